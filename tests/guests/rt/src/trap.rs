//! Exceptions: interrupts go to one handler, a fault inside [`attempt`] becomes a value, any other ends the guest.
//!
//! `attempt` keeps the callee-saved registers in its CPU's [`Context`]; a synchronous exception or SError taken while it
//! is armed returns there instead of where it came from, so the code tried may branch anywhere. It does not nest.
//!
//! Known hole: code that destroys SP_EL1, VBAR_EL1 or the translation of the vectors stops its own CPU.

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::fmt;
use core::mem::offset_of;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::entry::{MAX_CPUS, cpu};
use crate::{console, smccc};

/// What stopped an attempt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Fault {
    /// ESR_EL1: the syndrome; meaningless for an SError's `serror`.
    pub esr: u64,
    /// FAR_EL1: the address, where the syndrome says that it is valid.
    pub far: u64,
    /// ELR_EL1: the instruction.
    pub elr: u64,
    /// 1 if it was an SError, not a synchronous exception.
    pub serror: u64,
}

impl Fault {
    /// The exception class, ESR_EL1.EC.
    pub fn class(&self) -> u64 {
        self.esr >> 26 & 0x3f
    }

    /// The fault status code of an abort: ESR_EL1.{DFSC, IFSC}.
    pub fn status(&self) -> u64 {
        self.esr & 0x3f
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.serror == 0 { "synchronous" } else { "SError" };
        write!(f, "{kind} esr {:#x} far {:#x} elr {:#x}", self.esr, self.far, self.elr)
    }
}

/// Exception classes (Arm DDI 0487, ESR_EL1.EC).
pub mod class {
    /// An unknown reason: the instruction is undefined.
    pub const UNKNOWN: u64 = 0x00;
    /// Instruction abort from the same level.
    pub const INSTRUCTION_ABORT: u64 = 0x21;
    /// Data abort from the same level.
    pub const DATA_ABORT: u64 = 0x25;
}

/// Fault status codes (Arm DDI 0487, ESR_EL1 ISS of aborts).
pub mod status {
    /// Synchronous external abort, not on a table walk.
    pub const EXTERNAL: u64 = 0x10;
    /// Translation fault of level 3; levels count down.
    pub const TRANSLATION_3: u64 = 0x07;
    /// Permission fault of level 3; levels count down.
    pub const PERMISSION_3: u64 = 0x0f;
}

/// The registers of code that was interrupted, as the vectors push them.
#[repr(C)]
struct Frame {
    x: [u64; 31],
    elr: u64,
    spsr: u64,
    _pad: u64,
}

#[repr(C)]
struct Context {
    armed: u64,
    result: u64,
    sp: u64,
    saved: [u64; 12],
    fault: Fault,
}

struct PerCpu(UnsafeCell<[Context; MAX_CPUS]>);

// SAFETY: each CPU touches only its own element.
unsafe impl Sync for PerCpu {}

static CONTEXTS: PerCpu =
    PerCpu(UnsafeCell::new([const { Context { armed: 0, result: 0, sp: 0, saved: [0; 12], fault: ZERO } }; MAX_CPUS]));
const ZERO: Fault = Fault { esr: 0, far: 0, elr: 0, serror: 0 };

static INTERRUPT: AtomicUsize = AtomicUsize::new(0);

/// SPSR_EL1: EL1 with its own stack pointer, everything masked.
const EL1H_MASKED: u64 = 0x3c5;

fn context() -> *mut Context {
    // In range: a CPU without a stack never gets here.
    CONTEXTS.0.get().cast::<Context>().wrapping_add(cpu())
}

unsafe extern "C" {
    fn rt_attempt(context: *mut Context, code: u64, a: u64, b: u64, c: u64) -> u64;
}

/// Calls the code at `code` with three arguments; its X0, or the exception that it took.
///
/// # Safety
/// If there is code, it keeps to the procedure call standard or faults, and has no effect on Rust's objects.
///
/// # Errors
/// The exception.
pub unsafe fn attempt(code: u64, arguments: [u64; 3]) -> Result<u64, Fault> {
    let context = context();
    let [a, b, c] = arguments;
    // SAFETY: this CPU's context, which nobody else uses; the caller vouches for the code.
    unsafe {
        assert_eq!((*context).armed, 0, "attempts do not nest");
        if rt_attempt(context, code, a, b, c) == 0 { Ok((*context).result) } else { Err((*context).fault) }
    }
}

macro_rules! probes {
    ($(#[$doc:meta] $name:ident = $($code:literal),+;)*) => {$(
        #[$doc]
        ///
        /// # Errors
        /// The exception that it took.
        pub fn $name(a: u64, b: u64) -> Result<u64, Fault> {
            #[unsafe(naked)]
            extern "C" fn code(_a: u64, _b: u64) -> u64 {
                core::arch::naked_asm!($($code),+, "ret")
            }
            let image = crate::memory::image();
            assert!(a < image.start.saturating_sub(64) || a >= image.end, "{a:#x} is inside the image");
            let code: extern "C" fn(u64, u64) -> u64 = code;
            // SAFETY: the code above touches X0 to X3 and memory at `a`, which is not in the image.
            unsafe { attempt(code as usize as u64, [a, b, 0]) }
        }
    )*};
}

/// Single accesses that may fault; `a` is the address, `b` the value.
pub mod probe {
    use super::{Fault, attempt};

    probes! {
        /// LDRB.
        load8 = "ldrb w0, [x0]";
        /// LDRH.
        load16 = "ldrh w0, [x0]";
        /// LDR of 32 bits.
        load32 = "ldr w0, [x0]";
        /// LDR of 64 bits.
        load64 = "ldr x0, [x0]";
        /// LDRSW: the result is sign-extended.
        load_signed32 = "ldrsw x0, [x0]";
        /// LDP: two registers, no syndrome for a hypervisor; the sum.
        load_pair = "ldp x1, x2, [x0]", "add x0, x1, x2";
        /// LDR with write-back: no syndrome for a hypervisor.
        load_post = "ldr x1, [x0], #8", "mov x0, x1";
        /// LDAR.
        load_acquire = "ldar x0, [x0]";
        /// LDXR.
        load_exclusive = "ldxr x0, [x0]", "clrex";
        /// STRB.
        store8 = "strb w1, [x0]";
        /// STRH.
        store16 = "strh w1, [x0]";
        /// STR of 32 bits.
        store32 = "str w1, [x0]";
        /// STR of 64 bits.
        store64 = "str x1, [x0]";
        /// STP: no syndrome for a hypervisor.
        store_pair = "stp x1, x1, [x0]";
        /// STR with write-back: no syndrome for a hypervisor.
        store_post = "str x1, [x0], #8";
        /// STLR.
        store_release = "stlr x1, [x0]";
        /// LDXR and STXR, once: 0 if the store was done.
        store_exclusive = "ldxr x2, [x0]", "stxr w3, x1, [x0]", "mov w0, w3";
        /// LDADD (FEAT_LSE).
        add_atomic = ".arch_extension lse", "ldadd x1, x0, [x0]";
        /// DC ZVA.
        zero_block = "dc zva, x0";
        /// DC CVAC.
        clean = "dc cvac, x0";
        /// DC CVAU.
        clean_to_unification = "dc cvau, x0";
        /// DC CVAP (FEAT_DPB).
        clean_to_persistence = ".arch armv8.2-a", "dc cvap, x0";
        /// DC CIVAC.
        clean_invalidate = "dc civac, x0";
        /// DC IVAC.
        invalidate = "dc ivac, x0";
        /// IC IVAU.
        invalidate_instructions = "ic ivau, x0";
        /// PRFM: a hint, never a fault.
        prefetch = "prfm pldl1keep, [x0]";
    }

    /// Branches with link to `address`, which holds no code of the image.
    ///
    /// # Errors
    /// The exception that it took.
    pub fn call(address: u64) -> Result<u64, Fault> {
        let image = crate::memory::image();
        assert!(!image.contains(&address), "{address:#x} is inside the image");
        // SAFETY: not the image's code; guests put only leaf functions or nothing at all there.
        unsafe { attempt(address, [0; 3]) }
    }
}

/// What to do with interrupts, on every CPU.
pub fn on_interrupt(handler: fn()) {
    INTERRUPT.store(handler as usize, Ordering::Release);
}

/// Takes interrupts, or not.
pub fn interrupts(enabled: bool) {
    // SAFETY: the vectors are set, and an interrupt without a handler ends the guest with a message.
    unsafe {
        if enabled {
            core::arch::asm!("msr daifclr, #2", options(nostack));
        } else {
            core::arch::asm!("msr daifset, #2", options(nostack));
        }
    }
}

/// Says why and powers off.
pub(crate) fn stop_all_of_it(why: fmt::Arguments<'_>) -> ! {
    console::init();
    console::print_last(format_args!("GUEST STOPPED on cpu {}: {why}\n", cpu()));
    smccc::system_off()
}

/// `vector` is the index in the table: 4 to 7 are EL1's own synchronous, IRQ, FIQ, SError.
#[unsafe(no_mangle)]
extern "C" fn rt_exception(frame: &mut Frame, vector: u64) {
    let fault = Fault {
        esr: crate::sysreg_read!("esr_el1"),
        far: crate::sysreg_read!("far_el1"),
        elr: frame.elr,
        serror: u64::from(vector % 4 == 3),
    };
    if vector % 4 == 1 || vector % 4 == 2 {
        match INTERRUPT.load(Ordering::Acquire) {
            0 => stop_all_of_it(format_args!("an interrupt without a handler, at {:#x}", frame.elr)),
            // SAFETY: on_interrupt stored a function of this type.
            handler => unsafe { core::mem::transmute::<usize, fn()>(handler)() },
        }
        return;
    }
    let context = context();
    // SAFETY: this CPU's context; the code that armed it is what was interrupted.
    unsafe {
        if (*context).armed == 0 {
            stop_all_of_it(format_args!("exception {vector}: {fault}, x30 {:#x}", frame.x[30]));
        }
        (*context).fault = fault;
    }
    frame.elr = crate::memory::address_of!(rt_attempt_recover);
    frame.spsr = EL1H_MASKED;
    frame.x[0] = context as u64;
}

global_asm!(
    r#"
    .text
    .globl rt_attempt, rt_attempt_recover, rt_vectors
rt_attempt:
    stp     x19, x20, [x0, #{saved}]
    stp     x21, x22, [x0, #{saved} + 16]
    stp     x23, x24, [x0, #{saved} + 32]
    stp     x25, x26, [x0, #{saved} + 48]
    stp     x27, x28, [x0, #{saved} + 64]
    stp     x29, x30, [x0, #{saved} + 80]
    mov     x9, sp
    str     x9, [x0, #{sp}]
    mov     x19, x0
    mov     x9, x1
    mov     x0, x2
    mov     x1, x3
    mov     x2, x4
    mov     x10, #1
    str     x10, [x19, #{armed}]
    blr     x9
    // A late SError of the attempt is still the attempt's.
    dsb     sy
    isb
    str     xzr, [x19, #{armed}]
    str     x0, [x19, #{result}]
    mov     x0, #0
    b       1f
rt_attempt_recover:
    mov     x19, x0
    str     xzr, [x19, #{armed}]
    mov     x0, #1
1:  ldr     x9, [x19, #{sp}]
    mov     sp, x9
    mov     x9, x19
    ldp     x19, x20, [x9, #{saved}]
    ldp     x21, x22, [x9, #{saved} + 16]
    ldp     x23, x24, [x9, #{saved} + 32]
    ldp     x25, x26, [x9, #{saved} + 48]
    ldp     x27, x28, [x9, #{saved} + 64]
    ldp     x29, x30, [x9, #{saved} + 80]
    ret

    .macro  vector number
    .balign 128
    sub     sp, sp, #{frame}
    stp     x0, x1, [sp]
    stp     x2, x3, [sp, #16]
    mov     x1, #\number
    b       rt_save
    .endm

    .balign 2048
rt_vectors:
    .irp    number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    vector  \number
    .endr

rt_save:
    stp     x4, x5, [sp, #32]
    stp     x6, x7, [sp, #48]
    stp     x8, x9, [sp, #64]
    stp     x10, x11, [sp, #80]
    stp     x12, x13, [sp, #96]
    stp     x14, x15, [sp, #112]
    stp     x16, x17, [sp, #128]
    stp     x18, x19, [sp, #144]
    stp     x20, x21, [sp, #160]
    stp     x22, x23, [sp, #176]
    stp     x24, x25, [sp, #192]
    stp     x26, x27, [sp, #208]
    stp     x28, x29, [sp, #224]
    mrs     x2, elr_el1
    stp     x30, x2, [sp, #240]
    mrs     x3, spsr_el1
    str     x3, [sp, #256]
    mov     x0, sp
    bl      rt_exception
    ldr     x3, [sp, #256]
    msr     spsr_el1, x3
    ldp     x30, x2, [sp, #240]
    msr     elr_el1, x2
    ldp     x28, x29, [sp, #224]
    ldp     x26, x27, [sp, #208]
    ldp     x24, x25, [sp, #192]
    ldp     x22, x23, [sp, #176]
    ldp     x20, x21, [sp, #160]
    ldp     x18, x19, [sp, #144]
    ldp     x16, x17, [sp, #128]
    ldp     x14, x15, [sp, #112]
    ldp     x12, x13, [sp, #96]
    ldp     x10, x11, [sp, #80]
    ldp     x8, x9, [sp, #64]
    ldp     x6, x7, [sp, #48]
    ldp     x4, x5, [sp, #32]
    ldp     x2, x3, [sp, #16]
    ldp     x0, x1, [sp]
    add     sp, sp, #{frame}
    eret
"#,
    armed = const offset_of!(Context, armed),
    result = const offset_of!(Context, result),
    sp = const offset_of!(Context, sp),
    saved = const offset_of!(Context, saved),
    frame = const size_of::<Frame>(),
);
