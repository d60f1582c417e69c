//! What the hypervisor does on its own account, between two turns of vCPUs, on the boot CPU.
//!
//! Protocol: whoever has something for the hypervisor raises its bit; the boot CPU leaves the vCPU that it runs and does it
//! with no vCPU loaded and no grace period pinned, so it may wait for grace periods and for other CPUs to leave a VM. All
//! of it runs on one CPU, so it needs no order among itself.

use crate::arch::{self, cpu};
use entresol_sync::atomic::{AtomicU64, Ordering};

use crate::{console, control, host, merge, registry, service, store, swap};

/// The CPU that does it.
pub const CPU: usize = 0;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The console has input, or a guest has room for input.
    Console = 1 << 0,
    /// The control channel has moved.
    Control = 1 << 1,
    /// A virtual machine has come to its end.
    Lifecycle = 1 << 2,
    /// A fork has left tables to take apart.
    Reclaim = 1 << 3,
    /// The disk of the store has finished something, or a task of the store goes on.
    Store = 1 << 4,
    /// Its owner waits for equal pages to be merged.
    Merge = 1 << 5,
    /// A guest has called for a service that is not its vCPU's to carry out.
    Service = 1 << 6,
    /// The disk of swapped pages has finished something, a page is waited for, or memory is to be reclaimed.
    Swap = 1 << 7,
}

static PENDING: AtomicU64 = AtomicU64::new(0);

/// There is work.
pub fn raise(work: Work) {
    PENDING.fetch_or(work as u64, Ordering::SeqCst);
    if cpu::index() != CPU {
        arch::kick(CPU);
    }
}

/// The same for a vCPU that is to enter its guest again only when it is done, where its CPU is the one that does it.
pub fn raise_and_leave(work: Work) {
    raise(work);
    if cpu::index() == CPU {
        arch::kick(CPU);
    }
}

/// Whether CPU `cpu` should look after it now.
#[inline]
pub fn pending(cpu: usize) -> bool {
    cpu == CPU && PENDING.load(Ordering::SeqCst) != 0 || merge::is_due(cpu)
}

/// Deferred frames given back in one go.
const REAP: usize = 64;

/// Does what CPU `cpu` has to do.
pub fn run(cpu: usize) {
    let host = host::get();
    host.pool.reap(&host.epoch, cpu, REAP);
    if host.pool.dirty_frames() + host.pool.stuck_frames() != 0 {
        host.supply(cpu).scrub(REAP);
    }
    if cpu != CPU {
        return;
    }
    swap::look_at_pressure();
    let work = PENDING.swap(0, Ordering::SeqCst);
    let has = |kind: Work| work & kind as u64 != 0;
    if has(Work::Console) {
        console::pump();
    }
    if has(Work::Control) {
        control::serve();
    }
    if has(Work::Store) {
        store::serve();
    }
    if has(Work::Swap) {
        swap::serve();
    }
    if has(Work::Lifecycle) {
        registry::settle();
    }
    if has(Work::Merge) || merge::is_due(cpu) {
        merge::run(cpu);
    }
    if has(Work::Service) {
        service::carry_out();
    }
    // Never behind other work: a fork would make its parent wait for it.
    if has(Work::Reclaim) && (work != Work::Reclaim as u64 || !registry::reclaim(cpu)) {
        raise(Work::Reclaim);
    }
}
