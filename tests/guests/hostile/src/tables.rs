//! Stage-1 tables with descriptors at random: walks that leave memory, loop into themselves, end in devices.
//!
//! The program's own part of memory stays mapped as it is, and addresses of random descriptors are only loaded from and
//! translated (AT), because what they map may be this program.

use guest_rt::mmu::{self, Kind, Space};
use guest_rt::trap::probe;
use guest_rt::{memory, sysreg_read, sysreg_write};

use crate::Attacker;

/// Root entries of the program's own gigabytes: devices and image.
const OWN: u64 = 2;

pub fn attack(attacker: &mut Attacker) {
    let tables = attacker.scratch.start + 0x1000;
    let mut space = Space::new(tables..tables + 0x1_0000);
    let own = guest_rt::machine::RAM;
    space.map(own, own, attacker.scratch.end.next_multiple_of(2 << 20) - own, Kind::Cacheable, true);
    space.map(0x0800_0000, 0x0800_0000, 32 << 20, Kind::Device, true);
    for _ in 0..24 {
        let index = OWN + attacker.rng.below(512 - OWN);
        let descriptor = descriptor(attacker, space.root());
        space.put_root(index, descriptor);
    }
    mmu::enable(&space);
    // Any ASID; the tables are the same.
    sysreg_write!("ttbr0_el1", space.root() | attacker.rng.draw() << 48);
    for _ in 0..8 {
        let address = (OWN + attacker.rng.below(512 - OWN)) << 30 | (attacker.rng.draw() & 0x3fff_fff8);
        let result = if attacker.rng.below(2) == 0 { probe::load64(address, 0) } else { translate(attacker, address) };
        attacker.note(result);
    }
    sysreg_write!("ttbr0_el1", space.root());
    memory::each_line(attacker.scratch.clone(), memory::clean_invalidate);
    mmu::disable();
}

/// AT S1E1R and S1E1W, then PAR_EL1.
fn translate(attacker: &mut Attacker, address: u64) -> Result<u64, guest_rt::trap::Fault> {
    let mut registers = [0; 18];
    registers[0] = address;
    let write = attacker.rng.below(2) as u32;
    attacker.execute(0xd508_7800 | write << 5, &registers);
    Ok(sysreg_read!("par_el1"))
}

fn descriptor(attacker: &mut Attacker, root: u64) -> u64 {
    let random = attacker.rng.draw();
    let attributes = random & 0xfff0_0000_0000_0ffc;
    let address = match attacker.rng.below(5) {
        0 => random & 0x0000_ffff_ffff_f000,
        1 => root,
        2 => attacker.outside() & 0x0000_ffff_ffff_f000,
        3 => attacker.data() & !0xfff,
        _ => 0x0800_0000,
    };
    // A table more often than a block; the access flag so that blocks are reached.
    let kind = if attacker.rng.below(4) == 0 { 1 } else { 3 };
    address | attributes | 1 << 10 | kind
}
