//! What is in the hypervisor's own mapping: audits and probes; and frames that are bad.

use serde::{Deserialize, Serialize};

/// What an audit of every frame and every memory object found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// Frames of guests and their tables.
    pub frames: u64,
    /// Of those, the ones set apart for private memory.
    pub private: u64,
    /// Private frames that are mapped because the hypervisor uses them.
    pub leased: u64,
    /// Private frames that are mapped because their guests share the pages with the hypervisor.
    #[serde(default)]
    pub open: u64,
    /// Private frames that are mapped because their removal failed, and is tried again.
    pub stuck: u64,
    /// Frames that are bad: never used again, and absent if they are private.
    #[serde(default)]
    pub poisoned: u64,
    /// Pages that private virtual machines have.
    pub pages: u64,
    /// Blocks of 2 MiB that are mapped as one.
    #[serde(default)]
    pub own_blocks: u64,
    /// Blocks of 2 MiB that are mapped page by page, as far as they are mapped: each has a table.
    #[serde(default)]
    pub own_tables: u64,
    /// Blocks of 2 MiB of which nothing is mapped.
    #[serde(default)]
    pub own_absent: u64,
    /// Frames that are mapped and should not be, or the reverse.
    pub wrong: u64,
    /// One of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub example: Option<u64>,
}

/// What a read of a guest's page by its machine address came to, as any code of the hypervisor might make it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// The frame behind the page.
    pub frame: u64,
    /// Whether it is private.
    pub private: bool,
    /// The fault; absent if the read went through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<ProbeFault>,
}

/// The fault of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeFault {
    /// ESR_EL2; on x86-64 the page fault's error code.
    pub syndrome: u64,
    /// FAR_EL2; on x86-64 CR2.
    pub address: u64,
}

/// A frame that is bad from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Poisoned {
    /// Its number.
    pub frame: u64,
    /// Whether it is private.
    pub private: bool,
}
