use alloc::sync::Arc;
use alloc::vec::Vec;
use alloc::{format, vec};

use proptest::prelude::*;

use super::*;

/// Cells that say whether they were used as they must be.
struct Cells {
    bytes: Mutex<Vec<u8>>,
    shown: Mutex<Vec<bool>>,
    /// Whether there is room to show them.
    may_show: Mutex<bool>,
    /// Writes that succeed before all fail.
    memory: Mutex<usize>,
}

impl Cells {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        let (shown, memory) = (Mutex::new(vec![true]), Mutex::new(usize::MAX));
        Arc::new(Self { bytes: Mutex::new(bytes), shown, may_show: Mutex::new(true), memory })
    }

    fn bytes(&self) -> Vec<u8> {
        self.bytes.lock().clone()
    }

    fn is_shown(&self) -> bool {
        *self.shown.lock().last().unwrap()
    }

    fn changed(&self, shown: bool) {
        assert_ne!(self.is_shown(), shown, "each call is a change");
        self.shown.lock().push(shown);
    }
}

impl Backing for Arc<Cells> {
    fn size(&self) -> u64 {
        self.bytes.lock().len() as u64
    }

    fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), BackingError> {
        to.copy_from_slice(&self.bytes.lock()[offset as usize..][..to.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), BackingError> {
        assert!(!self.is_shown(), "written while a guest may read");
        assert!(from.len() <= PIECE);
        let mut memory = self.memory.lock();
        *memory = memory.checked_sub(1).ok_or(BackingError)?;
        self.bytes.lock()[offset as usize..][..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn show(&self) -> bool {
        let may = *self.may_show.lock();
        if may {
            self.changed(true);
        }
        may
    }

    fn hide(&self) {
        self.changed(false);
    }
}

const SIZE: usize = 2 * BLOCK as usize;

fn bank() -> (Flash<Arc<Cells>>, Arc<Cells>) {
    let cells = Cells::new((0..SIZE).map(|at| (at / 3) as u8 | 0x11).collect());
    (Flash::new(cells.clone()).unwrap_or_else(|error| panic!("{error}")), cells)
}

fn put(flash: &Flash<Arc<Cells>>, offset: u64, size: u8, value: u64) {
    assert_eq!(flash.write(offset, size, value), Work::Idle);
}

/// A command to both chips at byte `offset`.
fn both(flash: &Flash<Arc<Cells>>, offset: u64, command: u64) {
    put(flash, offset, 4, command << 16 | command);
}

/// What both chips say, which must be the same.
fn agreed(flash: &Flash<Arc<Cells>>, word: u64) -> u16 {
    let both = flash.read(word * 4, 4) as u32;
    assert_eq!(both >> 16, both & 0xffff, "word {word:#x}");
    both as u16
}

#[test]
fn a_driver_finds_what_it_looks_for() {
    let (flash, cells) = bank();
    both(&flash, 0x55 * 4, 0x98);
    assert!(!cells.is_shown());
    let text: Vec<u8> = [0x10, 0x11, 0x12, 0x31, 0x32, 0x33].map(|word| agreed(&flash, word) as u8).to_vec();
    assert_eq!(text, b"QRYPRI");
    let number = |word| agreed(&flash, word) | agreed(&flash, word + 1) << 8;
    assert_eq!((number(0x13), number(0x15), number(0x17), number(0x28)), (1, 0x31, 0, 1));
    assert_eq!(1u64 << agreed(&flash, 0x27), SIZE as u64 / 2);
    assert_eq!((agreed(&flash, 0x2c), number(0x2d), number(0x2f)), (1, 1, 0x200));
    assert_eq!(1 << number(0x2a), BUFFER / 2);
    both(&flash, 0, 0x90);
    assert_eq!([0, 1, 2, 3].map(|word| agreed(&flash, word)), [0x89, 0x18, 0, 0]);
    both(&flash, 0, 0xff);
    assert!(cells.is_shown());
    assert_eq!(flash.read(8, 8), u64::from_le_bytes(cells.bytes()[8..16].try_into().unwrap()));
}

#[test]
fn a_copy_goes_on_in_the_middle_of_a_command() {
    let (flash, cells) = bank();
    both(&flash, BLOCK + 40, 0x20);
    let copied = Cells::new(cells.bytes());
    copied.hide();
    let copy = flash.fork(copied.clone()).unwrap_or_else(|error| panic!("{error}"));
    // The copy erases its block, the original is told to read its array.
    both(&copy, BLOCK + 40, 0xd0);
    // What is no confirmation ends the command; then it is told again.
    both(&flash, 0, 0xff);
    both(&flash, 0, 0xff);
    both(&copy, 0, 0xff);
    assert!(copied.is_shown() && cells.is_shown());
    let bytes = copied.bytes();
    let (first, second) = bytes.split_at(BLOCK as usize);
    assert_eq!(first, &cells.bytes()[..BLOCK as usize]);
    assert!(second.iter().all(|byte| *byte == 0xff) && cells.bytes()[BLOCK as usize..] != second[..]);
    // Registers, errors and the buffer are each one's own.
    both(&copy, 0, 0x90);
    assert!(!copied.is_shown() && cells.is_shown());
}

#[test]
fn programming_clears_bits_and_erasing_sets_a_block() {
    let (flash, cells) = bank();
    let mut expected = cells.bytes();
    both(&flash, 0x100, 0x40);
    put(&flash, 0x100, 4, 0xf0f0_0f0f);
    assert_eq!(agreed(&flash, 0), 0x80);
    both(&flash, 0, 0xff);
    for (byte, mask) in expected[0x100..0x104].iter_mut().zip([0x0f, 0x0f, 0xf0, 0xf0]) {
        *byte &= mask;
    }
    assert_eq!(cells.bytes(), expected);
    both(&flash, BLOCK + 40, 0x20);
    both(&flash, BLOCK + 40, 0xd0);
    assert_eq!(agreed(&flash, 0), 0x80);
    expected[BLOCK as usize..].fill(0xff);
    assert_eq!(cells.bytes(), expected);
}

/// Sends `words` by the write buffer to byte `offset`; what the status says then.
fn buffered(flash: &Flash<Arc<Cells>>, offset: u64, words: &[u32]) -> u16 {
    both(flash, offset, 0xe8);
    assert_eq!(agreed(flash, offset / 4) & 0x80, 0x80);
    both(flash, offset, words.len() as u64 - 1);
    for (index, word) in words.iter().enumerate() {
        put(flash, offset + index as u64 * 4, 4, (*word).into());
    }
    both(flash, offset, 0xd0);
    agreed(flash, offset / 4)
}

#[test]
fn a_buffer_is_programmed_whole_or_not_at_all() {
    let (flash, cells) = bank();
    let start = cells.bytes();
    let words: Vec<u32> = (0..(BUFFER / 4) as u32).map(|n| n.wrapping_mul(0x9e37_79b9)).collect();
    assert_eq!(buffered(&flash, BLOCK - 2048, &words), 0x80);
    let expected: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let place = (BLOCK - 2048) as usize..BLOCK as usize;
    assert!(
        cells.bytes()[place.clone()].iter().zip(&expected).zip(&start[place]).all(|((is, new), was)| *is == new & was)
    );
    let before = cells.bytes();
    // Too many, over the end of a block, another block, no confirmation: a sequence error, and nothing happens.
    both(&flash, 0, 0xe8);
    both(&flash, 0, BUFFER as u64 / 4);
    assert_eq!(agreed(&flash, 0), 0xb0);
    both(&flash, 0, 0x50);
    assert_eq!(agreed(&flash, 0), 0x80);
    assert_eq!(buffered(&flash, BLOCK - 4, &[0, 0]) & 0x30, 0x30);
    both(&flash, 0, 0x50);
    both(&flash, 0, 0xe8);
    both(&flash, 0, 0);
    put(&flash, BLOCK, 4, 0);
    both(&flash, 0, 0xd0);
    assert_eq!(agreed(&flash, 0), 0xb0);
    both(&flash, 0, 0x50);
    both(&flash, 0, 0xe8);
    both(&flash, 0, 0);
    put(&flash, 0, 4, 0);
    both(&flash, 0, 0xff);
    assert_eq!(agreed(&flash, 0), 0xb0);
    assert_eq!(cells.bytes(), before);
}

#[test]
fn a_buffer_for_one_block_is_confirmed_at_another() {
    let (flash, cells) = bank();
    let before = cells.bytes()[BLOCK as usize];
    both(&flash, BLOCK, 0xe8);
    both(&flash, BLOCK, 0);
    put(&flash, BLOCK, 4, 0xffff_ff01);
    both(&flash, 0, 0xd0);
    assert_eq!((agreed(&flash, 0), cells.bytes()[BLOCK as usize]), (0x80, before & 1));
}

#[test]
fn a_locked_block_keeps_what_it_holds_until_it_is_unlocked() {
    let (flash, cells) = bank();
    let before = cells.bytes();
    both(&flash, BLOCK, 0x60);
    both(&flash, BLOCK, 0x01);
    both(&flash, 0, 0x90);
    assert_eq!((agreed(&flash, 2), agreed(&flash, BLOCK / 4 + 2)), (0, 1));
    both(&flash, BLOCK, 0x10);
    put(&flash, BLOCK, 4, 0);
    assert_eq!(agreed(&flash, 0), 0x92);
    both(&flash, 0, 0x50);
    both(&flash, BLOCK, 0x20);
    both(&flash, BLOCK, 0xd0);
    assert_eq!(agreed(&flash, 0), 0xa2);
    both(&flash, 0, 0x50);
    assert_eq!(buffered(&flash, BLOCK, &[0]), 0x92);
    assert_eq!(cells.bytes(), before);
    both(&flash, BLOCK, 0x60);
    both(&flash, BLOCK, 0xd0);
    both(&flash, 0, 0x50);
    assert_eq!(buffered(&flash, BLOCK, &[0]), 0x80);
    assert_eq!(cells.bytes()[BLOCK as usize..][..4], [0; 4]);
    both(&flash, 0, 0x60);
    both(&flash, 0, 0x2f);
    flash.reset();
    assert!(cells.is_shown());
    both(&flash, 0, 0x90);
    assert_eq!(agreed(&flash, 2), 0);
}

#[test]
fn a_driver_that_takes_it_for_16_bits_is_served() {
    let (flash, cells) = bank();
    let mut expected = cells.bytes();
    put(&flash, 0xaa << 1, 2, 0x98);
    assert_eq!([0x40, 0x44, 0x48, 0x42].map(|at| flash.read(at, 2) as u8), *b"QRYQ");
    assert_eq!((flash.read(0x41, 1), flash.read(0x40, 8)), (0, 0x52_0052_0051_0051));
    put(&flash, 0, 2, 0xff);
    put(&flash, 0x2_0000, 2, 0x20);
    put(&flash, 0x2_0000, 2, 0xd0);
    expected[..BLOCK as usize].fill(0xff);
    put(&flash, 0x202, 2, 0xe8);
    put(&flash, 0x202, 2, 2);
    for (index, value) in [0x1111, 0x2222, 0x3333].into_iter().enumerate() {
        put(&flash, 0x202 + index as u64 * 2, 2, value);
    }
    put(&flash, 0x202, 2, 0xd0);
    assert_eq!(flash.read(0x202, 2), 0x80);
    expected[0x202..0x208].copy_from_slice(&[0x11, 0x11, 0x22, 0x22, 0x33, 0x33]);
    put(&flash, 0x301, 1, 0x40);
    put(&flash, 0x301, 1, 0x5a);
    expected[0x301] = 0x5a;
    put(&flash, 0, 2, 0xff);
    assert!(cells.bytes() == expected && cells.is_shown());
    // A command and its data in one store of 64 bits.
    put(&flash, 0x400, 8, 0x1234_5678_0000_0040);
    expected[0x404..0x408].copy_from_slice(&0x1234_5678u32.to_le_bytes());
    assert!(cells.bytes() == expected && !cells.is_shown());
}

#[test]
fn a_backing_without_memory_is_an_error_of_the_operation() {
    let (flash, cells) = bank();
    let mut expected = cells.bytes();
    *cells.memory.lock() = 0;
    both(&flash, 0, 0x40);
    both(&flash, 0, 0);
    assert_eq!(agreed(&flash, 0), 0x98);
    both(&flash, 0, 0x50);
    assert_eq!(buffered(&flash, 0, &[0, 0]), 0x98);
    assert_eq!(cells.bytes(), expected);
    both(&flash, 0, 0x50);
    *cells.memory.lock() = 3;
    both(&flash, 0, 0x20);
    both(&flash, 0, 0xd0);
    assert_eq!(agreed(&flash, 0), 0xa8);
    expected[..3 * PIECE].fill(0xff);
    assert_eq!(cells.bytes(), expected, "as far as it came");
    *cells.memory.lock() = usize::MAX;
    both(&flash, 0, 0x50);
    assert_eq!(buffered(&flash, 0, &[0, 0]), 0x80);
}

#[test]
fn what_cannot_be_shown_is_still_read_and_shown_later() {
    let (flash, cells) = bank();
    both(&flash, 0, 0x70);
    *cells.may_show.lock() = false;
    both(&flash, 0, 0xff);
    assert!(!cells.is_shown());
    assert_eq!(flash.read(8, 8), u64::from_le_bytes(cells.bytes()[8..16].try_into().unwrap()));
    *cells.may_show.lock() = true;
    both(&flash, 0, 0xff);
    assert!(cells.is_shown());
}

#[test]
fn sizes_that_no_chip_has_are_refused() {
    for size in [0, BLOCK - 1, BLOCK + 1, 3 * BLOCK, 2 * MAX_SIZE] {
        let made = Flash::new(Cells::new(vec![0; size as usize]));
        let error = made.err().map(|error| format!("{error}"));
        assert_eq!(error, Some(format!("flash = {size:#x} bytes: must be a power of two from 0x40000 to 0x4000000")));
    }
}

/// What a driver does.
#[derive(Clone, Debug)]
enum Step {
    Program { word: u32, value: u32 },
    Buffered { word: u32, words: Vec<u32> },
    Erase { block: u32 },
    Lock { block: u32, locked: bool },
    Compare,
}

/// A flash that is only an array and a set of locks.
struct Naive {
    words: Vec<u32>,
    locked: [bool; 2],
}

impl Naive {
    fn block(word: u32) -> usize {
        (u64::from(word) * WORD / BLOCK) as usize
    }

    fn program(&mut self, word: u32, values: &[u32]) -> bool {
        let end = word as usize + values.len();
        let good = end <= self.words.len() && Self::block(word) == Self::block(end as u32 - 1);
        let done = good && !self.locked[Self::block(word)];
        if done {
            self.words[word as usize..end].iter_mut().zip(values).for_each(|(cell, value)| *cell &= value);
        }
        done
    }

    fn erase(&mut self, block: u32) -> bool {
        let words = (BLOCK / WORD) as usize;
        let done = !self.locked[block as usize];
        if done {
            self.words[block as usize * words..][..words].fill(u32::MAX);
        }
        done
    }
}

fn step() -> impl Strategy<Value = Step> {
    let word = || 0..(SIZE / 4) as u32;
    // Beside the border of the blocks as often as anywhere.
    let near = || prop_oneof![word(), (BLOCK / 4 - 8) as u32..(BLOCK / 4 + 8) as u32];
    prop_oneof![
        4 => (near(), any::<u32>()).prop_map(|(word, value)| Step::Program { word, value }),
        4 => (near(), prop::collection::vec(any::<u32>(), 1..20)).prop_map(|(word, words)| Step::Buffered { word, words }),
        2 => (0u32..2).prop_map(|block| Step::Erase { block }),
        1 => (0u32..2, any::<bool>()).prop_map(|(block, locked)| Step::Lock { block, locked }),
        1 => Just(Step::Compare),
    ]
}

fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_driver_sees_what_a_naive_flash_does(steps in prop::collection::vec(step(), 0..40)) {
        let (flash, cells) = bank();
        let words = cells.bytes().chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        let mut naive = Naive { words, locked: [false; 2] };
        for step in steps {
            let done = match &step {
                Step::Program { word, value } => {
                    let offset = u64::from(*word) * WORD;
                    both(&flash, offset, 0x40);
                    put(&flash, offset, 4, (*value).into());
                    naive.program(*word, &[*value])
                }
                Step::Buffered { word, words } => {
                    buffered(&flash, u64::from(*word) * WORD, words);
                    naive.program(*word, words)
                }
                Step::Erase { block } => {
                    both(&flash, u64::from(*block) * BLOCK, 0x20);
                    both(&flash, u64::from(*block) * BLOCK, 0xd0);
                    naive.erase(*block)
                }
                Step::Lock { block, locked } => {
                    both(&flash, u64::from(*block) * BLOCK, 0x60);
                    both(&flash, u64::from(*block) * BLOCK, if *locked { 0x01 } else { 0xd0 });
                    naive.locked[*block as usize] = *locked;
                    true
                }
                Step::Compare => {
                    prop_assert!(cells.bytes() == bytes_of(&naive.words));
                    true
                }
            };
            both(&flash, 0, 0x70);
            let status = agreed(&flash, 0);
            prop_assert_eq!(status == 0x80, done, "{:?}: status {:#x}", step, status);
            both(&flash, 0, 0x50);
            both(&flash, 0, 0xff);
            prop_assert!(cells.is_shown());
        }
        prop_assert!(cells.bytes() == bytes_of(&naive.words));
    }

    /// Whatever a guest stores: nothing panics, what is shown is what is read, and a bit that goes from 0 to 1 does so with its whole
    /// block.
    #[test]
    fn no_stores_break_a_flash(stores in prop::collection::vec(store(), 0..200)) {
        let (flash, cells) = bank();
        let mut before = cells.bytes();
        for (offset, size, value) in stores {
            prop_assert_eq!(flash.write(offset, size, value), Work::Idle);
            let after = cells.bytes();
            for block in raised(&before, &after) {
                prop_assert!(after[block..block + BLOCK as usize].iter().all(|byte| *byte == 0xff), "block {block:#x}");
            }
            before = after;
            let read = flash.read(offset, size);
            if cells.is_shown() && offset.saturating_add(8) <= SIZE as u64 && size <= 8 {
                let mut expected = [0; 8];
                expected[..usize::from(size)].copy_from_slice(&before[offset as usize..][..usize::from(size)]);
                prop_assert_eq!(read, u64::from_le_bytes(expected));
            }
        }
        both(&flash, 0, 0xff);
    }
}

/// The blocks where a bit went from 0 to 1.
fn raised(before: &[u8], after: &[u8]) -> Vec<usize> {
    let rose = |block: &usize| {
        let part = *block..*block + BLOCK as usize;
        let (was, is) = (&before[part.clone()], &after[part]);
        was != is && was.iter().zip(is).any(|(was, is)| is & !was != 0)
    };
    (0..SIZE).step_by(BLOCK as usize).filter(rose).collect()
}

fn store() -> impl Strategy<Value = (u64, u8, u64)> {
    let commands =
        prop::sample::select(vec![0x10u64, 0x20, 0x40, 0x50, 0x60, 0x70, 0x90, 0x98, 0xe8, 0xff, 0xd0, 1, 0x2f, 3, 0]);
    let value = prop_oneof![
        6 => commands.prop_map(|command| command << 48 | command << 32 | command << 16 | command),
        1 => any::<u64>(),
    ];
    let offset = prop_oneof![6 => 0..64u64, 2 => BLOCK - 32..BLOCK + 32, 1 => any::<u64>(), 1 => SIZE as u64 - 9..SIZE as u64 + 9];
    (offset, prop_oneof![5 => Just(4u8), 2 => Just(2), 1 => Just(1), 1 => Just(8), 1 => any::<u8>()], value)
}
