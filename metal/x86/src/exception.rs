//! Our interrupt descriptor table, and the end of a hypervisor that trapped itself.
//!
//! Purpose: interrupts are held off while the hypervisor runs (`crate::interrupts`), so all that comes is an exception of its own, an
//! NMI or a machine check. An NMI is another CPU's question, which [`own`] answers, and a fault of [`probe`]'s load is what that asked for.
//! Anything else is a bug, or broken hardware: it is reported with everything that helps to find it, on a stack of its own, since a stack
//! overflow is
//! one of them.
//!
//! Protocol: the gate switches to an interrupt stack, the stub saves all registers in a [`Frame`] there and calls
//! [`entresol_exception`]; if that returns, the frame says where and with which registers to go on. An NMI may come at any
//! instruction while GIF is set, so its handler takes no lock, and uses no register that the stub does not save.
//!
//! Protocol of the fatal path: the first CPU that fails reports; others that fail meanwhile stop. The report begins with `PANIC`, ends with
//! `END OF PANIC`, and the machine is turned off, so that whoever started it does not wait for ever.
//!
//! The image is linked where it runs, so addresses in a backtrace are those of the ELF file.
//!
//! Sources: APM 4.8.4 (gates), 8.2 (vectors), 8.9 (the 64-bit stack frame).
//!
//! Known holes: an exception between the loading of a guest's segment bases and their return, which no instruction there raises,
//! would find the guest's GS.

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::fmt;
use core::panic::PanicInfo;

use entresol_metal_common::stack::Trace;
use entresol_sync::atomic::{AtomicUsize, Ordering};
use x86_64::VirtAddr;
use x86_64::instructions::port::Port;
use x86_64::instructions::tables::lidt;
use x86_64::registers::control::Cr2;
use x86_64::registers::segmentation::{CS, Segment};
use x86_64::structures::DescriptorTablePointer;

use crate::cpu::{self, IST_EXCEPTION, IST_MACHINE_CHECK, IST_NMI};
use crate::interrupts::{self, STUB, entresol_interrupt_stubs};
use crate::{console, own, power, probe};

/// Vectors that exceptions have, and all.
const EXCEPTIONS: usize = 32;
const VECTORS: usize = 256;
const NMI: usize = 2;
/// Port of the PC's system control, and what it says of NMIs: the system's error line, and a device's (SERR#, IOCHK#).
const SYSTEM_CONTROL: u16 = 0x61;
const HARDWARE_ERRORS: u8 = 0b11 << 6;
const PAGE_FAULT: u64 = 14;
const MACHINE_CHECK: usize = 18;

/// What the CPU was doing.
#[repr(C)]
struct Frame {
    /// R15 first, RAX last.
    general: [u64; 15],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// Their names, as the frame has them.
const NAMES: [&str; 15] =
    ["r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8", "rdi", "rsi", "rbp", "rbx", "rdx", "rcx", "rax"];
/// Among them.
const FRAME_POINTER: usize = 10;
const RDX: usize = 12;
const RAX: usize = 14;

global_asm!(
    r#"
    .text
    // One stub for each vector. Those of 8, 10 to 14, 17, 21, 29 and 30 find an error code on the stack.
    .balign 16
    .global entresol_stubs
entresol_stubs:
    .set    vector, 0
    .rept   32
    .balign 16
    .if (0x60227d00 >> vector) & 1
    .else
    push    0
    .endif
    push    vector
    jmp     entresol_save
    .set    vector, vector + 1
    .endr

    .balign 16
entresol_save:
    push    rax
    push    rcx
    push    rdx
    push    rbx
    push    rbp
    push    rsi
    push    rdi
    push    r8
    push    r9
    push    r10
    push    r11
    push    r12
    push    r13
    push    r14
    push    r15
    cld
    mov     rdi, rsp
    xor     ebp, ebp
    call    entresol_exception
    pop     r15
    pop     r14
    pop     r13
    pop     r12
    pop     r11
    pop     r10
    pop     r9
    pop     r8
    pop     rdi
    pop     rsi
    pop     rbp
    pop     rbx
    pop     rdx
    pop     rcx
    pop     rax
    add     rsp, 16                     // vector and error code
    iretq
    "#
);

unsafe extern "C" {
    static entresol_stubs: u8;
}

/// A gate of the table.
#[repr(C)]
#[derive(Clone, Copy)]
struct Gate {
    offset_low: u16,
    selector: u16,
    stack: u8,
    kind: u8,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<Gate>() == 16, "APM figure 4-24");

impl Gate {
    const ABSENT: Self =
        Self { offset_low: 0, selector: 0, stack: 0, kind: 0, offset_middle: 0, offset_high: 0, reserved: 0 };

    /// Present, an interrupt gate, to `handler` on interrupt stack `stack`, or on the stack that is there.
    fn to(handler: u64, selector: u16, stack: Option<u8>) -> Self {
        const INTERRUPT: u8 = 1 << 7 | 0xe;
        Self {
            offset_low: handler as u16,
            selector,
            // 0 means no switch.
            stack: stack.map_or(0, |stack| stack + 1),
            kind: INTERRUPT,
            offset_middle: (handler >> 16) as u16,
            offset_high: (handler >> 32) as u32,
            reserved: 0,
        }
    }
}

struct Table(UnsafeCell<[Gate; VECTORS]>);

// SAFETY: written by the boot CPU before anybody uses it, read by processors after.
unsafe impl Sync for Table {}

static TABLE: Table = Table(UnsafeCell::new([Gate::ABSENT; VECTORS]));

/// Makes exceptions of the boot CPU come here. Its task state segment is loaded.
pub(crate) fn install() {
    let (fatal, interrupts) = (&raw const entresol_stubs as u64, &raw const entresol_interrupt_stubs as u64);
    let gate = |vector: usize| {
        let (first, number, stack) = match vector {
            NMI => (fatal, vector, Some(IST_NMI)),
            MACHINE_CHECK => (fatal, vector, Some(IST_MACHINE_CHECK)),
            0..EXCEPTIONS => (fatal, vector, Some(IST_EXCEPTION)),
            _ => (interrupts, vector - EXCEPTIONS, None),
        };
        Gate::to(first + (number * STUB) as u64, CS::get_reg().0, stack)
    };
    // SAFETY: the boot CPU, once, before any other runs.
    unsafe { *TABLE.0.get() = core::array::from_fn(gate) };
    load();
}

/// Makes this CPU's come here. Its task state segment is loaded.
pub(crate) fn load() {
    let limit = (VECTORS * size_of::<Gate>() - 1) as u16;
    // SAFETY: the table is a static, and every gate of it leads to a stub.
    unsafe { lidt(&DescriptorTablePointer { limit, base: VirtAddr::from_ptr(TABLE.0.get()) }) };
}

/// Nobody reports yet.
const NOBODY: usize = usize::MAX;

/// Frames of a backtrace that are printed.
const MOST_FRAMES: usize = 48;

/// The CPU that reports.
static REPORTER: AtomicUsize = AtomicUsize::new(NOBODY);

/// An exception of our own. Returns to what the frame says, or not at all.
#[unsafe(no_mangle)]
extern "C" fn entresol_exception(frame: &mut Frame) {
    if frame.vector == NMI as u64 && !is_hardware_error() {
        own::answer();
        frame.rip = interrupts::after_nmi(frame.rip);
        return;
    }
    if frame.vector == PAGE_FAULT
        && let Some((rip, [rax, rdx])) = probe::recover(frame.rip, Cr2::read_raw(), frame.error)
    {
        frame.rip = rip;
        (frame.general[RAX], frame.general[RDX]) = (rax, rdx);
        return;
    }
    report(format_args!("{frame}"), trace(frame.rip, frame.general[FRAME_POINTER]))
}

/// Whether the machine has a reason of its own for a non-maskable interrupt. A port that does not exist reads as ones.
fn is_hardware_error() -> bool {
    // SAFETY: reading the port has no effect.
    let status = unsafe { Port::<u8>::new(SYSTEM_CONTROL).read() };
    status != u8::MAX && status & HARDWARE_ERRORS != 0
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let (frame_pointer, here): (u64, u64);
    // SAFETY: reads two registers.
    unsafe {
        core::arch::asm!("mov {}, rbp", "lea {}, [rip]", out(reg) frame_pointer, out(reg) here, options(nomem, nostack));
    }
    report(format_args!("{info}"), trace(here, frame_pointer))
}

fn report(what: fmt::Arguments<'_>, trace: impl Iterator<Item = u64>) -> ! {
    let cpu = cpu::index();
    match REPORTER.compare_exchange(NOBODY, cpu, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {}
        Err(reporter) if reporter == cpu => {
            console::emergency(format_args!("\nPANIC inside a panic on CPU {cpu}\n"));
            power::off()
        }
        Err(_) => cpu::halt(),
    }
    console::emergency(format_args!("\nPANIC on CPU {cpu}: {what}\n"));
    for (depth, address) in trace.enumerate() {
        if depth == MOST_FRAMES {
            console::emergency(format_args!("  ...\n"));
            break;
        }
        console::emergency(format_args!("  #{depth:<2} {address:#010x}\n"));
    }
    console::emergency(format_args!("END OF PANIC\n"));
    power::off()
}

impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vector, error, rip, cs, rflags, rsp, ss, .. } = self;
        let address = if *vector == PAGE_FAULT { Cr2::read_raw() } else { 0 };
        write!(f, "exception {vector}, error code {error:#x}, CR2 {address:#x}{}", explain(*vector, address))?;
        write!(f, "\n  rip {rip:#018x} rsp {rsp:#018x}  rflags {rflags:#x} cs {cs:#x} ss {ss:#x}")?;
        for (number, (name, value)) in NAMES.iter().zip(self.general).rev().enumerate() {
            let separator = if number % 4 == 0 { "\n " } else { "" };
            write!(f, "{separator} {name:<3} {value:#018x}")?;
        }
        Ok(())
    }
}

fn explain(vector: u64, address: u64) -> &'static str {
    let overflow = vector == PAGE_FAULT && (0..cpu::count()).any(|cpu| cpu::stacks_of(cpu).is_guard(address));
    if overflow { " (stack overflow: a guard page)" } else { "" }
}

/// Return addresses, from frame to frame (System V ABI, AMD64 supplement 3.2.2).
fn trace(first: u64, frame_pointer: u64) -> impl Iterator<Item = u64> {
    let read = |at| {
        let own = (0..cpu::count()).any(|cpu| cpu::stacks_of(cpu).has_record(at));
        // SAFETY: both words lie inside a mapped stack.
        own.then(|| unsafe { core::ptr::read(at as *const [u64; 2]) })
    };
    Trace { first, frame_pointer, back: 1, read }
}
