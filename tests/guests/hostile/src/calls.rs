//! HVC and SMC with any immediate, any function and any arguments.
//!
//! Left out: PSCI functions that stop, reset or put to sleep the caller. They are recognised in the low 32 bits, whatever
//! stands above, because a hypervisor may look at W0 only.

use crate::Attacker;

/// PSCI numbers of CPU_SUSPEND, CPU_OFF, SYSTEM_OFF, SYSTEM_RESET, CPU_FREEZE, CPU_DEFAULT_SUSPEND, SYSTEM_SUSPEND,
/// SYSTEM_RESET2, SYSTEM_OFF2 (DEN 0022, 5.1).
const LEFT_OUT: [u64; 9] = [1, 2, 8, 9, 0xb, 0xc, 0xe, 0x12, 0x15];
/// What a function identifier looks like (DEN 0028, 2.5): owners, with both calling conventions.
const OWNERS: [u64; 10] = [
    0x8400_0000,
    0xc400_0000,
    0x8000_0000,
    0xc000_0000,
    0x8600_0000,
    0xc600_0000,
    0x8500_0000,
    0x8600_ff00,
    0xbf00_0000,
    0xc400_0050,
];

pub fn attack(attacker: &mut Attacker) {
    let mut registers = [0; 18];
    for register in &mut registers {
        *register = match attacker.rng.below(4) {
            0 => attacker.rng.draw(),
            1 => attacker.rng.below(16),
            _ => attacker.anywhere(),
        };
    }
    let random = attacker.rng.draw();
    registers[0] = match attacker.rng.below(4) {
        0 => random,
        1 => random & 0xffff_ffff,
        2 => attacker.rng.pick(&OWNERS) + (random & 0x1f) + (random & 0xffff_0000_0000_0000 & (random << 32)),
        _ => attacker.rng.pick(&OWNERS) + (random & 0x1f),
    };
    let function = registers[0] & 0xffff_ffff;
    if function & !0x4000_001f == 0x8400_0000 && LEFT_OUT.contains(&(function & 0x1f)) {
        return;
    }
    // A CPU that is off would start anywhere: that one is lost, and the attack goes on without it.
    let immediate = if attacker.rng.below(2) == 0 { 0 } else { (random >> 20) as u32 & 0xffff };
    let smc = u32::from(attacker.rng.below(2) == 0);
    attacker.execute(0xd400_0002 | smc | immediate << 5, &registers);
}
