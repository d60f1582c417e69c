//! The program counter where no code is, and instructions that a guest may not have.
//!
//! Left out: any instruction that could write SP, branch or store: only the encodings of FP and SIMD data processing, SVE
//! and SME (which are trapped: CPACR_EL1) and permanently undefined ones are made up.

use guest_rt::trap::probe;

use crate::Attacker;

pub fn attack(attacker: &mut Attacker) {
    let random = attacker.rng.draw();
    match attacker.rng.below(4) {
        0 => {
            let address = attacker.outside();
            let result = probe::call(address);
            attacker.note(result);
        }
        1 => {
            let address = attacker.outside() & !3;
            let result = probe::call(address);
            attacker.note(result);
        }
        2 => {
            // UDF #imm, or an encoding of the reserved group.
            let instruction = random as u32 & 0x01ff_ffff;
            attacker.execute(if random >> 63 == 0 { instruction & 0xffff } else { instruction }, &[0; 18]);
        }
        _ => {
            // Bits 28:25: x111 is FP and SIMD data processing, 0010 is SVE, 0000 with bit 31 is SME.
            let bits = random as u32;
            let instruction = match random >> 62 {
                0 | 1 => bits & 0x61ff_ffff | 0x0e00_0000,
                2 => bits & 0xe1ff_ffff | 0x0400_0000,
                _ => bits & 0x61ff_ffff | 0x8000_0000,
            };
            let registers = [random; 18];
            attacker.execute(instruction, &registers);
        }
    }
}
