//! Identification registers as a guest sees them.
//!
//! Purpose: a guest believes its ID registers, so they are a promise: a feature is shown only if the hypervisor saves,
//! restores and traps everything that it brings. [`sanitise`] maps the machine's value to the guest's by a safe-list: a field
//! has a row and a rule, or it reads as zero; a value newer than its row knows is cut down to the newest known one.
//!
//! Sources: Arm DDI 0487 D24.2 for each register; D23.3.1 for what an unnamed encoding reads as. Withheld on purpose: EL2,
//! EL3, Secure and Realm state; RAS, MPAM, AMU, SVE, SME, GCS, NMI, THE; performance monitors, SPE, trace, BRBE;
//! TME, LS64, 128-bit registers; FGT, ECV, LORegions, nested virtualisation, everything of ID_AA64MMFR3 and MMFR4 (it comes
//! with registers of EL1 that nobody switches), SCXTNUM (CSV2 at most 1).
//!
//! Fields that count downwards or whose zero means "present" (FP, AdvSIMD, TGran4, TGran64, DoubleLock) are passed or fixed
//! explicitly, never left to the default.
//!
//! Invariants: `sanitise` is idempotent, and independent of the fields it withholds.

use crate::sysreg::SysReg;

/// What this VM may have, beyond what every VM has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmFeatures {
    /// Bits of guest physical address (VTCR_EL2.T0SZ): 32–48.
    pub physical_bits: u8,
    /// EL0 may be AArch32, if the machine can.
    pub aarch32: bool,
    /// HCR_EL2.{API,APK} are 1 and the keys are switched.
    pub pointer_auth: bool,
    /// HCRX_EL2.MSCEn is 1: memory copy and set instructions.
    pub memory_copy: bool,
    /// HCR_EL2.ATA is 1, the registers of memory tagging are switched, and its memory has valid tags.
    pub tags: bool,
}

/// How a field of the machine becomes the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// As it is.
    Pass,
    /// At most this.
    Cap(u64),
    /// Always this.
    Fixed(u64),
    /// ID_AA64PFR0_EL1.EL0: 2 (both states) only with `aarch32`.
    El0,
    /// At most this, with `pointer_auth`; else 0.
    PointerAuth(u64),
    /// At most this, with `tags`; else 0.
    Tags(u64),
    /// At most this, with `memory_copy`; else 0.
    MemoryCopy(u64),
    /// The largest encoding of at most `physical_bits`.
    PhysicalRange,
}

/// A field that a guest sees.
#[derive(Clone, Copy, Debug)]
struct Field {
    name: &'static str,
    shift: u32,
    width: u32,
    rule: Rule,
}

impl Field {
    const fn mask(&self) -> u64 {
        ((1 << self.width) - 1) << self.shift
    }
}

use Rule::{Cap, El0, Fixed, MemoryCopy, Pass, PhysicalRange, PointerAuth, Tags};

const fn f(name: &'static str, shift: u32, rule: Rule) -> Field {
    Field { name, shift, width: 4, rule }
}

const fn whole(name: &'static str) -> Field {
    Field { name, shift: 0, width: 32, rule: Pass }
}

const AA64PFR0: &[Field] = &[
    f("EL0", 0, El0),
    f("EL1", 4, Cap(1)),
    f("FP", 16, Pass),
    f("AdvSIMD", 20, Pass),
    f("GIC", 24, Fixed(1)),
    f("DIT", 48, Cap(1)),
    f("CSV2", 56, Cap(1)),
    f("CSV3", 60, Cap(1)),
];

const AA64PFR1: &[Field] = &[
    f("BT", 0, Cap(1)),
    f("SSBS", 4, Cap(2)),
    f("MTE", 8, Tags(3)),
    f("CSV2_frac", 32, Cap(1)),
    f("MTE_frac", 40, Tags(0xf)),
];

/// Armv8.0 debug with the fewest breakpoints and watchpoints that there can be: two each, one context-aware.
const AA64DFR0: &[Field] = &[
    f("DebugVer", 0, Fixed(6)),
    f("BRPs", 12, Fixed(1)),
    f("WRPs", 20, Fixed(1)),
    f("CTX_CMPs", 28, Fixed(0)),
    f("DoubleLock", 36, Fixed(0xf)),
];

const AA64ISAR0: &[Field] = &[
    f("AES", 4, Cap(2)),
    f("SHA1", 8, Cap(1)),
    f("SHA2", 12, Cap(2)),
    f("CRC32", 16, Cap(1)),
    f("Atomic", 20, Cap(3)),
    f("RDM", 28, Cap(1)),
    f("SHA3", 32, Cap(1)),
    f("SM3", 36, Cap(1)),
    f("SM4", 40, Cap(1)),
    f("DP", 44, Cap(1)),
    f("FHM", 48, Cap(1)),
    f("TS", 52, Cap(2)),
    f("TLB", 56, Cap(2)),
    f("RNDR", 60, Cap(1)),
];

const AA64ISAR1: &[Field] = &[
    f("DPB", 0, Cap(2)),
    f("APA", 4, PointerAuth(5)),
    f("API", 8, PointerAuth(5)),
    f("JSCVT", 12, Cap(1)),
    f("FCMA", 16, Cap(1)),
    f("LRCPC", 20, Cap(3)),
    f("GPA", 24, PointerAuth(1)),
    f("GPI", 28, PointerAuth(1)),
    f("FRINTTS", 32, Cap(1)),
    f("SB", 36, Cap(1)),
    f("SPECRES", 40, Cap(2)),
    f("BF16", 44, Cap(2)),
    f("DGH", 48, Cap(1)),
    f("I8MM", 52, Cap(1)),
    f("XS", 56, Cap(1)),
];

const AA64ISAR2: &[Field] = &[
    f("WFxT", 0, Cap(2)),
    f("RPRES", 4, Cap(1)),
    f("GPA3", 8, PointerAuth(1)),
    f("APA3", 12, PointerAuth(5)),
    f("MOPS", 16, MemoryCopy(1)),
    f("BC", 20, Cap(1)),
    f("PAC_frac", 24, PointerAuth(1)),
    f("CLRBHB", 28, Cap(1)),
    f("RPRFM", 48, Cap(1)),
    f("CSSC", 52, Cap(1)),
    f("LUT", 56, Cap(1)),
];

const AA64ISAR3: &[Field] = &[f("FAMINMAX", 4, Cap(1)), f("LSFE", 16, Cap(1)), f("FPRCVT", 28, Cap(1))];

const AA64MMFR0: &[Field] = &[
    f("PARange", 0, PhysicalRange),
    f("ASIDBits", 4, Cap(2)),
    f("BigEnd", 8, Cap(1)),
    f("BigEndEL0", 16, Cap(1)),
    f("TGran16", 20, Cap(2)),
    f("TGran64", 24, Pass),
    f("TGran4", 28, Pass),
    f("ExS", 44, Cap(1)),
];

const AA64MMFR1: &[Field] = &[
    f("HAFDBS", 0, Cap(2)),
    f("VMIDBits", 4, Cap(2)),
    f("HPDS", 12, Cap(2)),
    f("PAN", 20, Cap(3)),
    f("SpecSEI", 24, Cap(1)),
    f("ETS", 36, Cap(3)),
    f("AFP", 44, Cap(1)),
    f("nTLBPA", 48, Cap(1)),
    f("TIDCP1", 52, Cap(1)),
    f("CMOW", 56, Cap(1)),
    f("ECBHB", 60, Cap(1)),
];

const AA64MMFR2: &[Field] = &[
    f("CnP", 0, Cap(1)),
    f("UAO", 4, Cap(1)),
    f("LSM", 8, Cap(1)),
    f("VARange", 16, Cap(1)),
    f("CCIDX", 20, Cap(1)),
    f("ST", 28, Cap(1)),
    f("AT", 32, Cap(1)),
    f("IDS", 36, Cap(1)),
    f("TTL", 48, Cap(1)),
    f("BBM", 52, Cap(2)),
    f("E0PD", 60, Cap(1)),
];

const PFR0: &[Field] = &[
    f("State0", 0, Cap(1)),
    f("State1", 4, Cap(3)),
    f("State2", 8, Cap(2)),
    f("State3", 12, Cap(1)),
    f("CSV2", 16, Cap(1)),
    f("DIT", 24, Cap(1)),
];

const PFR1: &[Field] =
    &[f("ProgMod", 0, Cap(1)), f("MProgMod", 8, Cap(2)), f("GenTimer", 16, Cap(1)), f("GIC", 28, Fixed(1))];

const PFR2: &[Field] = &[f("CSV3", 0, Cap(1)), f("SSBS", 4, Cap(1))];

/// Armv8.0 debug, no performance monitors (0), no trace.
const DFR0: &[Field] = &[f("CopDbg", 0, Fixed(6))];

const MMFR4: &[Field] = &[
    f("SpecSEI", 0, Cap(1)),
    f("AC2", 4, Cap(1)),
    f("CnP", 12, Cap(1)),
    f("HPDS", 16, Cap(2)),
    f("LSM", 20, Cap(1)),
    f("CCIDX", 24, Cap(1)),
];

const MMFR5: &[Field] = &[f("ETS", 0, Cap(3)), f("nTLBPA", 4, Cap(1))];

/// Registers that describe the AArch32 instruction set or memory model and nothing that EL2 has to know.
const ALL: &[Field] = &[whole("all")];

/// The rows of a register; empty if it reads as zero.
const fn fields(reg: SysReg) -> &'static [Field] {
    match reg {
        SysReg::ID_AA64PFR0_EL1 => AA64PFR0,
        SysReg::ID_AA64PFR1_EL1 => AA64PFR1,
        SysReg::ID_AA64DFR0_EL1 => AA64DFR0,
        SysReg::ID_AA64ISAR0_EL1 => AA64ISAR0,
        SysReg::ID_AA64ISAR1_EL1 => AA64ISAR1,
        SysReg::ID_AA64ISAR2_EL1 => AA64ISAR2,
        SysReg::ID_AA64ISAR3_EL1 => AA64ISAR3,
        SysReg::ID_AA64MMFR0_EL1 => AA64MMFR0,
        SysReg::ID_AA64MMFR1_EL1 => AA64MMFR1,
        SysReg::ID_AA64MMFR2_EL1 => AA64MMFR2,
        _ => &[],
    }
}

/// The rows of a register that describes AArch32.
const fn fields32(reg: SysReg) -> &'static [Field] {
    match reg {
        SysReg::ID_PFR0_EL1 => PFR0,
        SysReg::ID_PFR1_EL1 => PFR1,
        SysReg::ID_PFR2_EL1 => PFR2,
        SysReg::ID_DFR0_EL1 => DFR0,
        SysReg::ID_MMFR4_EL1 => MMFR4,
        SysReg::ID_MMFR5_EL1 => MMFR5,
        SysReg::ID_MMFR0_EL1 | SysReg::ID_MMFR1_EL1 | SysReg::ID_MMFR2_EL1 | SysReg::ID_MMFR3_EL1 => ALL,
        SysReg::ID_ISAR0_EL1 | SysReg::ID_ISAR1_EL1 | SysReg::ID_ISAR2_EL1 | SysReg::ID_ISAR3_EL1 => ALL,
        SysReg::ID_ISAR4_EL1 | SysReg::ID_ISAR5_EL1 | SysReg::ID_ISAR6_EL1 => ALL,
        SysReg::MVFR0_EL1 | SysReg::MVFR1_EL1 | SysReg::MVFR2_EL1 => ALL,
        _ => &[],
    }
}

/// Bits of physical address by ID_AA64MMFR0_EL1.PARange.
const PHYSICAL_BITS: [u8; 8] = [32, 36, 40, 42, 44, 48, 52, 56];

/// ID_AA64MMFR0_EL1.PARange for a VM with this many bits: the largest encoding that promises no more.
pub const fn physical_range(bits: u8) -> u64 {
    let mut encoding = PHYSICAL_BITS.len() - 1;
    while encoding > 0 && PHYSICAL_BITS[encoding] > bits {
        encoding -= 1;
    }
    encoding as u64
}

const fn least(a: u64, b: u64) -> u64 {
    if a < b { a } else { b }
}

const fn apply(rule: Rule, hardware: u64, vm: &VmFeatures) -> u64 {
    match rule {
        Pass => hardware,
        Cap(most) => least(hardware, most),
        Fixed(value) => value,
        El0 => least(hardware, if vm.aarch32 { 2 } else { 1 }),
        PointerAuth(most) => least(hardware, if vm.pointer_auth { most } else { 0 }),
        Tags(most) => least(hardware, if vm.tags { most } else { 0 }),
        MemoryCopy(most) => least(hardware, if vm.memory_copy { most } else { 0 }),
        PhysicalRange => least(hardware, physical_range(vm.physical_bits)),
    }
}

/// What a guest reads from identification register `reg`, whose value on this machine is `hardware`.
///
/// A register without rows, or one that describes AArch32 in a VM that has none, reads as zero.
pub const fn sanitise(reg: SysReg, hardware: u64, vm: &VmFeatures) -> u64 {
    let mut rows = fields(reg);
    if rows.is_empty() && vm.aarch32 {
        rows = fields32(reg);
    }
    let mut guest = 0;
    let mut i = 0;
    while i < rows.len() {
        let field = &rows[i];
        let value = apply(field.rule, (hardware & field.mask()) >> field.shift, vm);
        guest |= value << field.shift;
        i += 1;
    }
    guest
}

/// The fields of a guest's value by the manual's names, for reports. Withheld fields do not appear.
pub fn named(reg: SysReg, guest: u64) -> impl Iterator<Item = (&'static str, u64)> {
    let rows = fields(reg).iter().chain(fields32(reg));
    rows.map(move |field| (field.name, (guest & field.mask()) >> field.shift))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VM: VmFeatures =
        VmFeatures { physical_bits: 40, aarch32: true, pointer_auth: true, memory_copy: false, tags: false };
    const BARE: VmFeatures =
        VmFeatures { physical_bits: 40, aarch32: false, pointer_auth: false, memory_copy: false, tags: false };

    fn ids() -> impl Iterator<Item = SysReg> {
        (1..8).flat_map(|crm| (0..8).map(move |op2| SysReg::new(3, 0, 0, crm, op2)))
    }

    fn field(value: u64, shift: u32) -> u64 {
        (value >> shift) & 0xf
    }

    #[test]
    fn no_two_rows_overlap_and_every_rule_fits_its_field() {
        for reg in ids() {
            let mut seen = 0;
            for field in fields(reg).iter().chain(fields32(reg)) {
                assert_eq!(seen & field.mask(), 0, "{reg} {}", field.name);
                seen |= field.mask();
                if let Cap(n) | Fixed(n) | PointerAuth(n) | MemoryCopy(n) | Tags(n) = field.rule {
                    assert!(n <= 0xf, "{reg} {}", field.name);
                }
            }
            assert!(fields(reg).is_empty() || fields32(reg).is_empty());
        }
    }

    #[test]
    fn the_withheld_features_are_gone() {
        let ones = u64::MAX;
        let pfr0 = sanitise(SysReg::ID_AA64PFR0_EL1, 0x1101_1122_1011_2222, &VM);
        assert_eq!((field(pfr0, 0), field(pfr0, 4), field(pfr0, 8), field(pfr0, 12)), (2, 1, 0, 0));
        assert_eq!(
            (field(pfr0, 24), field(pfr0, 28), field(pfr0, 32), field(pfr0, 40), field(pfr0, 44)),
            (1, 0, 0, 0, 0)
        );
        let pfr1 = sanitise(SysReg::ID_AA64PFR1_EL1, ones, &VM);
        assert_eq!((field(pfr1, 8), field(pfr1, 24), field(pfr1, 36), field(pfr1, 44)), (0, 0, 0, 0));
        let dfr0 = sanitise(SysReg::ID_AA64DFR0_EL1, ones, &VM);
        for (shift, want) in [(0, 6), (4, 0), (8, 0), (12, 1), (20, 1), (28, 0), (32, 0), (36, 0xf), (44, 0), (52, 0)] {
            assert_eq!(field(dfr0, shift), want, "{shift}");
        }
        let isar0 = sanitise(SysReg::ID_AA64ISAR0_EL1, ones, &VM);
        assert_eq!((field(isar0, 24), field(isar0, 60)), (0, 1));
        assert_eq!(field(sanitise(SysReg::ID_AA64ISAR1_EL1, ones, &VM), 60), 0);
        let mmfr0 = sanitise(SysReg::ID_AA64MMFR0_EL1, ones, &VM);
        assert_eq!((field(mmfr0, 56), field(mmfr0, 60)), (0, 0));
        let mmfr1 = sanitise(SysReg::ID_AA64MMFR1_EL1, ones, &VM);
        assert_eq!((field(mmfr1, 8), field(mmfr1, 16), field(mmfr1, 40)), (0, 0, 0));
        let mmfr2 = sanitise(SysReg::ID_AA64MMFR2_EL1, ones, &VM);
        assert_eq!((field(mmfr2, 24), field(mmfr2, 40), field(mmfr2, 56)), (0, 0, 0));
        for reg in [
            SysReg::ID_AA64MMFR3_EL1,
            SysReg::ID_AA64MMFR4_EL1,
            SysReg::ID_AA64ZFR0_EL1,
            SysReg::ID_AA64SMFR0_EL1,
            SysReg::ID_AA64FPFR0_EL1,
            SysReg::ID_AA64PFR2_EL1,
            SysReg::ID_AA64AFR0_EL1,
            SysReg::ID_AFR0_EL1,
        ] {
            assert_eq!(sanitise(reg, ones, &VM), 0, "{reg}");
        }
    }

    #[test]
    fn fields_whose_zero_means_present_are_kept() {
        // No FP, no AdvSIMD; neither 4 KiB nor 64 KiB granule.
        assert_eq!(sanitise(SysReg::ID_AA64PFR0_EL1, 0xff << 16, &VM) & 0xff << 16, 0xff << 16);
        assert_eq!(sanitise(SysReg::ID_AA64MMFR0_EL1, 0xff << 24, &VM) & 0xff << 24, 0xff << 24);
    }

    #[test]
    fn physical_range_promises_no_more_than_the_vm_has() {
        for (bits, range) in [(32, 0), (35, 0), (36, 1), (39, 1), (40, 2), (43, 3), (44, 4), (48, 5), (52, 6), (31, 0)]
        {
            assert_eq!(physical_range(bits), range, "{bits}");
        }
        assert_eq!(sanitise(SysReg::ID_AA64MMFR0_EL1, 6, &VM) & 0xf, 2);
        assert_eq!(sanitise(SysReg::ID_AA64MMFR0_EL1, 1, &VM) & 0xf, 1);
    }

    #[test]
    fn what_the_vm_may_not_have_is_hidden() {
        let ones = u64::MAX;
        assert_eq!(sanitise(SysReg::ID_AA64PFR0_EL1, 0x22, &BARE) & 0xf, 1);
        let isar1 = sanitise(SysReg::ID_AA64ISAR1_EL1, ones, &BARE);
        assert_eq!((field(isar1, 4), field(isar1, 8), field(isar1, 24), field(isar1, 28)), (0, 0, 0, 0));
        let isar2 = sanitise(SysReg::ID_AA64ISAR2_EL1, ones, &BARE);
        assert_eq!((field(isar2, 8), field(isar2, 12), field(isar2, 16), field(isar2, 24)), (0, 0, 0, 0));
        assert_eq!(sanitise(SysReg::ID_ISAR5_EL1, ones, &BARE), 0);
        assert_eq!(sanitise(SysReg::ID_ISAR5_EL1, ones, &VM), 0xffff_ffff);
        let pfr1 = sanitise(SysReg::ID_AA64PFR1_EL1, 0x0300, &BARE);
        assert_eq!((field(pfr1, 8), field(pfr1, 40)), (0, 0));
        let tagging = VmFeatures { tags: true, ..VM };
        assert_eq!(field(sanitise(SysReg::ID_AA64PFR1_EL1, 0x0300, &tagging), 8), 3);
        assert_eq!(field(sanitise(SysReg::ID_AA64PFR1_EL1, 0x0200, &tagging), 8), 2);
        let moving = VmFeatures { memory_copy: true, ..VM };
        assert_eq!(field(sanitise(SysReg::ID_AA64ISAR2_EL1, ones, &moving), 16), 1);
    }

    #[test]
    fn fields_have_names() {
        let mut shown = named(SysReg::ID_AA64PFR1_EL1, 0x21);
        assert_eq!(shown.next(), Some(("BT", 1)));
        assert_eq!(shown.next(), Some(("SSBS", 2)));
        assert_eq!(shown.next(), Some(("MTE", 0)));
        assert_eq!(shown.next(), Some(("CSV2_frac", 0)));
        assert_eq!(shown.next(), Some(("MTE_frac", 0)));
        assert_eq!(shown.next(), None);
    }

    proptest! {
        #[test]
        fn sanitising_twice_changes_nothing(crm in 1u8..8, op2 in 0u8..8, hardware: u64) {
            let reg = SysReg::new(3, 0, 0, crm, op2);
            let once = sanitise(reg, hardware, &VM);
            prop_assert_eq!(sanitise(reg, once, &VM), once);
        }

        #[test]
        fn fields_without_a_row_have_no_influence(crm in 1u8..8, op2 in 0u8..8, hardware: u64, noise: u64) {
            let reg = SysReg::new(3, 0, 0, crm, op2);
            let rows = fields(reg).iter().chain(fields32(reg)).fold(0, |mask, field| mask | field.mask());
            prop_assert_eq!(sanitise(reg, hardware & rows | noise & !rows, &VM), sanitise(reg, hardware, &VM));
            prop_assert_eq!(sanitise(reg, hardware, &VM) & !rows, 0);
        }
    }
}
