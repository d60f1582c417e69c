//! Random operations on the controller and on the oracle: what each vCPU may acknowledge must be the same at every step.
//!
//! Operations run one at a time and every kick is answered before the next, so the two must agree exactly: nothing lost,
//! nothing twice, nothing that is disabled, and always one of the most urgent.

use super::super::{Kick, Ppi, REDISTRIBUTOR_SIZE, SgiRegister, Vgic};
use super::cpu::Cpu;
use super::oracle::Oracle;
use super::{std, vgic};
use proptest::prelude::*;
use std::vec;
use std::vec::Vec;

/// The interrupts of each word that take part: few, so that they meet. Bits 0–3 and 16–19.
const USED: u32 = 0x000f_000f;
/// Where software writes active state, no more may take part than there are list registers. Bits 0–1 and 16–17.
const USED_ACTIVE: u32 = 0x0003_0003;
const SPIS: usize = 64;
const REGISTERS: [u64; 7] = [0x080, 0x100, 0x180, 0x200, 0x280, 0x300, 0x380];

#[derive(Clone, Debug)]
enum Op {
    Spi {
        intid: u32,
        level: bool,
    },
    Ppi {
        vcpu: usize,
        intid: u32,
        level: bool,
    },
    Message {
        intid: u32,
        set: bool,
    },
    Sgi {
        from: usize,
        register: u8,
        intid: u32,
        targets: u16,
        all_others: bool,
    },
    /// A word register of the interrupts of `word`; word 0 is private to `vcpu`.
    Bits {
        vcpu: usize,
        word: u32,
        register: usize,
        value: u32,
    },
    Priority {
        vcpu: usize,
        intid: u32,
        value: u8,
    },
    Config {
        vcpu: usize,
        intid: u32,
        edge: bool,
    },
    Route {
        intid: u32,
        target: u64,
    },
    Forward {
        groups: u8,
    },
    PriorityMask {
        vcpu: usize,
        value: u8,
    },
    CpuGroups {
        vcpu: usize,
        value: u64,
    },
    Acknowledge {
        vcpu: usize,
    },
    End {
        vcpu: usize,
    },
    /// `DIR` of the `which`-th interrupt that someone ended and nobody deactivated.
    Deactivate {
        vcpu: usize,
        which: usize,
    },
    /// Every vCPU exits and every state register is compared.
    Audit,
}

fn used_spi(width: u32) -> impl Strategy<Value = u32> {
    (1u32..3, prop::bool::ANY, 0..width).prop_map(|(word, high, bit)| 32 * word + 16 * u32::from(high) + bit)
}

fn used_private(width: u32) -> impl Strategy<Value = u32> {
    (prop::bool::ANY, 0..width).prop_map(|(high, bit)| 16 * u32::from(high) + bit)
}

/// `active` says whether software may write active state.
fn op(active: bool) -> impl Strategy<Value = Op> {
    let vcpu = 0usize..8;
    let (width, used) = if active { (2, USED_ACTIVE) } else { (4, USED) };
    let any_intid = prop_oneof![used_spi(width), used_private(width)];
    let register = 0usize..if active { 7 } else { 5 };
    prop_oneof![
        4 => (used_spi(width), any::<bool>()).prop_map(|(intid, level)| Op::Spi { intid, level }),
        4 => (vcpu.clone(), 16..16 + width, any::<bool>()).prop_map(|(vcpu, intid, level)| Op::Ppi { vcpu, intid, level }),
        2 => (used_spi(width), any::<bool>()).prop_map(|(intid, set)| Op::Message { intid, set }),
        4 => (vcpu.clone(), 0u8..3, 0..width, any::<u16>(), any::<bool>()).prop_map(
            |(from, register, intid, targets, all_others)| Op::Sgi { from, register, intid, targets, all_others }),
        4 => (vcpu.clone(), 0u32..3, register, any::<u32>()).prop_map(
            move |(vcpu, word, register, value)| Op::Bits { vcpu, word, register, value: value & used }),
        2 => (vcpu.clone(), any_intid.clone(), any::<u8>()).prop_map(
            |(vcpu, intid, value)| Op::Priority { vcpu, intid, value }),
        1 => (vcpu.clone(), any_intid, any::<bool>()).prop_map(|(vcpu, intid, edge)| Op::Config { vcpu, intid, edge }),
        2 => (used_spi(width), 0u64..9).prop_map(|(intid, target)| Op::Route { intid, target }),
        1 => (0u8..4).prop_map(|groups| Op::Forward { groups }),
        1 => (vcpu.clone(), any::<u8>()).prop_map(|(vcpu, value)| Op::PriorityMask { vcpu, value }),
        1 => (vcpu.clone(), 0u64..4).prop_map(|(vcpu, value)| Op::CpuGroups { vcpu, value }),
        12 => vcpu.clone().prop_map(|vcpu| Op::Acknowledge { vcpu }),
        8 => vcpu.clone().prop_map(|vcpu| Op::End { vcpu }),
        4 => (vcpu, 0usize..8).prop_map(|(vcpu, which)| Op::Deactivate { vcpu, which }),
        1 => Just(Op::Audit),
    ]
}

struct Machine {
    vgic: Vgic,
    cpus: Vec<Cpu>,
    oracle: Oracle,
    /// What each vCPU acknowledged and has not ended, oldest first.
    running: Vec<Vec<u32>>,
    /// What was ended and not deactivated, by whom.
    ended: Vec<(usize, u32)>,
    split: bool,
    /// Kicks are answered. Off only to show that the comparison notices.
    answers: bool,
}

impl Machine {
    fn new(vcpus: usize, list_registers: usize, split: bool) -> Self {
        Self {
            vgic: vgic(vcpus, SPIS),
            cpus: (0..vcpus).map(|index| Cpu::new(index, list_registers, split)).collect(),
            oracle: Oracle::new(vcpus, SPIS),
            running: (0..vcpus).map(|_| Vec::new()).collect(),
            ended: Vec::new(),
            split,
            answers: true,
        }
    }

    /// Everything enabled, in Group 1, at different priorities: most sequences start where something happens.
    fn set_up(&mut self) {
        self.apply(&Op::Forward { groups: 3 });
        for word in 0..3 {
            for vcpu in 0..if word == 0 { self.cpus.len() } else { 1 } {
                self.apply(&Op::Bits { vcpu, word, register: 0, value: USED & !8 });
                self.apply(&Op::Bits { vcpu, word, register: 1, value: USED });
                for bit in 0..32 {
                    let value = (bit * 40 + word * 16 + 8) as u8;
                    self.apply(&Op::Priority { vcpu, intid: 32 * word + bit, value });
                }
            }
        }
    }

    /// A write by `vcpu`, which sees what it did before.
    fn write(&mut self, vcpu: usize, intid: u32, offset: u64, size: u8, value: u64) -> Kick {
        let kick = self.cpus[vcpu].sync(&self.vgic);
        kick | if intid < 32 {
            self.vgic.redist_write(vcpu, REDISTRIBUTOR_SIZE / 2 + offset, size, value)
        } else {
            self.vgic.dist_write(offset, size, value)
        }
    }

    fn apply(&mut self, op: &Op) {
        let vcpus = self.cpus.len();
        let kick = match *op {
            Op::Spi { intid, level } => {
                self.oracle.set_wire(0, intid, level);
                self.vgic.set_spi(self.vgic.spi(intid).expect("it exists"), level)
            }
            Op::Ppi { vcpu, intid, level } => {
                self.oracle.set_wire(vcpu % vcpus, intid, level);
                self.vgic.set_ppi(vcpu % vcpus, Ppi::new(intid).expect("a PPI"), level)
            }
            Op::Message { intid, set } => {
                self.oracle.message(intid, set);
                self.vgic.dist_write(if set { 0x40 } else { 0x48 }, 4, intid.into())
            }
            Op::Sgi { from, register, intid, targets, all_others } => {
                let (from, register) = (
                    from % vcpus,
                    [SgiRegister::Sgi1r, SgiRegister::Sgi0r, SgiRegister::Asgi1r][usize::from(register)],
                );
                for to in (0..vcpus).filter(|&to| if all_others { to != from } else { targets >> to & 1 == 1 }) {
                    self.oracle.sgi(register, intid, to);
                }
                let value = u64::from(all_others) << 40 | u64::from(intid) << 24 | u64::from(targets);
                self.vgic.sgi(from, register, value)
            }
            Op::Bits { vcpu, word, register, value } => {
                let vcpu = vcpu % vcpus;
                self.oracle.write_bits(vcpu, 32 * word, REGISTERS[register], value);
                self.write(vcpu, 32 * word, REGISTERS[register] + 4 * u64::from(word), 4, value.into())
            }
            Op::Priority { vcpu, intid, value } => {
                self.oracle.set_priority(vcpu % vcpus, intid, value);
                self.write(vcpu % vcpus, intid, 0x400 + u64::from(intid), 1, value.into())
            }
            Op::Config { vcpu, intid, edge } => self.configure(vcpu % vcpus, intid, edge),
            Op::Route { intid, target } => {
                self.oracle.set_target(intid, usize::try_from(target).ok().filter(|&target| target < vcpus));
                self.vgic.dist_write(0x6000 + 8 * u64::from(intid), 8, target)
            }
            Op::Forward { groups } => {
                self.oracle.set_forwarded_groups(groups);
                self.vgic.dist_write(0, 4, groups.into())
            }
            Op::PriorityMask { vcpu, value } => {
                self.cpus[vcpu % vcpus].set_priority_mask(value);
                Kick::NONE
            }
            Op::CpuGroups { vcpu, value } => {
                self.cpus[vcpu % vcpus].set_groups(value);
                Kick::NONE
            }
            Op::Acknowledge { vcpu } => self.acknowledge(vcpu % vcpus),
            Op::End { vcpu } => self.end(vcpu % vcpus),
            Op::Deactivate { vcpu, which } => self.deactivate(vcpu % vcpus, which),
            Op::Audit => self.audit(),
        };
        assert!(kick.iter().all(|vcpu| self.vgic.needs_sync(vcpu)), "a kick without its flag");
        if self.answers {
            self.settle();
            self.compare_deliverable();
        }
    }

    fn settle(&mut self) {
        for _ in 0..2 * self.cpus.len() {
            let kicks: Vec<_> = self.cpus.iter_mut().map(|cpu| cpu.settle(&self.vgic)).collect();
            if kicks.iter().all(|kick| kick.is_empty()) {
                return;
            }
        }
        panic!("vCPUs kick each other without end");
    }

    fn configure(&mut self, vcpu: usize, intid: u32, edge: bool) -> Kick {
        if intid >= 16 {
            self.oracle.set_edge(vcpu, intid, edge);
        }
        let mut kick = self.cpus[vcpu].sync(&self.vgic);
        let offset = 0xc00 + u64::from(intid / 16) * 4;
        let (before, more) = if intid < 32 {
            self.vgic.redist_read(vcpu, REDISTRIBUTOR_SIZE / 2 + offset, 4)
        } else {
            self.vgic.dist_read(offset, 4)
        };
        kick |= more;
        let bit = 2 << (2 * (intid % 16));
        kick | self.write(vcpu, intid, offset, 4, if edge { before | bit } else { before & !bit })
    }

    fn acknowledge(&mut self, vcpu: usize) -> Kick {
        let cpu = &mut self.cpus[vcpu];
        let candidates = self.oracle.candidates(vcpu, cpu.control());
        let limit = cpu.running_priority().min(cpu.control().priority_mask());
        let best = candidates.iter().map(|&(_, priority)| priority).min().filter(|&best| best < limit);
        let taken = cpu.acknowledge();
        match (best, taken) {
            (None, None) => {}
            (Some(best), Some(intid)) => {
                let priority = candidates.iter().find(|&&(candidate, _)| candidate == intid);
                assert_eq!(priority, Some(&(intid, best)), "vCPU {vcpu} took {intid} instead");
                self.oracle.acknowledge(vcpu, intid);
                self.running[vcpu].push(intid);
            }
            (best, taken) => panic!("vCPU {vcpu} should take one of priority {best:?}, took {taken:?}"),
        }
        Kick::NONE
    }

    fn end(&mut self, vcpu: usize) -> Kick {
        if let Some(intid) = self.running[vcpu].pop() {
            let dropped = self.cpus[vcpu].running_priority();
            self.cpus[vcpu].end(intid);
            if self.split {
                self.ended.push((vcpu, intid));
            } else {
                self.oracle.end(vcpu, intid, dropped);
            }
        }
        Kick::NONE
    }

    fn deactivate(&mut self, vcpu: usize, which: usize) -> Kick {
        if self.ended.is_empty() {
            return Kick::NONE;
        }
        let (owner, intid) = self.ended.remove(which % self.ended.len());
        // An SPI can be deactivated by anyone.
        let by = if intid < 32 { owner } else { vcpu };
        self.oracle.irq(owner, intid).active = false;
        self.cpus[by].deactivate(&self.vgic, intid)
    }

    fn compare_deliverable(&mut self) {
        for cpu in &mut self.cpus {
            let vmcr = cpu.control();
            let expected =
                self.oracle.candidates(cpu.index, vmcr).iter().any(|&(_, priority)| priority < vmcr.priority_mask());
            assert_eq!(cpu.deliverable(&self.vgic), expected, "vCPU {}", cpu.index);
        }
    }

    fn audit(&mut self) -> Kick {
        let mut kick = self.cpus.iter_mut().fold(Kick::NONE, |kick, cpu| kick | cpu.sync(&self.vgic));
        for vcpu in 0..self.cpus.len() {
            for word in 0..3 {
                let offset = 4 * u64::from(word);
                for (register, is_active) in [(0x200, false), (0x280, false), (0x300, true), (0x380, true)] {
                    let (value, more) = if word == 0 {
                        self.vgic.redist_read(vcpu, REDISTRIBUTOR_SIZE / 2 + register, 4)
                    } else {
                        self.vgic.dist_read(register + offset, 4)
                    };
                    assert!(more.is_empty(), "everything is unloaded");
                    kick |= more;
                    let expected = (0..32).fold(0, |all, index| {
                        let irq = self.oracle.irq(vcpu, 32 * word + index);
                        all | u64::from(if is_active { irq.active } else { irq.pending() }) << index
                    });
                    assert_eq!(value, expected, "vCPU {vcpu}, register {register:#x}, word {word}");
                }
            }
        }
        kick
    }

    /// Lets every vCPU handle what it has until nothing is left, with all masks open.
    fn drain(&mut self) {
        for vcpu in 0..self.cpus.len() {
            self.apply(&Op::PriorityMask { vcpu, value: 0xff });
            self.apply(&Op::CpuGroups { vcpu, value: 3 });
        }
        for intid in 32..32 + SPIS as u32 {
            self.apply(&Op::Spi { intid, level: false });
            self.apply(&Op::Message { intid, set: false });
        }
        for vcpu in 0..self.cpus.len() {
            for intid in 16..32 {
                self.apply(&Op::Ppi { vcpu, intid, level: false });
            }
            loop {
                let before = self.running[vcpu].len();
                self.apply(&Op::Acknowledge { vcpu });
                if self.running[vcpu].len() == before && before == 0 {
                    break;
                }
                if self.running[vcpu].len() == before {
                    self.apply(&Op::End { vcpu });
                }
            }
        }
        while !self.ended.is_empty() {
            self.apply(&Op::Deactivate { vcpu: 0, which: 0 });
        }
        self.apply(&Op::Audit);
    }
}

fn run(vcpus: usize, list_registers: usize, split: bool, ops: &[Op]) {
    let mut machine = Machine::new(vcpus, list_registers, split);
    machine.set_up();
    for op in ops {
        machine.apply(op);
    }
    machine.drain();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// More interrupts than list registers, nested, pending again while active, rerouted while pending.
    #[test]
    fn few_list_registers(
        vcpus in 1usize..=8, list_registers in 1usize..=4, split: bool, ops in prop::collection::vec(op(false), 1..200),
    ) {
        run(vcpus, list_registers, split, &ops);
    }

    /// Software writes active state. As many list registers as interrupts: an end that finds none names nobody.
    #[test]
    fn written_active_state(vcpus in 1usize..=3, split: bool, ops in prop::collection::vec(op(true), 1..200)) {
        run(vcpus, 16, split, &ops);
    }
}

/// The comparison can fail: a machine that does not answer kicks is noticed.
#[test]
#[should_panic(expected = "should take one of priority")]
fn a_lost_kick_is_noticed() {
    let mut machine = Machine::new(1, 4, false);
    machine.set_up();
    machine.answers = false;
    machine.apply(&Op::Spi { intid: 33, level: true });
    machine.apply(&Op::Acknowledge { vcpu: 0 });
}
