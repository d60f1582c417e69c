//! virtio-mmio (virtio 1.2, 4.2): registers at random, and drivers whose rings, descriptors and indices lie.
//!
//! Left out: addresses of this program itself. What a device is made to write goes to this CPU's data, to nowhere, or
//! across the end of memory.

use guest_rt::machine::VIRTIO;
use guest_rt::memory::{store32, store64};
use guest_rt::trap::probe;

use crate::Attacker;

const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC: u64 = 0x80;
const QUEUE_DRIVER: u64 = 0x90;
const QUEUE_DEVICE: u64 = 0xa0;
/// Registers that hold halves of addresses: from the first to behind the last.
const ADDRESSES: core::ops::Range<u64> = 0x80..0xa8;

pub fn attack(attacker: &mut Attacker) {
    let (first, count, step) = VIRTIO;
    let transport = first + step * attacker.rng.below(count);
    if attacker.rng.below(2) == 0 {
        any_register(attacker, transport);
    } else {
        driver(attacker, transport);
    }
}

fn any_register(attacker: &mut Attacker, transport: u64) {
    let random = attacker.rng.draw();
    let offset = random & 0x1ff;
    let value = if attacker.rng.below(2) == 0 { random >> 32 } else { random >> 32 & 0xf };
    let (offset, access) = match attacker.rng.below(6) {
        0 => (offset, probe::load8 as fn(u64, u64) -> _),
        1 => (offset & !3, probe::load32 as _),
        2 => (offset & !7, probe::load64 as _),
        3 => (offset, probe::store8 as _),
        4 => (offset & !1, probe::store16 as _),
        _ => (offset & !3, probe::store32 as _),
    };
    let stores = access as usize != probe::load32 as *const () as usize;
    if stores && ADDRESSES.contains(&offset) {
        return;
    }
    let result = access(transport + offset, value);
    attacker.note(result);
}

/// A driver that follows the steps of 3.1.1 with wrong values in them.
fn driver(attacker: &mut Attacker, transport: u64) {
    let size = 1 << attacker.rng.below(11);
    let (desc, driver, device) = (attacker.anywhere(), attacker.anywhere(), attacker.anywhere());
    // Half of the time rings that work, so that descriptors are looked at.
    let honest = attacker.rng.below(2) == 0;
    let base = attacker.data() & !0xfff;
    let (desc, driver, device) = if honest { (base, base + 0x800, base + 0xc00) } else { (desc, driver, device) };
    let size = if honest { size.min(64) } else { size + attacker.rng.below(3) };
    if honest {
        rings(attacker, base, size);
    }
    let queue = attacker.rng.below(4);
    let features = attacker.rng.draw();
    let steps = [
        (STATUS, 0),
        (STATUS, 1),
        (STATUS, 3),
        (DEVICE_FEATURES_SEL, features >> 40),
        (DRIVER_FEATURES_SEL, 0),
        (DRIVER_FEATURES, features & 0xffff_ffff),
        (DRIVER_FEATURES_SEL, 1),
        // VIRTIO_F_VERSION_1 is bit 32.
        (DRIVER_FEATURES, 1),
        (STATUS, 0xb),
        (QUEUE_SEL, queue),
        (QUEUE_NUM, size),
        (QUEUE_DESC, desc & 0xffff_ffff),
        (QUEUE_DESC + 4, desc >> 32),
        (QUEUE_DRIVER, driver & 0xffff_ffff),
        (QUEUE_DRIVER + 4, driver >> 32),
        (QUEUE_DEVICE, device & 0xffff_ffff),
        (QUEUE_DEVICE + 4, device >> 32),
        (QUEUE_READY, 1),
        (STATUS, 0xf),
        (QUEUE_NOTIFY, queue),
        (QUEUE_NOTIFY, features >> 20),
        (INTERRUPT_ACK, 3),
    ];
    for (register, value) in steps {
        // Now and then a step is left out.
        if attacker.rng.below(24) != 0 {
            let result = probe::store32(transport + register, value);
            attacker.note(result);
        }
    }
}

/// A table of descriptors, an available ring and its index, all in one page of this CPU's.
fn rings(attacker: &mut Attacker, base: u64, size: u64) {
    for index in 0..size {
        let random = attacker.rng.draw();
        let address = attacker.anywhere();
        let length = match random & 3 {
            0 => random >> 32,
            1 => 0,
            _ => random >> 32 & 0xfff,
        };
        let entry = base + 16 * index;
        store64(entry, address);
        store32(entry + 8, length as u32);
        // Flags NEXT, WRITE, INDIRECT; the next one is often itself, or past the table.
        let next = (random >> 16) % (size + 2);
        store32(entry + 12, (random >> 8 & 7 | next << 16) as u32);
    }
    let ring = base + 0x800;
    let index = attacker.rng.draw();
    store32(ring, (index & 0xffff_0001) as u32);
    for slot in 0..size / 2 {
        store32(ring + 4 + 4 * slot, attacker.rng.draw() as u32 & 0x00ff_00ff);
    }
}
