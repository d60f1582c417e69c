//! A CPU interface as hardware has it: list registers, active priorities, `ICH_HCR_EL2`, `ICH_VMCR_EL2`.
//!
//! Written from the pseudocode's description in Arm IHI 0069H chapter 12, five priority bits, all of them group priority.

use super::super::{Flush, Group, Hcr, Kick, ListRegister, ListRegisters, MAX_LIST_REGISTERS, State, Vgic, Vmcr};
use super::vtr;

pub struct Cpu {
    pub index: usize,
    lr: [u64; MAX_LIST_REGISTERS],
    hcr: u64,
    pub vmcr: u64,
    /// Active priorities, a bit each, by group.
    active_priorities: [u32; 2],
    image: ListRegisters,
}

impl Cpu {
    pub fn new(index: usize, list_registers: usize, split: bool) -> Self {
        let image = ListRegisters::new(vtr(list_registers));
        let vmcr = 0xff << 24 | 3 | u64::from(split) << 9;
        Self { index, lr: [0; MAX_LIST_REGISTERS], hcr: image.hcr, vmcr, active_priorities: [0; 2], image }
    }

    /// The image, read from hardware as the protocol says.
    pub fn image(&mut self) -> &mut ListRegisters {
        let live = self.image.live();
        assert!(self.lr[live..].iter().all(|&lr| lr == 0), "a list register beyond `live` is in use");
        self.image.lr[..live].copy_from_slice(&self.lr[..live]);
        (self.image.hcr, self.image.vmcr) = (self.hcr, self.vmcr);
        &mut self.image
    }

    fn write_back(&mut self, count: usize) {
        self.lr[..count].copy_from_slice(&self.image.lr[..count]);
        self.hcr = self.image.hcr;
    }

    pub fn flush(&mut self, vgic: &Vgic) -> Flush {
        let index = self.index;
        let flush = vgic.flush(index, self.image());
        self.write_back(flush.write);
        assert!(!flush.kick.contains(index));
        flush
    }

    pub fn sync(&mut self, vgic: &Vgic) -> Kick {
        let index = self.index;
        let live = self.image().live();
        let kick = vgic.sync(index, &mut self.image);
        self.write_back(live);
        kick
    }

    pub fn deactivate(&mut self, vgic: &Vgic, intid: u32) -> Kick {
        let index = self.index;
        let live = self.image().live();
        let kick = vgic.deactivate(index, &mut self.image, intid.into());
        self.write_back(live);
        kick
    }

    pub fn deliverable(&mut self, vgic: &Vgic) -> bool {
        let index = self.index;
        vgic.deliverable(index, self.image())
    }

    fn registers(&self) -> impl Iterator<Item = (usize, ListRegister)> {
        self.lr.iter().take(self.image.implemented()).map(|&lr| ListRegister::decode(lr)).enumerate()
    }

    pub fn control(&self) -> Vmcr {
        Vmcr(self.vmcr)
    }

    pub fn set_priority_mask(&mut self, mask: u8) {
        self.vmcr = self.vmcr & !(0xff << 24) | u64::from(mask & 0xf8) << 24;
    }

    pub fn set_groups(&mut self, groups: u64) {
        self.vmcr = self.vmcr & !3 | groups & 3;
    }

    /// Idle is 0xFF, as `ICC_RPR_EL1` says.
    pub fn running_priority(&self) -> u8 {
        let all = self.active_priorities[0] | self.active_priorities[1];
        if all == 0 { 0xff } else { (all.trailing_zeros() * 8) as u8 }
    }

    /// `IAR` of whichever group is signalled.
    pub fn acknowledge(&mut self) -> Option<u32> {
        let vmcr = self.control();
        let (index, mut lr) = self
            .registers()
            .filter(|(_, lr)| lr.state == State::Pending && vmcr.is_enabled(lr.group))
            .min_by_key(|(_, lr)| lr.priority)?;
        if lr.priority >= vmcr.priority_mask() || lr.priority >= self.running_priority() {
            return None;
        }
        lr.state = State::Active;
        self.lr[index] = lr.encode();
        self.active_priorities[usize::from(lr.group == Group::One)] |= 1 << (lr.priority / 8);
        Some(lr.intid)
    }

    /// `EOIR` of the group that is being handled.
    pub fn end(&mut self, intid: u32) {
        let dropped = self.running_priority();
        if dropped == 0xff {
            return;
        }
        let group = self.active_priorities.iter().position(|&all| all >> (dropped / 8) & 1 == 1).expect("running");
        self.active_priorities[group] &= !(1 << (dropped / 8));
        let split = self.control().splits_deactivation();
        let found = self.registers().find(|(_, lr)| lr.state.is_active() && lr.intid == intid);
        match found {
            Some((index, mut lr)) if !split && lr.priority == dropped => {
                lr.state = if lr.state.is_pending() { State::Pending } else { State::Inactive };
                self.lr[index] = lr.encode();
            }
            None if !split => {
                let count = (self.hcr & Hcr::EOICOUNT) >> Hcr::EOICOUNT_SHIFT;
                self.hcr = self.hcr & !Hcr::EOICOUNT | ((count + 1) & 0x1f) << Hcr::EOICOUNT_SHIFT;
            }
            _ => {}
        }
    }

    /// `ICH_MISR_EL2` is not zero and `ICH_HCR_EL2.En` is set.
    pub fn maintenance(&self) -> bool {
        let asks = |bit| self.hcr & bit != 0;
        let vmcr = self.control();
        let (zero, one) = (vmcr.is_enabled(Group::Zero), vmcr.is_enabled(Group::One));
        asks(Hcr::EN)
            && (self.registers().any(|(_, lr)| lr.state == State::Inactive && lr.eoi)
                || asks(Hcr::LRENPIE) && self.hcr & Hcr::EOICOUNT != 0
                || asks(Hcr::NPIE) && !self.registers().any(|(_, lr)| lr.state == State::Pending)
                || asks(Hcr::VGRP0EIE) && zero
                || asks(Hcr::VGRP0DIE) && !zero
                || asks(Hcr::VGRP1EIE) && one
                || asks(Hcr::VGRP1DIE) && !one)
    }

    /// Exits while hardware or another vCPU asks for it. Fails if it does not end: a guest would make no progress.
    pub fn settle(&mut self, vgic: &Vgic) -> Kick {
        let mut kick = Kick::NONE;
        for _ in 0..3 {
            if !vgic.needs_sync(self.index) && !self.maintenance() {
                return kick;
            }
            kick |= self.flush(vgic).kick;
        }
        panic!("vCPU {} exits without end", self.index);
    }
}
