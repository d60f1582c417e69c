//! The SMC calling convention: what a guest asks of its firmware by HVC or SMC.
//!
//! Purpose: [`decode`] sorts a call by its function identifier (Arm DEN 0028, SMCCC 1.2). The guest's firmware is this
//! hypervisor; it offers the Arm architecture calls that tell so, PSCI ([`crate::psci`]), and
//! stolen time (Arm DEN 0057). Everything else answers
//! [`NOT_SUPPORTED`] in X0, as DEN 0028 5.2 asks of an unknown function, and has no effect.
//!
//! Invariants: pure; every combination of register values decodes.
//!
//! Known holes: speculation workarounds of the machine's firmware are not forwarded; a guest finds them unsupported.

use ::smccc::arch::{SMCCC_ARCH_FEATURES, SMCCC_VERSION};

use crate::psci;

/// SMCCC 1.1: major in bits 30:16, minor in 15:0.
pub const VERSION: u64 = 1 << 16 | 1;
/// The function is there.
pub const SUCCESS: u64 = 0;
/// There is no such function (−1).
pub const NOT_SUPPORTED: u64 = -1i64 as u64;

/// PV_TIME_FEATURES (DEN 0057, "Discovery"): whether a function of paravirtualized time is there.
const PV_TIME_FEATURES: u32 = 0xc500_0020;
/// PV_TIME_ST (DEN 0057, "Stolen time"): where the record of the calling vCPU is.
const PV_TIME_ST: u32 = 0xc500_0021;

/// Bit 16 of a fast call's identifier: the caller has no live SVE state (SMCCC 1.3). A hint.
const SVE_HINT: u32 = 1 << 16;
/// Bit 31: a fast call.
const FAST: u32 = 1 << 31;

/// A call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// SMCCC_VERSION: answer [`VERSION`].
    Version,
    /// SMCCC_ARCH_FEATURES: answer [`features`].
    ArchFeatures {
        /// Which function is asked for.
        function: u32,
    },
    /// A PSCI function.
    Psci(psci::Call),
    /// PV_TIME_FEATURES: answer [`pv_time_features`].
    PvTimeFeatures {
        /// Which function is asked for.
        function: u32,
    },
    /// PV_TIME_ST: answer the address of the calling vCPU's record, or [`NOT_SUPPORTED`].
    StolenTime,
    /// Answer [`NOT_SUPPORTED`].
    Unknown {
        /// The identifier.
        function: u32,
    },
}

/// The call that X0–X3 describe.
#[inline]
pub const fn decode(x: [u64; 4]) -> Call {
    let raw = x[0] as u32;
    let function = if raw & FAST != 0 { raw & !SVE_HINT } else { raw };
    match function {
        SMCCC_VERSION => Call::Version,
        SMCCC_ARCH_FEATURES => Call::ArchFeatures { function: x[1] as u32 },
        _ => match psci::decode(function, x[1], x[2], x[3]) {
            Some(call) => Call::Psci(call),
            None => match function {
                PV_TIME_FEATURES => Call::PvTimeFeatures { function: x[1] as u32 },
                PV_TIME_ST => Call::StolenTime,
                _ => Call::Unknown { function: raw },
            },
        },
    }
}

/// The answer to SMCCC_ARCH_FEATURES.
pub const fn features(function: u32) -> u64 {
    match function {
        SMCCC_VERSION | SMCCC_ARCH_FEATURES | PV_TIME_FEATURES => SUCCESS,
        _ => NOT_SUPPORTED,
    }
}

/// The answer to PV_TIME_FEATURES.
pub const fn pv_time_features(function: u32) -> u64 {
    match function {
        PV_TIME_FEATURES | PV_TIME_ST => SUCCESS,
        _ => NOT_SUPPORTED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_convention_tells_of_itself() {
        assert_eq!(decode([0x8000_0000, 0, 0, 0]), Call::Version);
        assert_eq!(decode([0x8000_0001, 0x8000_8000, 0, 0]), Call::ArchFeatures { function: 0x8000_8000 });
        assert_eq!(features(0x8000_0000), SUCCESS);
        assert_eq!(features(0x8000_8000), NOT_SUPPORTED);
    }

    #[test]
    fn stolen_time_is_found_as_linux_looks_for_it() {
        assert_eq!(decode([0x8000_0001, 0xc500_0020, 0, 0]), Call::ArchFeatures { function: 0xc500_0020 });
        assert_eq!(features(0xc500_0020), SUCCESS);
        assert_eq!(decode([0xc500_0020, 0xc500_0021, 0, 0]), Call::PvTimeFeatures { function: 0xc500_0021 });
        assert_eq!([0xc500_0021, 0xc500_0022, 0].map(pv_time_features), [SUCCESS, NOT_SUPPORTED, NOT_SUPPORTED]);
        assert_eq!(decode([0xc500_0021, 0, 0, 0]), Call::StolenTime);
        assert_eq!(
            decode([0x8500_0021, 0, 0, 0]),
            Call::Unknown { function: 0x8500_0021 },
            "the 64-bit convention only"
        );
    }

    #[test]
    fn the_sve_hint_is_no_part_of_the_name() {
        assert_eq!(decode([0x8001_0000, 0, 0, 0]), Call::Version);
        assert_eq!(decode([0x8401_0008, 0, 0, 0]), Call::Psci(psci::Call::SystemOff));
    }

    #[test]
    fn yielding_calls_and_vendors_are_unknown() {
        for function in [0u32, 0x0400_0000, 0x8600_ff01, 0xc600_0000, 0x8400_0050] {
            assert_eq!(decode([function as u64, 0, 0, 0]), Call::Unknown { function });
        }
    }

    proptest! {
        #[test]
        fn the_upper_half_of_the_identifier_is_ignored(x: [u64; 4]) {
            let mut low = x;
            low[0] &= 0xffff_ffff;
            prop_assert_eq!(decode(x), decode(low));
        }
    }
}
