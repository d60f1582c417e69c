//! Answers to requests, and refusals.

use alloc::borrow::Cow;
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

use super::{Audit, Bytes, Files, PROTOCOL, Pages, Poisoned, Posted, Probe, Stats};
use crate::Refusal;
use crate::refusal::shorten;

/// The answer to one request, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response<'a> {
    /// The request's id; `None` if the line had none that could be read.
    pub id: Option<u64>,
    /// How it went.
    pub result: Result<Answer<'a>, Error>,
}

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer<'a> {
    /// It is done; there is nothing to tell.
    Done,
    /// Who answers.
    #[serde(borrow)]
    Hello(Hello<'a>),
    /// Every virtual machine.
    #[serde(borrow)]
    Ps(Vec<VmRow<'a>>),
    /// Counters of one.
    #[serde(borrow)]
    Stats(Box<Stats<'a>>),
    /// Memory slots of one.
    #[serde(borrow)]
    Slots(SlotPage<'a>),
    /// What one posted.
    Posted(Posted),
    /// Pages that one wrote.
    Pages(Pages),
    /// How many pages were cleared, or entries were young.
    Count(u64),
    /// Tags, one byte for each 16 bytes of memory: of fewer pages than were asked for, if the next one cannot be read.
    Tags(Bytes<'a>),
    /// How far merging is.
    Merge(MergeStatus),
    /// What an audit found.
    Audit(Audit),
    /// What a probe met.
    Probe(Probe),
    /// Which frame is bad.
    Poisoned(Poisoned),
    /// How many bytes of input the guest's console took.
    Accepted(u32),
    /// What is in the store.
    #[serde(borrow)]
    Files(Files<'a>),
}

/// Who answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello<'a> {
    /// `entresol`.
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    /// The program's version.
    #[serde(borrow)]
    pub version: Cow<'a, str>,
    /// The protocol's version.
    pub protocol: u32,
}

impl Hello<'_> {
    /// What this build says of itself.
    pub const fn this() -> Self {
        Self { name: Cow::Borrowed("entresol"), version: Cow::Borrowed(env!("CARGO_PKG_VERSION")), protocol: PROTOCOL }
    }
}

/// One virtual machine in a list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRow<'a> {
    /// Name.
    #[serde(borrow)]
    pub name: Cow<'a, str>,
    /// What it does.
    pub state: State,
    /// Why it is paused, stopped or crashed.
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Cow<'a, str>>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Bytes of memory that it may have.
    pub memory: u64,
    /// Bytes of memory that it has.
    pub resident: u64,
}

/// How far the search for equal pages is, over all virtual machines that take part, and what it took since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MergeStatus {
    /// Virtual machines that take part.
    pub vms: u32,
    /// Rounds that were made.
    pub rounds: u64,
    /// Rounds that are still to be made at once.
    pub rounds_left: u32,
    /// Pages that it may read in a second when nobody waits for it; 0: none.
    pub pages_per_second: u32,
    /// Pages that were read.
    pub scanned: u64,
    /// Pages that gave their frames back: joined an equal one, or were zeros.
    pub given_back: u64,
    /// Time that the boot CPU spent on all of it, in nanoseconds.
    pub nanoseconds: u64,
    /// Frames that hold what is remembered for the search.
    pub held_frames: u64,
}

/// What a virtual machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its vCPUs run when there is work for them.
    Running,
    /// No vCPU runs until `resume`. Reasons: `NotStarted`, `Owner`, `OutOfMemory`, `CoalescedFull`, `DirtyRingFull`, `Storage`
    /// and those of the core's exits.
    Paused,
    /// It powered itself off or was killed; its memory is given back.
    Stopped,
    /// It did what its owner's policies do not allow to go on from.
    Crashed,
    /// A state that this reader does not know.
    #[serde(other)]
    Other,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
            Self::Other => "other",
        })
    }
}

/// Some of a virtual machine's memory slots, in the order of their numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotPage<'a> {
    /// At most [`SLOTS_PER_ANSWER`](super::SLOTS_PER_ANSWER) rows.
    #[serde(borrow)]
    pub rows: Vec<SlotRow<'a>>,
    /// The number to ask from for the rest, if there is more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u32>,
}

/// One memory slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRow<'a> {
    /// Its number.
    pub id: u32,
    /// First guest physical address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
    /// Number of the memory object behind it.
    pub object: u64,
    /// What kind of object that is: `anonymous`, `rom`, `device`.
    #[serde(borrow)]
    pub kind: Cow<'a, str>,
    /// Flags that are set, by name: `read-only`, `dirty-log`.
    #[serde(borrow)]
    pub flags: Vec<Cow<'a, str>>,
}

/// Why a request was refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// For programs.
    pub code: Code,
    /// For people; complete without the rest.
    pub message: String,
    /// The field that is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The value that stands there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// What must hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
}

/// Kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The line is not a JSON object.
    Malformed,
    /// The line is longer than [`MAX_LINE`](super::MAX_LINE).
    LineTooLong,
    /// A field is missing, unknown, twice there, or of the wrong kind.
    BadField,
    /// The operation is not known.
    UnknownOp,
    /// No virtual machine has that name.
    NoSuchVm,
    /// The virtual machine's state does not allow it.
    WrongState,
    /// A slot as it was asked for breaks a rule.
    SlotRefused,
    /// The console of that virtual machine is not attached.
    NotAttached,
    /// The hypervisor has not the memory for it.
    OutOfMemory,
    /// The store cannot be used, or was not changed.
    StoreFailed,
    /// The answer does not fit into a line.
    AnswerTooLong,
    /// A refusal that this reader does not know.
    #[serde(other)]
    Other,
}

impl Error {
    /// A refusal that is about no field. A long message loses its end.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: shorten(message.into()), field: None, value: None, rule: None }
    }

    /// A refusal of a field's value.
    pub fn refused(code: Code, refusal: Refusal) -> Self {
        let message = refusal.to_string();
        let Refusal { field, value, rule } = refusal;
        Self { code, message, field: Some(field), value: Some(value), rule: Some(rule) }
    }

    /// No virtual machine is called `name`.
    pub fn no_such_vm(name: &str) -> Self {
        Self::refused(Code::NoSuchVm, Refusal::text("vm", name, "must be the name of a virtual machine"))
    }
}

impl Response<'_> {
    /// The same, borrowing nothing.
    pub fn into_owned(self) -> Response<'static> {
        Response { id: self.id, result: self.result.map(Answer::into_owned) }
    }
}

impl Answer<'_> {
    /// The same, borrowing nothing.
    pub fn into_owned(self) -> Answer<'static> {
        match self {
            Self::Done => Answer::Done,
            Self::Hello(hello) => Answer::Hello(Hello {
                name: owned(hello.name),
                version: owned(hello.version),
                protocol: hello.protocol,
            }),
            Self::Ps(rows) => Answer::Ps(rows.into_iter().map(VmRow::into_owned).collect()),
            Self::Stats(stats) => Answer::Stats(Box::new(stats.into_owned())),
            Self::Slots(page) => Answer::Slots(SlotPage {
                rows: page.rows.into_iter().map(SlotRow::into_owned).collect(),
                next: page.next,
            }),
            Self::Posted(posted) => Answer::Posted(posted),
            Self::Pages(pages) => Answer::Pages(pages),
            Self::Count(count) => Answer::Count(count),
            Self::Tags(tags) => Answer::Tags(Bytes(Cow::Owned(tags.0.into_owned()))),
            Self::Merge(status) => Answer::Merge(status),
            Self::Audit(audit) => Answer::Audit(audit),
            Self::Probe(probe) => Answer::Probe(probe),
            Self::Poisoned(poisoned) => Answer::Poisoned(poisoned),
            Self::Accepted(bytes) => Answer::Accepted(bytes),
            Self::Files(files) => Answer::Files(files.into_owned()),
        }
    }
}

impl VmRow<'_> {
    fn into_owned(self) -> VmRow<'static> {
        VmRow { name: owned(self.name), reason: self.reason.map(owned), ..self }
    }
}

impl SlotRow<'_> {
    fn into_owned(self) -> SlotRow<'static> {
        SlotRow { kind: owned(self.kind), flags: self.flags.into_iter().map(owned).collect(), ..self }
    }
}

/// A text that borrows nothing.
pub(super) fn owned(text: Cow<'_, str>) -> Cow<'static, str> {
    Cow::Owned(text.into_owned())
}
