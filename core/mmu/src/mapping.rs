//! Which entry a grant becomes: pure decisions about size and permissions.

use entresol_addr::{Gfn, GfnRange, PageSize, Pfn};
use entresol_backing::{Grant, Memory as Behind};
use entresol_fault::Fault;
use entresol_machine::Features;
use entresol_slot::Slot;
use entresol_sync::planted;
use entresol_table::{Leaf, Memory, Permissions};

/// An entry to be: where its block starts, and what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First guest frame of the block.
    pub gfn: Gfn,
    /// The entry.
    pub leaf: Leaf,
}

impl Mapping {
    /// The guest frames that it translates.
    #[inline]
    pub fn range(&self) -> GfnRange {
        GfnRange::block(self.gfn, self.leaf.size)
    }

    /// Only the page at `gfn`, which lies in it.
    pub fn page(&self, gfn: Gfn) -> Self {
        Self { gfn, leaf: Leaf { pfn: self.leaf.frame_of(gfn), size: PageSize::Size4K, ..self.leaf } }
    }

    /// The same without the permission to write.
    pub fn read_only(&self) -> Self {
        let permissions = self.leaf.permissions.without(Permissions::WRITE);
        Self { leaf: Leaf { permissions, ..self.leaf }, ..*self }
    }
}

/// The entry for `fault` at `gfn`, which lies in `slot` and is backed by `grant`.
#[inline]
pub fn choose(slot: &Slot, grant: &Grant, fault: &Fault, largest: PageSize, features: &Features) -> Mapping {
    let gfn = fault.gfn();
    let exact = grant.frame(slot.object_frame(gfn));
    let size = size(slot, grant, gfn, exact, largest);
    let pfn = exact.align_down(size);
    let device = matches!(grant.memory, Behind::Device);
    let permissions = Permissions {
        read: true,
        write: grant.writable & (!slot.is_read_only() | planted!(ZX2)),
        execute: !device & (features.coherent_icache | fault.is_fetch()),
    };
    let memory = if device { Memory::Device } else { Memory::Normal };
    Mapping { gfn: gfn.align_down(size), leaf: Leaf { pfn, size, permissions, memory, young: true } }
}

/// The largest size such that guest and machine agree modulo it, and the whole block lies in the slot and in the grant
/// (INV-5). A grant is aligned to its own size in the machine; in its object one of a device or a ROM need not be.
#[inline]
fn size(slot: &Slot, grant: &Grant, gfn: Gfn, exact: Pfn, largest: PageSize) -> PageSize {
    let mut size = if grant.size < largest { grant.size } else { largest };
    while let Some(smaller) = size.smaller() {
        let agrees = (gfn.get() ^ exact.get()) & (size.frames() - 1) == 0;
        if agrees && (slot.range().covers(GfnRange::block(gfn, size)) || planted!(ZX1)) {
            return size;
        }
        size = smaller;
    }
    size
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_addr::Gpa;
    use entresol_fault::{Access, Cause};
    use entresol_slot::{ObjectId, SlotFlags};
    use proptest::prelude::*;

    const COHERENT: Features =
        Features { forced_write_back: true, coherent_icache: true, physical_bits: 48, vmid_bits: 16, tags: false };

    fn slot(base: u64, count: u64, offset: u64) -> Slot {
        Slot { id: 0, base: Gfn::new(base), count, object: ObjectId::new(0), offset, flags: SlotFlags::empty() }
    }

    fn block(pfn: u64, start: u64, size: PageSize) -> Grant {
        let memory = Behind::Normal;
        Grant { pfn: Pfn::new(pfn), extent_start: start, size, writable: true, memory, fresh: false }
    }

    fn read(gfn: u64) -> Fault {
        Fault {
            gpa: Gpa::new(gfn << 12),
            access: Access::Read,
            cause: Cause::Translation,
            stage1_walk: false,
            cache_maintenance: false,
            transfer: None,
            syndrome: 0,
        }
    }

    #[test]
    fn a_block_needs_agreement_and_room() {
        let size_of = |slot: &Slot, gfn| {
            choose(slot, &block(0x8000, 512, PageSize::Size2M), &read(gfn), PageSize::Size1G, &COHERENT).leaf.size
        };
        assert_eq!(size_of(&slot(0x4_0000, 4096, 0), 0x4_0000 + 600), PageSize::Size2M);
        assert_eq!(size_of(&slot(0x4_0001, 4096, 0), 0x4_0001 + 600), PageSize::Size4K, "guest and object disagree");
        assert_eq!(size_of(&slot(0x4_0000, 700, 0), 0x4_0000 + 600), PageSize::Size4K, "the block leaves the slot");
        assert_eq!(size_of(&slot(0x4_0000 + 513, 4096, 513), 0x4_0000 + 600), PageSize::Size4K, "starts before it");
    }

    #[test]
    fn execution_waits_for_a_fetch_without_coherent_caches() {
        let features = Features { coherent_icache: false, ..COHERENT };
        let (slot, grant) = (slot(0, 16, 0), block(0x8000, 0, PageSize::Size4K));
        let load = choose(&slot, &grant, &read(0), PageSize::Size4K, &features);
        let fetch = Fault { access: Access::Fetch, ..read(0) };
        assert!(!load.leaf.permissions.execute);
        assert!(choose(&slot, &grant, &fetch, PageSize::Size4K, &features).leaf.permissions.execute);
        assert!(choose(&slot, &grant, &read(0), PageSize::Size4K, &COHERENT).leaf.permissions.execute);
        let device = Grant { memory: Behind::Device, ..grant };
        assert!(!choose(&slot, &device, &fetch, PageSize::Size4K, &COHERENT).leaf.permissions.execute);
    }

    #[test]
    fn a_block_of_rom_agrees_with_the_machine_and_not_with_its_object() {
        // The object's frame 509 begins a block of the machine.
        let grant = block(0x40_0000, 509, PageSize::Size2M);
        let leaf = |slot: &Slot, gfn| choose(slot, &grant, &read(gfn), PageSize::Size1G, &COHERENT).leaf;
        let page = leaf(&slot(0, 2048, 0), 600);
        assert_eq!((page.size, page.pfn), (PageSize::Size4K, Pfn::new(0x40_0000 + 91)));
        let whole = leaf(&slot(3, 2048, 0), 603);
        assert_eq!((whole.size, whole.pfn), (PageSize::Size2M, Pfn::new(0x40_0000)));
    }

    proptest! {
        /// INV-5, and every frame of the block is the one that the object has there.
        #[test]
        fn a_mapping_never_leaves_slot_or_grant(
            base in 0u64..2000, count in 1u64..3000, offset in 0u64..2000, at in 0u64..3000, shift in 0u64..512,
        ) {
            let slot = slot(base, count, offset);
            let gfn = base + at % count;
            let frame = slot.object_frame(Gfn::new(gfn));
            // A ROM begins anywhere in the machine; memory is aligned in its object too.
            for shift in [0, shift] {
                let start = frame.wrapping_sub((frame + shift) % 512);
                let grant = block(0x40_0000, start, PageSize::Size2M);
                let mapping = choose(&slot, &grant, &read(gfn), PageSize::Size1G, &COHERENT);
                prop_assert!(slot.range().covers(mapping.range()));
                prop_assert!(mapping.range().contains(Gfn::new(gfn)));
                prop_assert!(mapping.leaf.pfn.is_aligned(mapping.leaf.size));
                for gfn in mapping.range().start().get()..mapping.range().end().get() {
                    let frame = slot.object_frame(Gfn::new(gfn));
                    prop_assert_eq!(mapping.leaf.frame_of(Gfn::new(gfn)), grant.frame(frame));
                }
            }
        }
    }
}
