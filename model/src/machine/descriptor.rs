//! A descriptor as the hardware reads it; of arm64 here, of x86 in [`x86`](super::x86): written from the manual a second time, so that a wrong bit in
//! `arch/arm64` is not wrong here too (Arm DDI 0487 D8.3, 4 KiB granule).

use entresol_addr::{PageSize, Pfn};

use super::config::{Config, Paging};
use super::x86;

/// What a word of a table means to the hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptor {
    /// A walk ends here with a translation fault.
    Invalid,
    /// A walk ends here with a fault that says so: present, and not as the architecture allows. Cached nowhere.
    Refused,
    /// The table of the next level.
    Table(Pfn),
    /// A block or page.
    Leaf(Leaf),
}

/// A valid block or page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// First frame.
    pub pfn: Pfn,
    /// How much.
    pub size: PageSize,
    /// S2AP\[0].
    pub read: bool,
    /// S2AP\[1].
    pub write: bool,
    /// XN clear.
    pub execute: bool,
    /// AF.
    pub accessed: bool,
    /// The memory type is Normal; otherwise Device.
    pub normal: bool,
}

impl Leaf {
    /// Whether both differ at most in what may change in place: permissions and access flag (D8.16.1).
    pub fn same_output(&self, other: &Self) -> bool {
        self.pfn == other.pfn && self.size == other.size && self.normal == other.normal
    }
}

impl Descriptor {
    /// Reads `raw` in a table at `level`.
    pub fn read(raw: u64, level: u8, config: &Config) -> Self {
        match config.format {
            Paging::Stage2 => Self::stage2(raw, level, config.fwb),
            // Both: a user page in a shadow table is read as a nested one is.
            Paging::Npt | Paging::Shadow => x86::nested(raw, level, config.physical_bits),
            Paging::Ept => x86::extended(raw, level, config.physical_bits),
        }
    }

    /// Whether a walk ends here, whatever it says.
    pub fn is_invalid(&self) -> bool {
        matches!(self, Self::Invalid | Self::Refused)
    }

    /// The same on arm64, with or without forced write-back.
    fn stage2(raw: u64, level: u8, fwb: bool) -> Self {
        let pfn = Pfn::new(raw >> 12 & 0xf_ffff_ffff);
        let size = match (level, raw & 0b11) {
            (0..=2, 0b11) => return Self::Table(pfn),
            (3, 0b11) => PageSize::Size4K,
            (2, 0b01) => PageSize::Size2M,
            (1, 0b01) => PageSize::Size1G,
            _ => return Self::Invalid,
        };
        let attributes = raw >> 2 & 0xf;
        // Without FWB MemAttr[3:2] is the outer type, 0b00 Device; with it MemAttr[2] is set for Normal memory.
        let normal = if fwb { attributes & 0b100 != 0 } else { attributes & 0b1100 != 0 };
        Self::Leaf(Leaf {
            pfn,
            size,
            read: raw >> 6 & 1 != 0,
            write: raw >> 7 & 1 != 0,
            execute: raw >> 53 & 0b11 == 0,
            accessed: raw >> 10 & 1 != 0,
            normal,
        })
    }

    /// Whether a TLB may cache it: valid, and for a leaf with its access flag set (D8.5).
    pub fn is_cacheable(&self) -> bool {
        match self {
            Self::Invalid | Self::Refused => false,
            Self::Table(_) => true,
            Self::Leaf(leaf) => leaf.accessed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_arch_arm64::stage2::Stage2;
    use entresol_table::{Entry, Format, Memory, Permissions, level_of};

    #[test]
    fn both_readings_agree() {
        for bits in 0..128u64 {
            let bit = |n: u32| bits >> n & 1 != 0;
            for size in PageSize::ALL {
                let leaf = entresol_table::Leaf {
                    pfn: Pfn::new(0x5_5540_0000).align_down(size),
                    size,
                    permissions: Permissions { read: bit(0), write: bit(1), execute: bit(2) },
                    memory: if bit(3) { Memory::Device } else { Memory::Normal },
                    young: bit(4),
                };
                let (fwb, level) = (bit(5), level_of(size));
                let raw = Stage2 { fwb }.leaf(&leaf);
                let expected = Leaf {
                    pfn: leaf.pfn,
                    size,
                    read: bit(0),
                    write: bit(1),
                    execute: bit(2),
                    accessed: bit(4),
                    normal: !bit(3),
                };
                assert_eq!(Descriptor::stage2(raw, level, fwb), Descriptor::Leaf(expected));
            }
        }
        for raw in [0, 0b10, 0x1002, 0x4000_07fd] {
            assert_eq!(Descriptor::stage2(raw, 3, true), Descriptor::Invalid);
            assert!(matches!(Stage2 { fwb: true }.decode(raw, 3), Entry::Vacant | Entry::Broken));
        }
    }
}
