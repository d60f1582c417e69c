//! Messages from the hypervisor, and how any message becomes a line.

use alloc::string::{String, ToString};

use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};

use super::{Answer, Error, Event, Request, Response};

/// A line from the hypervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// The response to a request.
    Response(Response<'a>),
    /// Something that happened.
    Event(Event<'a>),
}

/// A message that does not fit into the buffer it was to be written to. The buffer holds nothing useful.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the message is longer than {limit} bytes")]
pub struct TooLong {
    /// Bytes that the buffer has.
    pub limit: usize,
}

/// The keys of a message as they are read.
#[derive(Deserialize)]
struct Keys<'a> {
    id: Option<u64>,
    #[serde(borrow)]
    ok: Option<Answer<'a>>,
    error: Option<Error>,
    #[serde(borrow)]
    event: Option<Event<'a>>,
}

impl<'a> Message<'a> {
    /// Reads a line, without its newline.
    ///
    /// # Errors
    /// Why it is no message, for people.
    pub fn parse(line: &'a [u8]) -> Result<Self, String> {
        let keys: Keys<'a> = serde_json::from_slice(line).map_err(|error| error.to_string())?;
        match keys {
            Keys { ok: Some(answer), error: None, event: None, id } => {
                Ok(Self::Response(Response { id, result: Ok(answer) }))
            }
            Keys { ok: None, error: Some(error), event: None, id } => {
                Ok(Self::Response(Response { id, result: Err(error) }))
            }
            Keys { ok: None, error: None, event: Some(event), id: None } => Ok(Self::Event(event)),
            _ => Err("it has not exactly one of `ok`, `error` and `event`".to_string()),
        }
    }

    /// The same, borrowing nothing.
    pub fn into_owned(self) -> Message<'static> {
        match self {
            Self::Response(response) => Message::Response(response.into_owned()),
            Self::Event(event) => Message::Event(event.into_owned()),
        }
    }
}

impl Serialize for Message<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Response(response) => response.serialize(serializer),
            Self::Event(event) => {
                let mut object = serializer.serialize_struct("Event", 1)?;
                object.serialize_field("event", event)?;
                object.end()
            }
        }
    }
}

impl Serialize for Response<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("Response", 2)?;
        object.serialize_field("id", &self.id)?;
        match &self.result {
            Ok(answer) => object.serialize_field("ok", answer)?,
            Err(error) => object.serialize_field("error", error)?,
        }
        object.end()
    }
}

impl Request<'_> {
    /// Writes the request with its newline into `buffer`; gives the part that was written.
    ///
    /// # Errors
    /// It does not fit.
    pub fn encode<'b>(&self, buffer: &'b mut [u8]) -> Result<&'b [u8], TooLong> {
        line(self, buffer)
    }
}

impl Message<'_> {
    /// Writes the message with its newline into `buffer`; gives the part that was written. Takes no heap.
    ///
    /// # Errors
    /// It does not fit.
    pub fn encode<'b>(&self, buffer: &'b mut [u8]) -> Result<&'b [u8], TooLong> {
        line(self, buffer)
    }
}

fn line<'b>(message: &impl Serialize, buffer: &'b mut [u8]) -> Result<&'b [u8], TooLong> {
    let limit = buffer.len();
    // A full buffer is the writer's only error.
    let written = serde_json_core::to_slice(message, buffer).map_err(|_| TooLong { limit })?;
    *buffer.get_mut(written).ok_or(TooLong { limit })? = b'\n';
    Ok(&buffer[..=written])
}
