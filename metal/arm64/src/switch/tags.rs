//! The registers of memory tagging, for guests that have it.
//!
//! Purpose: where HCR_EL2.ATA is set, EL1 and EL0 write these without a trap; where it is clear, they trap (D24.2.49), so
//! nothing of another guest's is seen in them.
//!
//! Sources: Arm DDI 0487 D24.2 (GCR_EL1, RGSR_EL1, TFSR_EL1, TFSRE0_EL1).

/// A vCPU's registers of memory tagging while it is not on a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct TagState {
    /// RGSR_EL1: the seed of random tags.
    pub rgsr: u64,
    /// GCR_EL1: which tags are not chosen.
    pub gcr: u64,
    /// TFSR_EL1: asynchronous tag check faults.
    pub tfsr: u64,
    /// TFSRE0_EL1: those of EL0.
    pub tfsre0: u64,
}

impl TagState {
    /// After a reset; the architecture leaves it open.
    pub const RESET: Self = Self { rgsr: 0, gcr: 0, tfsr: 0, tfsre0: 0 };

    /// Takes the registers off this CPU, which has FEAT_MTE2.
    pub fn save(&mut self) {
        self.rgsr = mrs!("s3_0_c1_c0_5");
        self.gcr = mrs!("s3_0_c1_c0_6");
        self.tfsr = mrs!("s3_0_c5_c6_0");
        self.tfsre0 = mrs!("s3_0_c5_c6_1");
    }

    /// Puts the registers onto this CPU.
    ///
    /// # Safety
    ///
    /// The CPU has FEAT_MTE2, no guest runs on it, and the one that is entered next is the owner of this state.
    pub unsafe fn load(&self) {
        // SAFETY: EL2 chooses no tags and checks none, so none of these changes what it does.
        unsafe {
            msr!("s3_0_c1_c0_5", self.rgsr);
            msr!("s3_0_c1_c0_6", self.gcr);
            msr!("s3_0_c5_c6_0", self.tfsr);
            msr!("s3_0_c5_c6_1", self.tfsre0);
            instruction!("isb");
        }
    }
}
