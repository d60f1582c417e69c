//! Single cases, by name.

use super::super::{Group, Hcr, Kick, ListRegister, ListRegisters, Ppi, SgiRegister, State, Vgic, Vmcr};
use super::cpu::Cpu;
use super::{std, vgic, vtr};
use proptest::prelude::*;
use std::vec::Vec;

const SGI_BASE: u64 = 0x1_0000;

/// The writes of a Linux guest's GICv3 driver on its boot CPU, then of each CPU, in its order.
fn boot_linux(vgic: &Vgic) {
    let write = |offset, value| {
        let _ = vgic.dist_write(offset, 4, value);
    };
    let words = vgic.dist_read(4, 4).0 & 0x1f;
    assert_eq!(vgic.dist_read(0xffe8, 4).0 & 0xf0, 0x30);
    write(0, 0);
    for word in 1..=words {
        write(0x080 + 4 * word, u64::from(u32::MAX));
    }
    for word in 2..2 * (words + 1) {
        write(0xc00 + 4 * word, 0);
    }
    for register in 8..8 * (words + 1) {
        write(0x400 + 4 * register, 0xa0a0_a0a0);
    }
    for word in 1..=words {
        write(0x380 + 4 * word, u64::from(u32::MAX));
        write(0x180 + 4 * word, u64::from(u32::MAX));
    }
    write(0, 1 << 4 | 1 << 1 | 1);
    assert_eq!(vgic.dist_read(0, 4).0 & 1 << 31, 0, "no write is in flight");
    for intid in 32..32 * (words + 1) {
        let _ = vgic.dist_write(0x6000 + 8 * intid, 8, 0);
    }
    for frame in 0..vgic.vcpus() {
        let write = |offset, value| {
            let _ = vgic.redist_write(frame, offset, 4, value);
        };
        write(0x14, vgic.redist_read(frame, 0x14, 4).0 & !2);
        assert_eq!(vgic.redist_read(frame, 0x14, 4).0 & 4, 0, "awake");
        write(SGI_BASE + 0x080, u64::from(u32::MAX));
        write(SGI_BASE + 0x380, u64::from(u32::MAX));
        write(SGI_BASE + 0x180, 0xffff_0000);
        for register in 0..8 {
            write(SGI_BASE + 0x400 + 4 * register, 0xa0a0_a0a0);
        }
        write(SGI_BASE + 0x180, 0xffff_0000);
        write(SGI_BASE + 0x100, 0x0000_ffff);
        write(SGI_BASE + 0x100, 1 << 27);
        assert_eq!(vgic.redist_read(frame, SGI_BASE + 0x100, 4).0, 0x0800_ffff);
    }
}

/// A booted machine with one CPU interface for each vCPU.
fn booted(vcpus: usize, list_registers: usize) -> (Vgic, Vec<Cpu>) {
    let vgic = vgic(vcpus, 256);
    boot_linux(&vgic);
    let mut cpus: Vec<_> = (0..vcpus).map(|index| Cpu::new(index, list_registers, false)).collect();
    for cpu in &mut cpus {
        assert_eq!(cpu.acknowledge(), None);
        assert_eq!(cpu.settle(&vgic), Kick::NONE);
    }
    (vgic, cpus)
}

fn spi(vgic: &Vgic, intid: u32, level: bool) -> Kick {
    vgic.set_spi(vgic.spi(intid).expect("it exists"), level)
}

/// Enables SPI 32 + `index`.
fn enable(vgic: &Vgic, index: u32) -> Kick {
    vgic.dist_write(0x104, 4, 1 << index)
}

fn make_edge(vgic: &Vgic, index: u32) {
    let _ = vgic.dist_write(0xc08, 4, 2 << (2 * index));
}

#[test]
fn after_linux_boots_timer_ipi_and_device_arrive() {
    let (vgic, mut cpus) = booted(2, 4);
    assert!(!vgic.needs_sync(0) && !vgic.needs_sync(1), "an idle vCPU enters with one load");
    assert_eq!(vgic.set_ppi(1, Ppi::VIRTUAL_TIMER, true), Kick::one(1));
    assert_eq!(vgic.set_ppi(1, Ppi::VIRTUAL_TIMER, true), Kick::NONE, "nothing changed");
    assert_eq!(vgic.sgi(0, SgiRegister::Sgi1r, 5 << 24 | 0b10), Kick::one(1));
    assert_eq!(spi(&vgic, 33, true), Kick::NONE, "not enabled yet");
    assert_eq!(enable(&vgic, 1), Kick::one(0));
    assert!(cpus[1].settle(&vgic).is_empty() && cpus[0].settle(&vgic).is_empty());
    assert!(cpus[0].deliverable(&vgic) && cpus[1].deliverable(&vgic));
    assert_eq!(cpus[0].acknowledge(), Some(33));
    assert_eq!(cpus[1].acknowledge(), Some(5));
    cpus[1].end(5);
    assert!(!cpus[1].maintenance(), "an SGI ends without an exit");
    assert_eq!(cpus[1].acknowledge(), Some(27));
}

#[test]
fn a_level_comes_again_until_its_line_drops() {
    let (vgic, mut cpus) = booted(1, 4);
    let cpu = &mut cpus[0];
    let _ = spi(&vgic, 33, true) | enable(&vgic, 1);
    for _ in 0..3 {
        let _ = cpu.settle(&vgic);
        assert_eq!(cpu.acknowledge(), Some(33));
        cpu.end(33);
        assert_eq!(cpu.acknowledge(), None);
        assert!(cpu.maintenance(), "the line has to be sampled");
    }
    let _ = cpu.settle(&vgic);
    assert_eq!(cpu.acknowledge(), Some(33));
    assert_eq!(spi(&vgic, 33, false), Kick::one(0));
    let _ = cpu.settle(&vgic);
    cpu.end(33);
    assert!(!cpu.maintenance(), "nothing to sample: a rising line kicks");
    assert_eq!(cpu.acknowledge(), None);
}

#[test]
fn a_line_that_drops_is_withdrawn() {
    let (vgic, mut cpus) = booted(1, 4);
    let _ = spi(&vgic, 33, true) | enable(&vgic, 1);
    let _ = cpus[0].settle(&vgic);
    assert_eq!(spi(&vgic, 33, false), Kick::one(0));
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), None);
    assert!(!cpus[0].deliverable(&vgic));
}

#[test]
fn a_disabled_edge_is_withdrawn_and_kept() {
    let (vgic, mut cpus) = booted(1, 4);
    make_edge(&vgic, 1);
    let _ = enable(&vgic, 1) | spi(&vgic, 33, true) | spi(&vgic, 33, false);
    let _ = cpus[0].settle(&vgic);
    assert_eq!(vgic.dist_write(0x184, 4, 2), Kick::one(0));
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), None);
    assert_eq!(vgic.dist_read(0x204, 4), (2, Kick::NONE));
    assert_eq!(enable(&vgic, 1), Kick::one(0));
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), Some(33));
}

#[test]
fn an_edge_during_its_own_handler_comes_next_without_an_exit() {
    let (vgic, mut cpus) = booted(1, 4);
    make_edge(&vgic, 1);
    let _ = enable(&vgic, 1) | vgic.dist_write(0x40, 4, 33);
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), Some(33));
    assert_eq!(vgic.dist_write(0x40, 2, 33), Kick::one(0));
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), None);
    cpus[0].end(33);
    assert!(!cpus[0].maintenance());
    assert_eq!(cpus[0].acknowledge(), Some(33));
}

/// The controller cannot know whether the guest took the first edge already; it must not lose the second.
#[test]
fn an_edge_after_an_unseen_acknowledgement_is_not_lost() {
    let (vgic, mut cpus) = booted(1, 4);
    make_edge(&vgic, 1);
    let _ = enable(&vgic, 1) | spi(&vgic, 33, true);
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), Some(33));
    cpus[0].end(33);
    let _ = spi(&vgic, 33, false);
    assert_eq!(spi(&vgic, 33, true), Kick::one(0));
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), Some(33));
}

#[test]
fn more_pending_than_list_registers() {
    let (vgic, mut cpus) = booted(1, 4);
    for index in 0..9u64 {
        let _ = vgic.dist_write(0x420 + index, 1, 0xf0 - 8 * index);
        let _ = spi(&vgic, 32 + index as u32, true) | enable(&vgic, index as u32);
    }
    let flush = cpus[0].flush(&vgic);
    assert_eq!((flush.write, flush.underflow, flush.overflow), (4, true, false));
    assert_ne!(cpus[0].image().hcr & Hcr::NPIE, 0);
    for index in (0..9).rev() {
        assert_eq!(cpus[0].acknowledge(), Some(32 + index));
        let _ = spi(&vgic, 32 + index, false);
        cpus[0].end(32 + index);
        let _ = cpus[0].settle(&vgic);
    }
    assert_eq!(cpus[0].image().hcr, Hcr::EN | Hcr::TDIR, "nothing to ask for any more");
}

/// Pending interrupts of a group that the guest masks must not keep the others out.
#[test]
fn a_masked_group_does_not_fill_the_list_registers() {
    let (vgic, mut cpus) = booted(1, 4);
    cpus[0].set_groups(0b10);
    let _ = vgic.dist_write(0x084, 4, 1 << 6);
    for index in 0..7u64 {
        let _ = vgic.dist_write(0x420 + index, 1, if index == 6 { 0xe0 } else { 0x10 });
        let _ = spi(&vgic, 32 + index as u32, true) | enable(&vgic, index as u32);
    }
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), Some(38));
    cpus[0].set_groups(0b11);
    assert!(cpus[0].maintenance(), "the masked group is enabled now, and more urgent");
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), Some(32));
}

#[test]
fn rerouted_while_pending_and_while_active() {
    let (vgic, mut cpus) = booted(2, 4);
    let _ = spi(&vgic, 33, true) | enable(&vgic, 1);
    let _ = cpus[0].settle(&vgic);
    assert_eq!(vgic.dist_write(0x6108, 8, 1), Kick::one(0), "who has it gives it back first");
    assert_eq!(cpus[0].settle(&vgic), Kick::one(1));
    assert_eq!(cpus[0].acknowledge(), None);
    let _ = cpus[1].settle(&vgic);
    assert_eq!(cpus[1].acknowledge(), Some(33));
    let _ = vgic.dist_write(0x6108, 8, 0);
    assert_eq!((cpus[1].settle(&vgic), cpus[0].settle(&vgic)), (Kick::NONE, Kick::NONE));
    assert_eq!(cpus[0].acknowledge(), None, "active elsewhere");
    cpus[1].end(33);
    assert_eq!(cpus[1].settle(&vgic), Kick::one(0));
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), Some(33));
}

#[test]
fn one_of_n_goes_to_who_is_awake_in_turn() {
    let (vgic, mut cpus) = booted(4, 4);
    make_edge(&vgic, 1);
    let _ = vgic.redist_write(2, 0x14, 4, 2);
    let _ = vgic.dist_write(0x6108, 8, 1 << 31) | enable(&vgic, 1);
    let mut turns = Vec::new();
    for _ in 0..6 {
        let kick = vgic.dist_write(0x40, 4, 33);
        let vcpu = kick.iter().next().expect("someone");
        assert_eq!(kick, Kick::one(vcpu), "exactly one");
        let _ = cpus[vcpu].settle(&vgic);
        assert_eq!(cpus[vcpu].acknowledge(), Some(33));
        cpus[vcpu].end(33);
        let _ = cpus[vcpu].flush(&vgic);
        turns.push(vcpu);
    }
    for vcpu in [0, 1, 3] {
        assert_eq!(turns.iter().filter(|&&turn| turn == vcpu).count(), 2, "{turns:?}");
    }
    let first = vgic.dist_write(0x40, 4, 33).iter().next().expect("someone");
    let second = vgic.redist_write(first, 0x14, 4, 2);
    assert!(!second.is_empty() && !second.contains(first) && !second.contains(2), "handed on");
}

#[test]
fn sgis_reach_whom_they_name() {
    let (vgic, _) = booted(4, 4);
    let send = |value| vgic.sgi(1, SgiRegister::Sgi1r, value);
    assert_eq!(send(1 << 40), Kick::one(0) | Kick::one(2) | Kick::one(3));
    assert_eq!(send(1 << 24 | 0b1010), Kick::one(1) | Kick::one(3), "oneself too, if named");
    for nowhere in [1 << 16, 1 << 32, 1 << 48, 1 << 44] {
        assert_eq!(send(nowhere | 2 << 24 | 0b1111), Kick::NONE);
    }
    assert_eq!(send(2 << 24 | 0xfff0), Kick::NONE);
    assert_eq!(vgic.sgi(1, SgiRegister::Sgi0r, 3 << 24 | 1), Kick::NONE, "all are in Group 1");
    let _ = vgic.redist_write(0, SGI_BASE + 0x80, 4, !(1 << 3));
    assert_eq!(vgic.sgi(1, SgiRegister::Sgi0r, 3 << 24 | 1), Kick::one(0));
}

#[test]
fn group_zero_is_loaded_as_such() {
    let (vgic, mut cpus) = booted(1, 4);
    let _ = vgic.dist_write(0x084, 4, 0) | enable(&vgic, 1) | spi(&vgic, 33, true);
    let _ = cpus[0].settle(&vgic);
    let register = ListRegister::decode(cpus[0].image().lr[0]);
    let expected = ListRegister { state: State::Pending, group: Group::Zero, priority: 0xa0, eoi: true, intid: 33 };
    assert_eq!(register, expected);
}

#[test]
fn asking_for_live_state_makes_the_next_answer_newer() {
    let (vgic, mut cpus) = booted(2, 4);
    let _ = spi(&vgic, 33, true) | enable(&vgic, 1);
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), Some(33));
    assert_eq!(vgic.dist_read(0x304, 4), (0, Kick::one(0)), "vCPU 0 has not exited since");
    let _ = cpus[0].settle(&vgic);
    assert_eq!(vgic.dist_read(0x304, 4).0, 2);
    // Another vCPU clears it: the holder's list register follows.
    assert_eq!(vgic.dist_write(0x384, 4, 2), Kick::one(0));
    assert_eq!(vgic.dist_read(0x304, 4).0, 0);
    let _ = spi(&vgic, 33, false);
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].image().live(), 0);
}

#[test]
fn active_beyond_the_list_registers_end_in_order() {
    let (vgic, mut cpus) = booted(1, 2);
    let nested = [0xc0u64, 0xa0, 0x80, 0x60, 0x40];
    for (index, priority) in (0u64..).zip(nested) {
        let _ = vgic.dist_write(0x420 + index, 1, priority);
        let _ = spi(&vgic, 32 + index as u32, true) | enable(&vgic, index as u32);
        let _ = cpus[0].settle(&vgic);
        assert_eq!(cpus[0].acknowledge(), Some(32 + index as u32));
        let _ = spi(&vgic, 32 + index as u32, false);
    }
    // The order is that of acknowledgement, whatever the priority is now.
    let _ = vgic.dist_write(0x420, 1, 0);
    assert!(cpus[0].flush(&vgic).overflow);
    for intid in [36, 35, 34] {
        cpus[0].end(intid);
    }
    assert!(cpus[0].maintenance());
    let _ = cpus[0].sync(&vgic);
    assert_eq!(vgic.dist_read(0x304, 4), (0b11, Kick::NONE));
    let _ = cpus[0].settle(&vgic);
    cpus[0].end(33);
    cpus[0].end(32);
    let _ = cpus[0].sync(&vgic);
    assert_eq!(vgic.dist_read(0x304, 4), (0, Kick::NONE));
}

/// One SPI active and pending again: `33`, an edge, handled at priority 0xA0.
fn active_and_pending(cpus: &mut [Cpu], vgic: &Vgic) {
    make_edge(vgic, 1);
    let _ = enable(vgic, 1) | vgic.dist_write(0x40, 4, 33);
    let _ = cpus[0].settle(vgic);
    assert_eq!(cpus[0].acknowledge(), Some(33));
    let _ = vgic.dist_write(0x40, 4, 33);
    let _ = cpus[0].settle(vgic);
}

#[test]
fn pending_again_does_not_overtake_what_found_no_list_register() {
    let (vgic, mut cpus) = booted(1, 2);
    active_and_pending(&mut cpus, &vgic);
    let _ = vgic.dist_write(0xc08, 4, u64::from(u32::MAX));
    for (index, priority) in [(2u64, 0x20), (3, 0x30), (4, 0x40)] {
        let _ = vgic.dist_write(0x420 + index, 1, priority);
        let _ = enable(&vgic, index as u32) | vgic.dist_write(0x40, 4, 32 + index);
    }
    let _ = cpus[0].settle(&vgic);
    // The handler ran with interrupts masked; hardware asks for an exit before the wrong one can be taken.
    cpus[0].end(33);
    for expected in [34, 35, 36, 33] {
        let _ = cpus[0].settle(&vgic);
        assert_eq!(cpus[0].acknowledge(), Some(expected));
        cpus[0].end(expected);
    }
}

#[test]
fn pending_again_at_a_new_priority() {
    let (vgic, mut cpus) = booted(1, 4);
    active_and_pending(&mut cpus, &vgic);
    let _ = vgic.dist_write(0x421, 1, 0x20) | vgic.dist_write(0x422, 1, 0x60);
    let _ = spi(&vgic, 34, true) | enable(&vgic, 2);
    let _ = cpus[0].settle(&vgic);
    cpus[0].end(33);
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), Some(33), "0x20 before 0x60");
}

#[test]
fn pending_again_and_rerouted() {
    let (vgic, mut cpus) = booted(2, 4);
    active_and_pending(&mut cpus, &vgic);
    let _ = vgic.dist_write(0x6108, 8, 1);
    let _ = cpus[0].settle(&vgic);
    cpus[0].end(33);
    assert_eq!(cpus[0].acknowledge(), None, "not ours any more");
    assert_eq!(cpus[0].settle(&vgic), Kick::one(1));
    let _ = cpus[1].settle(&vgic);
    assert_eq!(cpus[1].acknowledge(), Some(33));
}

/// Software may take the active state away and put it back; the guest's end of interrupt must still find it.
#[test]
fn active_state_written_back_is_ended() {
    let (vgic, mut cpus) = booted(1, 4);
    let _ = spi(&vgic, 33, true) | enable(&vgic, 1);
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), Some(33));
    let _ = spi(&vgic, 33, false);
    let _ = cpus[0].sync(&vgic) | vgic.dist_write(0x384, 4, 2);
    let _ = cpus[0].settle(&vgic);
    let _ = cpus[0].sync(&vgic) | vgic.dist_write(0x304, 4, 2);
    let _ = cpus[0].settle(&vgic);
    cpus[0].end(33);
    let _ = cpus[0].sync(&vgic);
    assert_eq!(vgic.dist_read(0x304, 4), (0, Kick::NONE));
}

/// An end that found nothing ends nothing, and not what became active since.
#[test]
fn an_end_of_nothing_ends_nothing() {
    let (vgic, mut cpus) = booted(1, 4);
    let _ = spi(&vgic, 33, true) | enable(&vgic, 1);
    let _ = cpus[0].settle(&vgic);
    assert_eq!(cpus[0].acknowledge(), Some(33));
    let _ = spi(&vgic, 33, false);
    let _ = cpus[0].sync(&vgic) | vgic.dist_write(0x384, 4, 2);
    let _ = cpus[0].settle(&vgic);
    cpus[0].end(33);
    // Someone else makes it active, before vCPU 0 has exited.
    let _ = vgic.dist_write(0x304, 4, 4);
    let _ = cpus[0].flush(&vgic);
    assert_eq!(vgic.dist_read(0x304, 4).0, 4);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn list_registers_decode_what_they_encode(
        state in 0usize..4, one: bool, priority: u8, eoi: bool, intid: u32,
    ) {
        let state = [State::Inactive, State::Pending, State::Active, State::ActivePending][state];
        let register = ListRegister { state, group: if one { Group::One } else { Group::Zero }, priority, eoi, intid };
        prop_assert_eq!(ListRegister::decode(register.encode()), register);
        let value = register.encode();
        prop_assert_eq!(value >> 62 & 1 != 0, state.is_pending());
        prop_assert_eq!(value >> 63 != 0, state.is_active());
        prop_assert_eq!(value & 0x1f00_fdff_0000_0000 & !(1 << 60), 0, "reserved bits and HW");
    }
}

#[test]
fn vmcr_fields() {
    let vmcr = Vmcr(0xf0 << 24 | 1 << 9 | 2);
    assert_eq!((vmcr.priority_mask(), vmcr.splits_deactivation()), (0xf0, true));
    assert!(vmcr.is_enabled(Group::One) && !vmcr.is_enabled(Group::Zero));
    assert!(vmcr.signals(Group::One, 0xe8) && !vmcr.signals(Group::One, 0xf0) && !vmcr.signals(Group::Zero, 0));
}

#[test]
fn the_image_follows_the_hardware_that_it_is_for() {
    let image = ListRegisters::new(vtr(4));
    assert_eq!((image.implemented(), image.live()), (4, 0));
    assert_eq!(ListRegisters::new(u64::MAX).implemented(), 16, "never more than there can be");
}
