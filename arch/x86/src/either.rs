//! Second-stage entries that one program writes for either maker's processor.
//!
//! Purpose: the program finds out at start on which processor it is, and its hot paths must not ask again at each word. The two formats
//! ([`npt`](crate::npt), [`ept`](crate::ept)) agree on where the frame is, on what is present, a large page and writable. What they do
//! not agree on is kept here as masks, and what a walk asks of a leaf stands in bits that both processors ignore or give the same meaning:
//!
//! | bits | meaning | NPT | EPT |
//! |---|---|---|---|
//! | 0 | present | P | read |
//! | 1 | writes | W | write |
//! | 2 | | U/S, set | execute |
//! | 7 | large page | PS | the same |
//! | 10 | device memory | ignored | ignored |
//! | 11 | a leaf that may not be read: bits 2:0 are clear | ignored | ignored |
//! | 51:12 | frame | | |
//! | 52 | writes of such a leaf | ignored | ignored |
//! | 63 | no fetches | NX | ignored (suppress #VE, which is off) |
//!
//! Masks: the processor's memory type, dirty and accessed bits, EPT's execute, NPT's user.
//!
//! Invariants: each word means to the processor that it was made for what [`Format::decode`] says; a word in progress is not present to
//! either. The tests hold these words against the two formats that know one processor each.
//!
//! Known holes: those of both.

use entresol_addr::{PageSize, Pfn};
use entresol_table::{Entry, Format, Geometry, LEAF_LEVEL, Leaf, Memory, MmioEntry, Permissions, VACANT, size_at};

use crate::ept::{self, Extended};
use crate::mmio;
use crate::npt::{self, Nested};

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
/// Ours in an entry that is not present: EPT's MMIO entries have both.
const UPPER: u64 = 0b110;
const LARGE: u64 = 1 << 7;
const DEVICE: u64 = 1 << 10;
const CLOSED: u64 = 1 << 11;
const CLOSED_WRITE: u64 = 1 << 52;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = npt::ADDRESS;

const _: () = assert!(npt::PRESENT == PRESENT && npt::WRITABLE == WRITE && npt::LARGE == LARGE);
const _: () = assert!(ept::READ == PRESENT && ept::WRITE == WRITE && ept::LARGE == LARGE && ept::ADDRESS == ADDRESS);
const _: () = assert!(ept::CLOSED == CLOSED && npt::NO_EXECUTE == NO_EXECUTE);

/// Whose the processor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Maker {
    /// Nested page tables.
    Amd,
    /// Extended page tables.
    Intel,
}

/// Where the two formats differ. Two words each are the first where it is not so, and the second where it is: they are picked, not asked for.
#[derive(Debug, PartialEq, Eq)]
struct Masks {
    /// A leaf that may be read: of memory, of a device.
    device: [u64; 2],
    execute: [u64; 2],
    young: [u64; 2],
    table: u64,
}

static AMD: Masks = {
    let normal = npt::PRESENT | npt::USER | npt::DIRTY;
    Masks {
        device: [normal, normal | npt::UNCACHEABLE | DEVICE],
        execute: [NO_EXECUTE, 0],
        young: [0, npt::ACCESSED],
        table: npt::PRESENT | npt::WRITABLE | npt::USER | npt::ACCESSED,
    }
};

static INTEL: Masks = {
    let device = ept::READ | ept::DIRTY;
    Masks {
        device: [device | ept::WRITE_BACK | ept::IGNORE_PAT, device | DEVICE],
        execute: [NO_EXECUTE, ept::EXECUTE],
        young: [0, ept::ACCESSED],
        table: ept::PRESENT | ept::ACCESSED,
    }
};

/// The entry format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Either {
    /// Named, not kept: who copies a format copies no masks.
    masks: &'static Masks,
    mmio: Option<mmio::Format>,
    maker: Maker,
    physical_bits: u8,
}

impl Either {
    /// The format for a processor of `physical_bits` address bits (CPUID 8000_0008 EAX 7:0); `leaking_bits` as in
    /// [`mmio::Format::new`]. Without a bit to reserve on AMD's it has no MMIO entries.
    pub fn new(maker: Maker, physical_bits: u8, leaking_bits: Option<u8>) -> Self {
        let (masks, kind) = match maker {
            Maker::Amd => (&AMD, mmio::Kind::Reserved),
            Maker::Intel => (&INTEL, mmio::Kind::Misconfiguration),
        };
        Self { masks, mmio: mmio::Format::new(kind, physical_bits, leaking_bits), maker, physical_bits }
    }
}

/// The word of a leaf that may not be read, from that of one that may.
#[cold]
#[inline(never)]
const fn closed(word: u64, write: bool) -> u64 {
    word & !(PRESENT | UPPER) | CLOSED | if write { CLOSED_WRITE } else { 0 }
}

impl Format for Either {
    const BROKEN: u64 = Extended::BROKEN;
    const FRAME_BITS: u32 = Extended::FRAME_BITS;

    /// Four levels, whatever part of the 48 bits is used: the processor walks them all.
    fn geometry(&self, gpa_bits: u8) -> Option<Geometry> {
        let whole = Geometry::new(Geometry::MAX_IPA_BITS, 1);
        if (Geometry::MIN_IPA_BITS..=Geometry::MAX_IPA_BITS).contains(&gpa_bits) { whole } else { None }
    }

    #[inline]
    fn decode(&self, raw: u64, level: u8) -> Entry {
        // Nearly every word of a walk, so it is asked first.
        if level < LEAF_LEVEL && raw & (PRESENT | LARGE) == PRESENT {
            return Entry::Table(Pfn::new((raw & ADDRESS) >> 12));
        }
        if raw == VACANT {
            return Entry::Vacant;
        }
        let present = raw & PRESENT != 0;
        if raw & mmio::RESERVED != 0 || !present {
            if level == LEAF_LEVEL && self.mmio_entry(raw).is_some() {
                return Entry::Vacant;
            }
            if !present && raw & (CLOSED | UPPER) != CLOSED {
                return Entry::Broken;
            }
        }
        // A large page in the root is reserved by both.
        let Some(size) = size_at(level) else { return Entry::Broken };
        let write = if present { raw & WRITE } else { raw & CLOSED_WRITE };
        Entry::Leaf(Leaf {
            pfn: Pfn::new((raw & ADDRESS) >> 12),
            size,
            permissions: Permissions { read: present, write: write != 0, execute: raw & NO_EXECUTE == 0 },
            memory: if raw & DEVICE != 0 { Memory::Device } else { Memory::Normal },
            young: raw & self.masks.young[1] != 0,
        })
    }

    #[inline]
    fn leaf(&self, leaf: &Leaf) -> u64 {
        let Permissions { read, write, execute } = leaf.permissions;
        let word = leaf.pfn.base().get() & ADDRESS
            | self.masks.device[usize::from(leaf.memory == Memory::Device)]
            | self.masks.execute[usize::from(execute)]
            | self.masks.young[usize::from(leaf.young)]
            | if write { WRITE } else { 0 }
            | if leaf.size == PageSize::Size4K { 0 } else { LARGE };
        if read { word } else { closed(word, write) }
    }

    /// Open to everything: the leaf decides.
    #[inline]
    fn table(&self, frame: Pfn) -> u64 {
        frame.base().get() & ADDRESS | self.masks.table
    }

    #[inline]
    fn young(&self, raw: u64) -> u64 {
        raw | self.masks.young[1]
    }

    #[inline]
    fn protected(&self, raw: u64, level: u8) -> Option<u64> {
        let write = if raw & PRESENT != 0 { WRITE } else { CLOSED_WRITE };
        matches!(self.decode(raw, level), Entry::Leaf(_)).then_some(raw & !write)
    }

    #[inline]
    fn writable(&self, raw: u64, level: u8) -> u64 {
        let write = if raw & PRESENT != 0 { WRITE } else { CLOSED_WRITE };
        if matches!(self.decode(raw, level), Entry::Leaf(_)) { raw | write | self.masks.young[1] } else { raw }
    }

    #[inline]
    fn generation_bits(&self) -> u32 {
        if self.mmio.is_some() { mmio::GENERATION_BITS } else { 0 }
    }

    fn mmio(&self, entry: &MmioEntry) -> Option<u64> {
        self.mmio?.encode(&mmio::Entry::direct(entry))
    }

    #[inline]
    fn mmio_entry(&self, raw: u64) -> Option<MmioEntry> {
        self.mmio?.decode(raw)?.for_all()
    }

    /// The two formats' own rules: the words are theirs.
    fn is_malformed(&self, raw: u64, level: u8) -> bool {
        match self.maker {
            Maker::Amd => Nested::new(self.physical_bits, None).is_malformed(raw, level),
            Maker::Intel => Extended::new(self.physical_bits, None).is_malformed(raw, level),
        }
    }
}
