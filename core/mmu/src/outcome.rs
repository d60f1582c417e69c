//! What the owner of a virtual machine is told about a fault (D11): exact reasons, no catch-all.

use entresol_backing::StoreSlot;

use crate::MemoryFault;

/// How a fault ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a fault that nobody acts on stops the guest"]
pub enum Outcome {
    /// The access can be made again.
    Resume,
    /// Something moved meanwhile: nothing was published; the access is made again and may fault again.
    Retry,
    /// The instruction has no effect here: step over it.
    Skip,
    /// The guest gets an exception.
    Inject(Abort),
    /// Nothing that the core owns lies there, or it is read-only: the owner emulates the access.
    Mmio,
    /// What is shared must be copied through the notifier, as [`crate::Switches::force_notifier`] asks: unpin, call
    /// [`crate::Vm::unshare`], and let the guest try again.
    Unshare,
    /// The core cannot go on; the owner decides.
    Exit(Reason),
}

/// Exceptions that the guest architecture has for accesses that fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    /// Synchronous external abort of the access: instruction or data abort by what the access was.
    External,
    /// Address size fault.
    AddressSize,
    /// Asynchronous system error.
    SystemError,
}

/// Why the core cannot go on. The guest's instruction has not been executed and may be tried again; where the reason does not
/// say otherwise, the fault was not handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No frame is free for a page or for a table.
    OutOfMemory,
    /// The hardware reports something that is no fault of memory.
    Unsupported {
        /// The raw syndrome.
        syndrome: u64,
    },
    /// The page is not in memory: whoever keeps the store fetches it ([`entresol_backing::Fetch`]). [`crate::Vm::absent`] says for
    /// which object and frame.
    Stored {
        /// The place that has it.
        slot: StoreSlot,
    },
    /// The access was of another kind than the page is: private, or shared with the hypervisor.
    MemoryFault(MemoryFault),
    /// A slot names an object that does not exist or ends before the slot does: the owner's mistake.
    BadObject,
    /// The tables hold a word that the hardware refuses and that nobody here wrote: something is broken. [`crate::Vm::way`] has
    /// the words.
    Malformed,
    /// The fault was handled; the vCPU's dirty ring is at its soft limit, and it is not to run before a reset.
    DirtyRingFull,
}
