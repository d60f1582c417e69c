//! What a guest stored without waiting: its coalesced writes and its doorbells.

use alloc::vec::Vec;
use core::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Everything that was posted since it was asked for last: taking is asking.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Posted {
    /// Stores to zones of coalesced MMIO, oldest first; at most [`POSTED_WRITES`](super::POSTED_WRITES).
    pub writes: Vec<PostedWrite>,
    /// Every doorbell, in the order of the configuration.
    pub doorbells: Vec<Rings>,
}

/// A store to a zone of coalesced MMIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostedWrite {
    /// Guest physical address.
    pub address: u64,
    /// Bytes: 1, 2, 4 or 8.
    pub size: u32,
    /// What a little-endian device would have seen.
    pub value: Hex,
}

/// A doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rings {
    /// Guest physical address.
    pub address: u64,
    /// How often it rang.
    pub rings: u64,
}

/// A number as text, `0x…`: with 64 bits it is more than many readers of JSON numbers keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hex(pub u64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Hex;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number as text, like \"0x2a\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Hex, E> {
                let digits = text.strip_prefix("0x").filter(|digits| !digits.starts_with('+'));
                let number = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
                number.map(Hex).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_str(Text)
    }
}
