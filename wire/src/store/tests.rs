//! A store is always what it was or what it should be, whatever a device loses; a damaged one says how.

use std::collections::BTreeMap;
use std::format;
use std::string::{String, ToString};
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

const SECTOR: usize = 512;
const BLOCKS: u64 = DATA_START + 40;

/// Random choices from a seed (SplitMix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}

/// A device that may lose every write since its last flush, sector by sector, in any order; it stops after so many steps.
#[derive(Clone)]
struct Device {
    kept: Vec<u8>,
    /// What was written to each sector since the last flush, oldest first.
    loose: BTreeMap<usize, Vec<[u8; SECTOR]>>,
    steps_left: usize,
}

/// The machine went off.
#[derive(Debug)]
struct Off;

impl Device {
    fn new() -> Self {
        let mut device =
            Self { kept: std::vec![0; (BLOCKS * BLOCK) as usize], loose: BTreeMap::new(), steps_left: 100 };
        for directory in Directory::first(BLOCKS).expect("large enough") {
            let at = directory.area() * AREA_BYTES;
            let image = directory.encode().expect("empty");
            device.kept[at..at + image.len()].copy_from_slice(&image);
        }
        device
    }

    fn step(&mut self) -> Result<(), Off> {
        self.steps_left = self.steps_left.checked_sub(1).ok_or(Off)?;
        Ok(())
    }

    fn write(&mut self, block: u64, bytes: &[u8]) -> Result<(), Off> {
        for (index, sector) in bytes.chunks(SECTOR).enumerate() {
            let at = (block * BLOCK) as usize / SECTOR + index;
            self.loose.entry(at).or_default().push(sector.try_into().expect("whole sectors"));
        }
        self.step()
    }

    fn flush(&mut self) -> Result<(), Off> {
        self.step()?;
        for (sector, mut versions) in core::mem::take(&mut self.loose) {
            let last = versions.pop().expect("not empty");
            self.kept[sector * SECTOR..][..SECTOR].copy_from_slice(&last);
        }
        Ok(())
    }

    /// What is found after the machine went off: each sector is as it was, or as any write since has it.
    fn lose(mut self, dice: &mut Dice) -> Vec<u8> {
        for (sector, versions) in self.loose {
            let choice = dice.roll(versions.len() as u64 + 1) as usize;
            if let Some(version) = versions.get(choice) {
                self.kept[sector * SECTOR..][..SECTOR].copy_from_slice(version);
            }
        }
        self.kept
    }
}

fn open(bytes: &[u8]) -> Directory {
    let area = |index: usize| &bytes[index * AREA_BYTES..][..AREA_BYTES];
    Directory::newest([area(0), area(1)], BLOCKS).expect("a whole directory")
}

fn read(bytes: &[u8], file: &File) -> Vec<u8> {
    let mut content = Vec::new();
    for extent in &file.extents {
        content
            .extend(&bytes[(u64::from(extent.start) * BLOCK) as usize..][..(u64::from(extent.count) * BLOCK) as usize]);
    }
    content.truncate(file.length as usize);
    assert_eq!(crc32fast::hash(&content), file.checksum);
    content
}

fn contents(bytes: &[u8]) -> BTreeMap<String, Vec<u8>> {
    open(bytes).files().iter().map(|file| (file.name.clone(), read(bytes, file))).collect()
}

/// Commits on the device; every step may be the last.
fn commit(device: &mut Device, directory: Directory) -> Result<(), Off> {
    let mut commit = Commit::new(directory).expect("fits");
    loop {
        match commit.step() {
            Step::Flush => device.flush()?,
            Step::Write => device.write(commit.block(), commit.image())?,
            Step::Done => return Ok(()),
        }
        commit.advance();
    }
}

/// Writes a file; `None` if it does not fit.
fn put(device: &mut Device, directory: &Directory, name: &str, content: &[u8]) -> Result<Option<Directory>, Off> {
    let mut writer = Writer::new(directory, name, 0).expect("a good name");
    let mut rest = content;
    while !rest.is_empty() {
        let most = (rest.len() as u64).div_ceil(BLOCK) as u32;
        let Ok(extent) = writer.append(most.min(3)) else { return Ok(None) };
        let (now, after) = rest.split_at(rest.len().min((u64::from(extent.count) * BLOCK) as usize));
        let mut blocks = now.to_vec();
        blocks.resize((u64::from(extent.count) * BLOCK) as usize, 0);
        device.write(extent.start.into(), &blocks)?;
        rest = after;
    }
    let next = writer.finish(content.len() as u64, crc32fast::hash(content)).expect("fits");
    commit(device, next.clone())?;
    Ok(Some(next))
}

fn some_bytes(dice: &mut Dice) -> Vec<u8> {
    let (length, fill) = (dice.roll(9 * BLOCK), dice.roll(256) as u8);
    (0..length).map(|index| fill ^ (index / 7) as u8).collect()
}

/// One random change. What should be there after it, and whether it was done.
fn change(device: &mut Device, dice: &mut Dice, now: &BTreeMap<String, Vec<u8>>) -> (BTreeMap<String, Vec<u8>>, bool) {
    let directory = {
        let mut bytes = device.kept.clone();
        for (sector, versions) in &device.loose {
            bytes[sector * SECTOR..][..SECTOR].copy_from_slice(versions.last().expect("not empty"));
        }
        open(&bytes)
    };
    let name = format!("file-{}", dice.roll(4));
    let mut after = now.clone();
    if dice.roll(4) == 0 && now.contains_key(&name) {
        after.remove(&name);
        let done = commit(device, directory.without(&name).expect("it is there"));
        return (after, done.is_ok());
    }
    let content = some_bytes(dice);
    after.insert(name.clone(), content.clone());
    match put(device, &directory, &name, &content) {
        Ok(Some(_)) => (after, true),
        Ok(None) => (now.clone(), true),
        Err(Off) => (after, false),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The machine goes off at every step of every change: each time the store is the one before or the one after.
    #[test]
    fn old_or_new_and_never_a_mix(seed in any::<u64>()) {
        let mut dice = Dice(seed);
        let (mut device, mut now) = (Device::new(), BTreeMap::new());
        for _ in 0..6 {
            let before = dice.0;
            for steps in 0.. {
                let mut doomed = Device { steps_left: steps, ..device.clone() };
                let (after, done) = change(&mut doomed, &mut Dice(before), &now);
                for other in 0..3 {
                    let found = contents(&doomed.clone().lose(&mut Dice(seed ^ other ^ steps as u64)));
                    prop_assert!(found == after || (!done && found == now), "step {steps}");
                }
                if done {
                    break;
                }
            }
            device.steps_left = 100;
            let (after, done) = change(&mut device, &mut Dice(before), &now);
            prop_assert!(done);
            now = after;
            dice = Dice(before ^ 0x5555);
        }
    }

    #[test]
    fn decode_undoes_encode(seed in any::<u64>(), files in 0usize..20) {
        let mut dice = Dice(seed);
        let mut directory = Directory::first(100_000).expect("large enough")[seed as usize % 2].clone();
        for index in 0..files {
            let base = directory.files().last().map_or(0, |file| if dice.roll(2) == 0 { file.id } else { 0 });
            let mut writer = Writer::new(&directory, &format!("{}f{index}", "x".repeat(dice.roll(60) as usize)), base).expect("good");
            let blocks = dice.roll(200);
            for _ in 0..blocks {
                writer.append(1).expect("room");
            }
            let length = (blocks * BLOCK).saturating_sub(if blocks == 0 { 0 } else { dice.roll(BLOCK) });
            directory = writer.finish(length, dice.roll(1 << 32) as u32).expect("fits");
        }
        let image = directory.encode().expect("fits");
        prop_assert_eq!(Directory::decode(&image, 100_000).expect("right"), directory);
    }

    /// Whatever is in the areas, it is a directory whose every extent lies in the data, or an error.
    #[test]
    fn a_strangers_directory_is_refused_or_right(seed in any::<u64>(), damages in 1usize..6) {
        let mut dice = Dice(seed);
        let mut device = Device::new();
        let mut now = BTreeMap::new();
        for _ in 0..4 {
            now = change(&mut device, &mut dice, &now).0;
        }
        let bytes = device.lose(&mut Dice(0));
        let mut area = bytes[open(&bytes).area() * AREA_BYTES..][..AREA_BYTES].to_vec();
        let len = u32::from_le_bytes([area[32], area[33], area[34], area[35]]) as usize;
        for _ in 0..damages {
            area[dice.roll(len as u64) as usize] = dice.roll(256) as u8;
        }
        area[12..16].fill(0);
        let claimed = u32::from_le_bytes([area[32], area[33], area[34], area[35]]) as usize;
        let checksum = crc32fast::hash(&area[..claimed.min(AREA_BYTES)]);
        area[12..16].copy_from_slice(&checksum.to_le_bytes());
        if let Ok(directory) = Directory::decode(&area, BLOCKS) {
            let mut seen = std::collections::HashSet::new();
            for extent in directory.files().iter().flat_map(|file| &file.extents) {
                for block in u64::from(extent.start)..extent.end() {
                    prop_assert!((DATA_START..BLOCKS).contains(&block) && seen.insert(block));
                }
            }
            for file in directory.files() {
                prop_assert!(file.length <= file.blocks() * BLOCK);
            }
        }
    }
}

#[test]
fn a_full_store_says_so_and_is_as_it_was() {
    let mut device = Device::new();
    let directory = open(&device.kept);
    let one = put(&mut device, &directory, "one", &[1; 30 * BLOCK as usize]).expect("on").expect("fits");
    assert_eq!(one.free_blocks(), 10);
    assert!(put(&mut device, &one, "two", &[2; 11 * BLOCK as usize]).expect("on").is_none());
    // Its own blocks are free when the new ones are committed, not before.
    assert!(put(&mut device, &one, "one", &[3; 11 * BLOCK as usize]).expect("on").is_none());
    let mut writer = Writer::new(&one, "two", 0).expect("good");
    writer.append(10).expect("free");
    assert_eq!(writer.append(1).expect_err("full").to_string(), "the store is full: no block of its 168 is free");
    let two = put(&mut device, &one, "two", &[2; 10 * BLOCK as usize]).expect("on").expect("fits");
    assert_eq!(two.free_blocks(), 0);
    commit(&mut device, two.without("one").expect("there")).expect("on");
    assert_eq!(contents(&device.lose(&mut Dice(1))).into_keys().collect::<Vec<_>>(), ["two"]);
}

#[test]
fn what_another_needs_stays() {
    let directory = Directory::first(BLOCKS).expect("large enough")[1].clone();
    let base = Writer::new(&directory, "base", 0).expect("good").finish(0, 0).expect("fits");
    let id = base.file("base").expect("there").id;
    let both = Writer::new(&base, "more", id).expect("good").finish(0, 0).expect("fits");
    let needed = "file \"base\": must not be what \"more\" cannot be read without";
    assert_eq!(both.without("base").expect_err("needed").to_string(), needed);
    assert_eq!(Writer::new(&both, "base", 0).expect_err("needed").to_string(), needed);
    assert!(Writer::new(&base, "base", id).is_err(), "a file is not its own base");
    assert_eq!(
        Writer::new(&both, "third", 77).expect_err("unknown").to_string(),
        "base = 77: must be the number of a file in the store"
    );
    let rest = both.without("more").expect("unneeded").without("base").expect("unneeded");
    assert_eq!(rest.free_blocks(), 40);
    assert_eq!(rest.without("base").expect_err("gone").to_string(), "file \"base\": must be in the store");
}

#[test]
fn what_is_no_store_says_what_it_is() {
    let [first, second] =
        Directory::first(BLOCKS).expect("large enough").map(|directory| directory.encode().expect("fits"));
    let message =
        |first: &[u8], second: &[u8]| Directory::newest([first, second], BLOCKS).expect_err("wrong").to_string();
    assert_eq!(message(&[0; 4096], &[1; 4096]), "not a store: neither of its two directories begins with \"ENTSTORE\"");
    let mut newer = second.clone();
    newer[8] = 2;
    assert_eq!(message(&[0; 64], &newer), "the store has version 2, this program reads version 1");
    let mut flipped = second.clone();
    flipped[20] ^= 1;
    assert!(message(&[0; 64], &flipped).starts_with("the store's directory has the checksum 0x"));
    // One of both is enough; the other way round they are in the wrong places.
    assert_eq!(Directory::newest([&first, &flipped], BLOCKS).expect("one").generation(), 0);
    assert!(message(&second, &first).contains("must be even in area 0 and odd in area 1"));
    assert!(Directory::newest([&first, &second], BLOCKS - 1).is_err(), "the device is smaller than the store");
    assert!(Directory::first(DATA_START).is_err());
}
