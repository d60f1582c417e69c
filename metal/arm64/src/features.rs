//! What this machine's CPUs can do, read once from the identification registers of the boot CPU.
//!
//! Invariants: constant after [`init`]; taken to be equal on all CPUs, as on every machine that we start on.
//! Sources: Arm DDI 0487 D24.2, the register named at each flag.

use bitflags::bitflags;
use entresol_sync::atomic::{AtomicU32, Ordering};

bitflags! {
    /// Optional architecture that changes what this crate does.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Feature: u32 {
        /// Pointer authentication, by any algorithm (ID_AA64ISAR1_EL1.APA, API; ID_AA64ISAR2_EL1.APA3).
        const PAUTH = 1 << 0;
        /// Stage-2 forced write-back (ID_AA64MMFR2_EL1.FWB).
        const FORCED_WRITE_BACK = 1 << 1;
        /// TLB invalidation by range (ID_AA64ISAR0_EL1.TLB).
        const TLB_RANGE = 1 << 2;
        /// Memory copy and set instructions (ID_AA64ISAR2_EL1.MOPS).
        const MOPS = 1 << 3;
        /// HCRX_EL2 (ID_AA64MMFR1_EL1.HCX).
        const HCRX = 1 << 4;
        /// Fine-grained traps (ID_AA64MMFR0_EL1.FGT).
        const FINE_GRAINED_TRAPS = 1 << 5;
        /// The second set of fine-grained traps.
        const FINE_GRAINED_TRAPS_2 = 1 << 6;
        /// Reliability extension: DISR, ESB (ID_AA64PFR0_EL1.RAS).
        const RAS = 1 << 7;
        /// Memory tagging with tag storage (ID_AA64PFR1_EL1.MTE).
        const MTE = 1 << 8;
        /// Performance monitors, version 3 (ID_AA64DFR0_EL1.PMUVer).
        const PMU = 1 << 9;
        /// Activity monitors (ID_AA64PFR0_EL1.AMU).
        const AMU = 1 << 10;
        /// Memory partitioning and monitoring (ID_AA64PFR0_EL1.MPAM, ID_AA64PFR1_EL1.MPAM_frac).
        const MPAM = 1 << 18;
        /// Data caches need no clean for instruction fetch (CTR_EL0.IDC).
        const COHERENT_DATA = 1 << 11;
        /// Instruction caches need no invalidation (CTR_EL0.DIC).
        const COHERENT_INSTRUCTION = 1 << 12;
        /// Instruction caches are found by physical address (CTR_EL0.L1Ip = 0b11).
        const PHYSICAL_INSTRUCTION_CACHE = 1 << 13;
        /// 16-bit VMIDs (ID_AA64MMFR1_EL1.VMIDBits).
        const VMID_16 = 1 << 14;
        /// AArch32 at EL0 (ID_AA64PFR0_EL1.EL0).
        const AARCH32_EL0 = 1 << 15;
        /// DC ZVA is allowed and its block divides a page (DCZID_EL0).
        const DC_ZVA = 1 << 16;
        /// Trap of EL0 and EL1 accesses to cache identification (ID_AA64MMFR2_EL1.EVT).
        const ENHANCED_VIRTUALIZATION_TRAPS = 1 << 17;
    }
}

static FEATURES: AtomicU32 = AtomicU32::new(0);

/// Whether the machine has `feature`.
#[inline]
pub fn has(feature: Feature) -> bool {
    all().contains(feature)
}

/// Everything the machine has.
#[inline]
pub fn all() -> Feature {
    Feature::from_bits_retain(FEATURES.load(Ordering::Relaxed))
}

/// Bits of a physical address (ID_AA64MMFR0_EL1.PARange; table D8-1 of D24.2.95). Without LPA2 descriptors of our own,
/// at most 48.
pub fn physical_bits() -> u8 {
    match mrs!("id_aa64mmfr0_el1") & 0xf {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        _ => 48,
    }
}

/// FEAT_LSE (ID_AA64ISAR0_EL1.Atomic). Asked before anything atomic is executed.
pub(crate) fn has_large_system_extensions() -> bool {
    mrs!("id_aa64isar0_el1") >> 20 & 0xf >= 2
}

/// Reads the registers. The boot CPU, once.
pub(crate) fn init() {
    let field = |register: u64, shift: u32| register >> shift & 0xf;
    let (isar0, isar1) = (mrs!("id_aa64isar0_el1"), mrs!("id_aa64isar1_el1"));
    let isar2 = mrs!("s3_0_c0_c6_2");
    let (pfr0, pfr1) = (mrs!("id_aa64pfr0_el1"), mrs!("id_aa64pfr1_el1"));
    let (mmfr0, mmfr1) = (mrs!("id_aa64mmfr0_el1"), mrs!("id_aa64mmfr1_el1"));
    let (mmfr2, dfr0) = (mrs!("s3_0_c0_c7_2"), mrs!("id_aa64dfr0_el1"));
    let (ctr, dczid) = (mrs!("ctr_el0"), mrs!("dczid_el0"));
    let rows = [
        (Feature::PAUTH, field(isar1, 4) | field(isar1, 8) | field(isar2, 12) != 0),
        (Feature::FORCED_WRITE_BACK, field(mmfr2, 40) != 0),
        (Feature::TLB_RANGE, field(isar0, 56) >= 2),
        (Feature::MOPS, field(isar2, 16) != 0),
        (Feature::HCRX, field(mmfr1, 40) != 0),
        (Feature::FINE_GRAINED_TRAPS, field(mmfr0, 56) != 0),
        (Feature::FINE_GRAINED_TRAPS_2, field(mmfr0, 56) >= 2),
        (Feature::RAS, field(pfr0, 28) != 0),
        (Feature::MTE, field(pfr1, 8) >= 2),
        (Feature::PMU, !matches!(field(dfr0, 8), 0 | 0xf)),
        (Feature::AMU, field(pfr0, 44) != 0),
        (Feature::MPAM, field(pfr0, 40) | field(pfr1, 16) != 0),
        (Feature::COHERENT_DATA, ctr >> 28 & 1 != 0),
        (Feature::COHERENT_INSTRUCTION, ctr >> 29 & 1 != 0),
        (Feature::PHYSICAL_INSTRUCTION_CACHE, ctr >> 14 & 3 == 3),
        (Feature::VMID_16, field(mmfr1, 4) == 2),
        (Feature::AARCH32_EL0, field(pfr0, 0) == 2),
        (Feature::DC_ZVA, dczid & 0x10 == 0 && dczid & 0xf <= 10),
        (Feature::ENHANCED_VIRTUALIZATION_TRAPS, field(mmfr2, 56) != 0),
    ];
    let present = rows.into_iter().filter(|(_, present)| *present).fold(Feature::empty(), |all, (flag, _)| all | flag);
    FEATURES.store(present.bits(), Ordering::Relaxed);
}
