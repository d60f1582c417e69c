//! A virtual machine's memory as an owner writes it: a size, or a table that says more.

use alloc::string::String;
use core::cmp::Reverse;
use core::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// Whose memory leaves, and how much of it, when there is a disk for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes that it has in memory at most: what is more leaves.
    pub max: Option<u64>,
    /// Bytes that it keeps as long as others have more than theirs.
    pub low: u64,
    /// Memory is taken from virtual machines of a lower priority first.
    pub priority: u8,
}

/// How soon memory is taken from a virtual machine: from the greatest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Yields {
    /// It has more than it is to keep.
    above_low: bool,
    priority: Reverse<u8>,
    /// Bytes that it has, but for those it is to keep while it has more.
    pub bytes: u64,
}

impl Limits {
    /// How soon memory is taken from who has `resident` bytes. `None`: it has nothing.
    pub fn yields(&self, resident: u64) -> Option<Yields> {
        let above_low = resident > self.low;
        let bytes = if above_low { resident - self.low } else { resident };
        (bytes > 0).then_some(Yields { above_low, priority: Reverse(self.priority), bytes })
    }
}

/// See [`Limits::priority`].
pub const PRIORITY: u8 = 100;

impl Default for Limits {
    fn default() -> Self {
        Self { max: None, low: 0, priority: PRIORITY }
    }
}

use super::PrivateIo;

/// `memory = "512M"`, or `memory = { size = "512M", private = true, io = "bounce" }`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WrittenMemory {
    /// A size.
    pub size: String,
    /// Whether the hypervisor keeps it out of its own mapping; no if absent.
    pub private: bool,
    /// A size; no limit if absent. See [`Limits::max`].
    pub max: Option<String>,
    /// A size; nothing if absent. See [`Limits::low`].
    pub low: Option<String>,
    /// [`PRIORITY`] if absent. See [`Limits::priority`].
    pub priority: Option<i64>,
    /// How devices reach it then.
    pub io: PrivateIo,
}

impl From<String> for WrittenMemory {
    fn from(size: String) -> Self {
        Self { size, ..Self::default() }
    }
}

impl From<&str> for WrittenMemory {
    fn from(size: &str) -> Self {
        String::from(size).into()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    size: String,
    #[serde(default)]
    private: bool,
    max: Option<String>,
    low: Option<String>,
    priority: Option<i64>,
    #[serde(default)]
    io: PrivateIo,
}

/// Either shape; an error speaks of the one that was meant.
struct Shape;

impl<'de> Visitor<'de> for Shape {
    type Value = WrittenMemory;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size like \"512M\", or a table with `size`, and `private`, `io`, `max`, `low`, `priority`")
    }

    fn visit_str<E: de::Error>(self, size: &str) -> Result<WrittenMemory, E> {
        Ok(size.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<WrittenMemory, A::Error> {
        let Table { size, private, io, max, low, priority } = Table::deserialize(MapAccessDeserializer::new(map))?;
        Ok(WrittenMemory { size, private, io, max, low, priority })
    }
}

impl<'de> Deserialize<'de> for WrittenMemory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Shape)
    }
}
