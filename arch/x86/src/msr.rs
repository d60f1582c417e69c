//! What RDMSR and WRMSR do for a guest: a table.
//!
//! Purpose: each MSR is the guest's own on the hardware ([`Rule::Pass`]: the world switch carries it), another part's
//! ([`Rule::Emulate`]), a number that does not change ([`Rule::Constant`]), or refused with a general-protection fault, as on a
//! processor that does not have it. What is not in the table is refused (APM volume 2, appendix A; SDM volume 4).
//!
//! The constants are what kernels read without asking CPUID first, and must not be made to stumble over; a store to one is
//! ignored.
//!
//! Invariants: pure and total; [`efer`] and [`xcr0`] accept only what a guest may run with.

use core::ops::RangeInclusive;

/// Whose an emulated MSR is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The local APIC: IA32_APIC_BASE, IA32_TSC_DEADLINE, x2APIC.
    Apic,
    /// The TSC: a store moves the guest's offset.
    Tsc,
    /// EFER: see [`efer`].
    Efer,
    /// kvm-clock, the record of this vCPU.
    SystemTime,
    /// kvm-clock, the wall clock.
    WallClock,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The hardware does it: no exit is needed.
    Pass,
    /// Somebody of ours.
    Emulate(Part),
    /// It reads so; stores are ignored.
    Constant(u64),
    /// General protection.
    Refuse,
}

/// HWCR: the TSC counts at the rate of the first P-state.
const TSC_FREQ_SEL: u64 = 1 << 24;
/// DE_CFG: LFENCE waits for all that is before it.
const LFENCE_SERIALISES: u64 = 1 << 1;
/// MTRR default type: enabled, all memory is write-back.
const WRITE_BACK: u64 = 1 << 11 | 6;
/// A microcode revision that no erratum's check looks for.
const PATCH_LEVEL: u64 = 0x0100_0065;

/// Ranges that do not overlap, in ascending order.
const TABLE: [(RangeInclusive<u32>, Rule); 26] = [
    (0x10..=0x10, Rule::Emulate(Part::Tsc)),
    // kvm-clock's first generation.
    (0x11..=0x11, Rule::Emulate(Part::WallClock)),
    (0x12..=0x12, Rule::Emulate(Part::SystemTime)),
    // IA32_PLATFORM_ID.
    (0x17..=0x17, Rule::Constant(0)),
    (0x1b..=0x1b, Rule::Emulate(Part::Apic)),
    // IA32_FEATURE_CONTROL: locked, without VMX.
    (0x3a..=0x3a, Rule::Constant(1)),
    // PATCH_LEVEL, IA32_BIOS_SIGN_ID.
    (0x8b..=0x8b, Rule::Constant(PATCH_LEVEL)),
    // MTRRcap: no register that could be changed.
    (0xfe..=0xfe, Rule::Constant(0)),
    // SYSENTER_CS, _ESP, _EIP.
    (0x174..=0x176, Rule::Pass),
    // IA32_MISC_ENABLE: fast strings.
    (0x1a0..=0x1a0, Rule::Constant(1)),
    // DEBUGCTL.
    (0x1d9..=0x1d9, Rule::Constant(0)),
    // PAT; under nested paging the guest has its own.
    (0x277..=0x277, Rule::Pass),
    // MTRRdefType.
    (0x2ff..=0x2ff, Rule::Constant(WRITE_BACK)),
    (0x6e0..=0x6e0, Rule::Emulate(Part::Apic)),
    (0x800..=0x8ff, Rule::Emulate(Part::Apic)),
    // kvm-clock.
    (0x4b56_4d00..=0x4b56_4d00, Rule::Emulate(Part::WallClock)),
    (0x4b56_4d01..=0x4b56_4d01, Rule::Emulate(Part::SystemTime)),
    (0xc000_0080..=0xc000_0080, Rule::Emulate(Part::Efer)),
    // STAR, LSTAR, CSTAR, SFMASK; FS.base, GS.base, KernelGSbase.
    (0xc000_0081..=0xc000_0084, Rule::Pass),
    (0xc000_0100..=0xc000_0102, Rule::Pass),
    // SYSCFG.
    (0xc001_0010..=0xc001_0010, Rule::Constant(0)),
    (0xc001_0015..=0xc001_0015, Rule::Constant(TSC_FREQ_SEL)),
    // NB_CFG.
    (0xc001_001f..=0xc001_001f, Rule::Constant(0)),
    // Interrupt pending.
    (0xc001_0055..=0xc001_0055, Rule::Constant(0)),
    // MMIO configuration base: no PCI.
    (0xc001_0058..=0xc001_0058, Rule::Constant(0)),
    (0xc001_1029..=0xc001_1029, Rule::Constant(LFENCE_SERIALISES)),
];

/// The rule for `msr`. `clock`: there is a kvm-clock; without one its MSRs are refused.
pub fn rule(msr: u32, clock: bool) -> Rule {
    let found = TABLE.iter().find(|(range, _)| range.contains(&msr)).map_or(Rule::Refuse, |(_, rule)| *rule);
    match found {
        Rule::Emulate(Part::SystemTime | Part::WallClock) if !clock => Rule::Refuse,
        rule => rule,
    }
}

/// Every MSR that needs no exit, for the processor's permission map.
pub fn passed() -> impl Iterator<Item = RangeInclusive<u32>> {
    TABLE.iter().filter(|(_, rule)| *rule == Rule::Pass).map(|(range, _)| range.clone())
}

/// An access that the processor refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// Bits of EFER (APM volume 2, 3.1.7).
pub mod efer_bits {
    /// SYSCALL.
    pub const SCE: u64 = 1 << 0;
    /// Long mode is enabled.
    pub const LME: u64 = 1 << 8;
    /// Long mode is active.
    pub const LMA: u64 = 1 << 10;
    /// No-execute.
    pub const NXE: u64 = 1 << 11;
    /// Fast FXSAVE.
    pub const FFXSR: u64 = 1 << 14;
}

const CR0_PG: u64 = 1 << 31;

/// EFER after a guest stored `value` over `current`, as the guest sees it; what the processor itself needs in it (SVME) is the
/// world switch's to add.
///
/// # Errors
///
/// Bits that a guest has not, SVME among them, and LME changed while paging is on (APM volume 2, 14.6).
pub const fn efer(current: u64, value: u64, cr0: u64) -> Result<u64, Refused> {
    use efer_bits::{FFXSR, LMA, LME, NXE, SCE};
    let paging = cr0 & CR0_PG != 0;
    if value & !(SCE | LME | LMA | NXE | FFXSR) != 0 || paging && (value ^ current) & LME != 0 {
        return Err(Refused);
    }
    // LMA is the processor's own, and is ignored.
    let active = if paging && value & LME != 0 { LMA } else { 0 };
    Ok(value & !LMA | active)
}

/// XCR0 after XSETBV of `value` on a processor that offers `offered` states.
///
/// # Errors
///
/// States that are not offered, or not without others (SDM volume 1, 13.3).
pub const fn xcr0(value: u64, offered: u64) -> Result<u64, Refused> {
    const X87: u64 = 1 << 0;
    const SSE: u64 = 1 << 1;
    const AVX: u64 = 1 << 2;
    let lone_avx = value & (SSE | AVX) == AVX;
    if value & !(offered & crate::cpuid::STATES) != 0 || value & X87 == 0 || lone_avx {
        Err(Refused)
    } else {
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_table_is_in_order() {
        for pair in TABLE.windows(2) {
            assert!(pair[0].0.end() < pair[1].0.start(), "{:x?}", pair[1].0);
        }
        assert!(TABLE.iter().all(|(range, rule)| !range.is_empty() && *rule != Rule::Refuse));
        assert_eq!(passed().map(|range| range.count()).sum::<usize>(), 3 + 1 + 4 + 3);
    }

    #[test]
    fn each_has_its_rule() {
        assert_eq!(rule(0xc000_0082, true), Rule::Pass);
        assert_eq!(rule(0x830, true), Rule::Emulate(Part::Apic));
        assert_eq!(rule(0x4b56_4d01, true), Rule::Emulate(Part::SystemTime));
        for msr in [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01] {
            assert_eq!(rule(msr, false), Rule::Refuse, "no clock");
        }
        // VM_CR, VM_HSAVE_PA, TSC_AUX, SPEC_CTRL, XSS, MC0_CTL, a performance counter, KVM's steal time, the last.
        for msr in [0xc001_0114, 0xc001_0117, 0xc000_0103, 0x48, 0xda0, 0x400, 0xc001_0200, 0x4b56_4d03, !0] {
            assert_eq!(rule(msr, true), Rule::Refuse, "{msr:#x}");
        }
    }

    #[test]
    fn efer_stays_what_a_guest_may_have() {
        assert_eq!(efer(0, 0x901, 0), Ok(0x901));
        assert_eq!(efer(0x100, 0x100, CR0_PG), Ok(0x500), "LMA follows");
        assert_eq!(efer(0x500, 0xd00, CR0_PG), Ok(0xd00));
        assert_eq!(efer(0x500, 0x000, CR0_PG), Err(Refused), "long mode is not left under paging");
        assert_eq!(efer(0, 0x400, 0), Ok(0), "nor entered by LMA");
        for bit in [1, 7, 9, 12, 13, 15, 63] {
            assert_eq!(efer(0, 1 << bit, 0), Err(Refused), "bit {bit}");
        }
    }

    #[test]
    fn states_come_in_their_order() {
        for value in 0..16 {
            let right = matches!(value, 0b001 | 0b011 | 0b111);
            assert_eq!(xcr0(value, u64::MAX).is_ok(), right, "{value:#b}");
            assert_eq!(xcr0(value, 0b011).is_ok(), right && value != 0b111);
        }
    }

    proptest! {
        #[test]
        fn any_store_leaves_a_possible_efer(current in any::<u64>(), value: u64, paging: bool) {
            let cr0 = if paging { CR0_PG } else { 0 };
            if let Ok(new) = efer(current, value, cr0) {
                prop_assert_eq!(new & efer_bits::LMA != 0, paging && new & efer_bits::LME != 0);
                prop_assert_eq!(new & 1 << 12, 0);
            }
        }
    }
}
