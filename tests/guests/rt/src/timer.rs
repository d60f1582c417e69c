//! The generic timer (Arm DDI 0487 D12): EL1's virtual and physical timers.

use core::arch::asm;

use crate::{sysreg_read, sysreg_write};

/// The virtual timer's interrupt on `virt`: PPI 11.
pub const VIRTUAL: u32 = 27;
/// EL1's physical timer's: PPI 14.
pub const PHYSICAL: u32 = 30;

/// CNTx_CTL: ENABLE, IMASK.
const ENABLE: u64 = 1;
const OFF: u64 = 2;

/// Ticks of the virtual counter since an unknown time.
pub fn now() -> u64 {
    // SAFETY: a barrier, so that the read that follows is not early.
    unsafe { asm!("isb", options(nostack)) };
    sysreg_read!("cntvct_el0")
}

/// Ticks of the physical counter.
pub fn physical_now() -> u64 {
    // SAFETY: as above.
    unsafe { asm!("isb", options(nostack)) };
    sysreg_read!("cntpct_el0")
}

/// Ticks in a second.
pub fn frequency() -> u64 {
    sysreg_read!("cntfrq_el0")
}

/// Lets the virtual timer fire in `ticks`.
pub fn arm_virtual(ticks: u64) {
    sysreg_write!("cntv_tval_el0", ticks);
    sysreg_write!("cntv_ctl_el0", ENABLE);
}

/// Lets the virtual timer fire when the virtual counter has come to `count`.
pub fn arm_virtual_at(count: u64) {
    sysreg_write!("cntv_cval_el0", count);
    sysreg_write!("cntv_ctl_el0", ENABLE);
}

/// Lets EL1's physical timer fire in `ticks`.
pub fn arm_physical(ticks: u64) {
    sysreg_write!("cntp_tval_el0", ticks);
    sysreg_write!("cntp_ctl_el0", ENABLE);
}

/// Stops the virtual timer.
pub fn stop_virtual() {
    sysreg_write!("cntv_ctl_el0", OFF);
}

/// Stops EL1's physical timer.
pub fn stop_physical() {
    sysreg_write!("cntp_ctl_el0", OFF);
}

/// Sleeps until an interrupt is pending, masked or not.
pub fn wait_for_interrupt() {
    // SAFETY: waits; the caller arranged for something to come.
    unsafe { asm!("dsb sy", "wfi", options(nostack)) };
}
