//! The virtual timer of a vCPU (Arm DDI 0487 D12.2): CNTV, and the offset of its count.
//!
//! The physical timer of a guest traps (`CNTHCTL_EL2.EL1PCEN` is 0) and is the hypervisor's to emulate.

/// CNTV_CTL_EL0.ENABLE.
pub const ENABLE: u64 = 1 << 0;
/// CNTV_CTL_EL0.IMASK.
pub const MASKED: u64 = 1 << 1;
/// CNTV_CTL_EL0.ISTATUS, read-only.
pub const CONDITION_MET: u64 = 1 << 2;

/// A vCPU's virtual timer while it is not on a CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimerState {
    /// CNTV_CTL_EL0.
    pub control: u64,
    /// CNTV_CVAL_EL0, in virtual counts.
    pub compare: u64,
    /// CNTVOFF_EL2: what is subtracted from the physical count. Equal for all vCPUs of a VM.
    pub offset: u64,
}

impl TimerState {
    /// Takes the timer off this CPU, and stops it there. [`deadline`](Self::deadline) says when it would fire.
    pub fn save(&mut self) {
        self.control = mrs!("cntv_ctl_el0");
        self.compare = mrs!("cntv_cval_el0");
        // SAFETY: the virtual timer is the guest's, and no guest runs.
        unsafe {
            msr!("cntv_ctl_el0", 0u64);
            instruction!("isb");
        }
    }

    /// Puts the timer onto this CPU.
    pub fn load(&self) {
        // SAFETY: as above. The offset first, so that the condition is never computed from another's.
        unsafe {
            msr!("cntvoff_el2", self.offset);
            msr!("cntv_cval_el0", self.compare);
            instruction!("isb");
            msr!("cntv_ctl_el0", self.control & (ENABLE | MASKED));
        }
    }

    /// The physical count at which the saved timer's interrupt becomes due; `None`: never. A sum past 64 bits is as the
    /// hardware compares it: modulo.
    pub fn deadline(&self) -> Option<u64> {
        (self.control & (ENABLE | MASKED) == ENABLE).then(|| self.compare.wrapping_add(self.offset))
    }
}

/// Whether the loaded vCPU's timer asserts its interrupt now.
#[inline]
pub fn is_asserted() -> bool {
    mrs!("cntv_ctl_el0") & (ENABLE | MASKED | CONDITION_MET) == ENABLE | CONDITION_MET
}
