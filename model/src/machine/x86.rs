//! Nested and extended entries as x86 processors read them, and what they report of an access that an entry refuses: written
//! from the manuals a second time, so that a wrong bit in `arch/x86` is not wrong here too (AMD APM volume 2, 5.3, 5.4 and 15.25;
//! Intel SDM volume 3, 28.2.1 and 29.3).
//!
//! Caches are coherent and the instruction cache follows stores, so of this machine only the entries, their TLBs and the frames
//! are modelled. The processor sets an entry's accessed flag by itself: [`ACCESSED`] says where it stands.

use entresol_addr::{PageSize, Pfn};
use entresol_fault::Access;

use super::config::Paging;
use super::descriptor::{Descriptor, Leaf};

/// Bits 51:12.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The accessed flag of a leaf.
pub const fn accessed(paging: Paging) -> u64 {
    match paging {
        Paging::Stage2 => 0,
        Paging::Npt | Paging::Shadow => 1 << 5,
        Paging::Ept => 1 << 8,
    }
}

/// A page's size at a level, and the address bits that must be zero in its entry.
fn size(level: u8) -> Option<(PageSize, u64)> {
    match level {
        3 => Some((PageSize::Size4K, 0)),
        2 => Some((PageSize::Size2M, 0x1f_f000)),
        1 => Some((PageSize::Size1G, 0x3fff_f000)),
        _ => None,
    }
}

/// An entry of a nested table at `level` (0: PML4), on a processor of `bits` physical address bits.
pub fn nested(raw: u64, level: u8, bits: u8) -> Descriptor {
    let bit = |n: u32| raw >> n & 1 != 0;
    if !bit(0) {
        return Descriptor::Invalid;
    }
    if raw & ADDRESS >> bits << bits != 0 {
        return Descriptor::Refused;
    }
    let pfn = Pfn::new((raw & ADDRESS) >> 12);
    if level < 3 && !bit(7) {
        return Descriptor::Table(pfn);
    }
    match size(level) {
        // Bit 12 of a large page chooses a memory type.
        Some((size, zero)) if raw & zero & !(if level < 3 { 1 << 12 } else { 0 }) == 0 => Descriptor::Leaf(Leaf {
            pfn: pfn.align_down(size),
            size,
            // A guest's access is a user access, whatever its own tables say (15.25.5).
            read: bit(2),
            write: bit(2) && bit(1),
            execute: bit(2) && !bit(63),
            accessed: bit(5),
            normal: !(bit(3) && bit(4)),
        }),
        _ => Descriptor::Refused,
    }
}

/// An extended entry at `level` (0: PML4), on a processor of `bits` physical address bits without execute-only pages.
pub fn extended(raw: u64, level: u8, bits: u8) -> Descriptor {
    let bit = |n: u32| raw >> n & 1 != 0;
    let (read, write, execute) = (bit(0), bit(1), bit(2));
    if !(read || write || execute) {
        return Descriptor::Invalid;
    }
    let page = level == 3 || bit(7);
    let kind = raw >> 3 & 7;
    let pfn = Pfn::new((raw & ADDRESS) >> 12);
    let wrong = !read || raw & ADDRESS >> bits << bits != 0;
    match size(level) {
        _ if wrong => Descriptor::Refused,
        _ if !page && kind == 0 && !bit(6) => Descriptor::Table(pfn),
        Some((size, zero)) if page && raw & zero == 0 && [0, 1, 4, 5, 6].contains(&kind) => {
            Descriptor::Leaf(Leaf { pfn, size, read, write, execute, accessed: bit(8), normal: kind == 6 })
        }
        _ => Descriptor::Refused,
    }
}

/// Why an entry refused an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is not present.
    Absent,
    /// It permits something else.
    Permission,
    /// It is one that no processor accepts.
    Malformed,
}

/// EXITINFO1 of a nested page fault (15.25.6). Processors report a reserved bit with P set.
pub fn exit_info(access: Access, refusal: Refusal) -> u64 {
    let bit = |set: bool, n: u32| u64::from(set) << n;
    bit(refusal != Refusal::Absent, 0)
        | bit(access == Access::Write, 1)
        | bit(true, 2)
        | bit(refusal == Refusal::Malformed, 3)
        | bit(access == Access::Fetch, 4)
        | bit(true, 32)
}

/// The exit qualification of an EPT violation (28.2.1). A misconfiguration has none.
pub fn qualification(access: Access, refusal: Refusal) -> u64 {
    let bit = |set: bool, n: u32| u64::from(set) << n;
    bit(access == Access::Read, 0)
        | bit(access == Access::Write, 1)
        | bit(access == Access::Fetch, 2)
        | bit(refusal == Refusal::Permission, 3)
        | bit(true, 7)
        | bit(true, 8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_addr::Gfn;
    use entresol_arch_x86::either::{Either, Maker};
    use entresol_arch_x86::ept::Extended;
    use entresol_arch_x86::npt::Nested;
    use entresol_table::{Entry, Format, Memory, MmioEntry, Permissions, level_of};

    const BITS: u8 = 44;

    /// The core's format and the hardware of this model read every leaf, table, marker and MMIO entry alike.
    fn both_readings_agree<F: Format>(format: F, read: fn(u64, u8, u8) -> Descriptor) {
        for bits in 0..32u64 {
            let bit = |n: u32| bits >> n & 1 != 0;
            for size in PageSize::ALL {
                let leaf = entresol_table::Leaf {
                    pfn: Pfn::new(0x5554_0000).align_down(size),
                    size,
                    permissions: Permissions { read: bit(0), write: bit(1), execute: bit(2) },
                    memory: if bit(3) { Memory::Device } else { Memory::Normal },
                    young: bit(4),
                };
                let expected = Leaf {
                    pfn: leaf.pfn,
                    size,
                    read: bit(0),
                    write: bit(0) && bit(1),
                    execute: bit(0) && bit(2),
                    accessed: bit(4),
                    normal: !bit(3),
                };
                // Extended tables keep a leaf that may not be read absent.
                let seen = read(format.leaf(&leaf), level_of(size), BITS);
                assert!(
                    seen == Descriptor::Leaf(expected) || !bit(0) && seen == Descriptor::Invalid,
                    "{seen:?} {leaf:?}"
                );
            }
        }
        for level in 0..3 {
            assert_eq!(read(format.table(Pfn::new(0x1234)), level, BITS), Descriptor::Table(Pfn::new(0x1234)));
            assert_eq!(read(F::BROKEN | 1 << 12, level, BITS), Descriptor::Invalid);
        }
        let raw = format.mmio(&MmioEntry { gfn: Gfn::new(0x9), generation: 77 }).unwrap();
        assert_eq!((read(raw, 3, BITS), format.decode(raw, 3)), (Descriptor::Refused, Entry::Vacant));
        assert_eq!(read(0, 3, BITS), Descriptor::Invalid);
    }

    #[test]
    fn both_readings_agree_on_nested_and_extended_entries() {
        both_readings_agree(Either::new(Maker::Amd, BITS, None), nested);
        both_readings_agree(Either::new(Maker::Intel, BITS, None), extended);
        both_readings_agree(Nested::new(BITS, None), nested);
        both_readings_agree(Extended::new(BITS, None), extended);
    }

    /// What the processor refuses is what the core calls malformed, for words of every kind.
    #[test]
    fn both_refuse_the_same_words() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut refused = 0;
        for _ in 0..200_000 {
            let sparse = random.u64(..) & random.u64(..) & random.u64(..);
            let (raw, level) = (sparse | random.u64(..8), random.u8(0..4));
            let seen = (nested(raw, level, BITS), extended(raw, level, BITS));
            let malformed =
                (Nested::new(BITS, None).is_malformed(raw, level), Extended::new(BITS, None).is_malformed(raw, level));
            assert_eq!((seen.0 == Descriptor::Refused, seen.1 == Descriptor::Refused), malformed, "{raw:#x} {level}");
            refused += usize::from(malformed.0) + usize::from(malformed.1);
        }
        assert!((10_000..390_000).contains(&refused));
    }
}
