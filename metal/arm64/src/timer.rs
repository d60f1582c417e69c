//! Time: the system counter, and EL2's own timer, which interrupts as [`crate::gic::HYPERVISOR_TIMER`].
//!
//! Sources: Arm DDI 0487 D12, D24.9.

/// The system counter's count. Not read ahead of earlier instructions.
#[inline]
pub fn now() -> u64 {
    // SAFETY: a barrier.
    unsafe { instruction!("isb") };
    mrs!("cntpct_el0")
}

/// Counts in a second.
#[inline]
pub fn frequency() -> u64 {
    mrs!("cntfrq_el0")
}

/// This CPU's timer interrupts when the counter reaches `count`, or at once if it has. Level-triggered: it stays
/// asserted until [`clear`] or a later deadline.
#[inline]
pub fn set_deadline(count: u64) {
    // SAFETY: CNTHP is EL2's alone. ENABLE 0 set, IMASK 1 clear.
    unsafe {
        msr!("cnthp_cval_el2", count);
        msr!("cnthp_ctl_el2", 1u64);
        instruction!("isb");
    }
}

/// No deadline.
#[inline]
pub fn clear() {
    // SAFETY: as above; ENABLE clear.
    unsafe {
        msr!("cnthp_ctl_el2", 0u64);
        instruction!("isb");
    }
}
