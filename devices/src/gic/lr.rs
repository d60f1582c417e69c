//! The virtual CPU interface's registers as data: list registers, `ICH_VMCR_EL2`, `ICH_HCR_EL2`.
//!
//! Source: Arm IHI 0069H, chapter 12 (virtual interface control system registers). Pure: nothing here knows what an
//! interrupt's state outside its list register is.

/// The most list registers that the architecture allows.
pub const MAX_LIST_REGISTERS: usize = 16;

/// An interrupt group. One Security state: Group 0 is signalled as a virtual FIQ, Group 1 as a virtual IRQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Group {
    /// Group 0.
    Zero,
    /// Group 1.
    One,
}

/// `ICH_LR<n>_EL2.State`, bits \[63:62\].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// The list register is free.
    Inactive,
    /// Waits for the guest's acknowledgement.
    Pending,
    /// Acknowledged, not yet deactivated.
    Active,
    /// Acknowledged, and will wait again once deactivated.
    ActivePending,
}

impl State {
    /// Whether the pending bit is set.
    pub const fn is_pending(self) -> bool {
        matches!(self, Self::Pending | Self::ActivePending)
    }

    /// Whether the active bit is set.
    pub const fn is_active(self) -> bool {
        matches!(self, Self::Active | Self::ActivePending)
    }
}

/// `ICH_LR<n>_EL2` of a software interrupt (`HW`, bit 61, is always zero here).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListRegister {
    /// State, bits \[63:62\].
    pub state: State,
    /// Group, bit 60.
    pub group: Group,
    /// Priority, bits \[55:48\]; lower is more urgent.
    pub priority: u8,
    /// EOI, bit 41: deactivation raises a maintenance interrupt.
    pub eoi: bool,
    /// vINTID, bits \[31:0\].
    pub intid: u32,
}

const LR_GROUP: u64 = 1 << 60;
const LR_PRIORITY_SHIFT: u32 = 48;
const LR_EOI: u64 = 1 << 41;

impl ListRegister {
    /// The register's value.
    pub const fn encode(self) -> u64 {
        let state = match self.state {
            State::Inactive => 0,
            State::Pending => 1,
            State::Active => 2,
            State::ActivePending => 3,
        };
        let group = match self.group {
            Group::Zero => 0,
            Group::One => LR_GROUP,
        };
        let eoi = if self.eoi { LR_EOI } else { 0 };
        state << 62 | group | (self.priority as u64) << LR_PRIORITY_SHIFT | eoi | self.intid as u64
    }

    /// From the register's value.
    pub const fn decode(value: u64) -> Self {
        Self {
            state: match value >> 62 {
                0 => State::Inactive,
                1 => State::Pending,
                2 => State::Active,
                _ => State::ActivePending,
            },
            group: if value & LR_GROUP == 0 { Group::Zero } else { Group::One },
            priority: (value >> LR_PRIORITY_SHIFT) as u8,
            eoi: value & LR_EOI != 0,
            intid: value as u32,
        }
    }
}

/// `ICH_VMCR_EL2`: how the guest set its CPU interface up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vmcr(pub u64);

impl Vmcr {
    /// VPMR, bits \[31:24\]: only more urgent (lower) priorities are signalled.
    pub const fn priority_mask(self) -> u8 {
        (self.0 >> 24) as u8
    }

    /// VEOIM, bit 9: `EOIR` only drops the priority, `DIR` deactivates.
    pub const fn splits_deactivation(self) -> bool {
        self.0 & 1 << 9 != 0
    }

    /// VENG0, bit 0, or VENG1, bit 1.
    pub const fn is_enabled(self, group: Group) -> bool {
        match group {
            Group::Zero => self.0 & 1 != 0,
            Group::One => self.0 & 2 != 0,
        }
    }

    /// Whether a pending interrupt of this group and priority is signalled when nothing is being handled.
    pub const fn signals(self, group: Group, priority: u8) -> bool {
        self.is_enabled(group) && priority < self.priority_mask()
    }
}

/// Bits of `ICH_HCR_EL2` that this module uses.
pub struct Hcr;

impl Hcr {
    /// The virtual CPU interface works.
    pub const EN: u64 = 1 << 0;
    /// Maintenance interrupt while `EOIcount` is not zero.
    pub const LRENPIE: u64 = 1 << 2;
    /// Maintenance interrupt while no list register is pending.
    pub const NPIE: u64 = 1 << 3;
    /// Maintenance interrupt while Group 0 is enabled.
    pub const VGRP0EIE: u64 = 1 << 4;
    /// Maintenance interrupt while Group 0 is disabled.
    pub const VGRP0DIE: u64 = 1 << 5;
    /// Maintenance interrupt while Group 1 is enabled.
    pub const VGRP1EIE: u64 = 1 << 6;
    /// Maintenance interrupt while Group 1 is disabled.
    pub const VGRP1DIE: u64 = 1 << 7;
    /// `ICC_DIR_EL1` traps (`ICH_VTR_EL2.TDS` says that it can).
    pub const TDIR: u64 = 1 << 14;
    /// Lowest bit of EOIcount, bits \[31:27\].
    pub const EOICOUNT_SHIFT: u32 = 27;
    /// EOIcount: deactivations that found no list register.
    pub const EOICOUNT: u64 = 0x1f << Self::EOICOUNT_SHIFT;

    /// What a flush decides anew.
    const DECIDED: u64 = Self::LRENPIE | Self::NPIE | Self::VGRP0EIE | Self::VGRP0DIE | Self::VGRP1EIE | Self::VGRP1DIE;

    /// The maintenance interrupts that are needed while `underflow` (pending interrupts did not fit) or `overflow` (active
    /// ones did not). A group that changes its enable changes which of the waiting are the most urgent.
    const fn maintenance(underflow: bool, overflow: bool, vmcr: Vmcr) -> u64 {
        let mut bits = if overflow { Self::LRENPIE } else { 0 };
        if underflow {
            bits |= Self::NPIE;
            bits |= if vmcr.is_enabled(Group::Zero) { Self::VGRP0DIE } else { Self::VGRP0EIE };
            bits |= if vmcr.is_enabled(Group::One) { Self::VGRP1DIE } else { Self::VGRP1EIE };
        }
        bits
    }
}

/// The image of one vCPU's virtual CPU interface, as far as it is shared with the hypervisor.
///
/// `lr`, `hcr` and `vmcr` are hardware's values: read before, written after (see the module). Active priorities
/// (`ICH_AP<n>R_EL2`) are saved and restored by the owner and do not concern this module.
#[derive(Clone, Debug)]
pub struct ListRegisters {
    /// `ICH_LR<n>_EL2`.
    pub lr: [u64; MAX_LIST_REGISTERS],
    /// `ICH_HCR_EL2`. Bits that this module does not name are the owner's and kept.
    pub hcr: u64,
    /// `ICH_VMCR_EL2`. Never written here.
    pub vmcr: u64,
    /// INTIDs of the first `live` list registers.
    loaded: [u16; MAX_LIST_REGISTERS],
    live: usize,
    implemented: usize,
    /// Active interrupts did not fit when it was loaded: only then does EOIcount mean one of them.
    overflow: bool,
}

impl ListRegisters {
    /// An empty image for hardware with this `ICH_VTR_EL2` (ListRegs, bits \[4:0\], is the number less one).
    pub const fn new(ich_vtr: u64) -> Self {
        let implemented = (ich_vtr & 0x1f) as usize + 1;
        Self {
            lr: [0; MAX_LIST_REGISTERS],
            hcr: Hcr::EN | Hcr::TDIR,
            vmcr: 0,
            loaded: [0; MAX_LIST_REGISTERS],
            live: 0,
            overflow: false,
            implemented: if implemented > MAX_LIST_REGISTERS { MAX_LIST_REGISTERS } else { implemented },
        }
    }

    /// How many list registers, from the first, hardware may have changed since they were written. The others are zero.
    #[inline]
    pub fn live(&self) -> usize {
        self.live
    }

    /// How many list registers hardware has.
    #[inline]
    pub fn implemented(&self) -> usize {
        self.implemented
    }

    /// `vmcr`, decoded.
    pub(super) fn control(&self) -> Vmcr {
        Vmcr(self.vmcr)
    }

    pub(super) fn holds_spis(&self) -> bool {
        self.loaded[..self.live].iter().any(|&intid| u32::from(intid) >= super::FIRST_SPI)
    }

    /// What each used list register was loaded with, and its value now.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u16, ListRegister)> {
        self.loaded[..self.live].iter().zip(&self.lr).map(|(&intid, &value)| (intid, ListRegister::decode(value)))
    }

    /// Reads EOIcount and sets it to zero: how many active interrupts that did not fit were ended. What else the guest ended
    /// was not active, and ending that does nothing. With split deactivation only DIR deactivates, and it traps; an
    /// implementation that counts EOIR there (QEMU does) is not heard.
    pub(super) fn take_ended(&mut self) -> u64 {
        let count = (self.hcr & Hcr::EOICOUNT) >> Hcr::EOICOUNT_SHIFT;
        self.hcr &= !Hcr::EOICOUNT;
        if self.overflow && !self.control().splits_deactivation() { count } else { 0 }
    }

    pub(super) fn clear(&mut self) {
        self.lr[..self.live].fill(0);
        self.live = 0;
        self.overflow = false;
    }

    /// Uses the next free list register. The caller has counted them.
    pub(super) fn push(&mut self, intid: u16, register: ListRegister) {
        self.loaded[self.live] = intid;
        self.lr[self.live] = register.encode();
        self.live += 1;
    }

    /// Ends loading: what did not fit, and the maintenance interrupts that it needs.
    pub(super) fn finish(&mut self, underflow: bool, overflow: bool) {
        self.overflow = overflow;
        self.hcr = self.hcr & !Hcr::DECIDED | Hcr::maintenance(underflow, overflow, self.control());
    }
}
