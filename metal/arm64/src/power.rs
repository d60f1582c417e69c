//! Power of the outer machine, through its firmware (PSCI, Arm DEN 0022).

use smccc::{Smc, psci};

use crate::cpu;

/// Turns the machine off.
pub fn off() -> ! {
    let error = psci::system_off::<Smc>();
    log::error!("PSCI SYSTEM_OFF came back: {error:?}");
    cpu::halt()
}

/// Resets the machine.
pub fn reset() -> ! {
    let error = psci::system_reset::<Smc>();
    log::error!("PSCI SYSTEM_RESET came back: {error:?}");
    cpu::halt()
}
