//! Thirty-two interrupts: their state, and the transitions of it.
//!
//! Purpose: one word of SPIs, or the SGIs and PPIs of one vCPU. A bit of each word is one interrupt, so finding what is
//! deliverable is a handful of bit operations. Transitions return a mask of the interrupts that they may have changed.
//!
//! Invariants: `carried`, `activate` and `deactivate` are subsets of `resident`; `activate` and `deactivate` are disjoint.
//! While an interrupt is resident, its list register knows whether it is active, `active` is what was loaded, and changes
//! by others are kept in `activate`/`deactivate` until it is unloaded.

use serde::{Deserialize, Serialize};

use super::frame::{BankRegister, Field};
use super::lr::{Group, ListRegister, State};
use crate::saved::{BadState, check};

/// Priority bits that exist: five, the fewest that a virtual CPU interface may have (IHI 0069H, `ICH_VTR_EL2.PRIbits`).
pub(super) const PRIORITY_MASK: u8 = 0xf8;

/// SGIs are edge-triggered and nothing can change it (`GICR_ICFGR0`).
const SGIS: u32 = 0x0000_ffff;

/// The groups that the distributor forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Groups {
    zero: u32,
    one: u32,
}

impl Groups {
    /// From `GICD_CTLR`, bits 0 and 1.
    pub(super) const fn from_control(control: u8) -> Self {
        Self { zero: if control & 1 != 0 { u32::MAX } else { 0 }, one: if control & 2 != 0 { u32::MAX } else { 0 } }
    }

    /// Of interrupts with these group bits, the forwarded ones.
    const fn forwarded(self, group: u32) -> u32 {
        group & self.one | !group & self.zero
    }
}

/// Thirty-two interrupts.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Bank {
    /// Set: Group 1.
    group: u32,
    enabled: u32,
    /// Pending by an edge, an SGI, a message or a write, whatever the line says.
    latch: u32,
    /// The wired input, as the device drives it.
    wire: u32,
    /// The input of level-sensitive interrupts as messages (`GICD_SETSPI_NSR`) drive it.
    message: u32,
    active: u32,
    /// Set: edge-triggered.
    edge: u32,
    /// Bits of `edge` that software cannot clear.
    fixed_edge: u32,
    /// In a list register.
    resident: u32,
    /// Resident, and the latch moved into the list register.
    carried: u32,
    /// Resident, and made active by software since it was loaded.
    activate: u32,
    /// Resident, and made inactive by software since it was loaded.
    deactivate: u32,
    priority: [u8; 32],
    /// Group of each when it was last acknowledged.
    acknowledged_group: u32,
    /// Priority of each when it was last acknowledged: priority drop looks for it in the list register.
    acknowledged_priority: [u8; 32],
}

impl Bank {
    /// SPIs after reset.
    pub(super) const fn shared() -> Self {
        Self::with_fixed_edge(0)
    }

    /// SGIs and PPIs after reset.
    pub(super) const fn private() -> Self {
        Self::with_fixed_edge(SGIS)
    }

    const fn with_fixed_edge(fixed_edge: u32) -> Self {
        Self {
            group: 0,
            enabled: 0,
            latch: 0,
            wire: 0,
            message: 0,
            active: 0,
            edge: fixed_edge,
            fixed_edge,
            resident: 0,
            carried: 0,
            activate: 0,
            deactivate: 0,
            priority: [0; 32],
            acknowledged_group: 0,
            acknowledged_priority: [0; 32],
        }
    }

    /// Everything but the wires.
    pub(super) fn reset(&mut self) {
        *self = Self { wire: self.wire, ..Self::with_fixed_edge(self.fixed_edge) };
    }

    /// Whether a bank that was read, of SGIs and PPIs or of SPIs, may be used: nothing is in a list register.
    pub(super) fn check(&self, private: bool) -> Result<(), BadState> {
        let away = self.resident | self.carried | self.activate | self.deactivate;
        check(away == 0, "gic.resident", "must be none")?;
        let fixed = if private { SGIS } else { 0 };
        check(self.fixed_edge == fixed && self.edge & fixed == fixed, "gic.edge", "must be set for SGIs")?;
        let priorities = self.priority.iter().chain(&self.acknowledged_priority);
        check(
            priorities.into_iter().all(|priority| priority & !PRIORITY_MASK == 0),
            "gic.priority",
            "must have five bits",
        )
    }

    pub(super) fn resident(&self) -> u32 {
        self.resident
    }

    pub(super) fn active(&self) -> u32 {
        self.active
    }

    pub(super) fn group(&self, index: u32) -> Group {
        group_of(self.group, index)
    }

    pub(super) fn priority(&self, index: u32) -> u8 {
        self.priority[index as usize]
    }

    pub(super) fn acknowledged_priority(&self, index: u32) -> u8 {
        self.acknowledged_priority[index as usize]
    }

    /// Of `mask`, the ones in Group 0.
    pub(super) fn group_zero(&self, mask: u32) -> u32 {
        mask & !self.group
    }

    /// Pending outside of list registers.
    fn pending(&self) -> u32 {
        self.latch | (self.wire | self.message) & !self.edge
    }

    fn forwarded(&self, groups: Groups) -> u32 {
        self.enabled & groups.forwarded(self.group)
    }

    /// What could be put into a list register as pending.
    pub(super) fn deliverable(&self, groups: Groups) -> u32 {
        self.forwarded(groups) & self.pending() & !self.active & !self.resident
    }

    /// Drives the wires of `mask`.
    pub(super) fn set_wire(&mut self, mask: u32, level: bool) -> u32 {
        let before = self.wire;
        self.wire = if level { before | mask } else { before & !mask };
        let moved = before ^ self.wire;
        let rising = if level { moved & self.edge } else { 0 };
        self.latch |= rising;
        moved & !self.edge | rising
    }

    /// A message for the interrupts of `mask`: an edge, or a level until [`Self::clear_message`].
    pub(super) fn set_message(&mut self, mask: u32) -> u32 {
        self.message |= mask & !self.edge;
        self.latch |= mask & self.edge;
        mask
    }

    /// Takes a message back: a level ends, an edge that was not taken is forgotten.
    pub(super) fn clear_message(&mut self, mask: u32) -> u32 {
        self.message &= !mask;
        self.clear_latch(mask & self.edge) | mask
    }

    /// Makes the interrupts of `mask` pending.
    pub(super) fn set_latch(&mut self, mask: u32) -> u32 {
        let changed = mask & !self.latch;
        self.latch |= mask;
        changed
    }

    fn clear_latch(&mut self, mask: u32) -> u32 {
        let changed = mask & (self.latch | self.carried);
        self.latch &= !mask;
        self.carried &= !mask;
        changed
    }

    /// Makes the interrupts of `mask` active, at the priority and in the group that they were last acknowledged with: if the
    /// guest is still handling one, its end of interrupt has to match.
    fn set_active(&mut self, mask: u32) -> u32 {
        let here = mask & !self.resident & !self.active;
        self.active |= here;
        let there = mask & self.resident;
        self.activate |= there;
        self.deactivate &= !there;
        here | there
    }

    /// Deactivates the interrupts of `mask`, wherever they are.
    pub(super) fn clear_active(&mut self, mask: u32) -> u32 {
        let here = mask & !self.resident & self.active;
        self.active &= !here;
        let there = mask & self.resident;
        self.deactivate |= there;
        self.activate &= !there;
        here | there
    }

    /// A register's value. Pending and active state of resident interrupts is as old as their last unloading.
    pub(super) fn read(&self, register: BankRegister) -> u32 {
        match register {
            BankRegister::Bits(Field::Group) => self.group,
            BankRegister::Bits(Field::SetEnable | Field::ClearEnable) => self.enabled,
            BankRegister::Bits(Field::SetPending | Field::ClearPending) => self.pending() | self.carried,
            BankRegister::Bits(Field::SetActive | Field::ClearActive) => self.active & !self.deactivate | self.activate,
            BankRegister::Priority { first, count } => {
                (0..count).fold(0, |value, byte| value | u32::from(self.priority(first + byte)) << (8 * byte))
            }
            BankRegister::Config { half } => {
                (0..16).fold(0, |value, field| value | (self.edge >> (16 * half + field) & 1) << (2 * field + 1))
            }
        }
    }

    /// Writes a register. Returns the interrupts that it may have changed.
    pub(super) fn write(&mut self, register: BankRegister, value: u32) -> u32 {
        match register {
            BankRegister::Bits(Field::Group) => replace(&mut self.group, value),
            BankRegister::Bits(Field::SetEnable) => {
                let enabled = self.enabled | value;
                replace(&mut self.enabled, enabled)
            }
            BankRegister::Bits(Field::ClearEnable) => {
                let enabled = self.enabled & !value;
                replace(&mut self.enabled, enabled)
            }
            BankRegister::Bits(Field::SetPending) => self.set_latch(value),
            BankRegister::Bits(Field::ClearPending) => self.clear_latch(value),
            BankRegister::Bits(Field::SetActive) => self.set_active(value),
            BankRegister::Bits(Field::ClearActive) => self.clear_active(value),
            BankRegister::Priority { first, count } => self.write_priorities(first, count, value),
            BankRegister::Config { half } => self.write_config(half, value),
        }
    }

    fn write_priorities(&mut self, first: u32, count: u32, value: u32) -> u32 {
        (0..count).fold(0, |changed, byte| {
            let priority = (value >> (8 * byte)) as u8 & PRIORITY_MASK;
            let slot = &mut self.priority[(first + byte) as usize];
            let before = core::mem::replace(slot, priority);
            changed | u32::from(before != priority) << (first + byte)
        })
    }

    fn write_config(&mut self, half: u32, value: u32) -> u32 {
        let edge = (0..16).fold(0, |edge, field| edge | (value >> (2 * field + 1) & 1) << field) << (16 * half);
        let kept = self.edge & !(0xffff << (16 * half));
        replace(&mut self.edge, edge | kept | self.fixed_edge)
    }

    /// Loads an interrupt into a list register. `may_wait` says whether one that is active may also be pending there.
    pub(super) fn load(&mut self, index: u32, intid: u16, may_wait: bool, groups: Groups) -> ListRegister {
        let bit = 1 << index;
        let active = self.active & bit != 0;
        let same = self.group(index) == group_of(self.acknowledged_group, index)
            && self.priority(index) == self.acknowledged_priority(index);
        let carries = !active || may_wait && same && self.forwarded(groups) & self.edge & bit != 0;
        if carries {
            self.carried |= self.latch & bit;
            self.latch &= !bit;
        }
        self.resident |= bit;
        let (group, priority) = if active {
            (group_of(self.acknowledged_group, index), self.acknowledged_priority(index))
        } else {
            (self.group(index), self.priority(index))
        };
        let state = match (active, self.carried & bit != 0) {
            (false, _) => State::Pending,
            (true, false) => State::Active,
            (true, true) => State::ActivePending,
        };
        ListRegister { state, group, priority, eoi: self.pending() & bit != 0, intid: intid.into() }
    }

    /// Takes an interrupt back from its list register. Nothing happens to one that is in none.
    pub(super) fn unload(&mut self, index: u32, register: ListRegister) {
        let bit = 1 << index;
        if self.resident & bit == 0 {
            return;
        }
        if register.state.is_pending() {
            self.latch |= self.carried & bit;
        }
        self.active &= !bit;
        if register.state.is_active() {
            self.active |= bit;
            self.acknowledged_priority[index as usize] = register.priority;
            self.acknowledged_group =
                self.acknowledged_group & !bit | if register.group == Group::One { bit } else { 0 };
        }
        let (activate, deactivate) = (self.activate & bit != 0, self.deactivate & bit != 0);
        for word in [&mut self.resident, &mut self.carried, &mut self.activate, &mut self.deactivate] {
            *word &= !bit;
        }
        if activate {
            self.set_active(bit);
        } else if deactivate {
            self.clear_active(bit);
        }
    }
}

/// The indices of the set bits, ascending.
pub(super) fn bits(mut mask: u32) -> impl Iterator<Item = u32> {
    core::iter::from_fn(move || {
        let index = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (index < u32::BITS).then_some(index)
    })
}

fn group_of(groups: u32, index: u32) -> Group {
    if groups >> index & 1 == 0 { Group::Zero } else { Group::One }
}

/// Stores a word; returns the bits that differ.
fn replace(word: &mut u32, value: u32) -> u32 {
    core::mem::replace(word, value) ^ value
}
