//! The floating-point and SIMD registers, which are always some guest's.
//!
//! Purpose: the hypervisor is compiled without them, so they need saving only when another vCPU wants them. The owner
//! of this file's state decides whether that is at every change of vCPU or at the first trapped use
//! (`traps::trap_fp`). SVE and SME trap always.
//!
//! A load or store that the hypervisor carries out for the guest reaches one register with [`read_live`] and
//! [`write_live`].
//!
//! Invariants: called with the FP trap off (`CPTR_EL2.TFP` is also EL2's own).

use core::arch::global_asm;

/// V0–V31, FPCR, FPSR of one vCPU.
#[repr(C, align(16))]
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FpState {
    /// V0–V31, 128 bits each.
    pub v: [[u64; 2]; 32],
    /// FPCR.
    pub control: u64,
    /// FPSR.
    pub status: u64,
}

impl FpState {
    /// All zero, as after a reset of our virtual CPUs.
    pub const ZERO: Self = Self { v: [[0; 2]; 32], control: 0, status: 0 };
}

global_asm!(
    r#"
    .text
    .arch_extension fp
    .macro EACH_PAIR op
    \op     q0, q1, [x0, #0]
    \op     q2, q3, [x0, #32]
    \op     q4, q5, [x0, #64]
    \op     q6, q7, [x0, #96]
    \op     q8, q9, [x0, #128]
    \op     q10, q11, [x0, #160]
    \op     q12, q13, [x0, #192]
    \op     q14, q15, [x0, #224]
    \op     q16, q17, [x0, #256]
    \op     q18, q19, [x0, #288]
    \op     q20, q21, [x0, #320]
    \op     q22, q23, [x0, #352]
    \op     q24, q25, [x0, #384]
    \op     q26, q27, [x0, #416]
    \op     q28, q29, [x0, #448]
    \op     q30, q31, [x0, #480]
    .endm

    .global entresol_fp_save
entresol_fp_save:
    EACH_PAIR stp
    mrs     x1, fpcr
    mrs     x2, fpsr
    str     x1, [x0, #512]
    str     x2, [x0, #520]
    ret

    .global entresol_fp_load
entresol_fp_load:
    EACH_PAIR ldp
    ldr     x1, [x0, #512]
    ldr     x2, [x0, #520]
    msr     fpcr, x1
    msr     fpsr, x2
    ret
    .purgem EACH_PAIR

    .global entresol_fp_read                // w0 = register, x1 = where to
entresol_fp_read:
    adr     x2, 1f
    add     x2, x2, x0, lsl #3              // two instructions each
    br      x2
1:  .irp    number, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    str     q\number, [x1]
    ret
    .endr

    .global entresol_fp_write               // w0 = register, x1 = where from
entresol_fp_write:
    adr     x2, 1f
    add     x2, x2, x0, lsl #3
    br      x2
1:  .irp    number, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    ldr     q\number, [x1]
    ret
    .endr
    .arch_extension nofp
    "#
);

const _: () = assert!(core::mem::offset_of!(FpState, control) == 512 && core::mem::offset_of!(FpState, status) == 520);

unsafe extern "C" {
    fn entresol_fp_save(state: *mut FpState);
    fn entresol_fp_load(state: *const FpState);
    fn entresol_fp_read(register: u64, to: *mut [u64; 2]);
    fn entresol_fp_write(register: u64, from: *const [u64; 2]);
}

/// V`register` (modulo 32) of the loaded vCPU. The FP trap is off.
pub fn read_live(register: u8) -> [u64; 2] {
    let mut value = [0; 2];
    // SAFETY: writes `value` only; the number is in the table that the assembly branches into.
    unsafe { entresol_fp_read(u64::from(register & 31), &mut value) };
    value
}

/// Sets V`register` (modulo 32) of the loaded vCPU. The FP trap is off.
pub fn write_live(register: u8, value: [u64; 2]) {
    // SAFETY: reads `value` only; the register is the guest's, and no code of ours has anything in it.
    unsafe { entresol_fp_write(u64::from(register & 31), &value) };
}

impl FpState {
    /// Saves what this CPU's registers hold. The FP trap is off.
    pub fn save(&mut self) {
        // SAFETY: writes `self` only, whose layout the assembly knows.
        unsafe { entresol_fp_save(self) };
    }

    /// Loads this CPU's registers. The FP trap is off.
    pub fn load(&self) {
        // SAFETY: reads `self` only; no code of ours has anything in these registers.
        unsafe { entresol_fp_load(self) };
    }
}
