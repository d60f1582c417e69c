//! Loads, stores, atomics and maintenance at addresses that are no memory.
//!
//! Left out: stores to the UART's data register, which would drown what this program says.

use guest_rt::machine::UART;
use guest_rt::trap::{Fault, probe};

use crate::Attacker;

type Probe = fn(u64, u64) -> Result<u64, Fault>;

const LOADS: [Probe; 14] = [
    probe::load8,
    probe::load16,
    probe::load32,
    probe::load64,
    probe::load_signed32,
    probe::load_pair,
    probe::load_post,
    probe::load_acquire,
    probe::load_exclusive,
    probe::clean,
    probe::clean_invalidate,
    probe::invalidate,
    probe::invalidate_instructions,
    probe::prefetch,
];

const STORES: [Probe; 10] = [
    probe::store8,
    probe::store16,
    probe::store32,
    probe::store64,
    probe::store_pair,
    probe::store_post,
    probe::store_release,
    probe::store_exclusive,
    probe::add_atomic,
    probe::zero_block,
];

pub fn attack(attacker: &mut Attacker) {
    let mut address = attacker.outside();
    // Aligned more often than not: stage 1 is off, and an unaligned access would fault before anybody else sees it.
    if attacker.rng.below(8) != 0 {
        address &= !15;
    }
    let load = attacker.rng.below(2) == 0;
    let access = if load { attacker.rng.pick(&LOADS) } else { attacker.rng.pick(&STORES) };
    if !load && address & !0xff == UART {
        address = UART + 0x100 + (address & 0xff);
    }
    let value = attacker.rng.draw();
    let result = access(address, value);
    attacker.note(result);
}
