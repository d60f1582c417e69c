//! Entering a guest and coming back.
//!
//! Purpose: [`enter`] is the whole of what happens at every exit: general registers, return address, state. What
//! changes only when another vCPU comes to this CPU is saved and loaded apart: [`el1`], [`fp`], [`gic`], [`tags`], [`timer`].
//!
//! Protocol: with a vCPU's slower state loaded and `traps` set for it, [`enter`] runs it until it traps or an interrupt
//! for EL2 is pending. Interrupts are not acknowledged here: EL2 keeps them masked, and `crate::gic::ack` takes them.
//!
//! Cost: 27 instructions in, 4 in the vector, 28 out. SP_EL0 and the EL1 registers stay in hardware.
//!
//! Sources: Arm DDI 0487 D1.3; AAPCS64 for the registers that a callee keeps (x19–x30; d8–d15 are not ours to keep,
//! since the hypervisor has no floating point).

pub mod el1;
pub mod fp;
pub mod gic;
pub mod tags;
pub mod timer;

use core::arch::global_asm;
use core::mem::offset_of;

pub use el1::El1State;
pub use fp::FpState;
pub use gic::GicState;
pub use tags::TagState;
pub use timer::TimerState;

/// A guest's general registers, as it left them.
#[repr(C, align(16))]
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registers {
    /// X0–X30.
    pub x: [u64; 31],
    /// Where it goes on.
    pub pc: u64,
    /// PSTATE, in the layout of SPSR_EL2. [`enter`] forces the fields that would lead outside the guest.
    pub pstate: u64,
}

impl Registers {
    /// All zero.
    pub const ZERO: Self = Self { x: [0; 31], pc: 0, pstate: 0 };
}

/// Why [`enter`] returned: the number that the vector gives, so that nobody translates it on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitKind(u32);

impl ExitKind {
    /// The guest trapped: `crate::exit` has the syndrome.
    pub const SYNCHRONOUS: Self = Self(EXIT_SYNCHRONOUS);
    /// A physical interrupt is pending.
    pub const INTERRUPT: Self = Self(EXIT_INTERRUPT);
    /// A physical SError was taken.
    pub const SERROR: Self = Self(EXIT_SERROR);
}

pub(crate) const EXIT_SYNCHRONOUS: u32 = 0;
pub(crate) const EXIT_INTERRUPT: u32 = 1;
pub(crate) const EXIT_SERROR: u32 = 2;

/// Bytes of `enter`'s stack frame: x19–x30, and the pointer to the guest's registers.
const FRAME: usize = 112;
/// Where in it the pointer is.
pub(crate) const FRAME_REGISTERS: usize = 96;

const _: () = assert!(offset_of!(Registers, pc) == 248 && offset_of!(Registers, pstate) == 256);

global_asm!(
    r#"
    .text
    .balign 64
    .global entresol_enter
entresol_enter:                         // x0 = registers
    stp     x29, x30, [sp, #-{frame}]!
    ldp     x1, x2, [x0, #248]
    stp     x27, x28, [sp, #16]
    stp     x25, x26, [sp, #32]
    stp     x23, x24, [sp, #48]
    stp     x21, x22, [sp, #64]
    stp     x19, x20, [sp, #80]
    str     x0, [sp, #{registers}]
    msr     elr_el2, x1
    msr     spsr_el2, x2
    ldp     x2, x3, [x0, #16]
    ldp     x4, x5, [x0, #32]
    ldp     x6, x7, [x0, #48]
    ldp     x8, x9, [x0, #64]
    ldp     x10, x11, [x0, #80]
    ldp     x12, x13, [x0, #96]
    ldp     x14, x15, [x0, #112]
    ldp     x16, x17, [x0, #128]
    ldp     x18, x19, [x0, #144]
    ldp     x20, x21, [x0, #160]
    ldp     x22, x23, [x0, #176]
    ldp     x24, x25, [x0, #192]
    ldp     x26, x27, [x0, #208]
    ldp     x28, x29, [x0, #224]
    ldr     x30, [x0, #240]
    ldp     x0, x1, [x0]
    eret
    dsb     nsh                         // no speculation past the return
    isb

    .balign 64
    .global entresol_exit
entresol_exit:                          // x0 = registers, w1 = kind, the guest's x0 and x1 on the stack
    stp     x2, x3, [x0, #16]
    stp     x4, x5, [x0, #32]
    ldp     x2, x3, [sp], #16
    mrs     x4, elr_el2
    mrs     x5, spsr_el2
    stp     x2, x3, [x0]
    stp     x6, x7, [x0, #48]
    stp     x8, x9, [x0, #64]
    stp     x10, x11, [x0, #80]
    stp     x12, x13, [x0, #96]
    stp     x14, x15, [x0, #112]
    stp     x16, x17, [x0, #128]
    stp     x18, x19, [x0, #144]
    stp     x20, x21, [x0, #160]
    stp     x22, x23, [x0, #176]
    stp     x24, x25, [x0, #192]
    stp     x26, x27, [x0, #208]
    stp     x28, x29, [x0, #224]
    str     x30, [x0, #240]
    stp     x4, x5, [x0, #248]
    mov     w0, w1
    ldp     x19, x20, [sp, #80]
    ldp     x21, x22, [sp, #64]
    ldp     x23, x24, [sp, #48]
    ldp     x25, x26, [sp, #32]
    ldp     x27, x28, [sp, #16]
    ldp     x29, x30, [sp], #{frame}
    ret
    "#,
    frame = const FRAME,
    registers = const FRAME_REGISTERS,
);

unsafe extern "C" {
    fn entresol_enter(registers: *mut Registers) -> u32;
}

/// PSTATE.M\[4:0\] of EL1 with its own stack pointer.
pub const EL1H: u64 = 0b0_0101;
/// PSTATE.M of EL1 with SP_EL0.
pub const EL1T: u64 = 0b0_0100;
/// PSTATE.M of EL0.
pub const EL0T: u64 = 0b0_0000;
/// PSTATE.M of AArch32 User.
pub const USER32: u64 = 0b1_0000;

/// Whether `pstate` names a state that a guest may be in: EL1 or EL0 in AArch64, or EL0 in AArch32.
#[inline]
pub const fn is_guest_state(pstate: u64) -> bool {
    // One shift: it is asked before each entry.
    const MODES: u32 = 1 << EL1H | 1 << EL1T | 1 << EL0T | 1 << USER32;
    MODES >> (pstate & 0x1f) & 1 != 0
}

/// Runs the guest whose state is loaded until it comes back.
///
/// # Panics
///
/// If `registers.pstate` is not a guest's ([`is_guest_state`]): that would return to EL2 with the guest's registers.
///
/// # Safety
///
/// HCR_EL2, the second stage and the slower state are this guest's, so that it reaches nothing but what it owns.
#[inline]
pub unsafe fn enter(registers: &mut Registers) -> ExitKind {
    assert!(is_guest_state(registers.pstate), "PSTATE {:#x} is no guest's", registers.pstate);
    // SAFETY: the assembly keeps the C calling convention, and writes `registers` only; the caller answers for the guest.
    ExitKind(unsafe { entresol_enter(registers) })
}
