//! What an owner asks.

use alloc::borrow::Cow;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::fields::Fields;
use super::{Bytes, Code, Dirty, Error, Response};
use crate::Refusal;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// Comes back in the response; below [`ID_LIMIT`](super::ID_LIMIT).
    pub id: u64,
    /// What is asked.
    pub op: Op<'a>,
}

/// A slot that shows a virtual machine's memory at another address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Alias {
    /// Its number, 16 to 59; the others are the slots that the machine started with.
    pub number: u32,
    /// First guest physical address.
    pub base: u64,
    /// Bytes; 0 deletes it.
    pub size: u64,
    /// The memory's byte behind the first.
    pub offset: u64,
    /// Stores do not go through it.
    pub read_only: bool,
}

/// What can be asked. `vm` names the virtual machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op<'a> {
    /// Who is there? Starts a session.
    Hello,
    /// Every virtual machine and its state.
    Ps,
    /// Counters.
    Stats {
        /// Of whom.
        vm: Cow<'a, str>,
    },
    /// Memory slots.
    Slots {
        /// Of whom.
        vm: Cow<'a, str>,
        /// The first slot number that is wanted.
        from: u32,
    },
    /// Makes a slot that shows its memory a second time, or moves or deletes the one of that number.
    SetSlot {
        /// Whose.
        vm: Cow<'a, str>,
        /// The slot as it shall be.
        slot: Alias,
    },
    /// Takes what it posted: coalesced writes, doorbells.
    Posted {
        /// Who.
        vm: Cow<'a, str>,
    },
    /// Its balloon shall have so much of its memory.
    Balloon {
        /// Whose.
        vm: Cow<'a, str>,
        /// Bytes: whole pages.
        size: u64,
    },
    /// Whether exactly what should be is in the hypervisor's own mapping.
    Audit,
    /// Reads a page of it as a stray access of the hypervisor would.
    Probe {
        /// Whose.
        vm: Cow<'a, str>,
        /// A guest physical address in the page.
        address: u64,
    },
    /// The frame behind a page of it is bad: it is taken from everybody, and never used again.
    Poison {
        /// Whose.
        vm: Cow<'a, str>,
        /// A guest physical address in the page.
        gpa: u64,
    },
    /// So much of its memory shall leave for the swap device. Answered with the bytes that left, when no more do.
    Reclaim {
        /// Whose.
        vm: Cow<'a, str>,
        /// Bytes: whole pages.
        size: u64,
    },
    /// The swap device is not to be used any more. Answered when all that was there is back, with the bytes that were read.
    SwapOff,
    /// It is to be used again. Answered with the bytes that it has room for.
    SwapOn,
    /// Reads the allocation tags of pages.
    ReadTags {
        /// Whose.
        vm: Cow<'a, str>,
        /// The first page.
        gpa: u64,
        /// Bytes of memory: whole pages, at most [`TAGGED_PER_ANSWER`](super::TAGGED_PER_ANSWER).
        size: u64,
    },
    /// Gives pages these allocation tags.
    WriteTags {
        /// Whose.
        vm: Cow<'a, str>,
        /// The first page.
        gpa: u64,
        /// A byte, 0 to 15, for each 16 bytes of memory: of whole pages, as many as are read at once.
        tags: Bytes<'a>,
    },
    /// Its vCPUs stop running.
    Pause {
        /// Whose.
        vm: Cow<'a, str>,
    },
    /// They run again, or for the first time.
    Resume {
        /// Whose.
        vm: Cow<'a, str>,
    },
    /// It stops for good and gives its memory back.
    Kill {
        /// Who.
        vm: Cow<'a, str>,
    },
    /// Makes copies of it that go on where it is.
    Fork {
        /// Of whom.
        vm: Cow<'a, str>,
        /// What the copy is called.
        name: Cow<'a, str>,
        /// So many copies, called `name`-1 and so on.
        count: Option<u32>,
    },
    /// Asks which pages it wrote.
    Dirty {
        /// Who.
        vm: Cow<'a, str>,
        /// What is asked.
        what: Dirty<'a>,
    },
    /// How many entries of the second stage were used since it was asked last.
    Young {
        /// Whose.
        vm: Cow<'a, str>,
        /// First guest physical address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// How far merging equal pages is.
    Merge {
        /// So many rounds shall be made at once.
        rounds: Option<u32>,
    },
    /// Attaches its console.
    Console {
        /// Whose.
        vm: Cow<'a, str>,
    },
    /// Detaches the console.
    Detach,
    /// Bytes for the attached console.
    Input {
        /// Who must be attached.
        vm: Cow<'a, str>,
        /// At most [`CONSOLE_CHUNK`](super::CONSOLE_CHUNK) bytes.
        data: Bytes<'a>,
    },
    /// Writes it, as it is at one moment, into a file of the store.
    Snapshot {
        /// Whom.
        vm: Cow<'a, str>,
        /// The file's name.
        file: Cow<'a, str>,
        /// The file that this one is to be the difference to.
        base: Option<Cow<'a, str>>,
    },
    /// Makes a machine from a file of the store.
    Restore {
        /// The file's name.
        file: Cow<'a, str>,
        /// The machine's, if not as it was called.
        name: Option<Cow<'a, str>>,
    },
    /// What is in the store.
    Files,
    /// Takes a file out of the store.
    RemoveFile {
        /// Its name.
        file: Cow<'a, str>,
    },
    /// Everything stops and the outer machine powers off.
    Shutdown,
}

/// A line that is no request: who to tell, and what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// The id, if it could be read.
    pub id: Option<u64>,
    /// What is wrong.
    pub error: Error,
}

impl From<Malformed> for Response<'static> {
    fn from(malformed: Malformed) -> Self {
        Self { id: malformed.id, result: Err(malformed.error) }
    }
}

impl<'a> Op<'a> {
    /// Its name in a request.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Ps => "ps",
            Self::Stats { .. } => "stats",
            Self::Slots { .. } => "slots",
            Self::SetSlot { .. } => "set-slot",
            Self::Posted { .. } => "posted",
            Self::Balloon { .. } => "balloon",
            Self::Audit => "audit",
            Self::Probe { .. } => "probe",
            Self::Poison { .. } => "poison",
            Self::Reclaim { .. } => "reclaim",
            Self::SwapOff => "swap-off",
            Self::SwapOn => "swap-on",
            Self::ReadTags { .. } => "tags-read",
            Self::WriteTags { .. } => "tags-write",
            Self::Pause { .. } => "pause",
            Self::Resume { .. } => "resume",
            Self::Kill { .. } => "kill",
            Self::Fork { .. } => "fork",
            Self::Dirty { what, .. } => what.name(),
            Self::Young { .. } => "young",
            Self::Merge { .. } => "merge",
            Self::Console { .. } => "console",
            Self::Detach => "detach",
            Self::Input { .. } => "input",
            Self::Snapshot { .. } => "snapshot",
            Self::Restore { .. } => "restore",
            Self::Files => "files",
            Self::RemoveFile { .. } => "remove-file",
            Self::Shutdown => "shutdown",
        }
    }

    /// The virtual machine that it is about, if it is about one.
    pub fn vm(&self) -> Option<&str> {
        match self {
            Self::Hello
            | Self::Ps
            | Self::Merge { .. }
            | Self::Audit
            | Self::SwapOff
            | Self::SwapOn
            | Self::Detach
            | Self::Restore { .. }
            | Self::Files
            | Self::RemoveFile { .. }
            | Self::Shutdown => None,
            Self::Stats { vm }
            | Self::Slots { vm, .. }
            | Self::SetSlot { vm, .. }
            | Self::Posted { vm }
            | Self::Balloon { vm, .. }
            | Self::Probe { vm, .. }
            | Self::Poison { vm, .. }
            | Self::Reclaim { vm, .. }
            | Self::ReadTags { vm, .. }
            | Self::WriteTags { vm, .. }
            | Self::Pause { vm }
            | Self::Resume { vm }
            | Self::Kill { vm }
            | Self::Fork { vm, .. }
            | Self::Snapshot { vm, .. }
            | Self::Dirty { vm, .. }
            | Self::Young { vm, .. }
            | Self::Console { vm }
            | Self::Input { vm, .. } => Some(vm),
        }
    }

    /// The operation called `name`, with what it needs taken out of `fields`.
    fn take(name: &str, fields: &mut Fields<'a>) -> Result<Self, Error> {
        Ok(match name {
            "hello" => Self::Hello,
            "ps" => Self::Ps,
            "stats" => Self::Stats { vm: fields.text("vm")? },
            "slots" => Self::Slots { vm: fields.text("vm")?, from: fields.number_or_zero("from")? },
            "set-slot" => Self::SetSlot {
                vm: fields.text("vm")?,
                slot: Alias {
                    number: fields.number_or_zero("slot")?,
                    base: fields.number("base")?,
                    size: fields.number("size")?,
                    offset: fields.number("offset")?,
                    read_only: fields.flag("read_only")?,
                },
            },
            "posted" => Self::Posted { vm: fields.text("vm")? },
            "balloon" => Self::Balloon { vm: fields.text("vm")?, size: fields.number("size")? },
            "audit" => Self::Audit,
            "probe" => Self::Probe { vm: fields.text("vm")?, address: fields.number("address")? },
            "poison" => Self::Poison { vm: fields.text("vm")?, gpa: fields.number("gpa")? },
            "reclaim" => Self::Reclaim { vm: fields.text("vm")?, size: fields.number("size")? },
            "swap-off" => Self::SwapOff,
            "swap-on" => Self::SwapOn,
            "tags-read" => {
                Self::ReadTags { vm: fields.text("vm")?, gpa: fields.number("gpa")?, size: fields.number("size")? }
            }
            "tags-write" => {
                Self::WriteTags { vm: fields.text("vm")?, gpa: fields.number("gpa")?, tags: fields.bytes("tags")? }
            }
            "pause" => Self::Pause { vm: fields.text("vm")? },
            "resume" => Self::Resume { vm: fields.text("vm")? },
            "kill" => Self::Kill { vm: fields.text("vm")? },
            "fork" => {
                Self::Fork { vm: fields.text("vm")?, name: fields.text("name")?, count: fields.small_number("count")? }
            }
            "young" => {
                Self::Young { vm: fields.text("vm")?, base: fields.number("base")?, size: fields.number("size")? }
            }
            "merge" => Self::Merge { rounds: fields.small_number("rounds")? },
            "console" => Self::Console { vm: fields.text("vm")? },
            "detach" => Self::Detach,
            "input" => Self::Input { vm: fields.text("vm")?, data: fields.bytes("data")? },
            "snapshot" => Self::Snapshot {
                vm: fields.text("vm")?,
                file: fields.text("file")?,
                base: fields.optional_text("base")?,
            },
            "restore" => Self::Restore { file: fields.text("file")?, name: fields.optional_text("name")? },
            "files" => Self::Files,
            "remove-file" => Self::RemoveFile { file: fields.text("file")? },
            "shutdown" => Self::Shutdown,
            unknown => {
                if let Some(what) = Dirty::take(unknown, fields)? {
                    return Ok(Self::Dirty { vm: fields.text("vm")?, what });
                }
                let rule = "must be an operation that this hypervisor knows";
                return Err(Error::refused(Code::UnknownOp, Refusal::text("op", unknown, rule)));
            }
        })
    }
}

impl<'a> Request<'a> {
    /// Reads a line, without its newline.
    ///
    /// # Errors
    /// The first thing that is wrong, ready to be sent as a response.
    pub fn parse(line: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::parse(line).map_err(|error| Malformed { id: None, error })?;
        let id = fields.id().map_err(|error| Malformed { id: None, error })?;
        let op = fields.text("op").and_then(|name| Op::take(&name, &mut fields));
        let op = op.and_then(|op| fields.none_left(op.name()).map(|()| op));
        op.map(|op| Self { id, op }).map_err(|error| Malformed { id: Some(id), error })
    }
}

impl Serialize for Request<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("id", &self.id)?;
        map.serialize_entry("op", self.op.name())?;
        if let Some(vm) = self.op.vm() {
            map.serialize_entry("vm", vm)?;
        }
        match &self.op {
            Op::Slots { from, .. } if *from != 0 => map.serialize_entry("from", from)?,
            Op::SetSlot { slot, .. } => {
                map.serialize_entry("slot", &slot.number)?;
                map.serialize_entry("base", &slot.base)?;
                map.serialize_entry("size", &slot.size)?;
                map.serialize_entry("offset", &slot.offset)?;
                map.serialize_entry("read_only", &slot.read_only)?;
            }
            Op::Probe { address, .. } => map.serialize_entry("address", address)?,
            Op::Poison { gpa, .. } => map.serialize_entry("gpa", gpa)?,
            Op::Balloon { size, .. } | Op::Reclaim { size, .. } => map.serialize_entry("size", size)?,
            Op::ReadTags { gpa, size, .. } => {
                map.serialize_entry("gpa", gpa)?;
                map.serialize_entry("size", size)?;
            }
            Op::WriteTags { gpa, tags, .. } => {
                map.serialize_entry("gpa", gpa)?;
                map.serialize_entry("tags", tags)?;
            }
            Op::Fork { name, count, .. } => {
                map.serialize_entry("name", name)?;
                if let Some(count) = count {
                    map.serialize_entry("count", count)?;
                }
            }
            Op::Snapshot { file, base, .. } => {
                map.serialize_entry("file", file)?;
                if let Some(base) = base {
                    map.serialize_entry("base", base)?;
                }
            }
            Op::Restore { file, name } => {
                map.serialize_entry("file", file)?;
                if let Some(name) = name {
                    map.serialize_entry("name", name)?;
                }
            }
            Op::RemoveFile { file } => map.serialize_entry("file", file)?,
            Op::Dirty { what, .. } => what.entries(&mut map)?,
            Op::Young { base, size, .. } => {
                map.serialize_entry("base", base)?;
                map.serialize_entry("size", size)?;
            }
            Op::Merge { rounds: Some(rounds) } => map.serialize_entry("rounds", rounds)?,
            Op::Input { data, .. } => map.serialize_entry("data", data)?,
            _ => (),
        }
        map.end()
    }
}
