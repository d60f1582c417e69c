//! Which CPU has to forget translations of guests before it enters one.
//!
//! Purpose: no instruction of this architecture invalidates another CPU's translations. A CPU that runs the hypervisor uses none
//! of a guest's, so all that is needed is that each CPU flushes before its next entry, and that a CPU inside a guest comes out.
//!
//! Protocol: who changed tables counts [`Flushes::ask`] up. An entry announces itself first, with the count up to which its CPU has
//! flushed, and looks at the count after. There is a full barrier between the two, and one between the counting and the look at the
//! announcements: of an entry and an asker at the same time one sees the other. The entry flushes, or the asker waits in
//! [`Flushes::complete`] until the CPU has come out. `kick` makes it come out. `tests/loom.rs` tries it.
//!
//! One address space identifier serves all guests of a CPU: another vCPU than the last one, or one that was elsewhere in between, is
//! a reason to flush too ([`Tenant`]), which is found when it comes to the CPU ([`Cpu::load`]) and not at each entry.
//!
//! Invariants: INV-3 and INV-14 as far as they rest on translations that some CPU holds.
//!
//! Known holes: everything of all guests is flushed, as processors without flush-by-ASID do; and whoever asks, a CPU inside any guest is
//! kicked.

use core::mem::offset_of;

use entresol_sync::atomic::{AtomicU64, Ordering, fence};
use entresol_sync::ordering;

use crate::boot::MAX_CPUS;

/// A CPU as others see it: in its block. On a line of its own, because they look at it while it enters and leaves.
#[repr(C, align(64))]
pub struct Cpu {
    /// Between an entry's announcement and the exit's: the count up to which it has flushed; else [`OUTSIDE`].
    state: AtomicU64,
    /// The count at its last flush; 0: it has to flush whatever was asked for.
    seen: AtomicU64,
    /// The ticket of its last tenant.
    ticket: AtomicU64,
}

/// No translation of a guest is used: later than any count.
pub const OUTSIDE: u64 = u64::MAX;

impl Cpu {
    /// Outside, and nothing is cached.
    pub const fn new() -> Self {
        Self { state: AtomicU64::new(OUTSIDE), seen: AtomicU64::new(0), ticket: AtomicU64::new(0) }
    }

    /// Where `state` is, for who stores [`OUTSIDE`] there by itself instead of calling [`Self::leave`].
    pub const STATE: usize = offset_of!(Self, state);

    /// It came back.
    #[inline]
    pub fn leave(&self) {
        self.state.store(OUTSIDE, ordering!(FlushLeave, Release, Relaxed));
    }

    /// Its tenant runs on other tables of its own from now on: its next entry flushes.
    pub fn forget(&self) {
        self.seen.store(0, Ordering::Relaxed);
    }

    /// `tenant` comes to this CPU, number `index`: its entries are the next there.
    pub fn load(&self, index: usize, tenant: &mut Tenant) {
        let last = self.ticket.load(Ordering::Relaxed);
        if last != tenant.0 || last == 0 {
            tenant.0 = ((last >> CPU_BITS) + 1) << CPU_BITS | index as u64;
            self.ticket.store(tenant.0, Ordering::Relaxed);
            self.seen.store(0, Ordering::Relaxed);
        }
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

/// What was asked of all CPUs.
pub struct Flushes {
    wanted: AtomicU64,
}

/// A vCPU, as far as translations that it left behind are concerned: the ticket of the CPU to which it came last. That CPU has given
/// no other since, if nobody else was there; and the vCPU has none of another CPU, if it was not elsewhere.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Tenant(u64);

/// Bits of a ticket that say whose it is.
const CPU_BITS: u32 = 8;

impl Flushes {
    /// Nobody is inside, nothing is cached.
    pub const fn new() -> Self {
        const { assert!(MAX_CPUS <= 1 << CPU_BITS, "a ticket names its CPU") };
        Self { wanted: AtomicU64::new(1) }
    }

    /// CPU `own` is about to enter its tenant; says whether it flushes first.
    #[inline(always)]
    #[must_use = "translations that are not flushed are used"]
    pub fn enter(&self, own: &Cpu) -> bool {
        let seen = own.seen.load(Ordering::Relaxed);
        own.state.store(seen, Ordering::Relaxed);
        fence(ordering!(FlushEnter, SeqCst, AcqRel));
        let wanted = self.wanted.load(Ordering::Acquire);
        if seen == wanted {
            return false;
        }
        own.seen.store(wanted, Ordering::Relaxed);
        own.state.store(wanted, Ordering::Release);
        true
    }

    /// Everything that any CPU knows of guests' translations by now is to be forgotten.
    #[inline]
    pub fn ask(&self) {
        self.wanted.fetch_add(1, Ordering::Release);
    }

    /// Waits until none of the `others`, all CPUs but the one that asks, uses a translation that was to be forgotten before. `kick` makes a
    /// CPU come out of its guest, and is called once for each that is inside; `turn` is what the CPU does while it waits.
    pub fn complete<'a>(&self, others: impl Iterator<Item = (usize, &'a Cpu)>, kick: impl Fn(usize), turn: impl Fn()) {
        fence(ordering!(FlushAsk, SeqCst, AcqRel));
        let wanted = self.wanted.load(Ordering::Relaxed);
        for (index, cpu) in others {
            let stale = || cpu.state.load(Ordering::Acquire) < wanted;
            if stale() {
                kick(index);
            }
            while stale() {
                turn();
            }
        }
    }
}

impl Default for Flushes {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;
    use std::sync::atomic::AtomicBool as Flag;

    /// Runs `tenant` on CPU `index` once; says whether the CPU flushed.
    fn run(flushes: &Flushes, cpus: &[Cpu], index: usize, tenant: &mut Tenant) -> bool {
        cpus[index].load(index, tenant);
        let flushed = flushes.enter(&cpus[index]);
        cpus[index].leave();
        flushed
    }

    fn others(cpus: &[Cpu], own: usize) -> impl Iterator<Item = (usize, &Cpu)> {
        cpus.iter().enumerate().filter(move |(index, _)| *index != own)
    }

    #[test]
    fn a_cpu_flushes_once_for_what_was_asked() {
        let (flushes, cpus, mut vcpu) = (Flushes::new(), [Cpu::new()], Tenant::default());
        assert!(run(&flushes, &cpus, 0, &mut vcpu), "the first time");
        assert!(!run(&flushes, &cpus, 0, &mut vcpu));
        flushes.ask();
        flushes.ask();
        assert!(run(&flushes, &cpus, 0, &mut vcpu));
        assert!(!run(&flushes, &cpus, 0, &mut vcpu));
    }

    #[test]
    fn another_vcpu_or_one_that_was_away_flushes() {
        let (flushes, cpus) = (Flushes::new(), [const { Cpu::new() }; 2]);
        let (mut one, mut two) = (Tenant::default(), Tenant::default());
        let run = |cpu, vcpu: &mut Tenant| run(&flushes, &cpus, cpu, vcpu);
        assert!(run(0, &mut one) && !run(0, &mut one));
        assert!(run(0, &mut two) && run(0, &mut one));
        assert!(run(1, &mut one), "it never ran here");
        assert!(run(0, &mut one), "what it invalidated there is still known here");
    }

    #[test]
    fn who_asks_waits_for_cpus_inside_and_no_others() {
        let (flushes, cpus) = (Flushes::new(), [const { Cpu::new() }; 3]);
        cpus[2].load(2, &mut Tenant::default());
        let kicked = Cell::new(0);
        let complete = |own| {
            let kick = |cpu: usize| {
                kicked.set(kicked.get() + 1);
                assert_eq!(cpu, 2);
                cpus[cpu].leave();
            };
            flushes.complete(others(&cpus, own), kick, || ());
            kicked.get()
        };
        flushes.ask();
        assert_eq!(complete(0), 0, "nobody is inside");
        assert!(flushes.enter(&cpus[2]));
        assert_eq!(complete(0), 0, "it flushed on its way in");
        flushes.ask();
        assert_eq!(complete(2), 0, "who asks is not inside");
        assert_eq!(complete(0), 1);
    }

    #[test]
    fn no_guest_runs_on_what_was_forgotten() {
        // A "page" that is taken away: a guest that runs on a translation older than the last completed flush would see it.
        const ROUNDS: usize = 2_000;
        let (flushes, cpus) = (Flushes::new(), [const { Cpu::new() }; 2]);
        let (mapped, taken, stop) = (Flag::new(true), Flag::new(false), Flag::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                cpus[1].load(1, &mut Tenant::default());
                let mut cached = false;
                while !stop.load(Ordering::SeqCst) {
                    if flushes.enter(&cpus[1]) {
                        cached = false;
                    }
                    cached |= mapped.load(Ordering::SeqCst);
                    assert!(!(cached && taken.load(Ordering::SeqCst)), "a translation outlived its flush");
                    cpus[1].leave();
                }
            });
            for _ in 0..ROUNDS {
                mapped.store(false, Ordering::SeqCst);
                flushes.ask();
                flushes.complete(others(&cpus, 0), |_| (), std::thread::yield_now);
                taken.store(true, Ordering::SeqCst);
                taken.store(false, Ordering::SeqCst);
                mapped.store(true, Ordering::SeqCst);
            }
            stop.store(true, Ordering::SeqCst);
        });
    }
}
