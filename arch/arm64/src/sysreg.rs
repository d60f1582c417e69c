//! System registers and instructions by their encoding.
//!
//! Purpose: a trapped MSR, MRS or SYS names its register by five numbers (Arm DDI 0487 C5.1, D23). [`SysReg`] packs them
//! into 16 bits, so that a policy is a `match` over constants that reads like the manual's index.
//!
//! Invariants: [`SysReg::new`] and the accessors are inverse; a `SysReg` from a syndrome is always in range.

use core::fmt;

/// A trapped access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Which register.
    pub reg: SysReg,
    /// General-purpose register, 0–31; 31 is the zero register.
    pub rt: u8,
    /// MRS: the system register is read.
    pub read: bool,
}

/// The encoding op0:op1:CRn:CRm:op2 in bits 15:14, 13:11, 10:7, 6:3 and 2:0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct SysReg(u16);

impl SysReg {
    /// The register with this encoding. Bits beyond a field's width fall away.
    #[inline]
    pub const fn new(op0: u8, op1: u8, crn: u8, crm: u8, op2: u8) -> Self {
        Self(
            (op0 as u16 & 0x3) << 14
                | (op1 as u16 & 0x7) << 11
                | (crn as u16 & 0xf) << 7
                | (crm as u16 & 0xf) << 3
                | (op2 as u16 & 0x7),
        )
    }

    /// op0: 1 for system instructions, 2 for debug and trace registers, 3 for the others.
    #[inline]
    pub const fn op0(self) -> u8 {
        (self.0 >> 14) as u8
    }

    /// op1.
    #[inline]
    pub const fn op1(self) -> u8 {
        (self.0 >> 11) as u8 & 0x7
    }

    /// CRn.
    #[inline]
    pub const fn crn(self) -> u8 {
        (self.0 >> 7) as u8 & 0xf
    }

    /// CRm.
    #[inline]
    pub const fn crm(self) -> u8 {
        (self.0 >> 3) as u8 & 0xf
    }

    /// op2.
    #[inline]
    pub const fn op2(self) -> u8 {
        self.0 as u8 & 0x7
    }
}

impl fmt::Display for SysReg {
    /// The assembler's generic name, such as `S3_0_C12_C11_5`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "S{}_{}_C{}_C{}_{}", self.op0(), self.op1(), self.crn(), self.crm(), self.op2())
    }
}

impl fmt::Debug for SysReg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! registers {
    ($($name:ident = $op0:literal, $op1:literal, $crn:literal, $crm:literal, $op2:literal;)*) => {
        /// Registers and instructions by name (Arm DDI 0487 D24; GIC: IHI 0069 12).
        #[allow(missing_docs, reason = "each constant is the manual's own name")]
        impl SysReg {
            $(pub const $name: Self = Self::new($op0, $op1, $crn, $crm, $op2);)*

            /// Every named register.
            pub const NAMED: &'static [(&'static str, Self)] = &[$((stringify!($name), Self::$name),)*];
        }
    };
}

registers! {
    // EL1 translation (HCR_EL2.TVM).
    SCTLR_EL1 = 3, 0, 1, 0, 0;
    TTBR0_EL1 = 3, 0, 2, 0, 0;
    TTBR1_EL1 = 3, 0, 2, 0, 1;
    TCR_EL1 = 3, 0, 2, 0, 2;
    AFSR0_EL1 = 3, 0, 5, 1, 0;
    AFSR1_EL1 = 3, 0, 5, 1, 1;
    ESR_EL1 = 3, 0, 5, 2, 0;
    FAR_EL1 = 3, 0, 6, 0, 0;
    MAIR_EL1 = 3, 0, 10, 2, 0;
    AMAIR_EL1 = 3, 0, 10, 3, 0;
    CONTEXTIDR_EL1 = 3, 0, 13, 0, 1;
    // Identification, group 3 (HCR_EL2.TID3).
    ID_PFR0_EL1 = 3, 0, 0, 1, 0;
    ID_PFR1_EL1 = 3, 0, 0, 1, 1;
    ID_DFR0_EL1 = 3, 0, 0, 1, 2;
    ID_AFR0_EL1 = 3, 0, 0, 1, 3;
    ID_MMFR0_EL1 = 3, 0, 0, 1, 4;
    ID_MMFR1_EL1 = 3, 0, 0, 1, 5;
    ID_MMFR2_EL1 = 3, 0, 0, 1, 6;
    ID_MMFR3_EL1 = 3, 0, 0, 1, 7;
    ID_ISAR0_EL1 = 3, 0, 0, 2, 0;
    ID_ISAR1_EL1 = 3, 0, 0, 2, 1;
    ID_ISAR2_EL1 = 3, 0, 0, 2, 2;
    ID_ISAR3_EL1 = 3, 0, 0, 2, 3;
    ID_ISAR4_EL1 = 3, 0, 0, 2, 4;
    ID_ISAR5_EL1 = 3, 0, 0, 2, 5;
    ID_MMFR4_EL1 = 3, 0, 0, 2, 6;
    ID_ISAR6_EL1 = 3, 0, 0, 2, 7;
    MVFR0_EL1 = 3, 0, 0, 3, 0;
    MVFR1_EL1 = 3, 0, 0, 3, 1;
    MVFR2_EL1 = 3, 0, 0, 3, 2;
    ID_PFR2_EL1 = 3, 0, 0, 3, 4;
    ID_DFR1_EL1 = 3, 0, 0, 3, 5;
    ID_MMFR5_EL1 = 3, 0, 0, 3, 6;
    ID_AA64PFR0_EL1 = 3, 0, 0, 4, 0;
    ID_AA64PFR1_EL1 = 3, 0, 0, 4, 1;
    ID_AA64PFR2_EL1 = 3, 0, 0, 4, 2;
    ID_AA64ZFR0_EL1 = 3, 0, 0, 4, 4;
    ID_AA64SMFR0_EL1 = 3, 0, 0, 4, 5;
    ID_AA64FPFR0_EL1 = 3, 0, 0, 4, 7;
    ID_AA64DFR0_EL1 = 3, 0, 0, 5, 0;
    ID_AA64DFR1_EL1 = 3, 0, 0, 5, 1;
    ID_AA64DFR2_EL1 = 3, 0, 0, 5, 2;
    ID_AA64AFR0_EL1 = 3, 0, 0, 5, 4;
    ID_AA64AFR1_EL1 = 3, 0, 0, 5, 5;
    ID_AA64ISAR0_EL1 = 3, 0, 0, 6, 0;
    ID_AA64ISAR1_EL1 = 3, 0, 0, 6, 1;
    ID_AA64ISAR2_EL1 = 3, 0, 0, 6, 2;
    ID_AA64ISAR3_EL1 = 3, 0, 0, 6, 3;
    ID_AA64MMFR0_EL1 = 3, 0, 0, 7, 0;
    ID_AA64MMFR1_EL1 = 3, 0, 0, 7, 1;
    ID_AA64MMFR2_EL1 = 3, 0, 0, 7, 2;
    ID_AA64MMFR3_EL1 = 3, 0, 0, 7, 3;
    ID_AA64MMFR4_EL1 = 3, 0, 0, 7, 4;
    // Identification, group 1 (HCR_EL2.TID1) and group 5 (TID5).
    REVIDR_EL1 = 3, 0, 0, 0, 6;
    AIDR_EL1 = 3, 1, 0, 0, 7;
    SMIDR_EL1 = 3, 1, 0, 0, 6;
    GMID_EL1 = 3, 1, 0, 0, 4;
    // Control.
    ACTLR_EL1 = 3, 0, 1, 0, 1;
    SCTLR2_EL1 = 3, 0, 1, 0, 3;
    CPACR_EL1 = 3, 0, 1, 0, 2;
    TCR2_EL1 = 3, 0, 2, 0, 3;
    TRFCR_EL1 = 3, 0, 1, 2, 1;
    RNDR = 3, 3, 2, 4, 0;
    RNDRRS = 3, 3, 2, 4, 1;
    SCXTNUM_EL1 = 3, 0, 13, 0, 7;
    SCXTNUM_EL0 = 3, 3, 13, 0, 7;
    // Limited ordering regions (HCR_EL2.TLOR).
    LORSA_EL1 = 3, 0, 10, 4, 0;
    LOREA_EL1 = 3, 0, 10, 4, 1;
    LORN_EL1 = 3, 0, 10, 4, 2;
    LORC_EL1 = 3, 0, 10, 4, 3;
    LORID_EL1 = 3, 0, 10, 4, 7;
    // Trace buffer and statistical profiling.
    TRBLIMITR_EL1 = 3, 0, 9, 11, 0;
    PMSCR_EL1 = 3, 0, 9, 9, 0;
    PMBLIMITR_EL1 = 3, 0, 9, 10, 0;
    // Performance monitors (MDCR_EL2.TPM, TPMCR).
    PMCR_EL0 = 3, 3, 9, 12, 0;
    PMCNTENSET_EL0 = 3, 3, 9, 12, 1;
    PMCCNTR_EL0 = 3, 3, 9, 13, 0;
    PMUSERENR_EL0 = 3, 3, 9, 14, 0;
    PMINTENSET_EL1 = 3, 0, 9, 14, 1;
    PMCCFILTR_EL0 = 3, 3, 14, 15, 7;
    // Generic timer, physical (CNTHCTL_EL2).
    CNTPCT_EL0 = 3, 3, 14, 0, 1;
    CNTPCTSS_EL0 = 3, 3, 14, 0, 5;
    CNTP_TVAL_EL0 = 3, 3, 14, 2, 0;
    CNTP_CTL_EL0 = 3, 3, 14, 2, 1;
    CNTP_CVAL_EL0 = 3, 3, 14, 2, 2;
    // GIC CPU interface: SGI generation, and what ICH_HCR_EL2 can trap.
    ICC_SGI1R_EL1 = 3, 0, 12, 11, 5;
    ICC_ASGI1R_EL1 = 3, 0, 12, 11, 6;
    ICC_SGI0R_EL1 = 3, 0, 12, 11, 7;
    ICC_SRE_EL1 = 3, 0, 12, 12, 5;
    ICC_CTLR_EL1 = 3, 0, 12, 12, 4;
    ICC_IGRPEN0_EL1 = 3, 0, 12, 12, 6;
    ICC_IGRPEN1_EL1 = 3, 0, 12, 12, 7;
    ICC_PMR_EL1 = 3, 0, 4, 6, 0;
    ICC_DIR_EL1 = 3, 0, 12, 11, 1;
    // Debug (MDCR_EL2.TDA, TDRA, TDOSA, TDCC).
    OSDTRRX_EL1 = 2, 0, 0, 0, 2;
    MDCCINT_EL1 = 2, 0, 0, 2, 0;
    MDSCR_EL1 = 2, 0, 0, 2, 2;
    OSDTRTX_EL1 = 2, 0, 0, 3, 2;
    OSECCR_EL1 = 2, 0, 0, 6, 2;
    MDRAR_EL1 = 2, 0, 1, 0, 0;
    OSLAR_EL1 = 2, 0, 1, 0, 4;
    OSLSR_EL1 = 2, 0, 1, 1, 4;
    OSDLR_EL1 = 2, 0, 1, 3, 4;
    DBGPRCR_EL1 = 2, 0, 1, 4, 4;
    DBGCLAIMSET_EL1 = 2, 0, 7, 8, 6;
    DBGCLAIMCLR_EL1 = 2, 0, 7, 9, 6;
    DBGAUTHSTATUS_EL1 = 2, 0, 7, 14, 6;
    MDCCSR_EL0 = 2, 3, 0, 1, 0;
    DBGDTR_EL0 = 2, 3, 0, 4, 0;
    DBGDTRRX_EL0 = 2, 3, 0, 5, 0;
    // Cache maintenance (HCR_EL2.TSW, TPCP, TPU).
    IC_IALLUIS = 1, 0, 7, 1, 0;
    IC_IALLU = 1, 0, 7, 5, 0;
    IC_IVAU = 1, 3, 7, 5, 1;
    DC_IVAC = 1, 0, 7, 6, 1;
    DC_ISW = 1, 0, 7, 6, 2;
    DC_CSW = 1, 0, 7, 10, 2;
    DC_CISW = 1, 0, 7, 14, 2;
    DC_ZVA = 1, 3, 7, 4, 1;
    DC_CVAC = 1, 3, 7, 10, 1;
    DC_CVAU = 1, 3, 7, 11, 1;
    DC_CVAP = 1, 3, 7, 12, 1;
    DC_CVADP = 1, 3, 7, 13, 1;
    DC_CIVAC = 1, 3, 7, 14, 1;
}

#[cfg(test)]
mod tests {
    extern crate alloc;
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn every_encoding_round_trips() {
        for raw in 0..=u16::MAX {
            let reg = SysReg(raw);
            assert_eq!(SysReg::new(reg.op0(), reg.op1(), reg.crn(), reg.crm(), reg.op2()), reg);
        }
    }

    #[test]
    fn no_two_names_share_an_encoding() {
        for (i, (name, reg)) in SysReg::NAMED.iter().enumerate() {
            for (other, same) in &SysReg::NAMED[i + 1..] {
                assert_ne!(reg, same, "{name} {other}");
            }
        }
    }

    #[test]
    fn the_name_is_the_assemblers() {
        assert_eq!(SysReg::ICC_SGI1R_EL1.to_string(), "S3_0_C12_C11_5");
    }
}
