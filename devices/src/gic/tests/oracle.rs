//! What a GICv3 is, as slow and as plainly as it can be said.

use super::super::{Group, SgiRegister, Vmcr};
use std::vec::Vec;

use super::std;

#[derive(Clone, Copy)]
pub struct Irq {
    pub enabled: bool,
    latch: bool,
    wire: bool,
    message: bool,
    edge: bool,
    group: Group,
    priority: u8,
    pub active: bool,
    /// Whose end of interrupt ends it: who acknowledged it, or whom it targeted when software made it active.
    owner: Option<usize>,
    /// Priority of its last acknowledgement.
    acknowledged: u8,
    target: Option<usize>,
}

impl Irq {
    fn new(target: usize, edge: bool) -> Self {
        Self {
            enabled: false,
            latch: false,
            wire: false,
            message: false,
            edge,
            group: Group::Zero,
            priority: 0,
            active: false,
            owner: None,
            acknowledged: 0,
            target: Some(target),
        }
    }

    pub fn pending(&self) -> bool {
        self.latch || !self.edge && (self.wire || self.message)
    }
}

pub struct Oracle {
    private: Vec<Vec<Irq>>,
    spis: Vec<Irq>,
    groups: u8,
}

impl Oracle {
    pub fn new(vcpus: usize, spis: usize) -> Self {
        let private = (0..vcpus).map(|vcpu| (0..32).map(|intid| Irq::new(vcpu, intid < 16)).collect()).collect();
        Self { private, spis: (0..spis).map(|_| Irq::new(0, false)).collect(), groups: 0 }
    }

    /// The interrupt that `intid` means to `vcpu`.
    pub fn irq(&mut self, vcpu: usize, intid: u32) -> &mut Irq {
        if intid < 32 { &mut self.private[vcpu][intid as usize] } else { &mut self.spis[intid as usize - 32] }
    }

    fn forwards(&self, irq: &Irq) -> bool {
        irq.enabled
            && !irq.active
            && irq.pending()
            && match irq.group {
                Group::Zero => self.groups & 1 != 0,
                Group::One => self.groups & 2 != 0,
            }
    }

    /// Everything that `vcpu`'s CPU interface could signal, by INTID, with its priority.
    pub fn candidates(&self, vcpu: usize, vmcr: Vmcr) -> Vec<(u32, u8)> {
        let own = self.private[vcpu].iter().enumerate().map(|(intid, irq)| (intid as u32, irq));
        let spis = self.spis.iter().enumerate().map(|(index, irq)| (index as u32 + 32, irq));
        own.chain(spis)
            .filter(|(_, irq)| irq.target == Some(vcpu) && self.forwards(irq) && vmcr.is_enabled(irq.group))
            .map(|(intid, irq)| (intid, irq.priority))
            .collect()
    }

    pub fn acknowledge(&mut self, vcpu: usize, intid: u32) {
        let irq = self.irq(vcpu, intid);
        irq.latch = false;
        irq.active = true;
        irq.owner = Some(vcpu);
        irq.acknowledged = irq.priority;
    }

    /// `EOIR` with `EOImode` 0 that drops priority `dropped`. Software that takes an interrupt again while it handles it, by
    /// writing its active state, ends the later one first; what does not match is left active.
    pub fn end(&mut self, vcpu: usize, intid: u32, dropped: u8) {
        let irq = self.irq(vcpu, intid);
        irq.active &= irq.owner != Some(vcpu) || irq.acknowledged != dropped;
    }

    pub fn set_wire(&mut self, vcpu: usize, intid: u32, level: bool) {
        let irq = self.irq(vcpu, intid);
        irq.latch |= irq.edge && level && !irq.wire;
        irq.wire = level;
    }

    pub fn message(&mut self, intid: u32, set: bool) {
        let irq = self.irq(0, intid);
        if irq.edge {
            irq.latch = set;
        }
        irq.message = set && (irq.message || !irq.edge);
    }

    pub fn sgi(&mut self, register: SgiRegister, intid: u32, to: usize) {
        let irq = self.irq(to, intid);
        irq.latch |= register == SgiRegister::Sgi1r || irq.group == Group::Zero;
    }

    pub fn set_forwarded_groups(&mut self, groups: u8) {
        self.groups = groups & 3;
    }

    pub fn set_target(&mut self, intid: u32, target: Option<usize>) {
        self.irq(0, intid).target = target;
    }

    pub fn set_priority(&mut self, vcpu: usize, intid: u32, priority: u8) {
        self.irq(vcpu, intid).priority = priority & 0xf8;
    }

    pub fn set_edge(&mut self, vcpu: usize, intid: u32, edge: bool) {
        self.irq(vcpu, intid).edge = edge;
    }

    /// A write to the register at `offset` (0x080–0x380) of the word that starts at `first`.
    pub fn write_bits(&mut self, vcpu: usize, first: u32, offset: u64, value: u32) {
        for index in 0..32 {
            let irq = self.irq(vcpu, first + index);
            let set = value >> index & 1 == 1;
            match offset {
                0x080 => irq.group = if set { Group::One } else { Group::Zero },
                0x100 => irq.enabled |= set,
                0x180 => irq.enabled &= !set,
                0x200 => irq.latch |= set,
                0x280 => irq.latch &= !set,
                0x300 if set && !irq.active => (irq.active, irq.owner) = (true, irq.target),
                0x300 => {}
                0x380 => irq.active &= !set,
                _ => panic!("no such register"),
            }
        }
    }
}
