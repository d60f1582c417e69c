//! The generation of a virtual machine (Virtual Machine Generation ID, Microsoft 2012; device tree binding
//! `microsoft,vmgenid`).
//!
//! Purpose: a guest that was copied must not use random numbers, nonces or identities that its original uses as well. It reads
//! a number of 128 bits here that no other virtual machine has, and is interrupted when it changes.
//!
//! Protocol: the number is in the first 16 bytes of the page; the rest reads as zero, and stores do nothing. The program that
//! owns the VM calls [`VmGenId::renew`] in a copy before its first instruction. The interrupt is an edge: the line
//! goes up and down again. Linux then reads the number, compares, and seeds its generator anew.
//!
//! Invariants: a load sees the number before or after a change, never a part of each, if it is one load; the interrupt comes
//! after the change.
//!
//! Lock order: the device's lock, then the line.

use entresol_sync::Mutex;

use crate::bus::{Device, Interrupt, Work};

/// Bytes of guest address space that it takes.
pub const SIZE: u64 = 0x1000;

/// Bytes of the number.
pub const ID_BYTES: usize = 16;

/// The page with the number, and its interrupt line.
pub struct VmGenId<L> {
    id: Mutex<[u8; ID_BYTES]>,
    line: L,
}

impl<L: Interrupt> VmGenId<L> {
    /// A generation called `id`. Nobody is told.
    pub fn new(id: [u8; ID_BYTES], line: L) -> Self {
        Self { id: Mutex::new(id), line }
    }

    /// From now on the generation is `id`, and the guest is told.
    pub fn renew(&self, id: [u8; ID_BYTES]) {
        let mut current = self.id.lock();
        *current = id;
        self.line.set_level(true);
        self.line.set_level(false);
    }

    /// The number.
    pub fn id(&self) -> [u8; ID_BYTES] {
        *self.id.lock()
    }
}

impl<L: Interrupt> Device for VmGenId<L> {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let (id, mut bytes) = (self.id(), [0; 8]);
        let Ok(start) = usize::try_from(offset) else { return 0 };
        if !matches!(size, 1 | 2 | 4 | 8) {
            return 0;
        }
        for (to, from) in bytes[..usize::from(size)].iter_mut().zip(id.get(start..).unwrap_or_default()) {
            *to = *from;
        }
        u64::from_le_bytes(bytes)
    }

    fn write(&self, _offset: u64, _size: u8, _value: u64) -> Work {
        Work::Idle
    }

    /// A reset is no copy: the generation stays.
    fn reset(&self) {}
}

#[cfg(test)]
mod tests {
    use alloc::vec::Vec;

    use super::*;

    #[derive(Default)]
    struct Levels(Mutex<Vec<bool>>);

    impl Interrupt for Levels {
        fn set_level(&self, high: bool) {
            self.0.lock().push(high);
        }
    }

    const FIRST: [u8; ID_BYTES] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];

    #[test]
    fn every_size_reads_the_number_and_zero_behind_it() {
        let page = VmGenId::new(FIRST, Levels::default());
        assert_eq!(page.read(0, 8), 0x0807_0605_0403_0201);
        assert_eq!(page.read(8, 8), 0x100f_0e0d_0c0b_0a09);
        assert_eq!((page.read(4, 4), page.read(6, 2), page.read(15, 1)), (0x0807_0605, 0x0807, 0x10));
        assert_eq!((page.read(12, 8), page.read(16, 8), page.read(SIZE - 4, 4)), (0x100f_0e0d, 0, 0));
        assert_eq!((page.read(u64::MAX, 8), page.read(0, 3), page.read(0, 0)), (0, 0, 0));
    }

    #[test]
    fn a_store_and_a_reset_change_nothing() {
        let page = VmGenId::new(FIRST, Levels::default());
        assert_eq!(page.write(0, 8, u64::MAX), Work::Idle);
        page.reset();
        assert_eq!(page.id(), FIRST);
        assert!(page.line.0.lock().is_empty());
    }

    #[test]
    fn a_new_generation_is_read_and_told_by_one_edge() {
        let page = VmGenId::new(FIRST, Levels::default());
        page.renew([0xee; ID_BYTES]);
        assert_eq!(page.read(0, 4), 0xeeee_eeee);
        assert_eq!(*page.line.0.lock(), [true, false]);
    }
}
