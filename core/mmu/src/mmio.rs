//! Accesses to what is no memory, without a look at the slots.
//!
//! Purpose: a device's address faults always, and most of such a fault's cost is to find out that no slot holds it. On a format
//! with MMIO entries (`entresol_table`) the first fault leaves one; the next is reported apart by the hardware, finds the
//! entry by a lock-free walk, and goes to the owner. What the vCPU found last it keeps in its [`MmioCache`], and does not even
//! walk. On other formats nothing of this is compiled.
//!
//! Protocol: [`Vm::handle_noting`] stands in the place of [`Vm::handle`] where the format has such entries, and
//! [`Vm::handle_refused`] takes the faults by an entry that the hardware refuses:
//!
//! | found, in this order | answer |
//! |---|---|
//! | the vCPU's cache knows the frame, of this generation | [`Outcome::Mmio`] |
//! | an MMIO entry of this generation, and no update in progress | the cache knows it from now on; [`Outcome::Mmio`] |
//! | an older one, or an update in progress | the whole way of a fault, which leaves a new one |
//! | a word that the hardware refuses and that is none | [`Reason::Malformed`], with [`Vm::way`] for the dump |
//! | anything else: another CPU has taken it away, or put memory there | [`Outcome::Retry`] |
//!
//! What an entry says is true as long as its generation is current: a slot is published with the mark of an update in progress, a
//! grace period passes, the generation moves. An entry made before says an older generation then; none is made and none counts
//! while the mark is set; whoever read the slots before it is in a pin that the update waits for. A slot that is being withdrawn
//! still holds its frames: the guest tries again until that is decided, and no entry is made over what is not unmapped yet.
//!
//! An entry holds a part of the generation. Before that part repeats, all entries are removed in an update of its own
//! ([`Slots::renumber`](entresol_slot::Slots::renumber)): none survives the crossing.
//!
//! Table pages for MMIO entries are the guest's to ask for, so there are few of them beyond those that memory needs
//! ([`TABLES_BEYOND`]); an access that finds none takes the whole way each time.
//!
//! Invariants: INV-8 as above; INV-9 with the rule of the crate's page that who answers looks again in its pin. Lock order: none
//! is taken. Allocation: table pages, out of which is no error.

use entresol_addr::Gfn;
use entresol_backing::Order;
use entresol_fault::{Cause, Fault};
use entresol_machine::Machine;
use entresol_slot::{Generation, Hint, MOST_PUBLICATIONS, Place};
use entresol_sync::{Pin, planted};
use entresol_table::{End, Format, LEAF_LEVEL, MapError, MmioEntry, Reserve, Way};

use crate::outcome::{Outcome, Reason};
use crate::vm::Vm;

/// A virtual machine that has more table pages than entries of memory, and so many, gets none for MMIO entries alone.
const TABLES_BEYOND: u64 = 64;

/// What one vCPU of one virtual machine found to be no memory last. Its own: no other CPU reads it.
#[derive(Debug, Default)]
pub struct MmioCache {
    kept: Option<(Gfn, Generation)>,
    counts: MmioCounts,
}

/// How a vCPU's accesses to what is no memory were answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MmioCounts {
    /// By the cache.
    pub cached: u64,
    /// By an MMIO entry.
    pub walked: u64,
    /// By the whole way of a fault, because the entry's generation was old, or an update was in progress.
    pub refreshed: u64,
    /// Entries made.
    pub made: u64,
}

impl MmioCache {
    /// Nothing found yet.
    pub const fn new() -> Self {
        Self { kept: None, counts: MmioCounts { cached: 0, walked: 0, refreshed: 0, made: 0 } }
    }

    /// What was counted so far.
    pub const fn counts(&self) -> MmioCounts {
        self.counts
    }

    /// Forgets what it knows: the vCPU's virtual machine is another one.
    pub fn forget(&mut self) {
        self.kept = None;
    }

    #[inline]
    fn knows(&self, gfn: Gfn, now: Generation) -> bool {
        self.kept == Some((gfn, now)) && !now.in_progress()
    }
}

/// Whether what was found out at a generation of which `stored` is kept is true `now`.
#[inline]
fn is_true<F: Format>(format: F, stored: u64, now: Generation) -> bool {
    let same = stored == stored_part(format, now.count());
    (same | planted!(ZC1)) & (!now.in_progress() | planted!(ZC8))
}

/// What an entry keeps of a generation.
#[inline]
fn stored_part<F: Format>(format: F, count: u64) -> u64 {
    count & ((1 << format.generation_bits()) - 1)
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// [`Vm::handle`], and an MMIO entry where it finds that there is no memory. `cache` is the vCPU's.
    #[inline]
    pub fn handle_noting(&self, pin: &Pin<'_>, hint: &Hint, cache: &mut MmioCache, fault: &Fault) -> Outcome {
        match self.handle(pin, hint, fault) {
            Outcome::Mmio => self.note(pin, cache, fault.gfn()),
            outcome => outcome,
        }
    }

    /// Handles a fault by an entry that the hardware refuses.
    #[inline(always)]
    pub fn handle_refused(&self, pin: &Pin<'_>, hint: &Hint, cache: &mut MmioCache, fault: &Fault) -> Outcome {
        let (gfn, now) = (fault.gfn(), self.slots.generation());
        // Code and tables of the guest's own are no device's business.
        let data = !fault.is_fetch() && !fault.stage1_walk;
        if data && cache.knows(gfn, now) {
            cache.counts.cached += 1;
            return self.refused(Outcome::Mmio);
        }
        let Some(way) = self.table.way(&self.host.machine, gfn) else {
            return self.look_again(pin, hint, cache, fault);
        };
        match way.end {
            End::Mmio(entry) if data && entry.gfn == gfn && is_true(self.table.format(), entry.generation, now) => {
                cache.counts.walked += 1;
                cache.kept = Some((gfn, now));
                self.refused(Outcome::Mmio)
            }
            End::Mmio(_) => self.look_again(pin, hint, cache, fault),
            End::Malformed => self.refused(Outcome::Exit(Reason::Malformed)),
            End::Entry(_) if planted!(ZC4) => self.refused(Outcome::Exit(Reason::Malformed)),
            End::Entry(_) => self.retry(),
        }
    }

    /// Whether there is no memory at `gfn`, by what the vCPU found there last: true until the end of the pin (INV-8, INV-9).
    #[inline]
    pub fn is_nothing(&self, _pin: &Pin<'_>, cache: &MmioCache, gfn: Gfn) -> bool {
        cache.knows(gfn, self.slots.generation())
    }

    /// The words of the tables on the way to `gfn`, as they are now; `None` if there can be none.
    pub fn way(&self, _pin: &Pin<'_>, gfn: Gfn) -> Option<Way> {
        self.table.way(&self.host.machine, gfn)
    }

    /// The whole way of a fault, as if nothing had been there.
    #[cold]
    fn look_again(&self, pin: &Pin<'_>, hint: &Hint, cache: &mut MmioCache, fault: &Fault) -> Outcome {
        cache.counts.refreshed += 1;
        self.handle_noting(pin, hint, cache, &Fault { cause: Cause::Translation, ..*fault })
    }

    /// The owner is to answer for `gfn`. Remembers that, if it is because no slot holds it.
    #[cold]
    fn note(&self, pin: &Pin<'_>, cache: &mut MmioCache, gfn: Gfn) -> Outcome {
        if self.table.format().generation_bits() == 0 {
            return Outcome::Mmio;
        }
        let generation = match self.slots.place(pin, gfn) {
            // Read-only memory, which is to be read without a fault.
            Place::Slot(_) => return Outcome::Mmio,
            Place::Leaving if planted!(ZC3) => self.slots.generation(),
            Place::Leaving => return self.retry(),
            Place::Nothing(generation) => generation,
        };
        if !generation.in_progress() {
            cache.kept = Some((gfn, generation));
            let entry = MmioEntry { gfn, generation: stored_part(self.table.format(), generation.count()) };
            cache.counts.made += u64::from(self.set_mmio(pin.cpu(), &entry));
        }
        Outcome::Mmio
    }

    /// Whether an MMIO entry was made. There is none if another CPU is changing something there, if no word can hold it, or for
    /// want of table pages: nothing is wrong without.
    fn set_mmio(&self, cpu: usize, entry: &MmioEntry) -> bool {
        let machine = &self.host.machine;
        let mut reserve = Reserve::new();
        let mut result = self.table.set_mmio(machine, entry, &mut reserve);
        if let Err(MapError::NoTable { needed }) = result
            && self.may_have_tables()
            && self.fill(cpu, &mut reserve, needed).is_ok()
        {
            result = self.table.set_mmio(machine, entry, &mut reserve);
        }
        while let Some(frame) = reserve.pop() {
            self.host.pool.give(cpu, frame, Order::PAGE);
        }
        result.is_ok()
    }

    /// Whether there may be more table pages than memory needs.
    fn may_have_tables(&self) -> bool {
        let census = self.census();
        let memory: u64 = census.leaves.iter().sum();
        census.tables + u64::from(LEAF_LEVEL) <= memory + TABLES_BEYOND
    }

    /// An update of the slots begins, and nobody else can begin one. If what entries keep of the generation would repeat, all
    /// entries go before. Not called by a pinned CPU.
    pub(crate) fn keep_generations_apart(&self, cpu: usize) {
        let bits = self.table.format().generation_bits();
        if bits == 0 {
            return;
        }
        let count = self.slots.generation().count();
        let round = ((count >> bits) + 1) << bits;
        if round - count > MOST_PUBLICATIONS {
            return;
        }
        self.slots.renumber(&self.host.epoch, round, || {
            if !planted!(ZC2) {
                let _pin = self.host.epoch.pin(cpu);
                self.table.clear_mmio(&self.host.machine, self.everything());
            }
        });
    }
}
