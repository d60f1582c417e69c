//! What a guest gets when it touches a register that is not its own.
//!
//! Purpose: one pure table from a trapped access to its answer, so that no trap is forgotten: whatever has no row is
//! UNDEFINED, as on a machine without the feature. The rows agree with [`crate::idregs`]: what the ID registers deny
//! (performance monitors, statistical profiling, trace, ordering regions, memory tagging) is UNDEFINED here.
//!
//! Protocol: [`answer`] for AArch64 accesses, [`coprocessor`] and [`coprocessor_pair`] for those of an AArch32 EL0. The
//! caller carries the policy out, then moves the PC past the instruction, except for `Undefined`, which it injects.
//!
//! Debug (Arm DDI 0487 D2, H9): hardware breakpoints and watchpoints read as zero and ignore writes, so a guest that arms
//! one never sees it fire; the debug control register itself is the guest's, since single-stepping a program needs it.
//!
//! Known holes: breakpoints and watchpoints in guests; external debug and the debug communication channel.

use crate::syndrome::{Coprocessor, CoprocessorPair};
use crate::sysreg::SysReg;

/// A physical timer register (EL1 physical timer, emulated).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerRegister {
    /// CNTPCT_EL0 and CNTPCTSS_EL0: the count, read-only.
    Count,
    /// CNTP_TVAL_EL0: compare value minus count, 32 bits, signed.
    TimerValue,
    /// CNTP_CTL_EL0: ENABLE 0, IMASK 1, ISTATUS 2 (read-only).
    Control,
    /// CNTP_CVAL_EL0.
    CompareValue,
}

/// Which SGI register was written; the argument is [`crate::mpidr::Sgi`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SgiRegister {
    /// ICC_SGI1R_EL1: group 1 of the own security state.
    Group1,
    /// ICC_ASGI1R_EL1: group 1 of the other security state.
    AliasGroup1,
    /// ICC_SGI0R_EL1: group 0.
    Group0,
}

/// A cache maintenance operation by virtual address, or on the whole instruction cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheOp {
    /// DC IVAC: needs write permission.
    Invalidate,
    /// DC CVAC, CVAP, CVADP: to the point of coherency, or of persistence.
    Clean,
    /// DC CVAU.
    CleanToUnification,
    /// DC CIVAC.
    CleanInvalidate,
    /// DC ZVA: an ordinary write.
    Zero,
    /// IC IVAU.
    InstructionAddress,
    /// IC IALLU, IC IALLUIS; the register operand means nothing.
    InstructionAll,
}

/// A register of EL1's translation whose writes may be watched (HCR_EL2.TVM; Arm DDI 0487 D24.2.49).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant is the manual's own name")]
pub enum TranslationRegister {
    SctlrEl1,
    Ttbr0El1,
    Ttbr1El1,
    TcrEl1,
    Afsr0El1,
    Afsr1El1,
    EsrEl1,
    FarEl1,
    MairEl1,
    AmairEl1,
    ContextidrEl1,
}

/// The answer to a trapped access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Read: [`crate::idregs::sanitise`] of the machine's value.
    IdRegister(SysReg),
    /// Reads give this value; writes do nothing.
    ReadAs(u64),
    /// MDSCR_EL1: the vCPU's own, with [`MDSCR_GUEST`] writable.
    DebugControl,
    /// The emulated physical timer.
    Timer(TimerRegister),
    /// Generate an SGI.
    Sgi(SgiRegister),
    /// DC ISW, CSW, CISW: clean and invalidate what the VM has mapped, once per cache toggle.
    SetWay,
    /// A write of EL1's own register, watched for its caches going on or off.
    Translation(TranslationRegister),
    /// Cache maintenance that a machine traps instead of doing.
    Cache(CacheOp),
    /// Inject an UNDEFINED exception.
    Undefined,
}

/// Reads as zero, writes are ignored.
const RAZ_WI: Policy = Policy::ReadAs(0);

/// MDSCR_EL1 bits a guest may set: SS (0), TDCC (12), KDE (13), MDE (15).
pub const MDSCR_GUEST: u64 = 1 << 0 | 1 << 12 | 1 << 13 | 1 << 15;

/// OSLSR_EL1: an OS lock that is implemented (OSLM, bits 3 and 0, is 0b10) and unlocked.
const OSLSR: u64 = 1 << 3;

/// The answer to an MSR, MRS or SYS (`read` is false for SYS).
#[inline]
pub const fn answer(reg: SysReg, read: bool) -> Policy {
    match reg.op0() {
        1 => instruction(reg, read),
        2 => debug(reg, read),
        3 => register(reg, read),
        _ => Policy::Undefined,
    }
}

const fn when(allowed: bool, policy: Policy) -> Policy {
    if allowed { policy } else { Policy::Undefined }
}

/// op0 = 3.
const fn register(reg: SysReg, read: bool) -> Policy {
    match reg {
        SysReg::ICC_SGI1R_EL1 => when(!read, Policy::Sgi(SgiRegister::Group1)),
        SysReg::ICC_ASGI1R_EL1 => when(!read, Policy::Sgi(SgiRegister::AliasGroup1)),
        SysReg::ICC_SGI0R_EL1 => when(!read, Policy::Sgi(SgiRegister::Group0)),
        SysReg::CNTP_CTL_EL0 => Policy::Timer(TimerRegister::Control),
        SysReg::CNTP_CVAL_EL0 => Policy::Timer(TimerRegister::CompareValue),
        SysReg::CNTP_TVAL_EL0 => Policy::Timer(TimerRegister::TimerValue),
        SysReg::CNTPCT_EL0 | SysReg::CNTPCTSS_EL0 => when(read, Policy::Timer(TimerRegister::Count)),
        SysReg::ACTLR_EL1 => RAZ_WI,
        SysReg::SCTLR_EL1 => when(!read, Policy::Translation(TranslationRegister::SctlrEl1)),
        SysReg::TTBR0_EL1 => when(!read, Policy::Translation(TranslationRegister::Ttbr0El1)),
        SysReg::TTBR1_EL1 => when(!read, Policy::Translation(TranslationRegister::Ttbr1El1)),
        SysReg::TCR_EL1 => when(!read, Policy::Translation(TranslationRegister::TcrEl1)),
        SysReg::AFSR0_EL1 => when(!read, Policy::Translation(TranslationRegister::Afsr0El1)),
        SysReg::AFSR1_EL1 => when(!read, Policy::Translation(TranslationRegister::Afsr1El1)),
        SysReg::ESR_EL1 => when(!read, Policy::Translation(TranslationRegister::EsrEl1)),
        SysReg::FAR_EL1 => when(!read, Policy::Translation(TranslationRegister::FarEl1)),
        SysReg::MAIR_EL1 => when(!read, Policy::Translation(TranslationRegister::MairEl1)),
        SysReg::AMAIR_EL1 => when(!read, Policy::Translation(TranslationRegister::AmairEl1)),
        SysReg::CONTEXTIDR_EL1 => when(!read, Policy::Translation(TranslationRegister::ContextidrEl1)),
        // SRE, DFB, DIB: system registers are the only interface, and cannot be turned off (IHI 0069 12.2.22).
        SysReg::ICC_SRE_EL1 => Policy::ReadAs(0b111),
        SysReg::REVIDR_EL1 | SysReg::AIDR_EL1 => when(read, RAZ_WI),
        // The rest of the identification space: CRm 1–7. Encodings without a name are RAZ (D23.3.1).
        id if id.op1() == 0 && id.crn() == 0 && id.crm() >= 1 && id.crm() <= 7 => when(read, Policy::IdRegister(id)),
        _ => Policy::Undefined,
    }
}

/// op0 = 2: debug; trace registers (op1 = 1) do not exist.
const fn debug(reg: SysReg, read: bool) -> Policy {
    match reg {
        SysReg::MDSCR_EL1 => Policy::DebugControl,
        SysReg::OSLSR_EL1 => when(read, Policy::ReadAs(OSLSR)),
        SysReg::OSLAR_EL1 => when(!read, RAZ_WI),
        SysReg::MDRAR_EL1 | SysReg::DBGAUTHSTATUS_EL1 | SysReg::MDCCSR_EL0 => when(read, RAZ_WI),
        SysReg::OSDLR_EL1
        | SysReg::DBGPRCR_EL1
        | SysReg::DBGCLAIMSET_EL1
        | SysReg::DBGCLAIMCLR_EL1
        | SysReg::MDCCINT_EL1
        | SysReg::OSDTRRX_EL1
        | SysReg::OSDTRTX_EL1
        | SysReg::OSECCR_EL1
        | SysReg::DBGDTR_EL0
        | SysReg::DBGDTRRX_EL0 => RAZ_WI,
        // DBGBVR, DBGBCR, DBGWVR, DBGWCR: CRn 0, CRm the number, op2 4–7.
        pair if pair.op1() == 0 && pair.crn() == 0 && pair.op2() >= 4 => RAZ_WI,
        _ => Policy::Undefined,
    }
}

/// op0 = 1: system instructions. Those on allocation tags do not exist.
const fn instruction(reg: SysReg, read: bool) -> Policy {
    let policy = match reg {
        SysReg::DC_ISW | SysReg::DC_CSW | SysReg::DC_CISW => Policy::SetWay,
        SysReg::DC_IVAC => Policy::Cache(CacheOp::Invalidate),
        SysReg::DC_CVAC | SysReg::DC_CVAP | SysReg::DC_CVADP => Policy::Cache(CacheOp::Clean),
        SysReg::DC_CVAU => Policy::Cache(CacheOp::CleanToUnification),
        SysReg::DC_CIVAC => Policy::Cache(CacheOp::CleanInvalidate),
        SysReg::DC_ZVA => Policy::Cache(CacheOp::Zero),
        SysReg::IC_IVAU => Policy::Cache(CacheOp::InstructionAddress),
        SysReg::IC_IALLU | SysReg::IC_IALLUIS => Policy::Cache(CacheOp::InstructionAll),
        _ => Policy::Undefined,
    };
    when(!read, policy)
}

/// The answer to an AArch32 MCR or MRC at EL0: the physical timer's, and nothing else.
pub const fn coprocessor(access: &Coprocessor) -> Policy {
    match (access.number, access.opc1, access.crn, access.crm, access.opc2) {
        (15, 0, 14, 2, 0) => Policy::Timer(TimerRegister::TimerValue),
        (15, 0, 14, 2, 1) => Policy::Timer(TimerRegister::Control),
        _ => Policy::Undefined,
    }
}

/// The answer to an AArch32 MCRR or MRRC at EL0: CNTPCT (opc1 0), CNTP_CVAL (opc1 2), CNTPCTSS (opc1 8).
pub const fn coprocessor_pair(access: &CoprocessorPair) -> Policy {
    match (access.number, access.opc1, access.crm) {
        (15, 0 | 8, 14) => when(access.read, Policy::Timer(TimerRegister::Count)),
        (15, 2, 14) => Policy::Timer(TimerRegister::CompareValue),
        _ => Policy::Undefined,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_guest_has_is_undefined() {
        for reg in [
            SysReg::PMCR_EL0,
            SysReg::PMCCNTR_EL0,
            SysReg::PMUSERENR_EL0,
            SysReg::PMCCFILTR_EL0,
            SysReg::LORID_EL1,
            SysReg::LORC_EL1,
            SysReg::TRBLIMITR_EL1,
            SysReg::PMBLIMITR_EL1,
            SysReg::TRFCR_EL1,
            SysReg::RNDR,
            SysReg::SCXTNUM_EL0,
            SysReg::GMID_EL1,
            SysReg::TCR2_EL1,
            // IMPLEMENTATION DEFINED space (HCR_EL2.TIDCP): CRn 11 and 15.
            SysReg::new(3, 0, 15, 2, 0),
            SysReg::new(3, 3, 11, 0, 0),
            // DC CIGSW: tags.
            SysReg::new(1, 0, 7, 14, 4),
        ] {
            assert_eq!(answer(reg, true), Policy::Undefined, "{reg}");
            assert_eq!(answer(reg, false), Policy::Undefined, "{reg}");
        }
    }

    #[test]
    fn identification_is_read_only_and_whole() {
        for crm in 1..8 {
            for op2 in 0..8 {
                let reg = SysReg::new(3, 0, 0, crm, op2);
                assert_eq!(answer(reg, true), Policy::IdRegister(reg));
                assert_eq!(answer(reg, false), Policy::Undefined);
            }
        }
        // MIDR and MPIDR are never trapped; asking for them here is a mistake.
        assert_eq!(answer(SysReg::new(3, 0, 0, 0, 0), true), Policy::Undefined);
    }

    #[test]
    fn sgis_and_locks_are_written_only() {
        assert_eq!(answer(SysReg::ICC_SGI1R_EL1, false), Policy::Sgi(SgiRegister::Group1));
        assert_eq!(answer(SysReg::ICC_SGI1R_EL1, true), Policy::Undefined);
        assert_eq!(answer(SysReg::OSLAR_EL1, false), RAZ_WI);
        assert_eq!(answer(SysReg::OSLAR_EL1, true), Policy::Undefined);
        assert_eq!(answer(SysReg::OSLSR_EL1, true), Policy::ReadAs(8));
    }

    #[test]
    fn all_sixteen_breakpoints_and_watchpoints_are_silent() {
        for crm in 0..16 {
            for op2 in 4..8 {
                let reg = SysReg::new(2, 0, 0, crm, op2);
                assert_eq!((answer(reg, true), answer(reg, false)), (RAZ_WI, RAZ_WI));
            }
        }
        assert_eq!(answer(SysReg::new(2, 1, 0, 0, 0), true), Policy::Undefined);
    }

    #[test]
    fn every_register_that_is_watched_is_written_only() {
        // HCR_EL2.TVM's list of AArch64 registers.
        for (crn, crm, op2) in [
            (1, 0, 0),
            (2, 0, 0),
            (2, 0, 1),
            (2, 0, 2),
            (5, 1, 0),
            (5, 1, 1),
            (5, 2, 0),
            (6, 0, 0),
            (10, 2, 0),
            (10, 3, 0),
            (13, 0, 1),
        ] {
            let reg = SysReg::new(3, 0, crn, crm, op2);
            assert!(matches!(answer(reg, false), Policy::Translation(_)), "{reg}");
            assert_eq!(answer(reg, true), Policy::Undefined, "{reg}");
        }
    }

    #[test]
    fn maintenance_is_told_apart() {
        for reg in [SysReg::DC_ISW, SysReg::DC_CSW, SysReg::DC_CISW] {
            assert_eq!(answer(reg, false), Policy::SetWay);
        }
        assert_eq!(answer(SysReg::DC_IVAC, false), Policy::Cache(CacheOp::Invalidate));
        assert_eq!(answer(SysReg::DC_CIVAC, false), Policy::Cache(CacheOp::CleanInvalidate));
        assert_eq!(answer(SysReg::DC_CVAP, false), Policy::Cache(CacheOp::Clean));
        assert_eq!(answer(SysReg::DC_CVAU, false), Policy::Cache(CacheOp::CleanToUnification));
    }

    #[test]
    fn aarch32_reaches_the_physical_timer_only() {
        use crate::syndrome::{Exit, class, decode};
        let pair = |iss: u64| match decode((class::CP15_64 as u64) << 26 | iss) {
            Exit::CoprocessorPair(pair) => coprocessor_pair(&pair),
            exit => panic!("{exit:?}"),
        };
        assert_eq!(pair(14 << 1 | 1), Policy::Timer(TimerRegister::Count));
        assert_eq!(pair(14 << 1), Policy::Undefined);
        assert_eq!(pair(2 << 16 | 14 << 1), Policy::Timer(TimerRegister::CompareValue));
        let single = |iss: u64| match decode((class::CP15_32 as u64) << 26 | iss) {
            Exit::Coprocessor(access) => coprocessor(&access),
            exit => panic!("{exit:?}"),
        };
        assert_eq!(single(1 << 17 | 14 << 10 | 2 << 1 | 1), Policy::Timer(TimerRegister::Control));
        assert_eq!(single(9 << 10 | 12 << 1), Policy::Undefined);
    }
}
