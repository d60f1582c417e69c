//! Interrupts of the machine, one after the other, when the hypervisor asks for them.
//!
//! Purpose: what the arm64 machine's `gic` is there: numbered interrupts of one priority that are acknowledged, not taken. No
//! interrupt is ever taken between two instructions of the hypervisor but inside [`ack`] and [`wait`].
//!
//! | line | what |
//! |---|---|
//! | 0–15 | one CPU to another ([`send_sgi`]) |
//! | [`TIMER`] | this CPU's timer (`crate::timer`) |
//! | [`FIRST_INPUT`] and on | inputs of the I/O APICs, by their number in ACPI (the global system interrupt) |
//!
//! Protocol: [`init`] on the boot CPU, [`init_cpu`] on every CPU; on an exit for an interrupt and after [`wait`]: [`ack`] until
//! `None`, for each handle it, then [`deactivate`] it. Inputs interrupt the boot CPU.
//!
//! How they are held off: RFLAGS.IF is clear for as long as code of the hypervisor runs. An entry clears GIF and sets IF (APM 15.17):
//! VMRUN sets GIF again, and with V_INTR_MASKING the IF of whoever executed it decides while the guest runs (15.21.1). An
//! interrupt that came while we looked at something else makes the guest come out before its first instruction, so nothing is lost
//! between the last look and the entry. The exit leaves it pending and GIF clear; IF is cleared before GIF is set.
//!
//! How they are taken: [`ack`] opens a window of one instruction. The stub that runs there notes its vector and returns with IF clear,
//! so that no second one comes; it stays in service until [`deactivate`]. NMIs are not held off; `exception` says whose they are.
//!
//! Invariants: a note that is not empty is an interrupt in service that nobody has handled; it is read by its own CPU only.
//!
//! Sources: APM 15.17 (GIF), 15.21 (interrupts while a guest runs), 8.5 (RFLAGS.IF and STI's shadow), 16.6.3 (in service).
//!
//! Lock order: the I/O APICs' lock is taken alone.

use core::arch::{asm, global_asm};
use core::fmt;

use entresol_sync::{Mutex, Once};
use x86_64::instructions::port::Port;

use crate::boot::{BootInfo, MAX_INPUTS};
use crate::cpu::{self, NOTE};
use crate::ioapic::{IoApics, Mapped, Route};
use crate::{apic, boot};

/// What makes another CPU look up from what it does; a guest comes out.
pub const KICK: u32 = 1;
/// This CPU's timer.
pub const TIMER: u32 = 16;
/// Input 0 of the I/O APICs.
pub const FIRST_INPUT: u32 = boot::FIRST_INPUT;

/// The vector of a line is so much more: the 32 first are exceptions', and those of a line are together with others of its kind.
const OFFSET: u32 = 0x30;
/// Delivered when there is nothing any more.
const SPURIOUS: u8 = 0xff;
const _: () = assert!(FIRST_INPUT + MAX_INPUTS as u32 + OFFSET <= SPURIOUS as u32);

/// Data ports of the two 8259s: their masks.
const MASKS_8259: [u16; 2] = [0x21, 0xa1];

/// The inputs, and how each is told.
struct Inputs {
    all: IoApics<Mapped>,
    edge: [bool; MAX_INPUTS],
    active_low: [bool; MAX_INPUTS],
    /// Identifier of the boot CPU.
    cpu: u8,
}

static INPUTS: Once<Mutex<Inputs>> = Once::new();

/// A line cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// No I/O APIC has it.
    NoSuchInterrupt(u32),
    /// The boot CPU's identifier does not fit into an I/O APIC's destination.
    Destination(u32),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchInterrupt(line) => write!(f, "I/O APIC: line {line} is no input of this machine"),
            Self::Destination(cpu) => {
                write!(f, "I/O APIC: the boot CPU's identifier is {cpu:#x}: must be at most 0xff")
            }
        }
    }
}

/// Masks every input and the 8259s. Boot CPU, once.
///
/// # Errors
///
/// [`Error::Destination`].
pub fn init(info: &BootInfo) -> Result<(), Error> {
    for port in MASKS_8259 {
        // SAFETY: the mask of an 8259, which nobody else uses; where there is none, nobody listens.
        unsafe { Port::<u8>::new(port).write(0xff) };
    }
    let boot = info.cpus.first().copied().unwrap_or(0);
    let cpu = u8::try_from(boot).map_err(|_| Error::Destination(boot))?;
    let active_low = core::array::from_fn(|input| info.active_low.get(input));
    INPUTS.call_once(|| {
        let all = IoApics::new(Mapped, &info.io_apics);
        Mutex::new(Inputs { all, edge: [false; MAX_INPUTS], active_low, cpu })
    });
    Ok(())
}

/// Sets up this CPU's local APIC: its timer is enabled, and what other CPUs send.
pub fn init_cpu() {
    apic::init_cpu(vector_of(TIMER), cpu::index() == 0);
}

const fn vector_of(line: u32) -> u8 {
    (line + OFFSET) as u8
}

fn with_input<R>(line: u32, f: impl FnOnce(&mut Inputs, usize) -> R) -> Result<R, Error> {
    let none = Error::NoSuchInterrupt(line);
    let input = line.checked_sub(FIRST_INPUT).ok_or(none)?;
    let mut inputs = INPUTS.get().ok_or(none)?.lock();
    if input as usize >= MAX_INPUTS || !inputs.all.has(input) {
        return Err(none);
    }
    Ok(f(&mut inputs, input as usize))
}

/// Lets an input through to the boot CPU. What is this CPU's own always comes through.
///
/// # Errors
///
/// [`Error::NoSuchInterrupt`].
pub fn enable(line: u32) -> Result<(), Error> {
    if line <= TIMER {
        return Ok(());
    }
    with_input(line, |inputs, input| {
        let (edge, active_low) = (inputs.edge[input], inputs.active_low[input]);
        let route = Route { vector: vector_of(line), edge, active_low, cpu: inputs.cpu };
        inputs.all.set(input as u32, Some(route));
    })
}

/// Holds an input back.
///
/// # Errors
///
/// [`Error::NoSuchInterrupt`].
pub fn disable(line: u32) -> Result<(), Error> {
    with_input(line, |inputs, input| {
        inputs.all.set(input as u32, None);
    })
}

/// Says whether an input is edge-triggered. Before it is enabled.
///
/// # Errors
///
/// [`Error::NoSuchInterrupt`].
pub fn set_edge(line: u32, edge: bool) -> Result<(), Error> {
    with_input(line, |inputs, input| inputs.edge[input] = edge)
}

/// Takes the pending interrupt of highest priority: it is in service. `None`: there is none.
#[inline]
pub fn ack() -> Option<u32> {
    let note = take_note().or_else(|| {
        window();
        take_note()
    });
    note.filter(|vector| *vector != SPURIOUS).and_then(|vector| u32::from(vector).checked_sub(OFFSET))
}

/// Nothing: where a GIC has two steps, a local APIC has one, which is [`deactivate`].
#[inline]
pub fn drop_priority(_line: u32) {}

/// What [`ack`] took is handled: it can come again.
#[inline]
pub fn deactivate(_line: u32) {
    apic::end();
}

/// Sends interrupt `id` (0–15) to CPU `cpu`, which has called [`init_cpu`]; it sees what this CPU stored before.
///
/// # Panics
///
/// If there is no such CPU or interrupt.
pub fn send_sgi(cpu: usize, id: u32) {
    assert!(id < 16, "interrupt {id} to another CPU");
    apic::send(cpu::apic_id_of(cpu), vector_of(id));
}

/// Sends a non-maskable interrupt to CPU `cpu`, which sees what this CPU stored before.
pub(crate) fn send_nmi(cpu: usize) {
    apic::send_nmi(cpu::apic_id_of(cpu));
}

/// Switches this CPU's local APIC on.
pub(crate) fn switch_on() {
    apic::switch_on(SPURIOUS);
}

/// One instruction's time for one interrupt.
#[inline]
fn window() {
    // SAFETY: what comes is one of the stubs below, which keep every register and clear IF in the flags that they return to, so that at
    // most one comes; the stack is ours.
    unsafe { asm!("sti", "nop", "cli") };
}

/// Sleeps until an interrupt is pending for this CPU; [`ack`] returns it.
pub(crate) fn wait() {
    if has_note() {
        return;
    }
    // SAFETY: as for `window`. STI takes effect after the instruction that follows it, so what comes before HLT ends it.
    unsafe { entresol_sleep() };
}

/// Where a non-maskable interrupt that came at `rip` goes on: not at the HLT of a CPU that was about to sleep. Behind STI nothing holds back
/// what can be masked once that interrupt has returned, and what comes then clears IF: the CPU would sleep on it.
pub(crate) fn after_nmi(rip: u64) -> u64 {
    const HLT_BYTES: u64 = 1;
    if rip == &raw const entresol_sleep_hlt as u64 { rip + HLT_BYTES } else { rip }
}

#[inline]
fn has_note() -> bool {
    let note: u64;
    // SAFETY: this CPU's own word, which only a stub in a window writes.
    unsafe { asm!("mov {}, gs:[{offset}]", out(reg) note, offset = const NOTE, options(nostack, preserves_flags)) };
    note != 0
}

#[inline]
fn take_note() -> Option<u8> {
    let note: u64;
    // SAFETY: this CPU's own word, which only a stub in a window writes, and there is no window between the two instructions.
    unsafe {
        asm!(
            "mov {}, gs:[{offset}]",
            "mov qword ptr gs:[{offset}], 0",
            out(reg) note, offset = const NOTE, options(nostack, preserves_flags)
        );
    }
    (note != 0).then_some(note as u8)
}

/// Bytes of a stub.
pub(crate) const STUB: usize = 16;

unsafe extern "C" {
    fn entresol_sleep();
    static entresol_sleep_hlt: u8;
    /// The stubs of vectors 32 to 255.
    pub(crate) static entresol_interrupt_stubs: u8;
}

global_asm!(
    r#"
    .text
    .global entresol_sleep
    .global entresol_sleep_hlt
entresol_sleep:
    sti
entresol_sleep_hlt:
    hlt
    cli
    ret

    .balign 16
    .global entresol_interrupt_stubs
entresol_interrupt_stubs:
    .set    vector, 32
    .rept   224
    .balign 16
    push    vector
    jmp     entresol_note_interrupt
    .set    vector, vector + 1
    .endr

    .balign 16
entresol_note_interrupt:
    pop     qword ptr gs:[{note}]
    btr     dword ptr [rsp + 16], 9     // RFLAGS.IF, to which we return
    iretq
    "#,
    note = const NOTE,
);
