//! A virtual machine's memory as an owner writes it: a size, or a table that says more.

use alloc::string::String;
use core::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// `memory = "512M"`, or `memory = { size = "512M", private = true }`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WrittenMemory {
    /// A size.
    pub size: String,
    /// Whether the hypervisor keeps it out of its own mapping; no if absent.
    pub private: bool,
}

impl From<String> for WrittenMemory {
    fn from(size: String) -> Self {
        Self { size, private: false }
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
}

/// Either shape; an error speaks of the one that was meant.
struct Shape;

impl<'de> Visitor<'de> for Shape {
    type Value = WrittenMemory;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size like \"512M\", or a table with `size` and `private`")
    }

    fn visit_str<E: de::Error>(self, size: &str) -> Result<WrittenMemory, E> {
        Ok(size.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<WrittenMemory, A::Error> {
        let Table { size, private } = Table::deserialize(MapAccessDeserializer::new(map))?;
        Ok(WrittenMemory { size, private })
    }
}

impl<'de> Deserialize<'de> for WrittenMemory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Shape)
    }
}
