//! Exceptions that the hypervisor gives to its guest, as the hardware would have.
//!
//! Purpose: [`enter`] computes what an exception taken to EL1 does to a vCPU's registers. It follows the pseudocode
//! `AArch64.TakeException` and `AArch64.ReportException` of Arm DDI 0487 (D1.3.1, D1.3.6 and J1.1), and nothing else: who
//! injects decides why.
//!
//! Protocol: the caller reads PSTATE and PC of the exit, calls [`enter`], and writes every field of the [`Entry`]; `far` is
//! `None` where the exception leaves FAR_EL1 alone. The guest's EL1 is always AArch64 (HCR_EL2.RW is 1); EL0 may be AArch32.
//! An SError from the machine should rather be made pending with HCR_EL2.VSE, since that honours PSTATE.A.
//!
//! Invariants: pure; hostile VBAR_EL1, SCTLR_EL1 and PSTATE values lead to some PC in the guest, never further.

/// Bits of PSTATE as SPSR_EL1 and SPSR_EL2 hold them (Arm DDI 0487 C5.2.19 and C5.2.20).
pub mod pstate {
    /// EL1 with SP_EL1.
    pub const EL1H: u64 = 0b0101;
    /// EL1 with SP_EL0.
    pub const EL1T: u64 = 0b0100;
    /// EL0.
    pub const EL0T: u64 = 0;
    /// Exception level and stack pointer, M\[3:0\].
    pub const MODE: u64 = 0xf;
    /// AArch32 state, M\[4\].
    pub const AARCH32: u64 = 1 << 4;
    /// FIQ masked.
    pub const F: u64 = 1 << 6;
    /// IRQ masked.
    pub const I: u64 = 1 << 7;
    /// SError masked.
    pub const A: u64 = 1 << 8;
    /// Debug exceptions masked.
    pub const D: u64 = 1 << 9;
    /// All four masks.
    pub const DAIF: u64 = D | A | I | F;
    /// Branch type.
    pub const BTYPE: u64 = 0b11 << 10;
    /// Speculative store bypass safe.
    pub const SSBS: u64 = 1 << 12;
    /// All interrupts masked (FEAT_NMI).
    pub const ALLINT: u64 = 1 << 13;
    /// Illegal execution state.
    pub const IL: u64 = 1 << 20;
    /// Software step.
    pub const SS: u64 = 1 << 21;
    /// Privileged access never.
    pub const PAN: u64 = 1 << 22;
    /// User access override (AArch64; SSBS in AArch32).
    pub const UAO: u64 = 1 << 23;
    /// Data independent timing.
    pub const DIT: u64 = 1 << 24;
    /// Tag check override.
    pub const TCO: u64 = 1 << 25;
    /// Condition flags.
    pub const NZCV: u64 = 0xf << 28;
    /// What a vCPU starts with: EL1h, everything masked (PSCI CPU_ON, Linux boot protocol).
    pub const RESET: u64 = EL1H | DAIF;
}

/// SCTLR_EL1 bits that exception entry looks at (Arm DDI 0487 D24.2 SCTLR_EL1).
mod sctlr {
    pub const SPAN: u64 = 1 << 23;
    pub const DSSBS: u64 = 1 << 44;
    pub const SPINTMASK: u64 = 1 << 62;
}

/// Features of the machine that add bits to PSTATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Features {
    /// FEAT_PAN.
    pub pan: bool,
    /// FEAT_SSBS.
    pub ssbs: bool,
    /// FEAT_MTE: PSTATE.TCO exists.
    pub mte: bool,
    /// FEAT_NMI: PSTATE.ALLINT exists.
    pub nmi: bool,
}

impl Features {
    /// From the machine's own ID_AA64PFR1_EL1 and ID_AA64MMFR1_EL1.
    pub const fn of_machine(pfr1: u64, mmfr1: u64) -> Self {
        Self {
            pan: (mmfr1 >> 20) & 0xf != 0,
            ssbs: (pfr1 >> 4) & 0xf != 0,
            mte: (pfr1 >> 8) & 0xf != 0,
            nmi: (pfr1 >> 36) & 0xf != 0,
        }
    }
}

/// What an aborted access reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Synchronous external abort, not on a table walk (0b010000).
    External,
    /// Synchronous external abort on a stage-1 table walk, with the level of the descriptor, -1 to 3 (0b0101LL, and
    /// 0b010011 for level -1).
    ExternalOnWalk(i8),
    /// Address size fault at level 0 (0b000000).
    AddressSize,
    /// What an address translation instruction reported for the guest's own stage 1: PAR_EL1.FST, 6 bits.
    Stage1(u8),
}

impl Status {
    /// From PAR_EL1 after a failed `AT S1E*` (F is 1); `None` if stage 2 failed it (S, bit 9), which is no fault of the
    /// guest's.
    pub const fn of_par(par: u64) -> Option<Self> {
        if par & 1 << 9 != 0 { None } else { Some(Self::Stage1((par >> 1) as u8 & 0x3f)) }
    }
}

/// An exception for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// The instruction is UNDEFINED.
    Undefined,
    /// An instruction fetch failed.
    InstructionAbort {
        /// Virtual address for FAR_EL1.
        address: u64,
        /// Status.
        status: Status,
    },
    /// A data access failed.
    DataAbort {
        /// Virtual address for FAR_EL1.
        address: u64,
        /// Status.
        status: Status,
        /// ISS.WnR: a store, or cache maintenance.
        write: bool,
        /// ISS.CM: cache maintenance by virtual address.
        cache_maintenance: bool,
    },
    /// SError with this ISS (25 bits).
    SError {
        /// ISS\[24:0\].
        iss: u32,
    },
}

/// The vCPU as the exception finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Address to return to.
    pub pc: u64,
    /// PSTATE, in SPSR_EL2's layout.
    pub pstate: u64,
    /// VBAR_EL1.
    pub vbar: u64,
    /// SCTLR_EL1.
    pub sctlr: u64,
}

/// The vCPU as the exception leaves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// PC, in the guest's vector table.
    pub pc: u64,
    /// PSTATE.
    pub pstate: u64,
    /// ELR_EL1.
    pub elr: u64,
    /// SPSR_EL1.
    pub spsr: u64,
    /// ESR_EL1.
    pub esr: u64,
    /// FAR_EL1, if the exception writes it.
    pub far: Option<u64>,
}

/// Where an exception comes from, seen from EL1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    CurrentSp0,
    CurrentSpx,
    LowerAarch64,
    LowerAarch32,
}

impl Source {
    const fn of(pstate: u64) -> Self {
        match pstate & (pstate::AARCH32 | pstate::MODE) {
            // An AArch32 mode can only be User: EL1 is AArch64.
            mode if mode & pstate::AARCH32 != 0 => Self::LowerAarch32,
            pstate::EL0T => Self::LowerAarch64,
            pstate::EL1T => Self::CurrentSp0,
            _ => Self::CurrentSpx,
        }
    }

    /// Offset of the synchronous vector from VBAR_EL1 (D1.3.1, table of vector offsets).
    const fn offset(self) -> u64 {
        match self {
            Self::CurrentSp0 => 0x000,
            Self::CurrentSpx => 0x200,
            Self::LowerAarch64 => 0x400,
            Self::LowerAarch32 => 0x600,
        }
    }

    const fn is_lower(self) -> bool {
        matches!(self, Self::LowerAarch64 | Self::LowerAarch32)
    }
}

/// Registers after `exception` was taken to EL1.
pub const fn enter(exception: Exception, from: &Context, features: Features) -> Entry {
    let source = Source::of(from.pstate);
    let kind = if matches!(exception, Exception::SError { .. }) { 0x180 } else { 0 };
    Entry {
        pc: (from.vbar & !0x7ff) | (source.offset() + kind),
        pstate: pstate_after(from, features),
        elr: from.pc,
        spsr: from.pstate,
        esr: syndrome(exception, source),
        far: address(exception),
    }
}

/// Flags and DIT stay, everything that the exception owns is set by its rule, the rest becomes 0.
const fn pstate_after(from: &Context, features: Features) -> u64 {
    let mut new = pstate::RESET | (from.pstate & (pstate::NZCV | pstate::DIT));
    if features.pan {
        new |= if from.sctlr & sctlr::SPAN == 0 { pstate::PAN } else { from.pstate & pstate::PAN };
    }
    if features.ssbs && from.sctlr & sctlr::DSSBS != 0 {
        new |= pstate::SSBS;
    }
    if features.mte {
        new |= pstate::TCO;
    }
    if features.nmi && from.sctlr & sctlr::SPINTMASK == 0 {
        new |= pstate::ALLINT;
    }
    new
}

/// ESR_EL1. IL is 1 for all of these: EC 0, instruction aborts, data aborts without ISV, and SError (D24.2 ESR_EL1.IL).
const fn syndrome(exception: Exception, source: Source) -> u64 {
    use crate::syndrome::class;
    // The class of an abort taken without a change of level is the next number.
    let same = !source.is_lower() as u64;
    let (class, iss) = match exception {
        Exception::Undefined => (class::UNKNOWN as u64, 0),
        Exception::InstructionAbort { status, .. } => (class::INSTRUCTION_ABORT as u64 + same, code(status)),
        Exception::DataAbort { status, write, cache_maintenance, .. } => {
            let iss = code(status) | (write as u64) << 6 | (cache_maintenance as u64) << 8;
            (class::DATA_ABORT as u64 + same, iss)
        }
        Exception::SError { iss } => (class::SERROR as u64, iss as u64 & 0x01ff_ffff),
    };
    class << 26 | 1 << 25 | iss
}

const fn code(status: Status) -> u64 {
    match status {
        Status::External => 0b01_0000,
        Status::ExternalOnWalk(level) => (0b01_0100 + level as i64) as u64 & 0x3f,
        Status::AddressSize => 0b00_0000,
        Status::Stage1(code) => code as u64 & 0x3f,
    }
}

const fn address(exception: Exception) -> Option<u64> {
    match exception {
        Exception::InstructionAbort { address, .. } | Exception::DataAbort { address, .. } => Some(address),
        Exception::Undefined | Exception::SError { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::syndrome::{class, decode, iss};
    use proptest::prelude::*;

    const ALL: Features = Features { pan: true, ssbs: true, mte: true, nmi: true };
    const VBAR: u64 = 0xffff_8000_0801_0800;

    fn context(pstate: u64, sctlr: u64) -> Context {
        Context { pc: 0x1234, pstate, vbar: VBAR, sctlr }
    }

    #[test]
    fn an_abort_on_a_walk_names_its_level() {
        for (level, code) in [(-1, 0b01_0011), (0, 0b01_0100), (1, 0b01_0101), (2, 0b01_0110), (3, 0b01_0111)] {
            let status = Status::ExternalOnWalk(level);
            let abort = Exception::DataAbort { address: 7, status, write: false, cache_maintenance: false };
            assert_eq!(enter(abort, &context(pstate::EL1H, 0), ALL).esr & 0x3f, code);
        }
    }

    #[test]
    fn each_source_has_its_vector_and_its_class() {
        let abort =
            Exception::DataAbort { address: 7, status: Status::External, write: true, cache_maintenance: false };
        for (pstate, offset, class) in [
            (pstate::EL1T, 0x000, 0x25),
            (pstate::EL1H, 0x200, 0x25),
            (pstate::EL0T, 0x400, 0x24),
            (pstate::AARCH32, 0x600, 0x24),
            (pstate::AARCH32 | 1 << 5, 0x600, 0x24),
        ] {
            let entry = enter(abort, &context(pstate, 0), Features::default());
            assert_eq!(entry.pc, VBAR + offset);
            assert_eq!(entry.esr, class << 26 | 1 << 25 | 1 << 6 | 0x10);
            assert_eq!((entry.elr, entry.spsr, entry.far), (0x1234, pstate, Some(7)));
            let entry = enter(Exception::SError { iss: 0 }, &context(pstate, 0), Features::default());
            assert_eq!(entry.pc, VBAR + offset + 0x180);
        }
    }

    #[test]
    fn an_undefined_instruction_says_nothing_and_keeps_far() {
        let entry = enter(Exception::Undefined, &context(pstate::EL0T, 0), ALL);
        assert_eq!((entry.esr, entry.far), (1 << 25, None));
    }

    #[test]
    fn a_fetch_from_nowhere_is_an_external_abort_at_its_address() {
        let exception = Exception::InstructionAbort { address: 0xdead_0000, status: Status::External };
        let entry = enter(exception, &context(pstate::EL1H, 0), ALL);
        assert_eq!(entry.esr, 0x21 << 26 | 1 << 25 | 0x10);
        assert_eq!(entry.far, Some(0xdead_0000));
        let exception = Exception::InstructionAbort { address: 1 << 50, status: Status::AddressSize };
        assert_eq!(iss(enter(exception, &context(0, 0), ALL).esr), 0);
    }

    #[test]
    fn a_failed_translation_is_the_guests_own_fault() {
        let translation_3 = 0b00_0111;
        let status = Status::of_par(1 | translation_3 << 1 | 1 << 8).unwrap();
        let abort = Exception::DataAbort { address: 9, status, write: false, cache_maintenance: false };
        let entry = enter(abort, &context(pstate::EL1H, 0), ALL);
        assert_eq!((iss(entry.esr), entry.far), (0b00_0111, Some(9)));
        assert_eq!(Status::of_par(1 | translation_3 << 1 | 1 << 9), None, "stage 2");
    }

    #[test]
    fn pan_follows_span() {
        let pan = Features { pan: true, ..Features::default() };
        let after = |old, sctlr| enter(Exception::Undefined, &context(old, sctlr), pan).pstate & pstate::PAN;
        assert_eq!(after(0, 0), pstate::PAN);
        assert_eq!(after(0, sctlr::SPAN), 0);
        assert_eq!(after(pstate::PAN, sctlr::SPAN), pstate::PAN);
        let none = enter(Exception::Undefined, &context(pstate::PAN, 0), Features::default());
        assert_eq!(none.pstate & pstate::PAN, 0);
    }

    #[test]
    fn flags_stay_and_the_rest_is_set_or_cleared() {
        let old = pstate::NZCV | pstate::UAO | pstate::SS | pstate::IL | pstate::BTYPE | pstate::DIT | pstate::SSBS;
        let entry = enter(Exception::Undefined, &context(old, sctlr::SPAN | sctlr::SPINTMASK), ALL);
        assert_eq!(entry.pstate, pstate::RESET | pstate::NZCV | pstate::DIT | pstate::TCO);
        let entry = enter(Exception::Undefined, &context(0, sctlr::DSSBS), ALL);
        assert_eq!(entry.pstate, pstate::RESET | pstate::PAN | pstate::SSBS | pstate::TCO | pstate::ALLINT);
    }

    proptest! {
        #[test]
        fn any_guest_state_enters_el1h_inside_its_vectors(pc: u64, pstate: u64, vbar: u64, sctlr: u64, iss: u32) {
            let from = Context { pc, pstate, vbar, sctlr };
            let entry = enter(Exception::SError { iss }, &from, ALL);
            prop_assert_eq!(entry.pstate & 0x1f, pstate::EL1H);
            prop_assert_eq!(entry.pstate & pstate::DAIF, pstate::DAIF);
            prop_assert_eq!(entry.pc & !0x7ff, vbar & !0x7ff);
            prop_assert_eq!(crate::syndrome::class(entry.esr), class::SERROR);
            prop_assert_eq!(decode(entry.esr), crate::syndrome::Exit::SError { iss: iss & 0x01ff_ffff });
        }
    }
}
