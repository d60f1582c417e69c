//! What translation caches may hold, as time.
//!
//! Purpose: a CPU may cache any valid entry at any moment while it runs under a VMID, and keep it until an invalidation
//! that covers it has completed (Arm DDI 0487 D8.16, D8.17). The model keeps no cache contents; it keeps *when* each
//! value stood in a word (`tables`), when each CPU ran under which VMID ([`Residence`]), and when each completed
//! invalidation began ([`Tlb::floor`]). A value may be cached exactly if these three overlap.
//!
//! - An invalidation counts from its completion, but only for what was overwritten before it began.
//! - One of a last-level entry leaves walk caches as they are.
//! - A CPU that has used the newer of two values does not go back to the older.

use entresol_addr::GfnRange;
use entresol_machine::{TlbOp, Vmid};
use entresol_table::level_of;

use super::linear::SHADOWS;

/// A moment: the number of the machine's last change.
pub type Stamp = u64;

/// Not yet.
pub const NEVER: Stamp = u64::MAX;

/// A time during which a CPU ran a virtual machine.
#[derive(Clone, Copy, Debug)]
pub struct Residence {
    /// Which CPU.
    pub cpu: usize,
    /// Under which VMID.
    pub vmid: Vmid,
    /// Which virtual machine.
    pub vm: usize,
    /// First moment.
    pub from: Stamp,
    /// First moment after, or [`NEVER`].
    pub until: Stamp,
}

/// Where an entry stands and for how long it stood there.
#[derive(Clone, Copy, Debug)]
pub struct Standing {
    /// Whose table.
    pub vm: usize,
    /// Level of the table, 0–3.
    pub level: u8,
    /// Guest frames behind the word.
    pub span: GfnRange,
    /// Whether it is a table entry, which only walk caches hold.
    pub table: bool,
    /// When it was stored.
    pub from: Stamp,
    /// When it was overwritten, or [`NEVER`].
    pub until: Stamp,
    /// When its table was cut off, if no walk can come to it any more: it stands there, and nobody finds it.
    pub cut: Option<Stamp>,
}

#[derive(Clone, Copy, Debug)]
struct Flush {
    op: TlbOp,
    began: Stamp,
}

/// All CPUs' translation caches.
#[derive(Debug, Default)]
pub struct Tlb {
    completed: Vec<Flush>,
    pending: Vec<(usize, Flush)>,
    residences: Vec<Residence>,
    /// (CPU, table, index) and when that CPU last used the newest value of the word.
    used: Vec<(usize, usize, u16, Stamp)>,
}

impl Tlb {
    /// `cpu` begins an invalidation.
    pub fn begin(&mut self, cpu: usize, op: TlbOp, began: Stamp) {
        self.pending.push((cpu, Flush { op, began }));
    }

    /// What `cpu` began has completed on every CPU.
    pub fn complete(&mut self, cpu: usize) {
        let completed = &mut self.completed;
        self.pending.retain(|(by, flush)| {
            if *by == cpu {
                completed.push(*flush);
            }
            *by != cpu
        });
    }

    /// `cpu` runs `vm` under `vmid` from now on.
    pub fn load(&mut self, cpu: usize, vm: usize, vmid: Vmid, now: Stamp) {
        self.residences.push(Residence { cpu, vmid, vm, from: now, until: NEVER });
    }

    /// `cpu` runs on the shadow tables `vm` under `vmid` from now on, and keeps nothing of any shadow tables from before.
    pub fn load_shadow(&mut self, cpu: usize, vm: usize, vmid: Vmid, now: Stamp) {
        self.residences.retain(|one| one.cpu != cpu || one.vmid != vmid || one.vm < SHADOWS);
        self.load(cpu, vm, vmid, now);
    }

    /// `cpu` runs no virtual machine from now on.
    pub fn put(&mut self, cpu: usize, now: Stamp) {
        for residence in self.residences.iter_mut().filter(|one| one.cpu == cpu && one.until == NEVER) {
            residence.until = now;
        }
    }

    /// Times that CPUs ran virtual machines.
    pub fn residences(&self) -> &[Residence] {
        &self.residences
    }

    /// When the last completed invalidation of everything under `vmid` began.
    pub fn floor_of_all(&self, vmid: Vmid) -> Stamp {
        let whole =
            self.completed.iter().filter(|flush| matches!(flush.op, TlbOp::All) || flush.op == TlbOp::Vmid(vmid));
        whole.map(|flush| flush.began).max().unwrap_or(0)
    }

    /// When the last completed invalidation began that covers the entry under `vmid`: what was overwritten before is in
    /// no cache any more.
    fn floor(&self, vmid: Vmid, entry: &Standing) -> Stamp {
        let covering = self.completed.iter().filter(|flush| covers(flush.op, vmid, entry));
        covering.map(|flush| flush.began).max().unwrap_or(0)
    }

    /// The same for invalidations that cover the way to the entry as well.
    fn floor_of_way(&self, vmid: Vmid, entry: &Standing) -> Stamp {
        let leaf_only = |op| matches!(op, TlbOp::Ipa { leaf_only: true, .. });
        let whole = self.completed.iter().filter(|flush| !leaf_only(flush.op) && covers(flush.op, vmid, entry));
        whole.map(|flush| flush.began).max().unwrap_or(0)
    }

    /// Whether a cache of `cpu` (of any CPU, for `None`) may hold the entry, under `vmid` if one is given.
    pub fn may_hold(&self, cpu: Option<usize>, vmid: Option<Vmid>, entry: &Standing) -> bool {
        let mut ran = self.residences.iter().filter(|one| {
            one.vm == entry.vm && cpu.is_none_or(|cpu| one.cpu == cpu) && vmid.is_none_or(|vmid| one.vmid == vmid)
        });
        ran.any(|one| {
            let from = one.from.max(entry.from).max(self.floor(one.vmid, entry));
            let gone = entry.cut.is_some_and(|cut| self.floor_of_way(one.vmid, entry) > cut);
            from < one.until.min(entry.until) && !gone
        })
    }

    /// `cpu` has used the newest value of a word.
    pub fn uses(&mut self, cpu: usize, table: usize, index: u16, now: Stamp) {
        match self.used.iter_mut().find(|(by, at, word, _)| (*by, *at, *word) == (cpu, table, index)) {
            Some((.., when)) => *when = now,
            None => self.used.push((cpu, table, index, now)),
        }
    }

    /// When `cpu` last used the newest value of a word.
    pub fn last_use(&self, cpu: usize, table: usize, index: u16) -> Stamp {
        let used = self.used.iter().find(|(by, at, word, _)| (*by, *at, *word) == (cpu, table, index));
        used.map_or(0, |(.., when)| *when)
    }
}

/// Whether `op`, once complete, leaves no cached copy of the entry under `vmid`.
fn covers(op: TlbOp, vmid: Vmid, entry: &Standing) -> bool {
    match op {
        // Their addresses are linear: no invalidation of guest frames is one of them.
        TlbOp::Range { .. } | TlbOp::Ipa { .. } if entry.vm >= SHADOWS => false,
        TlbOp::All => true,
        // The hypervisor's own translations are not a guest's.
        TlbOp::Own(_) => false,
        TlbOp::Vmid(whose) => whose == vmid,
        TlbOp::Range { vmid: whose, range } => whose == vmid && range.overlaps(entry.span),
        TlbOp::Ipa { vmid: whose, gfn, size, leaf_only } => {
            let level = level_of(size);
            let reached = if entry.table { !leaf_only && entry.level <= level } else { entry.level == level };
            whose == vmid && entry.span.contains(gfn) && reached
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_addr::{Gfn, PageSize};

    const VMID: Vmid = Vmid::new(1);

    fn page(from: Stamp, until: Stamp) -> Standing {
        Standing { vm: 0, level: 3, span: GfnRange::single(Gfn::new(5)), table: false, from, until, cut: None }
    }

    fn ipa(leaf_only: bool) -> TlbOp {
        TlbOp::Ipa { vmid: VMID, gfn: Gfn::new(5), size: PageSize::Size4K, leaf_only }
    }

    #[test]
    fn only_who_ran_meanwhile_can_have_cached_it() {
        let mut tlb = Tlb::default();
        tlb.load(0, 0, VMID, 10);
        tlb.put(0, 20);
        assert!(!tlb.may_hold(None, None, &page(1, 10)));
        assert!(tlb.may_hold(Some(0), Some(VMID), &page(1, 11)));
        assert!(!tlb.may_hold(Some(1), None, &page(1, 11)));
        assert!(!tlb.may_hold(None, None, &page(20, NEVER)));
    }

    #[test]
    fn an_invalidation_counts_when_complete_for_what_was_overwritten_before_it_began() {
        let mut tlb = Tlb::default();
        tlb.load(0, 0, VMID, 1);
        tlb.begin(1, ipa(true), 30);
        assert!(tlb.may_hold(None, None, &page(10, 20)));
        tlb.complete(0);
        assert!(tlb.may_hold(None, None, &page(10, 20)), "another CPU's barrier");
        tlb.complete(1);
        assert!(!tlb.may_hold(None, None, &page(10, 20)));
        assert!(tlb.may_hold(None, None, &page(10, 31)), "overwritten after it began");
    }

    #[test]
    fn what_hangs_from_a_table_that_was_cut_off_goes_with_the_next_flush_of_the_way_to_it() {
        let mut tlb = Tlb::default();
        tlb.load(0, 0, VMID, 1);
        let cut = Standing { cut: Some(20), ..page(10, NEVER) };
        for (op, began, holds) in [(ipa(true), 30, true), (TlbOp::Vmid(VMID), 19, true), (ipa(false), 30, false)] {
            tlb.begin(0, op, began);
            tlb.complete(0);
            assert_eq!(tlb.may_hold(None, None, &cut), holds, "{op:?} at {began}");
            assert!(tlb.may_hold(None, None, &page(10, NEVER)), "one that is not cut off is found again");
        }
    }

    #[test]
    fn walk_caches_outlive_a_last_level_invalidation() {
        let table =
            Standing { level: 2, table: true, span: GfnRange::block(Gfn::new(5), PageSize::Size2M), ..page(10, 20) };
        for (op, holds) in [
            (ipa(true), true),
            (ipa(false), false),
            (TlbOp::Range { vmid: VMID, range: GfnRange::single(Gfn::new(9)) }, false),
            (TlbOp::Vmid(Vmid::new(2)), true),
            (TlbOp::Vmid(VMID), false),
            (TlbOp::All, false),
        ] {
            let mut tlb = Tlb::default();
            tlb.load(0, 0, VMID, 1);
            tlb.begin(0, op, 30);
            tlb.complete(0);
            assert_eq!(tlb.may_hold(None, None, &table), holds, "{op:?}");
        }
    }
}
