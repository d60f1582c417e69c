//! What the pipeline counted. Relaxed counters: each is exact, a set of them is not one moment.

use entresol_sync::atomic::Ordering;
use entresol_sync::tally::AtomicU64;

/// One event counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Zero.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// One more.
    #[inline]
    pub fn bump(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// `n` more.
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counters of one virtual machine.
#[derive(Debug, Default)]
pub struct Stats {
    /// Faults because no valid entry was there.
    pub translation: Counter,
    /// Faults because a valid entry did not permit the access.
    pub permission: Counter,
    /// Faults because an entry's access flag was clear.
    pub access_flag: Counter,
    /// Faults whose page the object had to make (zeroed).
    pub fresh: Counter,
    /// Faults whose page the object already had.
    pub populated: Counter,
    /// Faults that copied a page or block which relatives share, or took the zero page away.
    pub copied: Counter,
    /// Entries made around a fault on what is shared.
    pub around: Counter,
    /// Entries that a change from elsewhere installed.
    pub changed: Counter,
    /// Faults that lost to an invalidation, a slot update or another vCPU, and went round again.
    pub retry: Counter,
    /// Faults that found their work done.
    pub spurious: Counter,
    /// Accesses outside every slot, or stores to read-only memory, given to the VM's owner.
    pub outside: Counter,
    /// Faults on pages that are not in memory, but in a store.
    pub absent: Counter,
    /// Faults on pages whose frames are bad: each an abort in the guest.
    pub poisoned: Counter,
    /// Pages that left memory for a store.
    pub stored: Counter,
    /// Aborts put into the guest by the pipeline.
    pub injected: Counter,
    /// Pages of dirty logs that the owner took over and that were write-protected again.
    pub reprotected: Counter,
    /// Pages that a scan for equal ones has read.
    pub merge_scanned: Counter,
    /// Pages that are never written again, so that equal ones may join them.
    pub merge_offered: Counter,
    /// Pages that joined an equal one: each gave a frame back.
    pub merge_joined: Counter,
    /// Pages of zeros that became vacant: likewise.
    pub merge_vacated: Counter,
    /// Blocks that were broken up for that.
    pub merge_broken: Counter,
    /// Pages that were found to differ when they were compared.
    pub merge_differed: Counter,
    /// Frames of content that the guest gave back.
    pub discarded: Counter,
    /// Invalidations through the notifier.
    pub invalidations: Counter,
    /// TLB invalidations of one address.
    pub tlb_ipa: Counter,
    /// TLB invalidations of a range.
    pub tlb_range: Counter,
    /// TLB invalidations of a whole virtual machine.
    pub tlb_vmid: Counter,
}
