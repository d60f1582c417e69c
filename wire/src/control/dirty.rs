//! Which of its pages a virtual machine wrote: what is asked, and how pages are told.

use alloc::vec::Vec;

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize};

use super::fields::Fields;
use super::{Bytes, Error};

/// What is asked about one virtual machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dirty<'a> {
    /// Keeps a dirty log of every slot that the guest writes memory through.
    Start {
        /// Telling pages does not clear them: `dirty-clear` does.
        manual: bool,
        /// Blocks are split at once, not by the guest's writes.
        ahead: bool,
        /// Each vCPU has a ring of so many entries.
        ring: Option<u32>,
    },
    /// Ends the log.
    Stop,
    /// Dirty pages from here on.
    Get(PagePlace),
    /// Clears pages of one slot.
    Clear {
        /// The slot, and the page that bit 0 of byte 0 names: a multiple of 64.
        at: PagePlace,
        /// The pages that are cleared.
        bits: Bytes<'a>,
    },
    /// Takes what stands in the rings.
    Harvest,
    /// Marks this moment.
    Mark,
    /// Forgets the mark.
    Unmark,
    /// Pages from here on that were written since the mark.
    Since(PagePlace),
}

/// A page of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PagePlace {
    /// The slot's number.
    pub slot: u32,
    /// The page, from the slot's start.
    pub page: u64,
}

/// Pages that follow each other: slot, first page, how many. Three numbers in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun(pub u32, pub u64, pub u64);

/// Some pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// At most [`RUNS_PER_ANSWER`](super::RUNS_PER_ANSWER) runs.
    pub runs: Vec<PageRun>,
    /// Where to ask from for the rest, if there may be more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<PagePlace>,
}

impl<'a> Dirty<'a> {
    /// The operation's name in a request.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Start { .. } => "dirty-start",
            Self::Stop => "dirty-stop",
            Self::Get(_) => "dirty-get",
            Self::Clear { .. } => "dirty-clear",
            Self::Harvest => "dirty-harvest",
            Self::Mark => "dirty-mark",
            Self::Unmark => "dirty-unmark",
            Self::Since(_) => "dirty-since",
        }
    }

    /// The operation called `name`, if it is one of these.
    pub(super) fn take(name: &str, fields: &mut Fields<'a>) -> Result<Option<Self>, Error> {
        let place = |fields: &mut Fields<'a>| {
            Ok::<_, Error>(PagePlace { slot: fields.number_or_zero("slot")?, page: fields.big_number_or_zero("page")? })
        };
        Ok(Some(match name {
            "dirty-start" => Self::Start {
                manual: fields.flag("manual")?,
                ahead: fields.flag("ahead")?,
                ring: fields.small_number("ring")?,
            },
            "dirty-stop" => Self::Stop,
            "dirty-get" => Self::Get(place(fields)?),
            "dirty-clear" => Self::Clear { at: place(fields)?, bits: fields.bytes("bits")? },
            "dirty-harvest" => Self::Harvest,
            "dirty-mark" => Self::Mark,
            "dirty-unmark" => Self::Unmark,
            "dirty-since" => Self::Since(place(fields)?),
            _ => return Ok(None),
        }))
    }

    /// Writes what is not its name.
    pub(super) fn entries<M: SerializeMap>(&self, map: &mut M) -> Result<(), M::Error> {
        match self {
            Self::Start { manual, ahead, ring } => {
                map.serialize_entry("manual", manual)?;
                map.serialize_entry("ahead", ahead)?;
                if let Some(ring) = ring {
                    map.serialize_entry("ring", ring)?;
                }
            }
            Self::Get(place) | Self::Since(place) => {
                map.serialize_entry("slot", &place.slot)?;
                map.serialize_entry("page", &place.page)?;
            }
            Self::Clear { at, bits } => {
                map.serialize_entry("slot", &at.slot)?;
                map.serialize_entry("page", &at.page)?;
                map.serialize_entry("bits", bits)?;
            }
            Self::Stop | Self::Harvest | Self::Mark | Self::Unmark => {}
        }
        Ok(())
    }
}
