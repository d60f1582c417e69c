//! Under which VMID a translation is cached.

use entresol_machine::{Machine, TlbOp, Vmid};
use entresol_sync::atomic::fence;
use entresol_sync::{ordering, planted};

/// Tells the VMID that a table's guest runs under, each time anew.
///
/// A VMID can be replaced while a table operation is on its way (rollover). The table asks after the changed word is
/// visible and behind a full barrier; whoever gives a VM a new VMID stores it, puts a full barrier, and then lets the
/// guest run. So either the operation invalidates under the new VMID, or no translation of the old word was cached
/// under it.
pub trait VmidSource {
    /// The VMID now.
    fn vmid(&self) -> Vmid;

    /// `op` is about to be carried out: the words that it is for say by now what they will say after it. Whoever keeps translations
    /// of the guest's outside the hardware (shadow tables) drops the same ones before this returns.
    #[inline]
    fn forget<M: Machine>(&self, machine: &M, op: &TlbOp) {
        let (_, _) = (machine, op);
    }
}

/// For VMs whose VMID never changes.
impl VmidSource for Vmid {
    #[inline]
    fn vmid(&self) -> Vmid {
        *self
    }
}

impl<F: Fn() -> Vmid> VmidSource for F {
    #[inline]
    fn vmid(&self) -> Vmid {
        self()
    }
}

/// Invalidates and waits. Every word that the invalidation is for was changed before.
#[inline]
pub(crate) fn flush<M: Machine, V: VmidSource>(machine: &M, vmid: &V, op: impl FnOnce(Vmid) -> TlbOp) {
    fence(ordering!(TableFlush, SeqCst, AcqRel));
    let op = op(vmid.vmid());
    vmid.forget(machine, &op);
    carry_out(machine, op);
}

/// The same where a word permits more than it did: what is remembered of it outside the hardware permits less, and may stay.
// A logged write is counted in instructions.
#[inline(always)]
pub(crate) fn flush_narrower<M: Machine, V: VmidSource>(machine: &M, vmid: &V, op: impl FnOnce(Vmid) -> TlbOp) {
    fence(ordering!(TableFlush, SeqCst, AcqRel));
    carry_out(machine, op(vmid.vmid()));
}

#[inline(always)]
fn carry_out<M: Machine>(machine: &M, op: TlbOp) {
    machine.tlb(op);
    if !planted!(ZA7) {
        machine.complete();
    }
}
