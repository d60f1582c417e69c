//! The power state coordination interface that a guest sees (Arm DEN 0022, PSCI 1.1).
//!
//! Purpose: [`decode`] gives a PSCI call its type and its arguments their width: the 32-bit form of a function takes only the
//! low halves of its registers (DEN 0028 2.6). [`features`] says what [`Call::Features`] answers, from the same table.
//!
//! Protocol: the caller carries the call out and puts the answer in X0: a [`Status`] as [`Status::x0`], or a number.
//!
//! Invariants: pure; every combination of register values decodes, or is none of PSCI's.

use ::smccc::psci as id;

/// PSCI 1.1.
pub const VERSION: u64 = 1 << 16 | 1;
/// MIGRATE_INFO_TYPE: no Trusted OS that would have to migrate.
pub const NO_MIGRATION: u64 = 2;

/// AFFINITY_INFO: what a vCPU is doing (DEN 0022 5.1.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Running, or suspended.
    On = 0,
    /// Off.
    Off = 1,
    /// CPU_ON was accepted; it has not run yet.
    OnPending = 2,
}

/// Return codes (DEN 0022 5.2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Success = 0,
    /// No such function.
    NotSupported = -1,
    /// An argument means nothing.
    InvalidParameters = -2,
    /// Not allowed.
    Denied = -3,
    /// The CPU is on.
    AlreadyOn = -4,
    /// The CPU is being turned on.
    OnPending = -5,
    /// A failure inside.
    InternalFailure = -6,
    /// No such CPU.
    NotPresent = -7,
    /// Disabled.
    Disabled = -8,
    /// The address is not memory.
    InvalidAddress = -9,
}

impl Status {
    /// The value of X0, sign-extended.
    #[inline]
    pub const fn x0(self) -> u64 {
        self as i64 as u64
    }
}

/// A PSCI call that this hypervisor implements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Answer [`VERSION`].
    Version,
    /// Wait for a wake-up event; as standby, or as power-down that resumes at `entry`.
    CpuSuspend {
        /// Power state in the original format: StateType is bit 16 (1 = power-down).
        power_state: u32,
        /// Where a power-down resumes.
        entry: u64,
        /// X0 on resumption.
        context: u64,
    },
    /// Turn the calling CPU off.
    CpuOff,
    /// Turn a CPU on.
    CpuOn {
        /// Affinity fields of its MPIDR_EL1.
        target: u64,
        /// Its first PC.
        entry: u64,
        /// Its X0.
        context: u64,
    },
    /// Ask for a [`Power`].
    AffinityInfo {
        /// Affinity fields.
        target: u64,
        /// Fields below this level are ignored; 0 names one CPU.
        level: u32,
    },
    /// Answer [`NO_MIGRATION`].
    MigrateInfoType,
    /// Turn the VM off.
    SystemOff,
    /// Reset the VM.
    SystemReset,
    /// Reset the VM in a way: 0 is a warm reset, bit 31 marks the vendor's own.
    SystemReset2 {
        /// Type.
        kind: u32,
        /// Vendor's argument.
        cookie: u64,
    },
    /// Answer [`features`].
    Features {
        /// Which function is asked for.
        function: u32,
    },
}

const fn low(x: u64) -> u64 {
    x & 0xffff_ffff
}

/// The call with this identifier and arguments X1–X3; `None` if PSCI has none, or this hypervisor offers none.
#[inline]
pub const fn decode(function: u32, x1: u64, x2: u64, x3: u64) -> Option<Call> {
    Some(match function {
        id::PSCI_VERSION => Call::Version,
        id::PSCI_CPU_SUSPEND_32 => Call::CpuSuspend { power_state: x1 as u32, entry: low(x2), context: low(x3) },
        id::PSCI_CPU_SUSPEND_64 => Call::CpuSuspend { power_state: x1 as u32, entry: x2, context: x3 },
        id::PSCI_CPU_OFF => Call::CpuOff,
        id::PSCI_CPU_ON_32 => Call::CpuOn { target: low(x1), entry: low(x2), context: low(x3) },
        id::PSCI_CPU_ON_64 => Call::CpuOn { target: x1, entry: x2, context: x3 },
        id::PSCI_AFFINITY_INFO_32 => Call::AffinityInfo { target: low(x1), level: x2 as u32 },
        id::PSCI_AFFINITY_INFO_64 => Call::AffinityInfo { target: x1, level: x2 as u32 },
        id::PSCI_MIGRATE_INFO_TYPE => Call::MigrateInfoType,
        id::PSCI_SYSTEM_OFF => Call::SystemOff,
        id::PSCI_SYSTEM_RESET => Call::SystemReset,
        id::PSCI_SYSTEM_RESET2_32 => Call::SystemReset2 { kind: x1 as u32, cookie: low(x2) },
        id::PSCI_SYSTEM_RESET2_64 => Call::SystemReset2 { kind: x1 as u32, cookie: x2 },
        id::PSCI_FEATURES => Call::Features { function: x1 as u32 },
        _ => return None,
    })
}

/// The answer to PSCI_FEATURES: 0 for what [`decode`] knows (no CPU_SUSPEND flags: original format, platform-coordinated) and
/// for SMCCC_VERSION, else −1.
pub const fn features(function: u32) -> u64 {
    let there = function == ::smccc::arch::SMCCC_VERSION || decode(function, 0, 0, 0).is_some();
    if there { Status::Success.x0() } else { Status::NotSupported.x0() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn arguments_of_the_32_bit_form_are_cut() {
        let wide = 0xaaaa_bbbb_cccc_dddd;
        let cut = 0xcccc_dddd;
        assert_eq!(decode(0x8400_0003, wide, wide, wide), Some(Call::CpuOn { target: cut, entry: cut, context: cut }));
        assert_eq!(
            decode(0xc400_0003, wide, wide, wide),
            Some(Call::CpuOn { target: wide, entry: wide, context: wide })
        );
        assert_eq!(
            decode(0x8400_0001, wide, wide, wide),
            Some(Call::CpuSuspend { power_state: 0xcccc_dddd, entry: cut, context: cut })
        );
    }

    #[test]
    fn functions_of_the_manual() {
        for (function, call) in [
            (0x8400_0000, Call::Version),
            (0x8400_0002, Call::CpuOff),
            (0x8400_0006, Call::MigrateInfoType),
            (0x8400_0008, Call::SystemOff),
            (0x8400_0009, Call::SystemReset),
            (0x8400_0012, Call::SystemReset2 { kind: 0, cookie: 0 }),
            (0x8400_000a, Call::Features { function: 0 }),
            (0xc400_0004, Call::AffinityInfo { target: 0, level: 0 }),
        ] {
            assert_eq!(decode(function, 0, 0, 0), Some(call));
        }
        // Functions that exist in one width only, and those not offered.
        for function in [0xc400_0000, 0xc400_0008, 0x8400_0005, 0x8400_000e, 0x8400_0013, 0x8400_0020] {
            assert_eq!(decode(function, 0, 0, 0), None, "{function:#x}");
        }
    }

    #[test]
    fn codes_are_negative_numbers() {
        assert_eq!(Status::NotSupported.x0(), u64::MAX);
        assert_eq!(Status::InvalidAddress.x0() as i64, -9);
        assert_eq!(Status::Success.x0(), 0);
    }

    proptest! {
        #[test]
        fn features_agree_with_what_is_decoded(function: u32, near in 0u32..0x40, wide: bool) {
            let psci = if wide { 0xc400_0000 } else { 0x8400_0000 } | near;
            for function in [function, psci] {
                let there = decode(function, 1, 2, 3).is_some() || function == 0x8000_0000;
                prop_assert_eq!(features(function) == 0, there);
            }
        }
    }
}
