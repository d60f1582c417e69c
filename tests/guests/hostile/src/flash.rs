//! The flash and the ROM below it: commands, data and noise of every width, from every CPU at once, and loads of whatever
//! answers. A machine without them gives aborts.

use guest_rt::trap::{Fault, probe};

use crate::Attacker;

/// What is stored to: the start of the ROM and of the flash, and where its first two blocks meet.
const PLACES: [u64; 3] = [0, 0x0400_0000, 0x0403_ffc0];

/// First and second cycles of the Intel command set, and some of other sets.
const COMMANDS: [u64; 16] =
    [0xff, 0x90, 0x98, 0x70, 0x50, 0x40, 0x10, 0xe8, 0x20, 0xd0, 0x60, 0x01, 0x2f, 0xb0, 0xf0, 0xaa];

type Probe = fn(u64, u64) -> Result<u64, Fault>;

const STORES: [Probe; 6] =
    [probe::store8, probe::store16, probe::store32, probe::store32, probe::store64, probe::store_pair];
const LOADS: [Probe; 6] =
    [probe::load8, probe::load16, probe::load32, probe::load64, probe::load_pair, probe::clean_invalidate];

pub fn attack(attacker: &mut Attacker) {
    let address = attacker.rng.pick(&PLACES) + attacker.rng.below(8) * 16;
    let command = attacker.rng.pick(&COMMANDS);
    let value = match attacker.rng.below(4) {
        0 => attacker.rng.draw(),
        1 => attacker.rng.below(4) * 0x1_0001,
        _ => command << 48 | command << 32 | command << 16 | command,
    };
    let access = if attacker.rng.below(3) == 0 { attacker.rng.pick(&LOADS) } else { attacker.rng.pick(&STORES) };
    let result = access(address, value);
    attacker.note(result);
}
