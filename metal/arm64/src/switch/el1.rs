//! The system registers of EL1 and EL0, which stay in hardware while their vCPU is on a CPU.
//!
//! Purpose: everything that a guest can write without a trap, and nothing else (`crate::traps` has the other half).
//! Registers that only AArch32 at EL1 has are not reachable for a guest whose EL1 is AArch64.
//!
//! Sources: Arm DDI 0487 D24.2; DDI 0487 D24.5 for CNTKCTL; values at reset from the registers' own descriptions.

use crate::features::{self, Feature};

macro_rules! state {
    ($($(#[$doc:meta])* $field:ident = $register:literal;)*) => {
        /// A vCPU's registers of EL1 and EL0 while it is not on a CPU.
        #[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct El1State {
            $($(#[$doc])* pub $field: u64,)*
            /// APIA, APIB, APDA, APDB, APGA: low and high halves.
            pub pauth_keys: [u64; 10],
            /// VDISR_EL2: a virtual SError that an ESB deferred.
            pub vdisr: u64,
            /// VSESR_EL2: syndrome of a virtual SError to come.
            pub vsesr: u64,
        }

        impl El1State {
            /// All zero.
            pub const ZERO: Self = Self { $($field: 0,)* pauth_keys: [0; 10], vdisr: 0, vsesr: 0 };

            fn save_common(&mut self) {
                $(self.$field = mrs!($register);)*
            }

            /// # Safety
            ///
            /// No guest runs on this CPU, and EL2 uses none of these.
            unsafe fn load_common(&self) {
                // SAFETY: as the caller promises; the registers exist on every CPU with EL2.
                unsafe { $(msr!($register, self.$field);)* }
            }
        }
    };
}

state! {
    /// SCTLR_EL1.
    sctlr = "sctlr_el1";
    /// CPACR_EL1.
    cpacr = "cpacr_el1";
    /// TTBR0_EL1.
    ttbr0 = "ttbr0_el1";
    /// TTBR1_EL1.
    ttbr1 = "ttbr1_el1";
    /// TCR_EL1.
    tcr = "tcr_el1";
    /// ESR_EL1.
    esr = "esr_el1";
    /// AFSR0_EL1.
    afsr0 = "afsr0_el1";
    /// AFSR1_EL1.
    afsr1 = "afsr1_el1";
    /// FAR_EL1.
    far = "far_el1";
    /// MAIR_EL1.
    mair = "mair_el1";
    /// AMAIR_EL1.
    amair = "amair_el1";
    /// VBAR_EL1.
    vbar = "vbar_el1";
    /// CONTEXTIDR_EL1.
    contextidr = "contextidr_el1";
    /// TPIDR_EL0.
    tpidr_el0 = "tpidr_el0";
    /// TPIDRRO_EL0.
    tpidrro_el0 = "tpidrro_el0";
    /// TPIDR_EL1.
    tpidr_el1 = "tpidr_el1";
    /// PAR_EL1.
    par = "par_el1";
    /// SP_EL0.
    sp_el0 = "sp_el0";
    /// SP_EL1.
    sp_el1 = "sp_el1";
    /// ELR_EL1.
    elr = "elr_el1";
    /// SPSR_EL1.
    spsr = "spsr_el1";
    /// CNTKCTL_EL1.
    cntkctl = "cntkctl_el1";
    /// CSSELR_EL1.
    csselr = "csselr_el1";
    /// MDSCR_EL1: writes trap, and the hypervisor stores here what it allows.
    mdscr = "mdscr_el1";
    /// VMPIDR_EL2: what the guest reads as MPIDR_EL1.
    vmpidr = "vmpidr_el2";
}

/// MDSCR_EL1 of the loaded vCPU.
pub fn mdscr() -> u64 {
    mrs!("mdscr_el1")
}

/// Sets MDSCR_EL1 of the loaded vCPU, whose own writes trap. The caller lets through only what a guest may have.
pub fn set_mdscr(value: u64) {
    // SAFETY: debug exceptions go to EL1 (MDCR_EL2.TDE is 0), and EL2 keeps PSTATE.D set.
    unsafe { msr!("mdscr_el1", value) };
}

/// Sets the syndrome that the loaded vCPU's next virtual SError (`Hcr::VSE`) reports, where the machine can.
pub fn set_vsesr(syndrome: u64) {
    if features::has(Feature::RAS) {
        // SAFETY: VSESR_EL2 exists with RAS, and is seen by the guest only.
        unsafe { msr!("s3_4_c5_c2_3", syndrome) };
    }
}

/// SCTLR_EL1 after a warm reset: MMU, caches and alignment checks off; RES1 bits 29, 28, 23, 22, 20, 11, 8, 7.
pub const SCTLR_RESET: u64 = 0x30d0_0980;

/// VMPIDR_EL2's RES1 bit.
const MPIDR_RES1: u64 = 1 << 31;

impl El1State {
    /// A virtual CPU after reset, with the affinity fields of `mpidr`.
    pub const fn reset(mpidr: u64) -> Self {
        Self { sctlr: SCTLR_RESET, vmpidr: mpidr | MPIDR_RES1, ..Self::ZERO }
    }

    /// Takes the registers off this CPU.
    pub fn save(&mut self) {
        self.save_common();
        if features::has(Feature::PAUTH) {
            self.pauth_keys = read_keys();
        }
        if features::has(Feature::RAS) {
            self.vdisr = mrs!("s3_4_c12_c1_1");
        }
    }

    /// Puts the registers onto this CPU.
    ///
    /// # Safety
    ///
    /// No guest runs on this CPU, and the one that is entered next is the owner of this state.
    pub unsafe fn load(&self) {
        // SAFETY: EL2 runs with its own registers; none of these is used at EL2 with E2H clear.
        unsafe {
            self.load_common();
            if features::has(Feature::PAUTH) {
                write_keys(&self.pauth_keys);
            }
            if features::has(Feature::RAS) {
                msr!("s3_4_c12_c1_1", self.vdisr);
                msr!("s3_4_c5_c2_3", self.vsesr);
            }
            instruction!("isb");
        }
    }
}

fn read_keys() -> [u64; 10] {
    [
        mrs!("s3_0_c2_c1_0"),
        mrs!("s3_0_c2_c1_1"),
        mrs!("s3_0_c2_c1_2"),
        mrs!("s3_0_c2_c1_3"),
        mrs!("s3_0_c2_c2_0"),
        mrs!("s3_0_c2_c2_1"),
        mrs!("s3_0_c2_c2_2"),
        mrs!("s3_0_c2_c2_3"),
        mrs!("s3_0_c2_c3_0"),
        mrs!("s3_0_c2_c3_1"),
    ]
}

/// # Safety
///
/// The CPU has the keys, and EL2 signs nothing with them.
unsafe fn write_keys(keys: &[u64; 10]) {
    // SAFETY: as the caller promises.
    unsafe {
        msr!("s3_0_c2_c1_0", keys[0]);
        msr!("s3_0_c2_c1_1", keys[1]);
        msr!("s3_0_c2_c1_2", keys[2]);
        msr!("s3_0_c2_c1_3", keys[3]);
        msr!("s3_0_c2_c2_0", keys[4]);
        msr!("s3_0_c2_c2_1", keys[5]);
        msr!("s3_0_c2_c2_2", keys[6]);
        msr!("s3_0_c2_c2_3", keys[7]);
        msr!("s3_0_c2_c3_0", keys[8]);
        msr!("s3_0_c2_c3_1", keys[9]);
    }
}
