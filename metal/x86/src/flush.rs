//! Which CPU has to forget translations of guests before it enters one.
//!
//! Purpose: no instruction of this architecture invalidates another CPU's translations. A CPU that runs the hypervisor uses none
//! of a guest's, so all that is needed is that each CPU flushes before its next entry, and that a CPU inside a guest comes out.
//!
//! Protocol: who changed tables counts [`Flushes::ask`] up. An entry announces itself first and looks at the count after, so that
//! of an entry and an asker at the same time one sees the other: the entry flushes, or the asker waits in [`Flushes::complete`]
//! until the CPU has come out. `kick` makes it come out.
//!
//! One address space identifier serves all guests of a CPU: another vCPU than the last one, or one that was elsewhere in between, is
//! a reason to flush too ([`Tenant`]).
//!
//! Invariants: INV-3 and INV-14 as far as they rest on translations that some CPU holds.
//!
//! Known holes: everything of all guests is flushed, as processors without flush-by-ASID do.

use entresol_sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A CPU as others see it.
struct Cpu {
    /// Between an entry's announcement and the exit's.
    inside: AtomicBool,
    /// The count at its last flush.
    seen: AtomicU64,
    /// The ticket of its last tenant.
    ticket: AtomicU64,
}

impl Cpu {
    const fn new() -> Self {
        Self { inside: AtomicBool::new(false), seen: AtomicU64::new(0), ticket: AtomicU64::new(0) }
    }
}

/// The flushes of `N` CPUs.
pub struct Flushes<const N: usize> {
    wanted: AtomicU64,
    cpus: [Cpu; N],
}

/// A vCPU, as far as translations that it left behind are concerned: the ticket of the CPU on which it ran last. That CPU has given
/// no other since, if nobody else was there; and the vCPU has none of another CPU, if it was not elsewhere.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tenant(u64);

/// Bits of a ticket that say whose it is.
const CPU_BITS: u32 = 8;

impl<const N: usize> Flushes<N> {
    /// Nobody is inside, nothing is cached.
    pub const fn new() -> Self {
        const { assert!(N <= 1 << CPU_BITS, "a ticket names its CPU") };
        Self { wanted: AtomicU64::new(1), cpus: [const { Cpu::new() }; N] }
    }

    /// CPU `cpu` is about to run `tenant`; says whether it flushes first.
    #[inline]
    #[must_use = "translations that are not flushed are used"]
    pub fn enter(&self, cpu: usize, tenant: &mut Tenant) -> bool {
        let own = &self.cpus[cpu];
        // Announced before the count is read: a swap is a full barrier. One CPU alone has nobody to tell.
        if N > 1 {
            own.inside.swap(true, Ordering::SeqCst);
        }
        let wanted = self.wanted.load(Ordering::SeqCst);
        if own.seen.load(Ordering::Relaxed) == wanted && own.ticket.load(Ordering::Relaxed) == tenant.0 {
            return false;
        }
        own.seen.store(wanted, Ordering::Release);
        tenant.0 = (((own.ticket.load(Ordering::Relaxed) >> CPU_BITS) + 1) << CPU_BITS) | cpu as u64;
        own.ticket.store(tenant.0, Ordering::Relaxed);
        true
    }

    /// It came back.
    #[inline]
    pub fn leave(&self, cpu: usize) {
        if N > 1 {
            self.cpus[cpu].inside.store(false, Ordering::Release);
        }
    }

    /// Everything that any CPU knows of guests' translations by now is to be forgotten.
    #[inline]
    pub fn ask(&self) {
        self.wanted.fetch_add(1, Ordering::SeqCst);
    }

    /// Waits, on CPU `own`, until nobody uses a translation that was to be forgotten before. `kick` makes a CPU come out of its guest,
    /// and is called once for each that is inside.
    #[inline]
    pub fn complete(&self, own: usize, kick: impl Fn(usize)) {
        let wanted = self.wanted.load(Ordering::SeqCst);
        for (index, cpu) in self.cpus.iter().enumerate().filter(|(index, _)| *index != own) {
            let stale = || cpu.inside.load(Ordering::SeqCst) && cpu.seen.load(Ordering::Acquire) < wanted;
            if stale() {
                kick(index);
            }
            while stale() {
                core::hint::spin_loop();
            }
        }
    }
}

impl<const N: usize> Default for Flushes<N> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;
    use std::sync::atomic::AtomicBool as Flag;

    #[test]
    fn a_cpu_flushes_once_for_what_was_asked() {
        let flushes = Flushes::<2>::new();
        let mut vcpu = Tenant::default();
        assert!(flushes.enter(0, &mut vcpu), "the first time");
        flushes.leave(0);
        assert!(!flushes.enter(0, &mut vcpu));
        flushes.leave(0);
        flushes.ask();
        flushes.ask();
        assert!(flushes.enter(0, &mut vcpu));
        flushes.leave(0);
        assert!(!flushes.enter(0, &mut vcpu));
    }

    #[test]
    fn another_vcpu_or_one_that_was_away_flushes() {
        let flushes = Flushes::<2>::new();
        let (mut one, mut two) = (Tenant::default(), Tenant::default());
        let run = |cpu, vcpu: &mut Tenant| {
            let flushed = flushes.enter(cpu, vcpu);
            flushes.leave(cpu);
            flushed
        };
        assert!(run(0, &mut one) && !run(0, &mut one));
        assert!(run(0, &mut two) && run(0, &mut one));
        assert!(run(1, &mut one), "it never ran here");
        assert!(run(0, &mut one), "what it invalidated there is still known here");
    }

    #[test]
    fn who_asks_waits_for_cpus_inside_and_no_others() {
        let flushes = Flushes::<3>::new();
        let mut vcpu = Tenant::default();
        let kicked = Cell::new(0);
        let kick = |cpu| {
            kicked.set(kicked.get() + 1);
            assert_eq!(cpu, 2);
            flushes.leave(cpu);
        };
        flushes.ask();
        flushes.complete(0, kick);
        assert_eq!(kicked.get(), 0, "nobody is inside");
        assert!(flushes.enter(2, &mut vcpu));
        flushes.complete(0, kick);
        assert_eq!(kicked.get(), 0, "it flushed on its way in");
        flushes.ask();
        flushes.complete(2, kick);
        assert_eq!(kicked.get(), 0, "who asks is not inside");
        flushes.complete(0, kick);
        assert_eq!(kicked.get(), 1);
    }

    #[test]
    fn no_guest_runs_on_what_was_forgotten() {
        // A "page" that is taken away: a guest that runs on a translation older than the last completed flush would see it.
        const ROUNDS: usize = 2_000;
        let flushes = Flushes::<2>::new();
        let (mapped, taken, stop) = (Flag::new(true), Flag::new(false), Flag::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut vcpu = Tenant::default();
                let mut cached = false;
                while !stop.load(Ordering::SeqCst) {
                    if flushes.enter(1, &mut vcpu) {
                        cached = false;
                    }
                    cached |= mapped.load(Ordering::SeqCst);
                    assert!(!(cached && taken.load(Ordering::SeqCst)), "a translation outlived its flush");
                    flushes.leave(1);
                }
            });
            for _ in 0..ROUNDS {
                mapped.store(false, Ordering::SeqCst);
                flushes.ask();
                flushes.complete(0, |_| ());
                taken.store(true, Ordering::SeqCst);
                taken.store(false, Ordering::SeqCst);
                mapped.store(true, Ordering::SeqCst);
            }
            stop.store(true, Ordering::SeqCst);
        });
    }
}
