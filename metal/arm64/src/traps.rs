//! What a guest may touch by itself, and what brings it back to EL2.
//!
//! Purpose: the control registers of EL2 that are the same for every guest are set once for each CPU ([`init_cpu`]);
//! HCR_EL2, the stage-2 registers and the FP trap change with the vCPU that is loaded.
//!
//! Protocol: everything that [`crate::switch`] does not save and restore must trap here, or one guest reads what
//! another left. The three rules: what is switched is not trapped; what is not switched is trapped; what is
//! neither is constant and harmless.
//!
//! Sources: Arm DDI 0487 D24.2 and D24.3, bit numbers beside each flag; E2H = 0 layouts throughout.
//!
//! Maintenance by set/way traps always; what follows from it, and when [`Hcr::TVM`] is on, is the hypervisor's to say.

use bitflags::bitflags;

use crate::features::{self, Feature};

bitflags! {
    /// HCR_EL2 (D24.2.49).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Hcr: u64 {
        /// Stage 2 is on.
        const VM = 1 << 0;
        /// Invalidation by set/way is upgraded to clean and invalidate.
        const SWIO = 1 << 1;
        /// Physical FIQs to EL2.
        const FMO = 1 << 3;
        /// Physical IRQs to EL2; virtual ones for EL1.
        const IMO = 1 << 4;
        /// Physical SErrors to EL2; virtual ones for EL1.
        const AMO = 1 << 5;
        /// A virtual SError is pending.
        const VSE = 1 << 8;
        /// TLB and cache maintenance, branch and barriers are broadcast inner-shareable.
        const FB = 1 << 9;
        /// Barriers apply to the inner-shareable domain at least (BSU = 0b01).
        const BSU_INNER = 1 << 10;
        /// WFI traps.
        const TWI = 1 << 13;
        /// WFE traps.
        const TWE = 1 << 14;
        /// REVIDR, AIDR, SMIDR trap.
        const TID1 = 1 << 16;
        /// ID registers trap.
        const TID3 = 1 << 18;
        /// SMC traps.
        const TSC = 1 << 19;
        /// Implementation defined registers trap.
        const TIDCP = 1 << 20;
        /// ACTLR_EL1 traps.
        const TACR = 1 << 21;
        /// Maintenance by set/way traps.
        const TSW = 1 << 22;
        /// Data cache maintenance to the point of coherency traps.
        const TPCP = 1 << 23;
        /// Cache maintenance to the point of unification traps.
        const TPU = 1 << 24;
        /// Writes of EL1's translation controls trap.
        const TVM = 1 << 26;
        /// EL1 is AArch64.
        const RW = 1 << 31;
        /// Limited ordering regions trap.
        const TLOR = 1 << 35;
        /// Error records trap.
        const TERR = 1 << 36;
        /// Pointer authentication keys are the guest's.
        const APK = 1 << 40;
        /// Pointer authentication instructions do not trap.
        const API = 1 << 41;
        /// Stage 2 forces write-back.
        const FWB = 1 << 46;
        /// Allocation tags, and the registers of memory tagging, are the guest's.
        const ATA = 1 << 56;
        /// GMID_EL1 traps.
        const TID5 = 1 << 58;
    }
}

impl Hcr {
    /// The value for a guest on this machine; flags that change with the vCPU or are its owner's (VSE, TWE, TVM, TPCP,
    /// TPU) are added to it.
    pub fn guest() -> Self {
        let mut hcr = Self::VM | Self::SWIO | Self::FMO | Self::IMO | Self::AMO | Self::FB | Self::BSU_INNER;
        hcr |= Self::TWI | Self::TID1 | Self::TID3 | Self::TSC | Self::TIDCP | Self::TACR | Self::TSW;
        hcr |= Self::RW | Self::TLOR | Self::TERR;
        for (feature, flags) in [
            (Feature::PAUTH, Self::APK | Self::API),
            (Feature::FORCED_WRITE_BACK, Self::FWB),
            (Feature::MTE, Self::TID5),
        ] {
            if features::has(feature) {
                hcr |= flags;
            }
        }
        hcr
    }
}

impl Hcr {
    /// The same for a guest that has memory tagging, on a machine with [`Feature::MTE`].
    pub const fn with_tags(self) -> Self {
        self.union(Self::ATA).difference(Self::TID5)
    }
}

/// HCR_EL2.E2H, which must stay 0.
const HCR_E2H: u64 = 1 << 34;

/// CPTR_EL2: bits that are RES1 or trap SVE (TZ 8) and SME (TSM 12).
const CPTR: u64 = 0x33ff | CPTR_TTA | CPTR_TAM;
/// Trap trace registers.
const CPTR_TTA: u64 = 1 << 20;
/// Trap activity monitors.
const CPTR_TAM: u64 = 1 << 30;
/// Trap FP and Advanced SIMD.
const CPTR_TFP: u64 = 1 << 10;

/// MDCR_EL2: TPMCR 5, TPM 6, TDA 9, TDOSA 10, TDRA 11, TPMS 14, TTRF 19, TDCC 27; buffers of SPE and trace (E2PB, E2TB)
/// are not the guest's. Debug exceptions go to EL1 (TDE 8 is 0).
const MDCR: u64 = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 14 | 1 << 19 | 1 << 27;

/// CNTHCTL_EL2: EL1PCTEN 0 (the count may be read), EL1PCEN 1 clear (the physical timer traps).
const CNTHCTL: u64 = 1 << 0;

/// HCRX_EL2.MSCEn: copy and set instructions are the guest's; their exceptions go to EL1 (MCE2 clear). Everything else
/// that the register enables comes with registers that nobody switches, and stays off.
const HCRX_MSCEN: u64 = 1 << 11;

/// MPAM2_EL2 (Arm DDI 0598 7.2): default partition for EL2, TRAPMPAM1EL1 48, TRAPMPAM0EL1 49.
const MPAM2_TRAPS: u64 = 1 << 48 | 1 << 49;
/// MPAMIDR_EL1.HAS_HCR.
const MPAMIDR_HAS_HCR: u64 = 1 << 17;
/// MPAMHCR_EL2.TRAP_MPAMIDR_EL1: no virtual partitions.
const MPAMHCR_TRAP_MPAMIDR: u64 = 1 << 31;

/// ICC_SRE_EL2: SRE 0, DFB 1, DIB 2; EL1's own ICC_SRE_EL1 traps (Enable 3 is 0).
const ICC_SRE_EL2: u64 = 0b111;

/// Panics if this CPU has no E2H = 0 mode. Before the MMU is on: with E2H, EL2's tables have another layout.
pub(crate) fn refuse_vhe() {
    // SAFETY: EL2 runs in its own regime with E2H clear; no guest exists yet.
    unsafe {
        msr!("hcr_el2", Hcr::RW.bits());
        instruction!("isb");
    }
    assert!(
        mrs!("hcr_el2") & HCR_E2H == 0,
        "HCR_EL2.E2H cannot be cleared: this CPU has EL2 with host extensions only"
    );
}

/// Sets what is the same for every guest. Each CPU, once, before it enters any.
pub(crate) fn init_cpu() {
    refuse_vhe();
    // SAFETY: each register exists at EL2 of every ARMv8 CPU with GICv3 system registers, or behind its feature; the
    // values only restrict EL1 and EL0, where nothing of ours runs.
    unsafe {
        msr!("cptr_el2", CPTR | CPTR_TFP);
        msr!("mdcr_el2", MDCR | counters());
        msr!("hstr_el2", 0u64);
        msr!("hacr_el2", 0u64);
        msr!("cnthctl_el2", CNTHCTL);
        msr!("cntvoff_el2", 0u64);
        msr!("vttbr_el2", 0u64);
        msr!("mdscr_el1", 0u64);
        msr!("vpidr_el2", mrs!("midr_el1"));
        msr!("cntv_ctl_el0", 0u64);
        msr!("cntp_ctl_el0", 0u64);
        msr!("icc_sre_el2", ICC_SRE_EL2);
        instruction!("isb");
        msr!("icc_sre_el1", 0b111u64);
        msr!("ich_hcr_el2", 0u64);
        init_optional();
        instruction!("isb");
    }
}

/// MDCR_EL2.HPMN: all counters stay usable at EL1 and EL0 as far as the trap lets them (PMCR_EL0.N).
fn counters() -> u64 {
    if features::has(Feature::PMU) { mrs!("pmcr_el0") >> 11 & 0x1f } else { 0 }
}

/// # Safety
///
/// As the block that calls it.
unsafe fn init_optional() {
    // SAFETY: each group exists with the feature asked for; zero traps what is off by default and nothing else.
    unsafe {
        if features::has(Feature::HCRX) {
            let mops = if features::has(Feature::MOPS) { HCRX_MSCEN } else { 0 };
            msr!("s3_4_c1_c2_2", mops); // HCRX_EL2
        }
        if features::has(Feature::FINE_GRAINED_TRAPS) {
            msr!("s3_4_c1_c1_4", 0u64); // HFGRTR_EL2
            msr!("s3_4_c1_c1_5", 0u64); // HFGWTR_EL2
            msr!("s3_4_c1_c1_6", 0u64); // HFGITR_EL2
            msr!("s3_4_c3_c1_4", 0u64); // HDFGRTR_EL2
            msr!("s3_4_c3_c1_5", 0u64); // HDFGWTR_EL2
            if features::has(Feature::AMU) {
                msr!("s3_4_c3_c1_6", 0u64); // HAFGRTR_EL2
            }
        }
        if features::has(Feature::FINE_GRAINED_TRAPS_2) {
            msr!("s3_4_c3_c1_2", 0u64); // HFGRTR2_EL2
            msr!("s3_4_c3_c1_3", 0u64); // HFGWTR2_EL2
            msr!("s3_4_c3_c1_7", 0u64); // HFGITR2_EL2
            msr!("s3_4_c3_c1_0", 0u64); // HDFGRTR2_EL2
            msr!("s3_4_c3_c1_1", 0u64); // HDFGWTR2_EL2
        }
        if features::has(Feature::PMU) {
            msr!("pmuserenr_el0", 0u64);
        }
        if features::has(Feature::AMU) {
            msr!("s3_3_c13_c2_3", 0u64); // AMUSERENR_EL0
        }
        if features::has(Feature::MPAM) {
            msr!("s3_4_c10_c5_0", MPAM2_TRAPS);
            if mrs!("s3_0_c10_c4_4") & MPAMIDR_HAS_HCR != 0 {
                msr!("s3_4_c10_c4_0", MPAMHCR_TRAP_MPAMIDR);
            }
        }
        if features::has(Feature::AARCH32_EL0) && mrs!("id_aa64pfr0_el1") >> 4 & 0xf == 2 {
            // The registers of AArch32 EL1 are reached from EL2 only: constant, so that nothing leaks through them.
            msr!("dacr32_el2", 0u64);
            msr!("ifsr32_el2", 0u64);
        }
    }
}

/// Sets HCR_EL2 for the guest that this CPU enters next. Takes effect there, or at the next context synchronisation.
#[inline]
pub fn set_hcr(hcr: Hcr) {
    // SAFETY: E2H and TGE are no flags of `Hcr`, so EL2 is not affected.
    unsafe { msr!("hcr_el2", hcr.bits()) };
}

/// Loads the second stage of the guest that this CPU enters next: VTCR_EL2 and VTTBR_EL2 (VMID 63:48, table 47:1).
///
/// # Safety
///
/// The table maps only what that guest may reach, and stays until another one is loaded and its TLB entries are gone.
#[inline]
pub unsafe fn set_stage2(vtcr: u64, vttbr: u64) {
    // SAFETY: stage 2 is not used by EL2; the caller answers for the table.
    unsafe {
        msr!("vtcr_el2", vtcr);
        msr!("vttbr_el2", vttbr);
        instruction!("isb");
    }
}

/// Whether the guest's FP and SIMD instructions trap.
#[inline]
pub fn trap_fp(trap: bool) {
    let value = if trap { CPTR | CPTR_TFP } else { CPTR };
    // SAFETY: the register restricts EL1 and EL0, and EL2, whose code uses no FP outside `switch::fp`.
    unsafe {
        msr!("cptr_el2", value);
        instruction!("isb");
    }
}
