//! What the guest does.

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SIZE};
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::{Machine, Word};
use entresol_mmu::{Abort, Maintenance, Outcome, Reason};
use entresol_table::{Entry, Leaf};

use super::{CPU, Subject};
use crate::input::Input;
use crate::reference::Behind;

/// Traps that one access may take: tables, the page, logging, execution, age, the splitting of a block, a copy.
const TRAPS: usize = 12;

/// How an access ended.
enum Ended {
    /// Through this translation.
    Done(Leaf),
    /// The core answered something else, which was judged.
    Answered,
}

pub(super) fn fault(gfn: u64, access: Access, cause: Cause) -> Fault {
    let gpa = Gpa::new(gfn * PAGE_SIZE + 8);
    Fault { gpa, access, cause, stage1_walk: false, cache_maintenance: false, transfer: None, syndrome: 0x93 }
}

impl Subject<'_> {
    pub(super) fn load(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let gfn = self.gfn(input);
        let Ended::Done(leaf) = self.access(gfn, Access::Read)? else { return Ok(()) };
        self.read_back(gfn, leaf)
    }

    pub(super) fn fetch(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let gfn = self.gfn(input);
        let Ended::Done(leaf) = self.access(gfn, Access::Fetch)? else { return Ok(()) };
        self.read_back(gfn, leaf)
    }

    pub(super) fn store(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let (gfn, value) = (self.gfn(input), u64::from(input.byte()) + 1);
        let Ended::Done(leaf) = self.access(gfn, Access::Write)? else { return Ok(()) };
        if self.is_memory(gfn) {
            self.host.machine.store(Word::new(leaf.frame_of(Gfn::new(gfn)), 0), value);
        }
        self.reference.write(gfn, value);
        Ok(())
    }

    fn is_memory(&self, gfn: u64) -> bool {
        self.behind(gfn).is_some_and(|behind| behind != Behind::Device)
    }

    fn behind(&self, gfn: u64) -> Option<Behind> {
        let (_, slot) = self.reference.at(gfn)?;
        self.reference.object(slot.object).map(|object| object.behind)
    }

    /// The guest reads what was put there (INV-11).
    fn read_back(&self, gfn: u64, leaf: Leaf) -> Result<(), String> {
        let Some((_, slot)) = self.reference.at(gfn).filter(|_| self.is_memory(gfn)) else { return Ok(()) };
        let found = self.host.machine.load(Word::new(leaf.frame_of(Gfn::new(gfn)), 0));
        let expected = self.reference.word(slot.object, slot.behind(gfn));
        if found == expected { Ok(()) } else { Err(format!("INV-11: {gfn:#x} reads {found:#x}, not {expected:#x}")) }
    }

    /// Makes an access until it is done or refused, as a vCPU does (INV-15).
    fn access(&mut self, gfn: u64, access: Access) -> Result<Ended, String> {
        for _ in 0..TRAPS {
            let walk = self.vm.table().walk(&self.host.machine, Gfn::new(gfn)).ok_or("outside the address space")?;
            let cause = match walk.entry {
                Entry::Leaf(leaf) => {
                    let permitted = match access {
                        Access::Read => leaf.permissions.read,
                        Access::Write => leaf.permissions.write,
                        Access::Fetch => leaf.permissions.execute,
                    };
                    match (permitted, leaf.young) {
                        (true, true) => return Ok(Ended::Done(leaf)),
                        (true, false) => Cause::AccessFlag,
                        (false, _) => Cause::Permission { level: walk.level },
                    }
                }
                _ => Cause::Translation,
            };
            let waiting = self.host.pool.deferred_frames();
            let outcome = self.vm.handle(&self.host.epoch.pin(CPU), &self.hint, &fault(gfn, access, cause));
            self.feedback.note(200 + number(outcome));
            let outcome = match outcome {
                Outcome::Unshare => match self.vm.unshare(CPU, Gpa::new(gfn * PAGE_SIZE)) {
                    Outcome::Retry => continue,
                    other => other,
                },
                other => other,
            };
            // Memory was out, and frames came back: the next trap will do.
            let reaped = outcome == Outcome::Retry && self.host.pool.deferred_frames() < waiting;
            if outcome != Outcome::Resume && !reaped {
                return self.answered(gfn, access, outcome).map(|()| Ended::Answered);
            }
        }
        Err(format!("INV-15: {access:?} of {gfn:#x} is not done after {TRAPS} traps"))
    }

    /// Whether the reference agrees with an answer that is not "again".
    fn answered(&self, gfn: u64, access: Access, outcome: Outcome) -> Result<(), String> {
        let behind = self.behind(gfn);
        let slot = self.reference.at(gfn).map(|(_, slot)| slot);
        let read_only = slot.is_some_and(|slot| slot.is_read_only()) || behind == Some(Behind::Rom);
        // A block around the page may be what is being invalidated.
        let around = GfnRange::new(Gfn::new(gfn & !511), 512).expect("a range");
        let right = match outcome {
            Outcome::Retry => self.is_excluded(around),
            Outcome::Mmio => access != Access::Fetch && (slot.is_none() || access == Access::Write && read_only),
            Outcome::Inject(Abort::External) => {
                access == Access::Fetch && (slot.is_none() || behind == Some(Behind::Device))
            }
            Outcome::Exit(Reason::OutOfMemory) => self.may_be_out(),
            _ => false,
        };
        if right { Ok(()) } else { Err(format!("{access:?} of {gfn:#x} in {slot:?}, {behind:?}: {outcome:?}")) }
    }

    /// Faults that are no plain access: page-table walks, what memory cannot do, addresses too large.
    pub(super) fn odd_fault(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let gfn = self.gfn(input);
        let access = input.one_of(&[Access::Read, Access::Write, Access::Fetch]);
        let cause = input.one_of(&[
            Cause::Translation,
            Cause::Permission { level: 3 },
            Cause::AccessFlag,
            Cause::UnsupportedAtomic,
            Cause::AddressSize,
            Cause::External,
            Cause::Other,
        ]);
        let (stage1_walk, cache_maintenance) = (input.bit(), input.bit());
        let beyond = input.one_of(&[0, 0, 0, 1 << 40, 1 << 44]);
        let plain = fault(gfn, access, cause);
        let gpa = Gpa::new(plain.gpa.get() | beyond);
        let odd = Fault { gpa, stage1_walk, cache_maintenance, ..plain };
        let outcome = self.vm.handle(&self.host.epoch.pin(CPU), &self.hint, &odd);
        self.feedback.note(300 + number(outcome));
        let expected = match cause {
            Cause::External => Some(Outcome::Inject(Abort::SystemError)),
            Cause::AddressSize => Some(Outcome::Inject(Abort::AddressSize)),
            Cause::UnsupportedAtomic => Some(Outcome::Inject(Abort::External)),
            Cause::Other => Some(Outcome::Exit(Reason::Unsupported { syndrome: 0x93 })),
            _ => None,
        };
        // What a fault of memory becomes is judged by the entries that it leaves.
        match expected {
            Some(expected) if outcome != expected => Err(format!("{odd:?} becomes {outcome:?}")),
            _ => Ok(()),
        }
    }

    /// Cache maintenance that traps has no effect that the guest's loads see.
    pub(super) fn maintain(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let gfn = self.gfn(input);
        let operation = input.one_of(&[
            Maintenance::Invalidate,
            Maintenance::Clean,
            Maintenance::CleanToUnification,
            Maintenance::Instructions,
        ]);
        let beyond = input.one_of(&[0, 0, 0, 1 << 40]);
        let gpa = Gpa::new((gfn * PAGE_SIZE) | beyond);
        let waiting = self.host.pool.deferred_frames();
        let outcome = self.vm.maintain(&self.host.epoch.pin(CPU), &self.hint, gpa, operation);
        self.feedback.note(400 + number(outcome));
        if input.bit() {
            self.vm.clean_all(CPU);
        }
        let right = match outcome {
            Outcome::Skip | Outcome::Inject(Abort::External) | Outcome::Unshare => true,
            Outcome::Retry => !self.invalidations.is_empty() || self.host.pool.deferred_frames() < waiting,
            Outcome::Exit(Reason::OutOfMemory) => self.may_be_out(),
            _ => false,
        };
        if right { Ok(()) } else { Err(format!("{operation:?} of {gpa:#x}: {outcome:?}")) }
    }
}

/// A number for the search: how an operation ended leads on to other code.
fn number(outcome: Outcome) -> u32 {
    match outcome {
        Outcome::Resume => 0,
        Outcome::Retry => 1,
        Outcome::Skip => 2,
        Outcome::Inject(Abort::External) => 3,
        Outcome::Inject(Abort::AddressSize) => 4,
        Outcome::Inject(Abort::SystemError) => 5,
        Outcome::Mmio => 6,
        Outcome::Exit(Reason::OutOfMemory) => 7,
        Outcome::Exit(Reason::Unsupported { .. }) => 8,
        Outcome::Exit(Reason::BadObject) => 9,
        Outcome::Exit(Reason::Malformed) => 13,
        Outcome::Unshare => 10,
        Outcome::Exit(Reason::Stored { .. }) => 11,
        Outcome::Exit(Reason::DirtyRingFull) => 12,
        Outcome::Exit(Reason::MemoryFault(_)) => 13,
    }
}
