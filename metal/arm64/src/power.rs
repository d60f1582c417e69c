//! Power of the outer machine, through its firmware (PSCI, Arm DEN 0022).

use smccc::{Hvc, Smc, psci};

use crate::{console, cpu};

/// Turns the machine off.
pub fn off() -> ! {
    let error = psci::system_off::<Smc>();
    came_back("SYSTEM_OFF", error)
}

/// Resets the machine.
pub fn reset() -> ! {
    let error = psci::system_reset::<Smc>();
    came_back("SYSTEM_RESET", error)
}

/// Turns the machine off from EL1, where we only are to say that we cannot run there.
pub(crate) fn off_by_hvc() -> ! {
    let error = psci::system_off::<Hvc>();
    came_back("SYSTEM_OFF", error)
}

/// Without the console's lock, since a panic may hold it.
fn came_back(call: &str, result: Result<(), psci::error::Error>) -> ! {
    console::emergency(format_args!("PSCI {call} came back: {result:?}\n"));
    cpu::halt()
}
