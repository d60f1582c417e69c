//! What a guest did to reach EL2: ESR_EL2 as a typed value.
//!
//! Purpose: [`decode`] turns the raw syndrome of a synchronous exception from a lower exception level into an
//! [`Exit`]. Every exception class that Arm DDI 0487 (issue L, D24.2 "ESR_EL2") lets a guest raise has a variant; any
//! other becomes [`Exit::Unknown`] with its class, so a newer machine cannot surprise us into a wrong answer.
//!
//! Protocol: aborts carry no payload here, because their meaning needs FAR_EL2 and HPFAR_EL2 too: see [`crate::abort`].
//! The hot path need not build an `Exit` at all: it compares [`class()`] with [`class::DATA_ABORT`] first.
//!
//! Where the guest's PC stands: at the instruction for every class except HVC and SVC, whose preferred return address
//! is already the next instruction (D1.3.1). A *trapped* SMC is at the instruction.
//!
//! Known holes: classes that only EL3 or a nested EL2 can receive (GPC, TINDEX) are reported as `Unknown`.

use crate::sysreg::{self, SysReg};

/// Exception class numbers, ESR_EL2.EC (Arm DDI 0487 D24.2, table of EC values).
pub mod class {
    /// Unknown reason: an instruction the machine does not define, at a place where EL2 gets it.
    pub const UNKNOWN: u8 = 0x00;
    /// WFI, WFE, WFIT, WFET.
    pub const WFX: u8 = 0x01;
    /// AArch32 MCR or MRC, coprocessor 15.
    pub const CP15_32: u8 = 0x03;
    /// AArch32 MCRR or MRRC, coprocessor 15.
    pub const CP15_64: u8 = 0x04;
    /// AArch32 MCR or MRC, coprocessor 14.
    pub const CP14_32: u8 = 0x05;
    /// AArch32 LDC or STC, coprocessor 14.
    pub const CP14_LOAD_STORE: u8 = 0x06;
    /// SIMD or floating point (CPTR_EL2.TFP or FPEN).
    pub const FP_ACCESS: u8 = 0x07;
    /// AArch32 VMRS of an ID register.
    pub const CP10_ID: u8 = 0x08;
    /// Pointer authentication instruction (HCR_EL2.API).
    pub const POINTER_AUTHENTICATION: u8 = 0x09;
    /// An instruction with no class of its own: LD64B, ST64B and their like.
    pub const OTHER: u8 = 0x0a;
    /// AArch32 MRRC, coprocessor 14.
    pub const CP14_64: u8 = 0x0c;
    /// Branch target exception.
    pub const BRANCH_TARGET: u8 = 0x0d;
    /// Illegal execution state.
    pub const ILLEGAL_STATE: u8 = 0x0e;
    /// SVC from AArch32.
    pub const SVC32: u8 = 0x11;
    /// HVC from AArch32.
    pub const HVC32: u8 = 0x12;
    /// SMC from AArch32.
    pub const SMC32: u8 = 0x13;
    /// MSRR, MRRS or 128-bit SYSP.
    pub const SYSTEM_128: u8 = 0x14;
    /// SVC from AArch64.
    pub const SVC64: u8 = 0x15;
    /// HVC from AArch64.
    pub const HVC64: u8 = 0x16;
    /// SMC from AArch64.
    pub const SMC64: u8 = 0x17;
    /// MSR, MRS or SYS.
    pub const SYSTEM: u8 = 0x18;
    /// SVE access.
    pub const SVE: u8 = 0x19;
    /// ERET, ERETAA, ERETAB.
    pub const ERET: u8 = 0x1a;
    /// TSTART.
    pub const TSTART: u8 = 0x1b;
    /// Pointer authentication failure.
    pub const POINTER_AUTHENTICATION_FAILURE: u8 = 0x1c;
    /// SME access.
    pub const SME: u8 = 0x1d;
    /// Instruction abort from a lower exception level.
    pub const INSTRUCTION_ABORT: u8 = 0x20;
    /// PC alignment fault.
    pub const PC_ALIGNMENT: u8 = 0x22;
    /// Data abort from a lower exception level.
    pub const DATA_ABORT: u8 = 0x24;
    /// SP alignment fault.
    pub const SP_ALIGNMENT: u8 = 0x26;
    /// Memory copy or memory set on the wrong machine state.
    pub const MOPS: u8 = 0x27;
    /// Trapped floating-point exception from AArch32.
    pub const FP_EXCEPTION32: u8 = 0x28;
    /// Trapped floating-point exception from AArch64.
    pub const FP_EXCEPTION64: u8 = 0x2c;
    /// Guarded control stack exception.
    pub const GCS: u8 = 0x2d;
    /// SError interrupt.
    pub const SERROR: u8 = 0x2f;
    /// Breakpoint from a lower exception level.
    pub const BREAKPOINT: u8 = 0x30;
    /// Software step from a lower exception level.
    pub const SOFTWARE_STEP: u8 = 0x32;
    /// Watchpoint from a lower exception level.
    pub const WATCHPOINT: u8 = 0x34;
    /// BKPT from AArch32.
    pub const BKPT32: u8 = 0x38;
    /// Vector catch from AArch32.
    pub const VECTOR_CATCH32: u8 = 0x3a;
    /// BRK from AArch64.
    pub const BRK64: u8 = 0x3c;
    /// Profiling exception.
    pub const PROFILING: u8 = 0x3d;
}

/// Which wait instruction was executed (ISS.TI).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Wait for interrupt.
    Wfi,
    /// Wait for event.
    Wfe,
    /// Wait for interrupt, until the counter passes a register's value.
    Wfit,
    /// Wait for event, until the counter passes a register's value.
    Wfet,
}

/// The condition of a trapped AArch32 instruction (ISS.CV and ISS.COND).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Condition(Option<u8>);

/// SPSR_EL2.M\[4\]: the guest was in AArch32 state.
const AARCH32: u64 = 1 << 4;

impl Condition {
    #[inline]
    const fn from_iss(iss: u32) -> Self {
        if iss & (1 << 24) != 0 { Self(Some((iss >> 20) as u8 & 0xf)) } else { Self(None) }
    }

    /// Whether the instruction would have been executed. A machine may trap one whose condition fails; it is then
    /// skipped without effect. `pstate` is SPSR_EL2 of the exit; in AArch64 state no instruction of this kind has a
    /// condition, and the answer is true.
    ///
    /// Where the syndrome has no condition (a T32 instruction), the one of the IT block in `pstate` is taken:
    /// IT\[7:2\] in bits 15:10, IT\[1:0\] in bits 26:25 (Arm DDI 0487 F1.1.2 and the SPSR_EL2 layout for AArch32).
    pub const fn holds(self, pstate: u64) -> bool {
        if pstate & AARCH32 == 0 {
            return true;
        }
        let condition = match self.0 {
            Some(condition) => condition,
            None => {
                let it = ((pstate >> 8) & 0xfc | (pstate >> 25) & 0x3) as u8;
                if it & 0xf == 0 {
                    return true;
                }
                it >> 4
            }
        };
        let [n, z, c, v] = [pstate & 1 << 31 != 0, pstate & 1 << 30 != 0, pstate & 1 << 29 != 0, pstate & 1 << 28 != 0];
        let met = match condition >> 1 {
            0 => z,
            1 => c,
            2 => n,
            3 => v,
            4 => c && !z,
            5 => n == v,
            6 => n == v && !z,
            _ => return true,
        };
        met != (condition & 1 == 1)
    }
}

/// A trapped 32-bit coprocessor access: MCR or MRC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coprocessor {
    /// 14 or 15.
    pub number: u8,
    /// Opc1.
    pub opc1: u8,
    /// CRn.
    pub crn: u8,
    /// CRm.
    pub crm: u8,
    /// Opc2.
    pub opc2: u8,
    /// General-purpose register, 0–31 (AArch64 numbering, D1.6.4).
    pub rt: u8,
    /// MRC: the coprocessor is read.
    pub read: bool,
    /// Whether the instruction was to execute.
    pub condition: Condition,
}

/// A trapped 64-bit coprocessor access: MCRR or MRRC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoprocessorPair {
    /// 14 or 15.
    pub number: u8,
    /// Opc1.
    pub opc1: u8,
    /// CRm.
    pub crm: u8,
    /// Register of the low half.
    pub rt: u8,
    /// Register of the high half.
    pub rt2: u8,
    /// MRRC: the coprocessor is read.
    pub read: bool,
    /// Whether the instruction was to execute.
    pub condition: Condition,
}

/// Why a guest left its exception level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Memory: an instruction fetch. See [`crate::abort::fault`].
    InstructionAbort,
    /// Memory: a load, store or cache operation. See [`crate::abort::fault`].
    DataAbort,
    /// A wait instruction. `timeout` is the register of WFIT and WFET, if the machine reports it.
    Wait {
        /// Which one.
        kind: Wait,
        /// Register that holds the deadline, in counter ticks.
        timeout: Option<u8>,
        /// AArch32 only; holds for AArch64.
        condition: Condition,
    },
    /// HVC. The PC is already past it.
    Hvc {
        /// The instruction's immediate.
        immediate: u16,
    },
    /// A trapped SMC. The PC is at it.
    Smc {
        /// The instruction's immediate; 0 from AArch32, whose syndrome has none.
        immediate: u16,
        /// AArch32 only.
        condition: Condition,
    },
    /// SVC, which reaches EL2 only if its owner routes it here.
    Svc {
        /// The instruction's immediate.
        immediate: u16,
    },
    /// MSR, MRS or SYS.
    System(sysreg::Access),
    /// MSRR, MRRS or SYSP: a pair of registers.
    System128(sysreg::Access),
    /// AArch32 MCR or MRC.
    Coprocessor(Coprocessor),
    /// AArch32 MCRR or MRRC.
    CoprocessorPair(CoprocessorPair),
    /// AArch32 LDC or STC to the debug data transfer registers.
    CoprocessorLoadStore {
        /// STC: the debug register is read and memory is written.
        read: bool,
        /// Whether the instruction was to execute.
        condition: Condition,
    },
    /// AArch32 VMRS of MVFR0–2 or FPSID.
    FpId(Coprocessor),
    /// SIMD or floating point while it is not the guest's.
    FpAccess {
        /// AArch32 only.
        condition: Condition,
    },
    /// SVE, which no guest has.
    Sve,
    /// SME, which no guest has. The reason is ISS.SMTC.
    Sme {
        /// ISS.SMTC.
        reason: u8,
    },
    /// A pointer authentication instruction or key while it is not the guest's.
    PointerAuthentication,
    /// A pointer that failed authentication (FEAT_FPAC).
    PointerAuthenticationFailure,
    /// ERET and its authenticating forms.
    Eret {
        /// ERETAA or ERETAB.
        authenticated: bool,
        /// The B key.
        key_b: bool,
    },
    /// LD64B, ST64B, ST64BV, ST64BV0 or another instruction without a class of its own; ISS tells which.
    Other {
        /// ISS\[24:0\].
        iss: u32,
    },
    /// Transactional memory start.
    TransactionStart,
    /// Illegal execution state.
    IllegalState,
    /// Branch target exception.
    BranchTarget,
    /// PC alignment fault; FAR_EL2 has the PC.
    PcAlignment,
    /// SP alignment fault.
    SpAlignment,
    /// A memory copy or set that must be restarted.
    MemoryCopy,
    /// Guarded control stack.
    GuardedStack,
    /// A trapped IEEE floating-point exception.
    FpException,
    /// Hardware breakpoint.
    Breakpoint,
    /// Software step.
    SoftwareStep,
    /// Watchpoint; FAR_EL2 has the address.
    Watchpoint,
    /// BRK or BKPT.
    BreakpointInstruction {
        /// The instruction's comment.
        comment: u16,
    },
    /// AArch32 vector catch.
    VectorCatch,
    /// Profiling exception.
    Profiling,
    /// SError; arrives through its own vector, but its syndrome is in the same register.
    SError {
        /// ISS\[24:0\].
        iss: u32,
    },
    /// EC 0: an instruction that nothing defines.
    Undefined,
    /// A class this program does not know.
    Unknown(u8),
}

/// ESR_EL2.EC.
#[inline]
pub const fn class(esr: u64) -> u8 {
    (esr >> 26) as u8 & 0x3f
}

/// ESR_EL2.ISS, 25 bits.
#[inline]
pub const fn iss(esr: u64) -> u32 {
    esr as u32 & 0x01ff_ffff
}

/// Bytes of the instruction that trapped: 4, or 2 for a 16-bit T32 instruction (ESR_EL2.IL).
#[inline]
pub const fn instruction_bytes(esr: u64) -> u64 {
    if esr & (1 << 25) != 0 { 4 } else { 2 }
}

/// The syndrome of a synchronous exception (or SError) from a lower exception level.
#[inline]
pub const fn decode(esr: u64) -> Exit {
    let iss = iss(esr);
    match class(esr) {
        class::DATA_ABORT => Exit::DataAbort,
        class::INSTRUCTION_ABORT => Exit::InstructionAbort,
        class::WFX => wait(iss),
        class::HVC64 | class::HVC32 => Exit::Hvc { immediate: iss as u16 },
        class::SMC64 => Exit::Smc { immediate: iss as u16, condition: Condition(Some(0xe)) },
        class::SMC32 => smc32(iss),
        class::SVC64 | class::SVC32 => Exit::Svc { immediate: iss as u16 },
        class::SYSTEM => Exit::System(system(iss)),
        class::SYSTEM_128 => Exit::System128(system(iss)),
        class::CP15_32 => Exit::Coprocessor(coprocessor(15, iss)),
        class::CP14_32 => Exit::Coprocessor(coprocessor(14, iss)),
        class::CP15_64 => Exit::CoprocessorPair(coprocessor_pair(15, iss)),
        class::CP14_64 => Exit::CoprocessorPair(coprocessor_pair(14, iss)),
        class::CP14_LOAD_STORE => {
            Exit::CoprocessorLoadStore { read: iss & 1 == 1, condition: Condition::from_iss(iss) }
        }
        class::CP10_ID => Exit::FpId(coprocessor(10, iss)),
        class::FP_ACCESS => Exit::FpAccess { condition: Condition::from_iss(iss) },
        class::SVE => Exit::Sve,
        class::SME => Exit::Sme { reason: iss as u8 & 0x7 },
        class::POINTER_AUTHENTICATION => Exit::PointerAuthentication,
        class::POINTER_AUTHENTICATION_FAILURE => Exit::PointerAuthenticationFailure,
        class::ERET => Exit::Eret { authenticated: iss & 2 != 0, key_b: iss & 1 != 0 },
        class::SERROR => Exit::SError { iss },
        class::BRK64 | class::BKPT32 => Exit::BreakpointInstruction { comment: iss as u16 },
        other => bare(other, iss),
    }
}

/// The classes whose syndrome says nothing more, or nothing that anybody here needs.
const fn bare(class: u8, iss: u32) -> Exit {
    match class {
        class::UNKNOWN => Exit::Undefined,
        class::OTHER => Exit::Other { iss },
        class::TSTART => Exit::TransactionStart,
        class::ILLEGAL_STATE => Exit::IllegalState,
        class::BRANCH_TARGET => Exit::BranchTarget,
        class::PC_ALIGNMENT => Exit::PcAlignment,
        class::SP_ALIGNMENT => Exit::SpAlignment,
        class::MOPS => Exit::MemoryCopy,
        class::GCS => Exit::GuardedStack,
        class::FP_EXCEPTION32 | class::FP_EXCEPTION64 => Exit::FpException,
        class::BREAKPOINT => Exit::Breakpoint,
        class::SOFTWARE_STEP => Exit::SoftwareStep,
        class::WATCHPOINT => Exit::Watchpoint,
        class::VECTOR_CATCH32 => Exit::VectorCatch,
        class::PROFILING => Exit::Profiling,
        unknown => Exit::Unknown(unknown),
    }
}

/// ISS of WFx: TI 1:0, RV 2, RN 9:5, COND 23:20, CV 24.
const fn wait(iss: u32) -> Exit {
    let kind = match iss & 0x3 {
        0 => Wait::Wfi,
        1 => Wait::Wfe,
        2 => Wait::Wfit,
        _ => Wait::Wfet,
    };
    let timed = iss & 0x2 != 0 && iss & 0x4 != 0;
    let timeout = if timed { Some((iss >> 5) as u8 & 0x1f) } else { None };
    Exit::Wait { kind, timeout, condition: Condition::from_iss(iss) }
}

/// ISS of SMC from AArch32: CCKNOWNPASS 19 says that the condition passed, so CV and COND need no look.
const fn smc32(iss: u32) -> Exit {
    let known = iss & (1 << 19) == 0;
    let condition = if known { Condition(Some(0xe)) } else { Condition::from_iss(iss) };
    Exit::Smc { immediate: 0, condition }
}

/// ISS of MSR, MRS, SYS and the 128-bit forms (whose Rt is even, so that its low bit 5 is 0).
const fn system(iss: u32) -> sysreg::Access {
    let reg = SysReg::new(
        (iss >> 20) as u8 & 0x3,
        (iss >> 14) as u8 & 0x7,
        (iss >> 10) as u8 & 0xf,
        (iss >> 1) as u8 & 0xf,
        (iss >> 17) as u8 & 0x7,
    );
    sysreg::Access { reg, rt: (iss >> 5) as u8 & 0x1f, read: iss & 1 == 1 }
}

/// ISS of MCR, MRC and VMRS.
const fn coprocessor(number: u8, iss: u32) -> Coprocessor {
    Coprocessor {
        number,
        opc1: (iss >> 14) as u8 & 0x7,
        crn: (iss >> 10) as u8 & 0xf,
        crm: (iss >> 1) as u8 & 0xf,
        opc2: (iss >> 17) as u8 & 0x7,
        rt: (iss >> 5) as u8 & 0x1f,
        read: iss & 1 == 1,
        condition: Condition::from_iss(iss),
    }
}

/// ISS of MCRR and MRRC.
const fn coprocessor_pair(number: u8, iss: u32) -> CoprocessorPair {
    CoprocessorPair {
        number,
        opc1: (iss >> 16) as u8 & 0xf,
        crm: (iss >> 1) as u8 & 0xf,
        rt: (iss >> 5) as u8 & 0x1f,
        rt2: (iss >> 10) as u8 & 0x1f,
        read: iss & 1 == 1,
        condition: Condition::from_iss(iss),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn esr(class: u8, iss: u32) -> u64 {
        (class as u64) << 26 | 1 << 25 | iss as u64
    }

    #[test]
    fn every_class_is_decoded_or_named_unknown() {
        // Classes that D24.2 leaves reserved, or gives to exceptions that no lower level can send to EL2.
        let unallocated = [
            0x02, 0x0b, 0x0f, 0x10, 0x1e, 0x1f, 0x21, 0x23, 0x25, 0x29, 0x2a, 0x2b, 0x2e, 0x31, 0x33, 0x35, 0x36, 0x37,
            0x39, 0x3b, 0x3e, 0x3f,
        ];
        for class in 0..64 {
            let exit = decode(esr(class, 0));
            assert_eq!(exit == Exit::Unknown(class), unallocated.contains(&class), "{class:#x} {exit:?}");
        }
    }

    #[test]
    fn no_syndrome_panics_and_the_upper_half_is_ignored() {
        for class in 0..64u8 {
            for pattern in 0..4096u32 {
                let raw = esr(class, pattern.wrapping_mul(0x0001_3f29) & 0x01ff_ffff);
                assert_eq!(decode(raw), decode(raw | 0xffff_ffff_0000_0000));
            }
        }
    }

    #[test]
    fn a_write_of_icc_sgi1r_from_x19() {
        // msr icc_sgi1r_el1, x19: op0=3 op1=0 CRn=12 CRm=11 op2=5.
        let raw = esr(class::SYSTEM, 3 << 20 | 5 << 17 | 12 << 10 | 19 << 5 | 11 << 1);
        let access = sysreg::Access { reg: SysReg::ICC_SGI1R_EL1, rt: 19, read: false };
        assert_eq!(decode(raw), Exit::System(access));
    }

    #[test]
    fn waits_name_their_deadline_only_if_it_is_valid() {
        let Exit::Wait { kind, timeout, .. } = decode(esr(class::WFX, 7 << 5 | 1 << 2 | 2)) else { panic!() };
        assert_eq!((kind, timeout), (Wait::Wfit, Some(7)));
        let Exit::Wait { kind, timeout, .. } = decode(esr(class::WFX, 7 << 5 | 3)) else { panic!() };
        assert_eq!((kind, timeout), (Wait::Wfet, None));
        let Exit::Wait { kind, timeout, .. } = decode(esr(class::WFX, 7 << 5 | 1 << 2)) else { panic!() };
        assert_eq!((kind, timeout), (Wait::Wfi, None));
    }

    #[test]
    fn coprocessor_fields_keep_their_places() {
        let Exit::Coprocessor(access) =
            decode(esr(class::CP15_32, 1 << 24 | 0xe << 20 | 2 << 17 | 3 << 14 | 9 << 10 | 5 << 5 | 12 << 1 | 1))
        else {
            panic!()
        };
        assert_eq!((access.number, access.opc1, access.crn, access.crm, access.opc2), (15, 3, 9, 12, 2));
        assert_eq!((access.rt, access.read), (5, true));
        let Exit::CoprocessorPair(pair) = decode(esr(class::CP14_64, 6 << 16 | 11 << 10 | 4 << 5 | 14 << 1)) else {
            panic!()
        };
        assert_eq!((pair.number, pair.opc1, pair.crm, pair.rt, pair.rt2, pair.read), (14, 6, 14, 4, 11, false));
    }

    #[test]
    fn conditions_follow_the_flags() {
        const N: u64 = 1 << 31;
        const Z: u64 = 1 << 30;
        const C: u64 = 1 << 29;
        const V: u64 = 1 << 28;
        let holds = |condition: u8, pstate| Condition(Some(condition)).holds(AARCH32 | pstate);
        for (condition, yes, no) in [
            (0x0, Z, 0),
            (0x2, C, Z),
            (0x4, N, V),
            (0x6, V, N),
            (0x8, C, C | Z),
            (0xa, N | V, N),
            (0xc, 0, Z),
            (0xd, V, 0),
        ] {
            assert!(holds(condition, yes), "{condition:x}");
            assert!(!holds(condition, no), "{condition:x}");
            assert_ne!(holds(condition ^ 1, yes), holds(condition, yes));
        }
        assert!(holds(0xe, 0) && holds(0xf, N));
        // IT block "EQ": IT[7:2] is 2 in bits 15:10, so IT is 0b0000_1000.
        let it = AARCH32 | 2 << 10;
        assert!(Condition(None).holds(it | Z));
        assert!(!Condition(None).holds(it));
        assert!(Condition(None).holds(AARCH32));
        // The same bits mean SSBS and BTYPE in AArch64 state.
        assert!(Condition(None).holds(2 << 10));
    }

    #[test]
    fn smc_from_aarch32_skips_only_when_it_may_have_failed() {
        let failing = 1 << 24; // CV, COND = EQ
        let Exit::Smc { condition, .. } = decode(esr(class::SMC32, failing)) else { panic!() };
        assert!(condition.holds(AARCH32));
        let Exit::Smc { condition, .. } = decode(esr(class::SMC32, failing | 1 << 19)) else { panic!() };
        assert!(!condition.holds(AARCH32));
    }
}
