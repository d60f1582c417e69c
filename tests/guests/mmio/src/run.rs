//! One instruction with known registers, and what it left in them: also when it took an exception.
//!
//! The instruction's own vectors do not return: they say that they were taken and join the way out, so that the registers are
//! seen as the exception found them. The stack pointer may be what is tried, so nothing is pushed.

use core::arch::global_asm;
use core::mem::offset_of;

/// X0–X3, V0–V3, the base X9, the index X10, and the stack pointer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(16))]
pub struct Registers {
    /// X0–X3.
    pub x: [u64; 4],
    /// X9.
    pub base: u64,
    /// X10.
    pub index: u64,
    /// SP; 0 keeps the one that is.
    pub sp: u64,
    /// The vector that was taken, plus one; 0 if none.
    pub taken: u64,
    /// ESR_EL1 afterwards.
    pub esr: u64,
    /// FAR_EL1 afterwards.
    pub far: u64,
    /// V0–V3.
    pub v: [[u64; 2]; 4],
}

/// Code that ends with a return.
pub type Code = unsafe extern "C" fn();

/// A function of one instruction, and what the assembler must be told before it.
#[macro_export]
macro_rules! code {
    ($($instruction:literal),+) => {{
        #[unsafe(naked)]
        unsafe extern "C" fn code() {
            core::arch::naked_asm!(
                ".arch_extension fp",
                ".arch_extension simd",
                ".arch_extension lse",
                $($instruction,)+
                "ret"
            )
        }
        code as $crate::run::Code
    }};
}

unsafe extern "C" {
    fn mmio_run(registers: *mut Registers, code: Code, control: u64);
}

/// SCTLR_EL1.EE: data is big-endian.
const BIG_ENDIAN: u64 = 1 << 25;

/// Lets the guest use SIMD registers (CPACR_EL1.FPEN).
pub fn enable_simd() {
    guest_rt::sysreg_write!("cpacr_el1", 3 << 20);
}

/// Runs `code` with `registers`, data in this byte order; the registers afterwards.
pub fn run(code: Code, registers: &Registers, big_endian: bool) -> Registers {
    let mut after = *registers;
    let control = guest_rt::sysreg_read!("sctlr_el1") | if big_endian { BIG_ENDIAN } else { 0 };
    // SAFETY: the assembly changes caller-saved registers, of SIMD V0–V3, which no Rust code uses, and `after`; `code` is one
    // instruction whose address the caller chose among devices and memory that Rust does not know.
    unsafe { mmio_run(&mut after, code, control) };
    if registers.sp == 0 {
        after.sp = 0;
    }
    if after.taken == 0 {
        (after.esr, after.far) = (0, 0);
    }
    after
}

const _: () = assert!(offset_of!(Registers, v) == 80 && offset_of!(Registers, far) == 72);

global_asm!(
    r#"
    .text
    .arch_extension fp
    .globl mmio_run
mmio_run:                               // x0 = registers, x1 = code, x2 = SCTLR_EL1 for it
    mov     x15, x0
    mov     x11, x1
    mov     x14, x2
    mov     x16, x30
    mov     x13, sp
    mrs     x12, sctlr_el1
    mrs     x17, vbar_el1
    adr     x3, mmio_vectors
    msr     vbar_el1, x3
    ldp     q0, q1, [x15, #80]
    ldp     q2, q3, [x15, #112]
    ldp     x9, x10, [x15, #32]
    ldr     x3, [x15, #48]
    cbz     x3, 1f
    mov     sp, x3
1:  ldp     x0, x1, [x15]
    ldp     x2, x3, [x15, #16]
    msr     sctlr_el1, x14
    isb
    adr     x30, 2f
    br      x11
2:  mov     x14, #0
mmio_done:
    msr     sctlr_el1, x12
    isb
    stp     x0, x1, [x15]
    stp     x2, x3, [x15, #16]
    mov     x4, sp
    mov     sp, x13
    stp     x9, x10, [x15, #32]
    stp     x4, x14, [x15, #48]
    mrs     x5, esr_el1
    mrs     x6, far_el1
    stp     x5, x6, [x15, #64]
    stp     q0, q1, [x15, #80]
    stp     q2, q3, [x15, #112]
    msr     vbar_el1, x17
    isb
    mov     x30, x16
    ret

    .balign 2048
mmio_vectors:
    .irp    number, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16
    .balign 128
    mov     x14, #\number
    b       mmio_done
    .endr
    .arch_extension nofp
    "#
);
