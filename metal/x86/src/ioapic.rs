//! I/O APICs: the inputs to which the machine's devices are wired.
//!
//! Purpose: every input is masked until someone enables it; then it interrupts the boot CPU.
//!
//! Protocol: [`IoApics::new`] over what ACPI names, then [`IoApics::set`]. Two registers, an index and a window, so one user at a
//! time: whoever owns the value.
//!
//! Sources: Intel 82093AA (registers, redirection table).
//!
//! Known holes: physical destinations are eight bits wide.

use arrayvec::ArrayVec;

use crate::boot::{IoApic, MAX_IO_APICS};

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
/// Version; 23:16: the last input.
const VERSION: u32 = 0x01;
/// The first entry's low half.
const TABLE: u32 = 0x10;

/// An input's entry: low half.
const MASKED: u32 = 1 << 16;
const LEVEL: u32 = 1 << 15;
const ACTIVE_LOW: u32 = 1 << 13;

/// The registers of an I/O APIC.
pub(crate) trait Registers {
    /// Reads register `register` of the one at `base`.
    fn read(&self, base: u64, register: u32) -> u32;
    /// Writes it.
    fn write(&self, base: u64, register: u32, value: u32);
}

/// Registers where the machine has them.
pub(crate) struct Mapped;

impl Registers for Mapped {
    fn read(&self, base: u64, register: u32) -> u32 {
        // SAFETY: ACPI names the registers, and our tables map them as device memory.
        unsafe {
            ((base + SELECT) as *mut u32).write_volatile(register);
            ((base + WINDOW) as *const u32).read_volatile()
        }
    }

    fn write(&self, base: u64, register: u32, value: u32) {
        // SAFETY: as above.
        unsafe {
            ((base + SELECT) as *mut u32).write_volatile(register);
            ((base + WINDOW) as *mut u32).write_volatile(value);
        }
    }
}

/// How an input is told, and to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub vector: u8,
    pub edge: bool,
    pub active_low: bool,
    /// The CPU's identifier.
    pub cpu: u8,
}

/// All of a machine.
pub(crate) struct IoApics<R> {
    registers: R,
    /// Registers, first input, number of inputs.
    parts: ArrayVec<(u64, u32, u32), MAX_IO_APICS>,
}

impl<R: Registers> IoApics<R> {
    /// Masks every input.
    pub fn new(registers: R, found: &[IoApic]) -> Self {
        let inputs = |part: &IoApic| (registers.read(part.registers, VERSION) >> 16 & 0xff) + 1;
        let parts: ArrayVec<_, MAX_IO_APICS> =
            found.iter().map(|part| (part.registers, part.first_input, inputs(part))).collect();
        let all = Self { registers, parts };
        for (base, _, inputs) in &all.parts {
            for input in 0..*inputs {
                all.registers.write(*base, TABLE + 2 * input, MASKED);
            }
        }
        all
    }

    /// Whether there is such an input.
    pub fn has(&self, input: u32) -> bool {
        self.find(input).is_some()
    }

    fn find(&self, input: u32) -> Option<(u64, u32)> {
        let part =
            self.parts.iter().find(|(_, first, inputs)| (*first..first.saturating_add(*inputs)).contains(&input));
        part.map(|(base, first, _)| (*base, TABLE + 2 * (input - first)))
    }

    /// Lets an input through as `route` says, or masks it. False: there is no such input.
    pub fn set(&self, input: u32, route: Option<Route>) -> bool {
        let Some((base, entry)) = self.find(input) else { return false };
        let Some(Route { vector, edge, active_low, cpu }) = route else {
            // What else it says is kept: a level that is being served still waits for its end.
            let kept = self.registers.read(base, entry);
            self.registers.write(base, entry, kept | MASKED);
            return true;
        };
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        // The destination is there before the mask is gone.
        self.registers.write(base, entry + 1, u32::from(cpu) << 24);
        self.registers.write(base, entry, u32::from(vector) | flag(!edge, LEVEL) | flag(active_low, ACTIVE_LOW));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::RefCell;
    use std::collections::BTreeMap;

    /// Two I/O APICs of 24 and 8 inputs.
    #[derive(Default)]
    struct Fake(RefCell<BTreeMap<(u64, u32), u32>>);

    impl Registers for &Fake {
        fn read(&self, base: u64, register: u32) -> u32 {
            match register {
                VERSION if base == 0x1000 => 23 << 16 | 0x20,
                VERSION => 7 << 16 | 0x20,
                _ => self.0.borrow().get(&(base, register)).copied().unwrap_or(0),
            }
        }

        fn write(&self, base: u64, register: u32, value: u32) {
            self.0.borrow_mut().insert((base, register), value);
        }
    }

    const FOUND: [IoApic; 2] =
        [IoApic { registers: 0x1000, first_input: 0 }, IoApic { registers: 0x2000, first_input: 24 }];

    #[test]
    fn every_input_begins_masked_and_is_found_in_its_part() {
        let fake = Fake::default();
        let all = IoApics::new(&fake, &FOUND);
        assert_eq!(fake.0.borrow().len(), 32);
        assert!(fake.0.borrow().values().all(|entry| *entry == MASKED));
        assert!(all.has(0) && all.has(31) && !all.has(32));
        assert!(!all.set(32, None));
        let route = Route { vector: 0x48, edge: false, active_low: true, cpu: 3 };
        assert!(all.set(24, Some(route)));
        assert_eq!(fake.0.borrow()[&(0x2000, TABLE)], 0x48 | LEVEL | ACTIVE_LOW);
        assert_eq!(fake.0.borrow()[&(0x2000, TABLE + 1)], 3 << 24);
    }

    #[test]
    fn masking_keeps_the_rest() {
        let fake = Fake::default();
        let all = IoApics::new(&fake, &FOUND);
        assert!(all.set(4, Some(Route { vector: 0x34, edge: true, active_low: false, cpu: 0 })));
        assert_eq!(fake.0.borrow()[&(0x1000, TABLE + 8)], 0x34);
        assert!(all.set(4, None));
        assert_eq!(fake.0.borrow()[&(0x1000, TABLE + 8)], 0x34 | MASKED);
    }
}
