//! The keys of a request, so that a mistake in any of them can be told by name.
//!
//! An operation takes the fields that it knows; what is left then is a mistake. Values that no operation knows are
//! skipped without being built, however deep they are.

use alloc::borrow::Cow;
use alloc::format;
use alloc::string::ToString;
use alloc::vec::Vec;
use core::fmt;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{Bytes, CONSOLE_CHUNK, Code, Error, ID_LIMIT};
use crate::Refusal;

/// Most keys in a request; no operation has as many.
const MAX_KEYS: usize = 16;

/// What was written and not yet taken.
#[derive(Debug)]
pub(super) struct Fields<'a>(Vec<(Cow<'a, str>, Scalar<'a>)>);

/// A value as far as an operation could want it.
#[derive(Debug)]
enum Scalar<'a> {
    Text(Cow<'a, str>),
    Number(u64),
    Flag(bool),
    /// Some other kind, by its name.
    Other(&'static str),
}

impl<'a> Fields<'a> {
    pub fn parse(line: &'a [u8]) -> Result<Self, Error> {
        let mut reader = serde_json::Deserializer::from_slice(line);
        let fields = reader.deserialize_map(Object).and_then(|fields| reader.end().map(|()| fields));
        let fields = fields.map_err(|error| Error::new(Code::Malformed, format!("not a request: {error}")))?;
        for (index, (key, _)) in fields.iter().enumerate() {
            if fields[..index].iter().any(|(earlier, _)| earlier == key) {
                return Err(bad(key, "given twice", "must be given once"));
            }
        }
        Ok(Self(fields))
    }

    pub fn id(&mut self) -> Result<u64, Error> {
        let rule = "must be a whole number below 2^53";
        match self.take("id") {
            Some(Scalar::Number(id)) if id < ID_LIMIT => Ok(id),
            other => Err(bad("id", shown(other.as_ref()), rule)),
        }
    }

    pub fn text(&mut self, key: &str) -> Result<Cow<'a, str>, Error> {
        match self.take(key) {
            Some(Scalar::Text(text)) => Ok(text),
            other => Err(bad(key, shown(other.as_ref()), "must be a text")),
        }
    }

    /// A text, if it is there.
    pub fn optional_text(&mut self, key: &str) -> Result<Option<Cow<'a, str>>, Error> {
        match self.take(key) {
            None => Ok(None),
            Some(Scalar::Text(text)) => Ok(Some(text)),
            other => Err(bad(key, shown(other.as_ref()), "must be a text")),
        }
    }

    pub fn number_or_zero(&mut self, key: &str) -> Result<u32, Error> {
        Ok(self.small_number(key)?.unwrap_or(0))
    }

    /// A number, if it is there.
    pub fn small_number(&mut self, key: &str) -> Result<Option<u32>, Error> {
        match self.take(key) {
            None => Ok(None),
            Some(Scalar::Number(number)) if u32::try_from(number).is_ok() => Ok(Some(number as u32)),
            other => Err(bad(key, shown(other.as_ref()), "must be a whole number below 2^32")),
        }
    }

    /// A number; 0 if it is not there.
    pub fn big_number_or_zero(&mut self, key: &str) -> Result<u64, Error> {
        if self.0.iter().any(|(name, _)| name == key) { self.number(key) } else { Ok(0) }
    }

    /// A number that must be there.
    pub fn number(&mut self, key: &str) -> Result<u64, Error> {
        match self.take(key) {
            Some(Scalar::Number(number)) if number < ID_LIMIT => Ok(number),
            other => Err(bad(key, shown(other.as_ref()), "must be a whole number below 2^53")),
        }
    }

    /// A flag; false if it is not there.
    pub fn flag(&mut self, key: &str) -> Result<bool, Error> {
        match self.take(key) {
            None => Ok(false),
            Some(Scalar::Flag(flag)) => Ok(flag),
            other => Err(bad(key, shown(other.as_ref()), "must be true or false")),
        }
    }

    pub fn bytes(&mut self, key: &str) -> Result<Bytes<'static>, Error> {
        let text = self.text(key)?;
        let bytes = Bytes::decode(&text).map_err(|error| bad(key, error, "must be base64 with padding"))?;
        if bytes.len() > CONSOLE_CHUNK {
            let value = format_args!("{} bytes", bytes.len());
            return Err(bad(key, value, &format!("must be at most {CONSOLE_CHUNK} bytes")));
        }
        Ok(Bytes(Cow::Owned(bytes)))
    }

    /// Everything was taken.
    pub fn none_left(&self, op: &str) -> Result<(), Error> {
        match self.0.first() {
            None => Ok(()),
            Some((key, value)) => Err(bad(key, shown(Some(value)), &format!("must be a field that {op:?} knows"))),
        }
    }

    fn take(&mut self, key: &str) -> Option<Scalar<'a>> {
        let index = self.0.iter().position(|(name, _)| name == key)?;
        Some(self.0.swap_remove(index).1)
    }
}

fn bad(field: &str, value: impl fmt::Display, rule: &str) -> Error {
    Error::refused(Code::BadField, Refusal::new(field, value, rule))
}

/// A value as an error shows it.
fn shown(value: Option<&Scalar<'_>>) -> Cow<'static, str> {
    match value {
        None => "(missing)".into(),
        Some(Scalar::Text(text)) => format!("{text:?}").into(),
        Some(Scalar::Number(number)) => number.to_string().into(),
        Some(Scalar::Flag(flag)) => flag.to_string().into(),
        Some(Scalar::Other(kind)) => (*kind).into(),
    }
}

struct Object;

impl<'de> Visitor<'de> for Object {
    type Value = Vec<(Cow<'de, str>, Scalar<'de>)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Vec::new();
        while let Some(key) = map.next_key::<Key<'de>>()? {
            if fields.len() == MAX_KEYS {
                return Err(de::Error::custom(format_args!("more than {MAX_KEYS} keys")));
            }
            fields.push((key.0, map.next_value()?));
        }
        Ok(fields)
    }
}

/// A text that borrows from the line where it has no escapes.
struct Key<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Key<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Cow<'de, str>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Cow::Borrowed(text))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Cow::Owned(text.into()))
            }
        }
        deserializer.deserialize_str(Text).map(Key)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Scalar<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Scalar<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Scalar::Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Scalar::Text(Cow::Owned(text.into())))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
                Ok(Scalar::Number(number))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
                Ok(Scalar::Other("a negative number"))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
                Ok(Scalar::Other("a fraction"))
            }

            fn visit_bool<E>(self, flag: bool) -> Result<Self::Value, E> {
                Ok(Scalar::Flag(flag))
            }

            fn visit_unit<E>(self) -> Result<Self::Value, E> {
                Ok(Scalar::Other("null"))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other("a list"))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other("an object"))
            }
        }
        deserializer.deserialize_any(Any)
    }
}
