//! EL2's vectors, and the end of a hypervisor that trapped itself.
//!
//! Purpose: exceptions from a lower exception level end [`crate::switch::enter`]. Exceptions from EL2 itself are bugs:
//! they are reported with everything that helps to find them, on a stack of their own, since a stack overflow is one of
//! them.
//!
//! Protocol of the fatal path: the vector switches to the CPU's emergency stack without touching the old one, saves all
//! registers in a [`Frame`] there, and calls [`entresol_fatal`]. It uses TPIDRRO_EL0 for a moment, which is a guest's:
//! no guest runs again. The first CPU that fails reports; others that fail meanwhile stop. The report begins with
//! `PANIC`, ends with `END OF PANIC`, and the machine is turned off through PSCI, so that whoever started it does not
//! wait for ever. The firmware's off has no status of its own: a tester looks for the line.
//!
//! One load may fault without being a bug: [`crate::probe`]'s, which is recognised by its address before anything else is
//! saved, and goes on behind itself.
//!
//! Addresses in a backtrace are printed as the ELF file has them.
//!
//! Invariants: PSTATE.DAIF stays set throughout.

use core::arch::global_asm;
use core::fmt;
use core::panic::PanicInfo;

use entresol_metal_common::stack::Trace;
use entresol_sync::atomic::{AtomicUsize, Ordering};

use crate::boot::image_offset;
use crate::cpu::{self, PER_CPU_EMERGENCY_TOP};
use crate::switch::{EXIT_INTERRUPT, EXIT_SERROR, EXIT_SYNCHRONOUS, FRAME_REGISTERS};
use crate::{console, power};

/// What the CPU was doing.
#[repr(C, align(16))]
struct Frame {
    x: [u64; 31],
    sp: u64,
    elr: u64,
    spsr: u64,
    esr: u64,
    far: u64,
    /// Offset of the vector in the table.
    vector: u64,
}

const FRAME_SIZE: usize = size_of::<Frame>();
const _: () = assert!(FRAME_SIZE.is_multiple_of(16), "the stack pointer stays aligned");

global_asm!(
    r#"
    // From EL2 itself, at vector offset \offset. TPIDR_EL2 points to the CPU's block.
    .macro FROM_EL2 offset
    .balign 0x80
    msr     tpidrro_el0, x0
    mrs     x0, tpidr_el2
    ldr     x0, [x0, #{emergency_top}]
    sub     x0, x0, #{frame_size}
    stp     x1, x2, [x0, #8]
    mov     x1, #\offset
    b       entresol_save_fatal
    .endm

    // From a guest. SP is where `enter` left it; {registers} bytes above it is the pointer to the guest's registers.
    .macro FROM_GUEST kind
    .balign 0x80
    stp     x0, x1, [sp, #-16]!
    ldr     x0, [sp, #{registers} + 16]
    mov     w1, #\kind
    b       entresol_exit
    .endm

    .text
    .balign 0x800
    .global entresol_vectors
entresol_vectors:
    FROM_EL2 0x000
    FROM_EL2 0x080
    FROM_EL2 0x100
    FROM_EL2 0x180
    FROM_EL2 0x200
    FROM_EL2 0x280
    FROM_EL2 0x300
    FROM_EL2 0x380
    FROM_GUEST {synchronous}            // AArch64
    FROM_GUEST {interrupt}
    FROM_GUEST {interrupt}
    FROM_GUEST {serror}
    FROM_GUEST {synchronous}            // AArch32
    FROM_GUEST {interrupt}
    FROM_GUEST {interrupt}
    FROM_GUEST {serror}

    // x0 = frame, x1 = vector; the guest's x0 is in TPIDRRO_EL0, x1 and x2 are in the frame.
entresol_save_fatal:
    str     x1, [x0, #288]
    mrs     x1, elr_el2
    adrp    x2, entresol_probe_load     // the one load that may fault: see `probe`
    add     x2, x2, :lo12:entresol_probe_load
    cmp     x1, x2
    b.eq    entresol_probe_faulted
    mrs     x1, tpidrro_el0
    str     x1, [x0]
    stp     x3, x4, [x0, #24]
    stp     x5, x6, [x0, #40]
    stp     x7, x8, [x0, #56]
    stp     x9, x10, [x0, #72]
    stp     x11, x12, [x0, #88]
    stp     x13, x14, [x0, #104]
    stp     x15, x16, [x0, #120]
    stp     x17, x18, [x0, #136]
    stp     x19, x20, [x0, #152]
    stp     x21, x22, [x0, #168]
    stp     x23, x24, [x0, #184]
    stp     x25, x26, [x0, #200]
    stp     x27, x28, [x0, #216]
    stp     x29, x30, [x0, #232]
    mov     x1, sp
    mrs     x2, elr_el2
    stp     x1, x2, [x0, #248]
    mrs     x1, spsr_el2
    mrs     x2, esr_el2
    stp     x1, x2, [x0, #264]
    mrs     x1, far_el2
    str     x1, [x0, #280]
    msr     spsel, #1
    mov     sp, x0
    mov     x29, xzr
    mov     x30, xzr
    bl      entresol_fatal              // does not return
    "#,
    emergency_top = const PER_CPU_EMERGENCY_TOP,
    frame_size = const FRAME_SIZE,
    registers = const FRAME_REGISTERS,
    synchronous = const EXIT_SYNCHRONOUS,
    interrupt = const EXIT_INTERRUPT,
    serror = const EXIT_SERROR,
);

const _: () = {
    use core::mem::offset_of;
    assert!(offset_of!(Frame, sp) == 248 && offset_of!(Frame, elr) == 256, "as the assembly stores them");
    assert!(offset_of!(Frame, spsr) == 264 && offset_of!(Frame, esr) == 272);
    assert!(offset_of!(Frame, far) == 280 && offset_of!(Frame, vector) == 288);
};

unsafe extern "C" {
    static entresol_vectors: u8;
}

/// Makes exceptions of this CPU come here.
pub(crate) fn install() {
    // SAFETY: the table is whole and aligned; every vector handles what comes.
    unsafe {
        msr!("vbar_el2", &raw const entresol_vectors);
        instruction!("isb");
    }
}

/// Nobody reports yet.
const NOBODY: usize = usize::MAX;

/// Frames of a backtrace that are printed.
const MOST_FRAMES: usize = 48;

/// The CPU that reports.
static REPORTER: AtomicUsize = AtomicUsize::new(NOBODY);

/// An exception from EL2 itself.
#[unsafe(no_mangle)]
extern "C" fn entresol_fatal(frame: &Frame) -> ! {
    report(format_args!("{frame}"), trace(frame.elr, frame.x[29]))
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let (frame_pointer, here): (u64, u64);
    // SAFETY: reads two registers.
    unsafe {
        core::arch::asm!("mov {}, x29", "adr {}, .", out(reg) frame_pointer, out(reg) here, options(nomem, nostack));
    }
    report(format_args!("{info}"), trace(here, frame_pointer))
}

fn report(what: fmt::Arguments<'_>, trace: impl Iterator<Item = u64>) -> ! {
    let cpu = cpu::index();
    match claim(cpu) {
        None => {}
        Some(reporter) if reporter == cpu => {
            console::emergency(format_args!("\nPANIC inside a panic on CPU {cpu}\n"));
            power::off()
        }
        Some(_) => cpu::halt(),
    }
    console::emergency(format_args!("\nPANIC on CPU {cpu}: {what}\n"));
    for (depth, address) in trace.enumerate() {
        if depth == MOST_FRAMES {
            console::emergency(format_args!("  ...\n"));
            break;
        }
        console::emergency(format_args!("  #{depth:<2} {:#010x}\n", image_offset(address)));
    }
    console::emergency(format_args!("END OF PANIC\n"));
    power::off()
}

/// Becomes the reporter, or says who is. Plain loads and stores while the MMU is off, where there is one CPU and
/// exclusive accesses need not work.
fn claim(cpu: usize) -> Option<usize> {
    if mrs!("sctlr_el2") & 1 == 0 {
        let before = REPORTER.load(Ordering::Relaxed);
        REPORTER.store(cpu, Ordering::Relaxed);
        return (before != NOBODY).then_some(before);
    }
    REPORTER.compare_exchange(NOBODY, cpu, Ordering::AcqRel, Ordering::Acquire).err()
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = ["synchronous exception", "IRQ", "FIQ", "SError"][(self.vector / 0x80 % 4) as usize];
        let class = self.esr >> 26 & 0x3f;
        write!(f, "{kind} taken from EL2 itself, class {class:#x}{}", explain(class, self.far))?;
        write!(f, "\n  ESR {:#018x}  FAR  {:#018x}", self.esr, self.far)?;
        write!(f, "\n  ELR {:#018x}  SPSR {:#018x}", self.elr, self.spsr)?;
        write!(f, "\n  SP  {:#018x}  image at {:#x}", self.sp, crate::boot::image_base())?;
        for (number, value) in self.x.iter().enumerate() {
            let separator = if number % 4 == 0 { "\n " } else { "" };
            write!(f, "{separator} x{number:<2} {value:#018x}")?;
        }
        Ok(())
    }
}

/// Exception class of a data abort without a change of exception level (Arm DDI 0487 D24.2.40).
const DATA_ABORT_SAME_LEVEL: u64 = 0x25;

fn explain(class: u64, far: u64) -> &'static str {
    if class != DATA_ABORT_SAME_LEVEL {
        return "";
    }
    if (0..cpu::count()).any(|cpu| cpu::stacks_of(cpu).is_guard(far)) { " (stack overflow: a guard page)" } else { "" }
}

/// Return addresses, from frame record to frame record (AAPCS64 6.4.6).
fn trace(first: u64, frame_pointer: u64) -> impl Iterator<Item = u64> {
    let read = |at| {
        let own = (0..cpu::count()).any(|cpu| cpu::stacks_of(cpu).has_record(at));
        // SAFETY: both words lie inside a mapped stack.
        own.then(|| unsafe { core::ptr::read(at as *const [u64; 2]) })
    };
    Trace { first, frame_pointer, back: 4, read }
}
