//! Every register of the interrupt controller's frames, any width, any value; and the window in which what it caused
//! is taken.

use guest_rt::machine::{GICD, GICR};
use guest_rt::trap::{self, probe};

use crate::Attacker;

/// The distributor, the ITS and what lies beside it, the first redistributors, past the last.
const FRAMES: [(u64, u64); 5] =
    [(GICD, 0x1_0000), (0x0801_0000, 0x9_0000), (GICR, 0x10_0000), (GICR, 0x2_0000), (0x08fe_0000, 0x2_0000)];

pub fn attack(attacker: &mut Attacker) {
    if attacker.rng.below(16) == 0 {
        return window();
    }
    let (base, size) = attacker.rng.pick(&FRAMES);
    let random = attacker.rng.draw();
    // Half of the time in the first kilobytes, where the registers that do something are dense.
    let offset = if random & 1 == 0 { (random >> 8) % size } else { (random >> 8) % 0x1000 };
    let value = match attacker.rng.below(3) {
        0 => attacker.rng.draw(),
        1 => u64::MAX,
        _ => 1 << attacker.rng.below(64),
    };
    let (address, access) = match attacker.rng.below(10) {
        0 => (offset, probe::load8 as fn(u64, u64) -> _),
        1 => (offset & !1, probe::load16 as _),
        2 => (offset & !3, probe::load32 as _),
        3 => (offset & !7, probe::load64 as _),
        4 => (offset, probe::store8 as _),
        5 => (offset & !1, probe::store16 as _),
        6 => (offset & !7, probe::store64 as _),
        7 => (offset & !7, probe::store_pair as _),
        _ => (offset & !3, probe::store32 as _),
    };
    let result = access(base + address, value);
    attacker.note(result);
}

/// Takes at most one interrupt: its handler masks the rest.
fn window() {
    guest_rt::gic::mask_below(0xff);
    trap::interrupts(true);
    guest_rt::memory::barrier();
    trap::interrupts(false);
}
