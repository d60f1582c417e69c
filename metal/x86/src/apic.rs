//! This CPU's local APIC: what interrupts it, how it interrupts others, and its timer.
//!
//! Purpose: registers only; which vector means what is [`crate::interrupts`]'s.
//!
//! Protocol: [`find`] once on the boot CPU, before our own tables are made, because they have to map the registers; then
//! [`switch_on`] and [`init_cpu`] on every CPU.
//!
//! Registers are model-specific ones (x2APIC) where the CPU has them, and a page of memory elsewhere.
//!
//! Invariants: every local source but the timer is masked, and on the boot CPU the machine's NMI line.
//!
//! Sources: APM volume 2, 16.2 to 16.6 (local interrupts, ICR, LVT, priorities), 16.9 to 16.11 (x2APIC); Intel SDM volume 3A, 11.5.4.1
//! (TSC deadline), 11.12.3 (its writes are not ordered behind stores).
//!
//! Known holes: the machine's NMI is taken to be at LINT1, as on every PC, whatever ACPI's MADT says.

use entresol_sync::atomic::{AtomicU64, Ordering};
use raw_cpuid::CpuId;
use x86_64::registers::model_specific::Msr;

/// APIC_BASE: its address (51:12), on (11), x2APIC (10).
const APIC_BASE: u32 = 0x1b;
const BASE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const BASE_ON: u64 = 1 << 11;
const BASE_X2APIC: u64 = 1 << 10;
/// The first register of x2APIC.
const X2APIC: u32 = 0x800;
/// TSC_DEADLINE.
const DEADLINE: u32 = 0x6e0;

/// Registers, by their offset in the page (APM table 16-2).
#[derive(Clone, Copy)]
#[repr(u16)]
enum Register {
    Priority = 0x80,
    End = 0xb0,
    Spurious = 0xf0,
    CommandLow = 0x300,
    CommandHigh = 0x310,
    Timer = 0x320,
    Thermal = 0x330,
    Performance = 0x340,
    Line0 = 0x350,
    Line1 = 0x360,
    Error = 0x370,
    InitialCount = 0x380,
    CurrentCount = 0x390,
    Divide = 0x3e0,
}

/// LVT: masked; as an NMI; the timer's mode, TSC deadline.
const MASKED: u32 = 1 << 16;
const BY_NMI: u32 = 0b100 << 8;
const BY_DEADLINE: u32 = 0b10 << 17;
/// Spurious vector: on.
const ON: u32 = 1 << 8;
/// Divide by one.
const BY_ONE: u32 = 0b1011;
/// Commands: NMI, INIT and start-up, asserted; the last one is not delivered yet.
const NMI: u32 = 0b100 << 8 | 1 << 14;
const INIT: u32 = 0b101 << 8 | 1 << 14;
const START_UP: u32 = 0b110 << 8 | 1 << 14;
const ASSERTED: u32 = 1 << 14;
const PENDING: u32 = 1 << 12;

/// Where the registers are; 0: they are model-specific.
static BASE: AtomicU64 = AtomicU64::new(0);

/// Whether the timer counts to a value of the time stamp counter.
pub(crate) fn has_deadline() -> bool {
    CpuId::new().get_feature_info().is_some_and(|features| features.has_tsc_deadline())
}

/// Where the registers are, if in memory. Boot CPU, once, before [`switch_on`].
pub(crate) fn find() -> Option<u64> {
    let x2apic = CpuId::new().get_feature_info().is_some_and(|features| features.has_x2apic());
    // SAFETY: every 64-bit processor has it.
    let address = unsafe { Msr::new(APIC_BASE).read() } & BASE_ADDRESS;
    (!x2apic).then(|| {
        BASE.store(address, Ordering::Relaxed);
        address
    })
}

fn read(register: Register) -> u32 {
    match BASE.load(Ordering::Relaxed) {
        // SAFETY: x2APIC is on, and has the register.
        0 => unsafe { Msr::new(X2APIC + (register as u32 >> 4)).read() as u32 },
        // SAFETY: our tables map the page as device memory.
        base => unsafe { ((base + register as u64) as *const u32).read_volatile() },
    }
}

fn write(register: Register, value: u32) {
    match BASE.load(Ordering::Relaxed) {
        // SAFETY: x2APIC is on, and has the register; the callers write what it takes.
        0 => unsafe { Msr::new(X2APIC + (register as u32 >> 4)).write(value.into()) },
        // SAFETY: our tables map the page as device memory.
        base => unsafe { ((base + register as u64) as *mut u32).write_volatile(value) },
    }
}

/// Switches this CPU's on, with `spurious` for what is gone before it is delivered.
pub(crate) fn switch_on(spurious: u8) {
    let (base, mut msr) = (BASE.load(Ordering::Relaxed), Msr::new(APIC_BASE));
    // SAFETY: the address stays what it was on the boot CPU, so the registers are where `find` says.
    unsafe {
        let kept = msr.read() & !BASE_ADDRESS | BASE_ON;
        let address = if base == 0 { msr.read() & BASE_ADDRESS } else { base };
        // x2APIC is entered from the other mode (16.9).
        msr.write(kept | address);
        if base == 0 {
            msr.write(kept | address | BASE_X2APIC);
        }
    }
    write(Register::Spurious, ON | u32::from(spurious));
    // SAFETY: one barrier before the deadline's register is ever written (SDM 11.5.4.1).
    unsafe { core::arch::x86_64::_mm_mfence() };
}

/// All local sources are masked but the timer, which interrupts with `timer`, and, if this CPU is the one that gets them, the
/// machine's `errors`; all priorities are let through.
pub(crate) fn init_cpu(timer: u8, errors: bool) {
    for source in [Register::Line0, Register::Error, Register::Performance, Register::Thermal] {
        write(source, MASKED);
    }
    write(Register::Line1, if errors { BY_NMI } else { MASKED });
    write(Register::Divide, BY_ONE);
    write(Register::Timer, u32::from(timer) | if has_deadline() { BY_DEADLINE } else { 0 });
    write(Register::Priority, 0);
}

/// This CPU's identifier, as other CPUs and the machine's tables know it.
pub(crate) fn identifier() -> u32 {
    let cpuid = CpuId::new();
    let wide = cpuid.get_extended_topology_info().and_then(|mut levels| levels.next()).map(|level| level.x2apic_id());
    wide.or_else(|| cpuid.get_feature_info().map(|features| features.initial_local_apic_id().into())).unwrap_or(0)
}

/// The interrupt that was taken last is over.
#[inline]
pub(crate) fn end() {
    write(Register::End, 0);
}

/// The count that the timer begins with; 0 stops it.
#[inline]
pub(crate) fn set_count(count: u32) {
    write(Register::InitialCount, count);
}

/// What is left of it.
pub(crate) fn count() -> u32 {
    read(Register::CurrentCount)
}

/// The value of the time stamp counter at which the timer interrupts; 0: never.
#[inline]
pub(crate) fn set_deadline(count: u64) {
    // SAFETY: it is there, as the caller knows of `has_deadline`.
    unsafe { Msr::new(DEADLINE).write(count) };
}

/// Interrupts the CPU with this identifier; it sees what this CPU stored before.
#[inline]
pub(crate) fn send(identifier: u32, vector: u8) {
    command(identifier, ASSERTED | u32::from(vector));
}

/// Sends it what nothing masks; it sees what this CPU stored before.
pub(crate) fn send_nmi(identifier: u32) {
    command(identifier, NMI);
}

/// Resets the CPU with this identifier.
pub(crate) fn send_init(identifier: u32) {
    command(identifier, INIT);
}

/// Starts it at `page`, which lies below 1 MiB.
pub(crate) fn send_start_up(identifier: u32, page: u8) {
    command(identifier, START_UP | u32::from(page));
}

fn command(identifier: u32, low: u32) {
    // SAFETY: barriers: in x2APIC mode the command is not ordered behind stores.
    unsafe { core::arch::asm!("mfence", "lfence", options(nostack, preserves_flags)) };
    if BASE.load(Ordering::Relaxed) == 0 {
        // SAFETY: x2APIC is on; the callers' commands are well-formed.
        unsafe {
            Msr::new(X2APIC + (Register::CommandLow as u32 >> 4)).write(u64::from(identifier) << 32 | u64::from(low))
        };
        return;
    }
    while read(Register::CommandLow) & PENDING != 0 {
        core::hint::spin_loop();
    }
    write(Register::CommandHigh, identifier << 24);
    write(Register::CommandLow, low);
}
