//! The walk against guests that are built level by level, so that what it must say is known without reading an entry.

use std::collections::HashMap;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

/// Memory of the guest, by address. Loads count.
#[derive(Default)]
struct Guest {
    words: HashMap<u64, u64>,
    loads: usize,
    /// Flips a bit before each of so many exchanges, as another CPU would.
    meddling: usize,
}

impl Tables for Guest {
    type Error = core::convert::Infallible;

    fn load(&mut self, at: Gpa, width: Width) -> Result<u64, Self::Error> {
        assert_eq!(at.get() % width.bytes(), 0);
        self.loads += 1;
        Ok(self.words.get(&at.get()).copied().unwrap_or(0))
    }

    fn compare_exchange(&mut self, at: Gpa, _: Width, current: u64, new: u64) -> Result<bool, Self::Error> {
        let word = self.words.entry(at.get()).or_insert(0);
        if self.meddling > 0 {
            self.meddling -= 1;
            *word ^= 1 << 9;
        }
        let same = *word == current;
        if same {
            *word = new;
        }
        Ok(same)
    }
}

/// One level of a way: what its entry allows.
#[derive(Clone, Copy, Debug)]
struct Gate {
    user: bool,
    write: bool,
    execute: bool,
}

/// A way through the tables, as it was built.
#[derive(Clone, Debug)]
struct Way {
    mode: Mode,
    /// Level of the page: 1, 2 or 3.
    last: u8,
    gates: Vec<Gate>,
    key: u8,
    address: u64,
    frame: u64,
}

const ROOT: u64 = 0x10_0000;
const PHYSICAL_BITS: u8 = 40;

impl Way {
    fn shift(&self, level: u8) -> u32 {
        12 + u32::from(level - 1) * if self.mode == Mode::Bits32 { 10 } else { 9 }
    }

    /// The first level whose entry lies in memory.
    fn first(&self) -> u8 {
        match self.mode {
            Mode::Bits32 | Mode::Pae => 2,
            Mode::Level4 => 4,
            Mode::Level5 => 5,
            Mode::Off => unreachable!(),
        }
    }

    fn at(&self, level: u8) -> u64 {
        let (bits, width) = if self.mode == Mode::Bits32 { (10, 4) } else { (9, 8) };
        let table = ROOT + u64::from(self.first() - level) * 0x1000;
        table + (self.address >> self.shift(level) & ((1 << bits) - 1)) * width
    }

    fn page(&self) -> u64 {
        let size = 1u64 << self.shift(self.last);
        let most = if self.mode == Mode::Bits32 && self.last == 1 { 1 << 32 } else { 1u64 << PHYSICAL_BITS };
        self.frame % most / size * size
    }

    fn build(&self) -> (Guest, [u64; 4]) {
        let mut guest = Guest::default();
        for (level, gate) in (self.last..=self.first()).rev().zip(&self.gates) {
            let mut raw = 1 | u64::from(gate.write) << 1 | u64::from(gate.user) << 2;
            if self.mode != Mode::Bits32 {
                raw |= u64::from(!gate.execute) << 63;
            }
            raw |= match level == self.last {
                false => ROOT + u64::from(self.first() - level + 1) * 0x1000,
                true if level == 1 => self.page(),
                true if self.mode == Mode::Bits32 => 1 << 7 | self.page() & 0xffff_ffff | self.page() >> 32 << 13,
                true => 1 << 7 | self.page(),
            };
            if level == self.last && matches!(self.mode, Mode::Level4 | Mode::Level5) {
                raw |= u64::from(self.key) << 59;
            }
            guest.words.insert(self.at(level), raw);
        }
        let mut pointers = [0; 4];
        pointers[(self.address >> 30 & 3) as usize] = ROOT | 1;
        (guest, pointers)
    }

    fn regime(&self, controls: Controls, pkru: u32, pointers: [u64; 4]) -> Regime {
        Regime { mode: self.mode, root: ROOT, pointers, controls, pkru, physical_bits: PHYSICAL_BITS }
    }
}

/// What the SDM's section 4.6 says, rule by rule.
fn permitted(way: &Way, controls: Controls, pkru: u32, request: Request) -> (bool, bool) {
    let user_page = way.gates.iter().all(|gate| gate.user);
    let writable = way.gates.iter().all(|gate| gate.write);
    let no_execute = controls.contains(Controls::NO_EXECUTE) && way.mode != Mode::Bits32;
    let fetchable = !no_execute || way.gates.iter().all(|gate| gate.execute);
    let wp = controls.contains(Controls::WRITE_PROTECT);
    let smap = controls.contains(Controls::NO_SUPERVISOR_ACCESS);
    let smep = controls.contains(Controls::NO_SUPERVISOR_FETCH);
    let rights = match (request.user, request.kind, user_page) {
        (false, Kind::Read, false) => true,
        (false, Kind::Read, true) => !smap || request.by_leave,
        (false, Kind::Write, false) => !wp || writable,
        (false, Kind::Write, true) => (!smap || request.by_leave) && (!wp || writable),
        (false, Kind::Fetch, false) => fetchable,
        (false, Kind::Fetch, true) => !smep && fetchable,
        (true, _, false) => false,
        (true, Kind::Read, true) => true,
        (true, Kind::Write, true) => writable,
        (true, Kind::Fetch, true) => fetchable,
    };
    let long = matches!(way.mode, Mode::Level4 | Mode::Level5);
    let key = if long { way.key } else { 0 };
    let keyed = long && controls.contains(Controls::PROTECTION_KEYS) && user_page && request.kind != Kind::Fetch && {
        let (ad, wd) = (pkru >> (2 * key) & 1 == 1, pkru >> (2 * key + 1) & 1 == 1);
        ad || wd && request.kind == Kind::Write && (request.user || wp)
    };
    (rights, keyed)
}

fn ways() -> impl Strategy<Value = Way> {
    let gate =
        (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(|(user, write, execute)| Gate { user, write, execute });
    let modes = prop::sample::select(std::vec![Mode::Bits32, Mode::Pae, Mode::Level4, Mode::Level5]);
    (modes, 1u8..=3, prop::collection::vec(gate, 5), 0u8..16, any::<u64>(), any::<u64>()).prop_map(
        |(mode, last, gates, key, address, frame)| {
            let last = last.min(if matches!(mode, Mode::Level4 | Mode::Level5) { 3 } else { 2 });
            let address = match mode {
                Mode::Level4 => ((address << 16) as i64 >> 16) as u64,
                Mode::Level5 => ((address << 7) as i64 >> 7) as u64,
                _ => address & 0xffff_ffff,
            };
            let mut way = Way { mode, last, gates, key, address, frame };
            way.gates.truncate(usize::from(way.first() - last) + 1);
            way
        },
    )
}

fn requests() -> impl Strategy<Value = Request> {
    let kinds = prop::sample::select(std::vec![Kind::Read, Kind::Write, Kind::Fetch]);
    (kinds, any::<bool>(), any::<bool>()).prop_map(|(kind, user, by_leave)| Request { kind, user, by_leave })
}

/// Any controls that let the way be walked.
fn controls() -> impl Strategy<Value = Controls> {
    any::<u16>().prop_map(|bits| Controls::from_bits_truncate(bits) | Controls::LARGE_PAGES | Controls::GIGABYTE_PAGES)
}

/// The way without bit 63 where that is not enabled.
fn fitting(mut way: Way, controls: Controls) -> Way {
    if !controls.contains(Controls::NO_EXECUTE) {
        way.gates.iter_mut().for_each(|gate| gate.execute = true);
    }
    way
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn a_way_that_was_built_is_walked(way in ways(), request in requests(), controls in controls(), pkru: u32) {
        let way = fitting(way, controls);
        let (mut guest, pointers) = way.build();
        let before = guest.words.clone();
        let regime = way.regime(controls, pkru, pointers);
        let (rights, keyed) = permitted(&way, controls, pkru, request);
        match walk(&mut guest, &regime, way.address, request) {
            Ok(found) => {
                prop_assert!(rights && !keyed);
                let size = 1u64 << way.shift(way.last);
                prop_assert_eq!(found.gpa.get(), way.page() + way.address % size);
                prop_assert_eq!(1u64 << found.page_shift, size);
                prop_assert_eq!(found.user, way.gates.iter().all(|gate| gate.user));
                prop_assert_eq!(found.write, way.gates.iter().all(|gate| gate.write));
                prop_assert_eq!(found.dirty, request.kind == Kind::Write);
                // Every entry is accessed, the page's is dirty after a store, and nothing else has changed.
                for level in way.last..=way.first() {
                    let flags = 1 << 5 | if level == way.last && request.kind == Kind::Write { 1 << 6 } else { 0 };
                    prop_assert_eq!(guest.words[&way.at(level)], before[&way.at(level)] | flags);
                }
            }
            Err(WalkError::Fault(code)) => {
                prop_assert!(!rights || keyed);
                prop_assert!(code.contains(PageFault::PRESENT) && !code.contains(PageFault::RESERVED));
                prop_assert_eq!(code.contains(PageFault::WRITE), request.kind == Kind::Write);
                prop_assert_eq!(code.contains(PageFault::USER), request.user);
                prop_assert_eq!(code.contains(PageFault::KEY), keyed);
                prop_assert_eq!(guest.words, before, "a fault sets no flag");
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn a_hole_on_the_way_is_absence(way in ways(), request in requests(), controls in controls(), hole: prop::sample::Index) {
        let way = fitting(way, controls);
        let (mut guest, pointers) = way.build();
        let level = way.last + hole.index(way.gates.len()) as u8;
        *guest.words.get_mut(&way.at(level)).unwrap() &= !1;
        let regime = way.regime(controls, 0, pointers);
        match walk(&mut guest, &regime, way.address, request) {
            Err(WalkError::Fault(code)) => {
                prop_assert!(!code.intersects(PageFault::PRESENT | PageFault::RESERVED | PageFault::KEY));
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }

    #[test]
    fn no_memory_makes_a_walk_fail_otherwise(
        raws in prop::collection::vec(any::<u64>(), 5), way in ways(), request in requests(), bits: u16, pkru: u32, physical_bits in 0u8..=64,
    ) {
        // Entries of any content: the walk ends, and leaves the guest's physical bits nowhere.
        let (mut guest, pointers) = way.build();
        for (level, raw) in (way.last..=way.first()).zip(raws) {
            guest.words.insert(way.at(level), raw);
        }
        let regime = Regime { physical_bits, ..way.regime(Controls::from_bits_truncate(bits), pkru, pointers) };
        if let Ok(found) = walk(&mut guest, &regime, way.address, request) {
            prop_assert!(found.gpa.get() >> physical_bits.clamp(32, 52) == 0);
        }
        prop_assert!(guest.loads <= DEEPEST + 1);
    }
}

const READ: Request = Request { kind: Kind::Read, user: false, by_leave: false };

fn way(mode: Mode, last: u8) -> Way {
    let gate = Gate { user: true, write: true, execute: true };
    let mut way = Way { mode, last, gates: std::vec![gate; 5], key: 0, address: 0x40_3000, frame: 0x12_3456_7000 };
    way.gates.truncate(usize::from(way.first() - last) + 1);
    way
}

const EVERYTHING: Controls = Controls::LARGE_PAGES.union(Controls::GIGABYTE_PAGES).union(Controls::NO_EXECUTE);

/// Bits that must be zero, by mode and by level of the page and of the entry (SDM tables 4-5 to 4-20), 40 physical bits.
#[test]
fn reserved_bits_are_refused_and_others_are_not() {
    let narrow_large = 1 << 21;
    let above = 0x000f_ff00_0000_0000u64;
    let above_pae = 0x7fff_ff00_0000_0000u64;
    for (mode, last, level, reserved) in [
        (Mode::Bits32, 1, 1, 0),
        (Mode::Bits32, 1, 2, 0),
        (Mode::Bits32, 2, 2, narrow_large),
        (Mode::Pae, 1, 1, above_pae),
        (Mode::Pae, 1, 2, above_pae),
        (Mode::Pae, 2, 2, above_pae | 0x1f_e000),
        (Mode::Level4, 1, 1, above),
        (Mode::Level4, 1, 3, above),
        (Mode::Level4, 2, 2, above | 0x1f_e000),
        (Mode::Level4, 3, 3, above | 0x3fff_e000),
        (Mode::Level4, 1, 4, above | 1 << 7),
        (Mode::Level5, 1, 5, above | 1 << 7),
    ] {
        let way = way(mode, last);
        for bit in 0..if mode == Mode::Bits32 { 32 } else { 64 } {
            // The bits that lead elsewhere: present, large, the address.
            let leads =
                bit == 0 || bit == 7 && reserved >> 7 & 1 == 0 || (12..40).contains(&bit) && reserved >> bit & 1 == 0;
            if leads {
                continue;
            }
            let (mut guest, pointers) = way.build();
            *guest.words.get_mut(&way.at(level)).unwrap() |= 1 << bit;
            let answer = walk(&mut guest, &way.regime(EVERYTHING, 0, pointers), way.address, READ);
            let refused = Err(WalkError::Fault(PageFault::PRESENT | PageFault::RESERVED));
            assert_eq!(
                answer == refused,
                reserved >> bit & 1 == 1,
                "{mode:?} page of level {last}, entry of {level}, bit {bit}"
            );
        }
    }
}

#[test]
fn bit_63_is_reserved_until_it_is_enabled() {
    for mode in [Mode::Pae, Mode::Level4, Mode::Level5] {
        let way = way(mode, 1);
        let (mut guest, pointers) = way.build();
        *guest.words.get_mut(&way.at(1)).unwrap() |= 1 << 63;
        let without = way.regime(EVERYTHING - Controls::NO_EXECUTE, 0, pointers);
        let refused = Err(WalkError::Fault(PageFault::PRESENT | PageFault::RESERVED));
        assert_eq!(walk(&mut guest, &without, way.address, READ), refused);
        let fetch = Request { kind: Kind::Fetch, ..READ };
        let forbidden = Err(WalkError::Fault(PageFault::PRESENT | PageFault::FETCH));
        assert_eq!(walk(&mut guest, &way.regime(EVERYTHING, 0, pointers), way.address, fetch), forbidden);
    }
}

#[test]
fn large_pages_exist_where_they_are_enabled() {
    let narrow = way(Mode::Bits32, 2);
    let (mut guest, pointers) = narrow.build();
    let found = walk(&mut guest, &narrow.regime(EVERYTHING, 0, pointers), narrow.address, READ).unwrap();
    assert_eq!((found.page_shift, found.gpa.get()), (22, 0x12_3440_3000), "bits 39:32 from bits 20:13");
    // Without PSE the bit is ignored: the entry is a table's, whose entries are not there.
    let without = narrow.regime(EVERYTHING - Controls::LARGE_PAGES, 0, pointers);
    assert_eq!(walk(&mut guest, &without, narrow.address, READ), Err(WalkError::Fault(PageFault::empty())));
    let huge = way(Mode::Level4, 3);
    let (mut guest, pointers) = huge.build();
    let without = huge.regime(EVERYTHING - Controls::GIGABYTE_PAGES, 0, pointers);
    let refused = Err(WalkError::Fault(PageFault::PRESENT | PageFault::RESERVED));
    assert_eq!(walk(&mut guest, &without, huge.address, READ), refused);
}

#[test]
fn addresses_outside_the_canonical_ranges_are_no_page_fault() {
    for (mode, good, bad) in [
        (Mode::Level4, 0x0000_7fff_ffff_ffff, 0x0000_8000_0000_0000),
        (Mode::Level4, 0xffff_8000_0000_0000, 0xffff_7fff_ffff_ffff),
        (Mode::Level5, 0x00ff_ffff_ffff_ffff, 0x0100_0000_0000_0000),
        (Mode::Level5, 0xff00_0000_0000_0000, 0xfeff_ffff_ffff_ffff),
    ] {
        let (mut guest, regime) = (Guest::default(), way(mode, 1).regime(EVERYTHING, 0, [0; 4]));
        assert_eq!(walk(&mut guest, &regime, good, READ), Err(WalkError::Fault(PageFault::empty())));
        assert_eq!(walk(&mut guest, &regime, bad, READ), Err(WalkError::NonCanonical));
    }
}

#[test]
fn another_cpu_is_outrun_or_waited_for() {
    for mode in [Mode::Bits32, Mode::Pae, Mode::Level4, Mode::Level5] {
        let way = way(mode, 1);
        let (mut guest, pointers) = way.build();
        let regime = way.regime(EVERYTHING, 0, pointers);
        guest.meddling = TRIES - 1;
        assert!(walk(&mut guest, &regime, way.address, READ).is_ok());
        let (mut guest, _) = way.build();
        guest.meddling = usize::MAX;
        assert_eq!(walk(&mut guest, &regime, way.address, READ), Err(WalkError::Contended));
    }
}

#[test]
fn without_paging_an_address_is_itself() {
    let regime = Regime { mode: Mode::Off, ..way(Mode::Level4, 1).regime(Controls::empty(), 0, [0; 4]) };
    let found = walk(&mut Guest::default(), &regime, 0x1_2345_6789, READ).unwrap();
    assert_eq!((found.gpa.get(), found.write), (0x2345_6789, true));
}

#[test]
fn modes_follow_the_registers() {
    let (pg, pae, la57, lma) = (1 << 31, 1 << 5, 1 << 12, 1 << 10);
    for (cr0, cr4, efer, mode) in [
        (0, pae, lma, Mode::Off),
        (pg, 0, 0, Mode::Bits32),
        (pg, pae, 0, Mode::Pae),
        (pg, pae, lma, Mode::Level4),
        (pg, pae | la57, lma, Mode::Level5),
        (pg, pae | la57, 0, Mode::Pae),
    ] {
        assert_eq!(Mode::of(cr0, cr4, efer), mode);
    }
}

#[test]
fn pointers_are_checked_when_they_are_loaded() {
    assert!(pointer_is_valid(0, 40) && pointer_is_valid(!1, 40), "what is not present is not looked at");
    assert!(pointer_is_valid(0xff_ffff_f001, 40) && pointer_is_valid(0x1000 | 0b1_1001 | 7 << 9, 40));
    for bit in [1, 2, 5, 6, 7, 8, 40, 51, 52, 63] {
        assert!(!pointer_is_valid(1 | 1 << bit, 40), "bit {bit}");
    }
    let absent = Regime { pointers: [0; 4], ..way(Mode::Pae, 1).regime(EVERYTHING, 0, [0; 4]) };
    assert_eq!(walk(&mut Guest::default(), &absent, 0, READ), Err(WalkError::Fault(PageFault::empty())));
}
