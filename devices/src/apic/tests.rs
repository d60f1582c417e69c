//! The controllers by the manual's rules, against naive sets, and with vCPUs on threads.

use super::timer::LEAST_PERIOD;
use super::*;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::vec::Vec;

extern crate std;

const TPR: u64 = 0x80;
const EOI: u64 = 0xb0;
const SVR: u64 = 0xf0;
const ESR: u64 = 0x280;
const ICR: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_ERROR: u64 = 0x370;
const INITIAL: u64 = 0x380;
const CURRENT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;

const CONFIG: Config = Config { vcpus: 4, io_id: 0xf0 };

/// Controllers whose local APICs are on, in flat logical mode with one bit each, and whose vCPUs have looked.
fn apic() -> Apic {
    let apic = Apic::new(CONFIG).unwrap();
    for vcpu in 0..4 {
        let _ = store(&apic, vcpu, SVR, 0x1ff);
        let _ = store(&apic, vcpu, 0xd0, 1 << (24 + vcpu));
        assert_eq!(apic.take_event(vcpu), None);
    }
    apic
}

fn store(apic: &Apic, vcpu: usize, register: u64, value: u64) -> Kick {
    apic.write(vcpu, register, 4, value, 0)
}

fn load(apic: &Apic, vcpu: usize, register: u64) -> u64 {
    apic.read(vcpu, register, 4, 0)
}

fn send(apic: &Apic, from: usize, high: u64, low: u64) -> Kick {
    let _ = store(apic, from, ICR_HIGH, high << 24);
    store(apic, from, ICR, low)
}

fn vectors(apic: &Apic) -> [Option<u8>; 4] {
    [0, 1, 2, 3].map(|vcpu| apic.pending(vcpu).map(|pending| pending.vector))
}

/// Programs an input of the I/O APIC.
fn redirect(apic: &Apic, input: u64, entry: u64) -> Kick {
    let mut kick = Kick::NONE;
    for (half, value) in [(1, entry >> 32), (0, entry & 0xffff_ffff)] {
        let _ = apic.io_write(0, 4, 0x10 + 2 * input + half);
        kick |= apic.io_write(0x10, 4, value);
    }
    kick
}

fn entry(apic: &Apic, input: u64) -> u64 {
    [0, 1]
        .map(|half| {
            let _ = apic.io_write(0, 4, 0x10 + 2 * input + half);
            apic.io_read(0x10, 4)
        })
        .iter()
        .rev()
        .fold(0, |value, half| value << 32 | half)
}

#[test]
fn an_owner_cannot_ask_for_what_cannot_be() {
    for vcpus in [0, 9] {
        let error = Apic::new(Config { vcpus, io_id: 0 }).err().unwrap();
        assert_eq!(std::format!("{error}"), std::format!("vcpus = {vcpus}: must be 1 to 8"));
    }
}

#[test]
fn commands_reach_who_is_meant() {
    let some = Some(0x40);
    #[rustfmt::skip]
    let table = [
        (2, 0x40, [None, None, some, None]),
        (0xff, 0x40, [some; 4]),
        (7, 0x40, [None; 4]),
        (0b1010, 0x840, [None, some, None, some]),
        (0, 0x4_0040, [None, some, None, None]),
        (0, 0x8_0040, [some; 4]),
        (0, 0xc_0040, [some, None, some, some]),
    ];
    for (high, low, expected) in table {
        let apic = apic();
        let kick = send(&apic, 1, high, low);
        assert_eq!(vectors(&apic), expected, "{high:#x} {low:#x}");
        for (vcpu, vector) in expected.iter().enumerate() {
            assert!(vector.is_none() || kick.contains(vcpu) && apic.needs_look(vcpu));
        }
    }
    let apic = apic();
    for vcpu in 0..4 {
        let _ = store(&apic, vcpu, 0xe0, 0x0fff_ffff);
        let _ = store(&apic, vcpu, 0xd0, [0x11, 0x12, 0x21, 0x22][vcpu] << 24);
    }
    let _ = send(&apic, 0, 0x23, 0x850);
    assert_eq!(vectors(&apic), [None, None, Some(0x50), Some(0x50)], "clusters");
    let _ = send(&apic, 0, 0xf1, 0x860);
    assert_eq!(vectors(&apic), [Some(0x60), None, Some(0x60), Some(0x50)], "the same bit of every cluster");
}

#[test]
fn priorities_nest() {
    let apic = apic();
    for vector in [0x31, 0x35, 0x52] {
        let _ = send(&apic, 1, 0, vector);
    }
    assert_eq!(apic.acknowledge(0), Some(0x52));
    assert_eq!((apic.pending(0), apic.acknowledge(0)), (None, None), "nothing above what is served");
    let _ = send(&apic, 1, 0, 0x5f);
    assert_eq!(apic.pending(0), None, "nor of its class");
    let _ = send(&apic, 1, 0, 0x60);
    assert_eq!(apic.acknowledge(0), Some(0x60));
    assert_eq!(load(&apic, 0, 0xa0), 0x60);
    let _ = store(&apic, 0, EOI, 0);
    assert_eq!(load(&apic, 0, 0xa0), 0x50);
    let _ = store(&apic, 0, EOI, 0);
    assert_eq!(apic.acknowledge(0), Some(0x5f));
    let _ = store(&apic, 0, EOI, 0);
    apic.set_tpr(0, 0x30);
    assert_eq!(apic.pending(0), Some(Pending { vector: 0x35, masked: true }));
    assert_eq!(apic.acknowledge(0), None);
    assert_eq!((load(&apic, 0, TPR), load(&apic, 0, 0xa0)), (0x30, 0x30));
    let _ = store(&apic, 0, TPR, 0x2f);
    assert_eq!([apic.acknowledge(0), apic.acknowledge(0)], [Some(0x35), None]);
}

#[test]
fn a_level_waits_for_its_end() {
    let apic = apic();
    assert_eq!(redirect(&apic, 20, 1 << 56 | 1 << 15 | 0x41), Kick::NONE);
    assert!(apic.set_input(20, true).contains(1));
    assert_eq!(entry(&apic, 20), 1 << 56 | 1 << 15 | 1 << 14 | 0x41, "remote IRR");
    assert!(apic.set_input(20, true).is_empty());
    assert_eq!(apic.acknowledge(1), Some(0x41));
    assert_eq!(load(&apic, 1, 0x1a0) & 1 << 1, 2, "TMR");
    assert!(store(&apic, 1, EOI, 0).contains(1));
    assert_eq!(apic.acknowledge(1), Some(0x41), "the line is still high");
    let _ = apic.set_input(20, false);
    let _ = store(&apic, 1, EOI, 0);
    assert_eq!((apic.acknowledge(1), entry(&apic, 20) & 1 << 14), (None, 0));
    let _ = redirect(&apic, 20, 1 << 56 | 1 << 16 | 1 << 15 | 0x41);
    assert!(apic.set_input(20, true).is_empty());
    assert!(redirect(&apic, 20, 1 << 56 | 1 << 15 | 0x41).contains(1), "a high level comes when it is unmasked");
    let _ = redirect(&apic, 20, 1 << 56 | 1 << 16 | 0x41);
    assert_eq!(entry(&apic, 20) & 1 << 14, 0, "an edge waits for nobody");
}

#[test]
fn an_edge_comes_once() {
    let apic = apic();
    let _ = apic.set_input(4, true);
    assert!(redirect(&apic, 4, 0x33).is_empty(), "an edge that was masked is lost");
    let _ = apic.set_input(4, false);
    assert!(apic.set_input(4, true).contains(0));
    assert_eq!(apic.acknowledge(0), Some(0x33));
    assert!(apic.set_input(4, true).is_empty());
    let _ = store(&apic, 0, EOI, 0);
    assert_eq!(vectors(&apic), [None; 4]);
    assert!(apic.set_input(48, true).is_empty() && apic.set_input(usize::MAX, true).is_empty());
    let _ = apic.io_write(0, 4, 1);
    assert_eq!(apic.io_read(0x10, 4), 0x2f_0011);
    let _ = apic.io_write(0, 4, 0x10 + 96);
    let _ = apic.io_write(0x10, 4, 0);
    assert_eq!(apic.io_read(0x10, 4), 0, "no input 48");
}

#[test]
fn lowest_priority_goes_to_one() {
    let apic = apic();
    for vcpu in [0, 2] {
        let _ = store(&apic, vcpu, TPR, 0x50);
    }
    let mut got = BTreeSet::new();
    for vector in 0x60..0x68 {
        let _ = redirect(&apic, 5, 0x0f << 56 | 1 << 11 | 1 << 8 | vector);
        let kick = apic.set_input(5, true) | apic.set_input(5, false);
        assert_eq!(kick.iter().count(), 1);
        got.extend(kick.iter());
    }
    assert_eq!(got, BTreeSet::from([1, 3]));
}

#[test]
fn the_others_start_by_init_and_sipi() {
    let apic = apic();
    assert_eq!([0, 1, 2, 3].map(|vcpu| apic.waits(vcpu)), [false, true, true, true]);
    let _ = send(&apic, 0, 1, 0x0_4500);
    assert_eq!([apic.take_event(1), apic.take_event(1)], [Some(Event::Init), None]);
    assert!(apic.waits(1) && load(&apic, 1, SVR) == 0xff);
    let _ = send(&apic, 0, 1, 0x0_8500);
    assert_eq!(apic.take_event(1), None, "the end of INIT's level is nothing");
    for _ in 0..2 {
        let _ = send(&apic, 0, 1, 0x0_0699);
    }
    assert_eq!(
        [apic.take_event(1), apic.take_event(1)],
        [Some(Event::Startup(0x99)), None],
        "the second SIPI is nothing"
    );
    assert!(!apic.waits(1));
    let _ = send(&apic, 0, 1, 0x400);
    assert_eq!([apic.take_event(1), apic.take_event(1)], [Some(Event::NonMaskable), None]);
    assert!(!apic.needs_look(1));
    let _ = send(&apic, 0, 0, 0x4_4500);
    assert_eq!(apic.take_event(0), None, "nobody sends itself INIT");
}

#[test]
fn wrong_vectors_and_registers_leave_their_marks() {
    let apic = apic();
    let _ = store(&apic, 0, LVT_ERROR, 0xfe);
    let _ = send(&apic, 0, 1, 0x0f);
    assert_eq!(load(&apic, 0, ESR), 0, "a store shows what has come");
    let _ = store(&apic, 0, ESR, 0);
    assert_eq!(load(&apic, 0, ESR), 1 << 5);
    assert_eq!(apic.acknowledge(0), Some(0xfe));
    let _ = (load(&apic, 0, 0x40), store(&apic, 0, 0x3f0, 0x40));
    let _ = store(&apic, 0, ESR, 0);
    assert_eq!(load(&apic, 0, ESR), 1 << 7);
    let _ = redirect(&apic, 3, 1 << 56 | 7);
    let _ = apic.set_input(3, true);
    let _ = store(&apic, 1, ESR, 0);
    assert_eq!(load(&apic, 1, ESR), 1 << 6);
    assert_eq!([load(&apic, 0, 0x84), apic.read(0, TPR, 8, 0), apic.read(0, u64::MAX, 4, 0)], [0; 3]);
    let _ = store(&apic, 0, SVR, 0xff);
    assert_eq!(load(&apic, 0, LVT_ERROR), 0x1_00fe, "off means masked");
    let _ = send(&apic, 1, 0, 0x77);
    assert_eq!(vectors(&apic)[0], None);
}

#[test]
fn x2apic_is_entered_and_left_as_the_manual_says() {
    let apic = apic();
    let on = |vcpu, value| apic.write_msr(vcpu, 0x1b, value, 0).map(drop);
    assert_eq!(apic.read_msr(0, 0x1b, 0), Ok(0xfee0_0900));
    assert_eq!(apic.read_msr(1, 0x1b, 0), Ok(0xfee0_0800));
    assert_eq!(apic.read_msr(0, 0x802, 0), Err(Refused));
    for bad in [0xfee0_0500, 0xfed0_0900, 0xfee0_0901, 1 << 52 | 0xfee0_0900] {
        assert_eq!(on(0, bad), Err(Refused), "{bad:#x}");
    }
    for vcpu in 0..4 {
        assert_eq!(on(vcpu, 0xfee0_0c00), Ok(()));
        assert_eq!(apic.read_msr(vcpu, 0x802, 0), Ok(vcpu as u64));
        assert_eq!(apic.read_msr(vcpu, 0x80d, 0), Ok(1 << vcpu));
        assert_eq!(apic.read_msr(vcpu, 0x80f, 0), Ok(0x1ff), "it kept its registers");
    }
    assert_eq!(load(&apic, 0, SVR), 0, "nothing in memory");
    assert_eq!(on(0, 0xfee0_0800), Err(Refused), "not back to memory at once");
    for msr in [0x80b, 0x80e, 0x831, 0x83f, 0x800, 0x8ff] {
        assert_eq!(apic.read_msr(0, msr, 0), Err(Refused), "{msr:#x}");
    }
    for (msr, value) in [
        (0x802, 0),
        (0x803, 0),
        (0x80a, 0),
        (0x80d, 0),
        (0x80b, 1),
        (0x828, 1),
        (0x808, 0x100),
        (0x80f, 0x1000),
        (0x832, 1 << 19),
    ] {
        assert_eq!(apic.write_msr(0, msr, value, 0), Err(Refused), "{msr:#x}");
    }
    let _ = apic.write_msr(0, 0x830, 2 << 32 | 0x44, 0).unwrap();
    let _ = apic.write_msr(0, 0x830, 0b1010 << 32 | 0x845, 0).unwrap();
    let _ = apic.write_msr(0, 0x83f, 0x46, 0).unwrap();
    assert_eq!(vectors(&apic), [Some(0x46), Some(0x45), Some(0x44), Some(0x45)]);
    let _ = apic.write_msr(0, 0x830, 0xffff_ffff << 32 | 0x47, 0).unwrap();
    assert_eq!(vectors(&apic), [Some(0x47); 4]);
    assert_eq!(apic.acknowledge(3), Some(0x47));
    assert!(apic.write_msr(3, 0x80b, 0, 0).is_ok());
    assert_eq!(apic.acknowledge(3), Some(0x45));
    assert_eq!(on(0, 0xfee0_0000), Ok(()));
    assert_eq!(on(0, 0xfee0_0c00), Err(Refused), "from off to memory first");
    assert_eq!(on(0, 0xfee0_0800), Ok(()));
    assert_eq!(load(&apic, 0, SVR), 0xff);
}

#[test]
fn the_timer_counts_once_and_again() {
    let apic = apic();
    let at = |register, value, now| {
        let _ = apic.write(0, register, 4, value, now);
    };
    at(DIVIDE, 0b0011, 0);
    at(LVT_TIMER, 0xec, 0);
    at(INITIAL, 10_000, 5);
    let period = 160_000;
    assert_eq!(apic.deadline(0), Some(5 + period));
    assert_eq!(apic.read(0, CURRENT, 4, 5 + period / 2), 5_000);
    assert!(apic.expire(0, 4 + period).is_empty() && apic.expire(0, 5 + period).contains(0));
    assert_eq!((apic.acknowledge(0), apic.deadline(0), apic.read(0, CURRENT, 4, 6 + period)), (Some(0xec), None, 0));
    at(EOI, 0, 0);
    at(LVT_TIMER, 0x2_00ec, 0);
    at(INITIAL, 10_000, 0);
    assert!(apic.expire(0, 3 * period + 1).contains(0), "three are one");
    assert_eq!(apic.deadline(0), Some(4 * period));
    at(DIVIDE, 0b1011, 3 * period + period / 2);
    assert_eq!(apic.read(0, CURRENT, 4, 3 * period + period / 2), 5_000, "the count goes on");
    at(INITIAL, 1, 0);
    assert!(apic.expire(0, 1 << 30).contains(0));
    assert_eq!(apic.deadline(0), Some((1 << 30) + LEAST_PERIOD), "no storm");
    at(LVT_TIMER, 0x3_00ec, 1 << 30);
    assert_eq!((apic.deadline(0), apic.expire(0, 1 << 40)), (None, Kick::NONE), "masked");
    at(INITIAL, 0, 1 << 40);
    assert_eq!(apic.deadline(0), None);
    let shifts = [0b0000, 0b0001, 0b0010, 0b0011, 0b1000, 0b1001, 0b1010, 0b1011];
    at(LVT_TIMER, 0xec, 0);
    for (divide, divisor) in shifts.into_iter().zip([2, 4, 8, 16, 32, 64, 128, 1]) {
        at(DIVIDE, divide, 0);
        at(INITIAL, 1000, 0);
        assert_eq!(apic.deadline(0), Some(1000 * divisor));
    }
}

#[test]
fn the_deadline_is_a_moment() {
    let apic = apic();
    let arm = |value, now| apic.write_msr(0, 0x6e0, value, now).map(drop);
    assert_eq!((arm(100, 0), apic.deadline(0)), (Ok(()), None), "only in its mode");
    let _ = apic.write(0, LVT_TIMER, 4, 0x4_00ec, 0);
    assert_eq!((arm(100, 0), apic.deadline(0), apic.read_msr(0, 0x6e0, 50)), (Ok(()), Some(100), Ok(100)));
    assert!(apic.expire(0, 100).contains(0));
    assert_eq!((apic.read_msr(0, 0x6e0, 101), apic.acknowledge(0)), (Ok(0), Some(0xec)));
    let _ = apic.write(0, EOI, 4, 0, 101);
    assert_eq!(arm(99, 102), Ok(()));
    assert_eq!((apic.deadline(0), apic.acknowledge(0)), (None, Some(0xec)), "what has passed comes at once");
    let _ = apic.write(0, INITIAL, 4, 5, 102);
    assert_eq!(apic.deadline(0), None);
    assert_eq!((arm(1000, 200), arm(0, 201), apic.deadline(0)), (Ok(()), Ok(()), None));
    let _ = (arm(1000, 200), apic.write(0, LVT_TIMER, 4, 0xec, 202));
    assert_eq!(apic.deadline(0), None, "another mode disarms");
}

#[test]
fn a_saved_machine_goes_on_and_a_strangers_is_checked() {
    let apic = apic();
    let _ = redirect(&apic, 20, 1 << 56 | 1 << 15 | 0x41);
    let _ = apic.set_input(20, true);
    let _ = apic.write(0, LVT_TIMER, 4, 0x4_00ec, 0);
    let _ = apic.write_msr(0, 0x6e0, 5000, 0);
    let _ = send(&apic, 0, 2, 0x4500);
    let saved = serde_json::to_value(apic.save().unwrap()).unwrap();
    let load = |value: &serde_json::Value| serde_json::from_value::<Saved>(value.clone()).unwrap().load(CONFIG);
    for other in [load(&saved).unwrap(), apic.fork().unwrap()] {
        assert!(other.needs_look(1));
        assert_eq!(other.acknowledge(1), Some(0x41));
        let _ = store(&other, 1, EOI, 0);
        assert_eq!(other.acknowledge(1), Some(0x41), "the line is high here too");
        assert_eq!((other.deadline(0), other.take_event(2)), (Some(5000), Some(Event::Init)));
    }
    for (path, value, what) in [
        ("/cpus/1/id", 2, "apic.cpus.id"),
        ("/cpus/1/irr/0", 1, "vectors below 16"),
        ("/cpus/1/lvt/0", 1 << 30, "bits that a local APIC has not"),
        ("/io/entries/0/3", 1 << 14, "apic.io.entries"),
    ] {
        let mut bad = saved.clone();
        *bad.pointer_mut(path).unwrap() = value.into();
        let error = load(&bad).err().unwrap();
        assert!(std::format!("{error}").contains(what), "{path}: {error}");
    }
    assert!(serde_json::from_value::<Saved>(saved).unwrap().load(Config { vcpus: 3, io_id: 0 }).is_err());
}

/// Sets of numbers in place of registers.
#[derive(Default)]
struct Naive {
    waiting: BTreeSet<u8>,
    served: BTreeSet<u8>,
    tpr: u8,
}

impl Naive {
    fn acknowledge(&mut self) -> Option<u8> {
        let vector = *self.waiting.last()?;
        let above = |limit: u8| vector >> 4 > limit >> 4;
        if !above(self.tpr) || self.served.last().is_some_and(|served| !above(*served)) {
            return None;
        }
        self.waiting.remove(&vector);
        self.served.insert(vector);
        Some(vector)
    }
}

proptest! {
    #[test]
    fn vectors_come_and_go_as_in_naive_sets(steps in prop::collection::vec((0u8..4, any::<u8>()), 0..400)) {
        let (apic, mut naive) = (apic(), Naive::default());
        for (step, value) in steps {
            match step {
                0 if value >= 16 => {
                    let _ = send(&apic, 1, 0, value.into());
                    naive.waiting.insert(value);
                }
                1 => {
                    let _ = store(&apic, 0, EOI, 0);
                    naive.served.pop_last();
                }
                2 => {
                    let _ = store(&apic, 0, TPR, u64::from(value >> 1));
                    naive.tpr = value >> 1;
                }
                _ => prop_assert_eq!(apic.acknowledge(0), naive.acknowledge()),
            }
        }
    }

    /// No access does harm, and what is injected is never a processor's own exception.
    #[test]
    fn any_guest(
        accesses in prop::collection::vec((0u8..7, 0usize..4, any::<u16>(), any::<u64>(), any::<u64>()), 0..200),
    ) {
        let apic = apic();
        for (what, vcpu, register, value, now) in accesses {
            let kick = match what {
                0 => apic.write(vcpu, u64::from(register & 0x3f) << 4, 4, value, now),
                1 => apic.write_msr(vcpu, 0x800 + u32::from(register & 0x3f), value & 0xfff, now).unwrap_or(Kick::NONE),
                2 => apic.write_msr(vcpu, 0x1b, 0xfee0_0000 | value & 0xc00, now).unwrap_or(Kick::NONE),
                3 => apic.io_write(u64::from(register & 0x10), 4, value & 0x1ffff),
                4 => apic.set_input(usize::from(register) % 50, value & 1 != 0),
                5 => apic.write_msr(vcpu, 0x6e0, value, now).unwrap_or(Kick::NONE) | apic.expire(vcpu, now),
                _ => apic.write(vcpu, ICR, 4, value, now),
            };
            prop_assert!(kick.iter().all(|vcpu| apic.needs_look(vcpu)));
            while apic.take_event(vcpu).is_some() {}
            let pending = apic.pending(vcpu);
            if let Some(vector) = apic.acknowledge(vcpu) {
                prop_assert!(vector >= 16);
                prop_assert_eq!(pending, Some(Pending { vector, masked: false }));
            }
            let _ = (apic.deadline(vcpu), apic.read(vcpu, u64::from(register), 4, now), apic.read_msr(vcpu, register.into(), now));
        }
        let copy = apic.save().unwrap().load(CONFIG);
        prop_assert!(copy.is_ok(), "{:?}", copy.err());
    }
}

/// Letters behind vectors: whoever is told looks, and nothing is left behind.
#[test]
fn nothing_is_lost_between_threads() {
    use std::sync::atomic::{AtomicU64, Ordering};
    const LETTERS: u64 = 3_000;
    let apic = apic();
    let (mail, read) = ([const { AtomicU64::new(0) }; 3], AtomicU64::new(0));
    std::thread::scope(|scope| {
        for (sender, mail) in mail.iter().enumerate() {
            let apic = &apic;
            scope.spawn(move || {
                for _ in 0..LETTERS {
                    mail.fetch_add(1, Ordering::Release);
                    let _ = send(apic, sender + 1, 0, 0x40 + 0x10 * sender as u64);
                }
            });
        }
        // A vCPU without an end would hang the test: the runner's own limit tells.
        while read.load(Ordering::Relaxed) < 3 * LETTERS {
            if !apic.needs_look(0) {
                std::hint::spin_loop();
                continue;
            }
            assert_eq!(apic.take_event(0), None);
            while let Some(vector) = apic.acknowledge(0) {
                let letters = mail[usize::from(vector - 0x40) / 0x10].swap(0, Ordering::Acquire);
                read.fetch_add(letters, Ordering::Relaxed);
                let _ = store(&apic, 0, EOI, 0);
            }
        }
    });
    let left: Vec<u64> = mail.iter().map(|mail| mail.load(Ordering::Relaxed)).collect();
    assert_eq!(left, [0; 3]);
}
