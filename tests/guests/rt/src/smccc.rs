//! Calls to firmware: SMC Calling Convention (Arm DEN 0028) and PSCI 1.1 (Arm DEN 0022).

use core::arch::asm;
use core::sync::atomic::{AtomicBool, Ordering};

/// The instruction that reaches firmware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduit {
    /// HVC: a hypervisor, or QEMU's firmware on a machine without EL2.
    Hvc,
    /// SMC: QEMU's firmware on a machine with EL2.
    Smc,
}

/// PSCI function identifiers (DEN 0022, 5.1); those with addresses in their 64-bit form.
pub mod psci {
    /// PSCI_VERSION.
    pub const VERSION: u64 = 0x8400_0000;
    /// CPU_SUSPEND.
    pub const CPU_SUSPEND: u64 = 0xc400_0001;
    /// CPU_OFF.
    pub const CPU_OFF: u64 = 0x8400_0002;
    /// CPU_ON.
    pub const CPU_ON: u64 = 0xc400_0003;
    /// AFFINITY_INFO.
    pub const AFFINITY_INFO: u64 = 0xc400_0004;
    /// SYSTEM_OFF.
    pub const SYSTEM_OFF: u64 = 0x8400_0008;
    /// SYSTEM_RESET.
    pub const SYSTEM_RESET: u64 = 0x8400_0009;
    /// PSCI_FEATURES.
    pub const FEATURES: u64 = 0x8400_000a;

    /// Status codes (DEN 0022, 5.2.2).
    pub const SUCCESS: i64 = 0;
    /// No such function.
    pub const NOT_SUPPORTED: i64 = -1;
    /// A bad argument.
    pub const INVALID_PARAMETERS: i64 = -2;
    /// The CPU is on.
    pub const ALREADY_ON: i64 = -4;
    /// An entry point that is no memory.
    pub const INVALID_ADDRESS: i64 = -9;
}

static BY_SMC: AtomicBool = AtomicBool::new(false);

pub(crate) fn set_conduit(conduit: Conduit) {
    BY_SMC.store(conduit == Conduit::Smc, Ordering::Relaxed);
}

/// Calls firmware by the machine's conduit with X0 to X3; its X0.
pub fn call(arguments: [u64; 4]) -> u64 {
    if BY_SMC.load(Ordering::Relaxed) { smc(arguments) } else { hvc(arguments) }
}

macro_rules! conduit {
    ($(#[$doc:meta])* $name:ident, $instruction:literal) => {
        $(#[$doc])*
        pub fn $name([a, b, c, d]: [u64; 4]) -> u64 {
            let answer;
            // SAFETY: firmware changes no memory of ours; X0 to X17 may be changed (SMCCC 1.0).
            unsafe {
                asm!($instruction, inlateout("x0") a => answer, inlateout("x1") b => _, inlateout("x2") c => _,
                    inlateout("x3") d => _, clobber_abi("C"), options(nostack))
            };
            answer
        }
    };
}

conduit!(
    /// HVC #0 with X0 to X3; its X0.
    hvc, "hvc #0"
);
conduit!(
    /// SMC #0 with X0 to X3; its X0.
    smc, "smc #0"
);

/// Powers the machine off.
pub fn system_off() -> ! {
    call([psci::SYSTEM_OFF, 0, 0, 0]);
    // Firmware without PSCI: nothing else can end this.
    loop {
        // SAFETY: waits.
        unsafe { asm!("wfi", options(nomem, nostack)) };
    }
}
