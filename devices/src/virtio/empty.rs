//! A slot of the guest's map without a device.
//!
//! Purpose: QEMU's `virt` has 32 slots for virtio, most of them empty, and programs for it probe them all. An empty one
//! shows the magic value and DeviceID 0, which a driver must ignore silently (virtio 4.2.2.2).

use super::registers;
use crate::bus::{Device, Work};

/// Nobody is home.
#[derive(Clone, Copy, Debug, Default)]
pub struct EmptySlot;

impl Device for EmptySlot {
    fn read(&self, offset: u64, size: u8) -> u64 {
        match (offset, size) {
            (registers::MAGIC_VALUE, 4) => registers::MAGIC.into(),
            (registers::VERSION, 4) => registers::LAYOUT.into(),
            (registers::VENDOR_ID, 4) => registers::VENDOR.into(),
            _ => 0,
        }
    }

    fn write(&self, _offset: u64, _size: u8, _value: u64) -> Work {
        Work::Idle
    }

    fn reset(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prober_finds_the_magic_and_no_device() {
        let words = [0, 4, 8, 0x10, 0x100, u64::MAX].map(|offset| EmptySlot.read(offset, 4));
        assert_eq!(words, [0x7472_6976, 2, 0, 0, 0, 0]);
        assert_eq!(EmptySlot.read(0, 8), 0);
        assert_eq!(EmptySlot.write(registers::STATUS, 4, 1), Work::Idle);
        assert_eq!(EmptySlot.read(registers::STATUS, 4), 0);
    }
}
