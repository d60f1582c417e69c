//! The CPU's random numbers (FEAT_RNG, Arm DDI 0487 D24.2.148 RNDR).

use core::arch::asm;

/// Whether the CPU has a generator (ID_AA64ISAR0_EL1.RNDR).
pub fn is_implemented() -> bool {
    mrs!("id_aa64isar0_el1") >> 60 & 0xf != 0
}

/// 64 random bits; only where [`is_implemented`]. The generator may say that it has none yet: it is asked again, which
/// ends in reasonable time (D24.2.148).
pub fn next() -> u64 {
    loop {
        let (value, empty): (u64, u64);
        // SAFETY: reads a register that exists as the caller says; sets the condition flags.
        unsafe { asm!("mrs {}, s3_3_c2_c4_0", "cset {}, eq", out(reg) value, out(reg) empty, options(nomem, nostack)) };
        if empty == 0 {
            return value;
        }
        core::hint::spin_loop();
    }
}
