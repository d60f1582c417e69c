//! Register frames: from an offset and a size to the register meant.
//!
//! Purpose: the part of the map that distributor and redistributors share (Arm IHI 0069H 12.8, 12.9, 12.11): words of one
//! bit an interrupt, priorities, configuration, identification. Accesses of a size or alignment that a register does not
//! support decode to nothing; callers read that as zero and ignore the write.

/// A register with one bit for each interrupt of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Field {
    Group,
    SetEnable,
    ClearEnable,
    SetPending,
    ClearPending,
    SetActive,
    ClearActive,
}

impl Field {
    /// Whether the value depends on what list registers hold.
    pub(super) const fn is_live(self) -> bool {
        matches!(self, Self::SetPending | Self::ClearPending | Self::SetActive | Self::ClearActive)
    }
}

/// A register of thirty-two interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BankRegister {
    /// One bit each.
    Bits(Field),
    /// `IPRIORITYR`: `count` (1 or 4) interrupts from `first`, one byte each.
    Priority { first: u32, count: u32 },
    /// `ICFGR`: the lower (0) or upper (1) sixteen, two bits each.
    Config { half: u32 },
}

/// Decodes offsets 0x080–0x3FF, 0x400–0x7FF and 0xC00–0xCFF: the word of interrupts (INTID / 32) and its register.
pub(super) fn bank(offset: u64, size: u8) -> Option<(usize, BankRegister)> {
    let word_sized = size == 4 && offset.is_multiple_of(4);
    match offset {
        0x080..=0x3ff if word_sized => {
            let field = match offset >> 7 {
                1 => Field::Group,
                2 => Field::SetEnable,
                3 => Field::ClearEnable,
                4 => Field::SetPending,
                5 => Field::ClearPending,
                6 => Field::SetActive,
                _ => Field::ClearActive,
            };
            Some(((offset & 0x7f) as usize / 4, BankRegister::Bits(field)))
        }
        0x400..=0x7ff if word_sized || size == 1 => {
            let intid = (offset - 0x400) as u32;
            Some((intid as usize / 32, BankRegister::Priority { first: intid % 32, count: size.into() }))
        }
        0xc00..=0xcff if word_sized => {
            let index = (offset - 0xc00) as u32 / 4;
            Some((index as usize / 2, BankRegister::Config { half: index % 2 }))
        }
        _ => None,
    }
}

/// How an access covers a 64-bit register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Span {
    /// All of it.
    Whole,
    /// Bits \[31:0\].
    Low,
    /// Bits \[63:32\].
    High,
}

impl Span {
    /// Which part of a 64-bit register an access reaches.
    pub(super) fn decode(offset: u64, size: u8) -> Option<Self> {
        match (offset % 8, size) {
            (0, 8) => Some(Self::Whole),
            (0, 4) => Some(Self::Low),
            (4, 4) => Some(Self::High),
            _ => None,
        }
    }

    pub(super) const fn read(self, register: u64) -> u64 {
        match self {
            Self::Whole => register,
            Self::Low => register & 0xffff_ffff,
            Self::High => register >> 32,
        }
    }

    /// The register after a write of `value`.
    pub(super) const fn write(self, register: u64, value: u64) -> u64 {
        match self {
            Self::Whole => value,
            Self::Low => register & !0xffff_ffff | value & 0xffff_ffff,
            Self::High => register & 0xffff_ffff | value << 32,
        }
    }
}

/// `GICD_IIDR` and `GICR_IIDR`: implementer Arm (JEP106 0x43B), no product, variant or revision.
pub(super) const IIDR: u64 = 0x0000_043b;

/// Which frame an identification register stands in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Distributor,
    Redistributor,
}

/// Identification registers 0xFFD0–0xFFFC of a 64 KiB frame (IHI 0069H 12.1.2; `PIDR2.ArchRev` = 3 means GICv3).
pub(super) fn identification(offset: u64, part: Part) -> u64 {
    match offset {
        0xffd0 => 0x44,
        0xffe0 => match part {
            Part::Distributor => 0x92,
            Part::Redistributor => 0x93,
        },
        0xffe4 => 0xb4,
        0xffe8 => 0x3b,
        0xfff0 => 0x0d,
        0xfff4 => 0xf0,
        0xfff8 => 0x05,
        0xfffc => 0xb1,
        _ => 0,
    }
}
