//! The CPUs: their stacks, their numbers, how they start and how they wait.
//!
//! Purpose: each CPU has a block that TPIDR_EL2 points to, and a stack area of [`STACK_STRIDE`] bytes, lowest address
//! first: a guard page, the emergency stack on which exceptions taken from EL2 itself are reported, a guard page, the
//! stack. The guards are mapped to nothing.
//!
//! Protocol: the boot CPU is number 0. [`start_all`] asks PSCI to start the others, one after the other, and waits for
//! each to say that it runs; a CPU that was started then waits in `entresol_secondary`.
//!
//! Invariants: a block is written by the boot CPU before its CPU starts, then by its own CPU only, except for its
//! atomics. Lock order: none.

use core::cell::UnsafeCell;
use core::fmt;
use core::mem::offset_of;

use entresol_metal_common::stack::StackArea;
use entresol_sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use smccc::{Smc, psci};

use crate::boot::{BootInfo, MAX_CPUS};
use crate::{exception, timer, traps};

const PAGE: usize = 4096;
const EMERGENCY: usize = 4 * PAGE;

/// Bytes of a CPU's stack area, guards included.
pub const STACK_STRIDE: usize = 128 << 10;

/// Where the start code of a CPU finds its stack in its block.
pub(crate) const PER_CPU_STACK_TOP: usize = offset_of!(PerCpu, stack_top);
/// Where an exception from EL2 finds its stack.
pub(crate) const PER_CPU_EMERGENCY_TOP: usize = offset_of!(PerCpu, emergency_top);

/// How long a CPU may take from PSCI's answer to its first instruction of ours.
const START_LIMIT_SECONDS: u64 = 5;

unsafe extern "Rust" {
    fn entresol_secondary(cpu: usize) -> !;
}

unsafe extern "C" {
    fn entresol_secondary_head();
}

#[repr(C, align(4096))]
struct Stacks(UnsafeCell<[[u8; STACK_STRIDE]; MAX_CPUS]>);

// SAFETY: each area is its CPU's own; Rust code makes no reference into it.
unsafe impl Sync for Stacks {}

#[unsafe(link_section = ".stacks")]
#[used]
static STACKS: Stacks = Stacks(UnsafeCell::new([[0; STACK_STRIDE]; MAX_CPUS]));

/// The stack area of CPU `index`.
pub(crate) fn stacks_of(index: usize) -> StackArea {
    assert!(index < MAX_CPUS, "CPU {index} of {MAX_CPUS}");
    let start = STACKS.0.get() as usize + index * STACK_STRIDE;
    StackArea::new(start as u64, STACK_STRIDE as u64, EMERGENCY as u64)
}

/// What a CPU knows of itself. On lines of its own, because its CPU reads it before its caches are on.
#[repr(C, align(256))]
struct PerCpu {
    index: usize,
    stack_top: u64,
    emergency_top: u64,
    affinity: u64,
    state: AtomicU32,
}

const OFF: u32 = 0;
const RUNNING: u32 = 1;

struct Blocks(UnsafeCell<[PerCpu; MAX_CPUS]>);

// SAFETY: a block is written before its CPU starts and read after; what changes later is atomic.
unsafe impl Sync for Blocks {}

static BLOCKS: Blocks = Blocks(UnsafeCell::new(
    [const { PerCpu { index: 0, stack_top: 0, emergency_top: 0, affinity: 0, state: AtomicU32::new(OFF) } }; MAX_CPUS],
));
static COUNT: AtomicUsize = AtomicUsize::new(1);

/// A CPU did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartError {
    /// Its number.
    pub cpu: usize,
    /// Its affinity.
    pub mpidr: u64,
    /// What the firmware said; `None`: it said yes, but the CPU never came.
    pub reason: Option<psci::error::Error>,
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CPU {} (MPIDR {:#x}) ", self.cpu, self.mpidr)?;
        match self.reason {
            Some(reason) => write!(f, "was refused by PSCI CPU_ON: {reason}"),
            None => write!(f, "did not run {START_LIMIT_SECONDS} s after PSCI CPU_ON succeeded"),
        }
    }
}

/// Number of the CPU that asks, below [`count`].
#[inline]
pub fn index() -> usize {
    let block = mrs!("tpidr_el2") as *const PerCpu;
    // SAFETY: TPIDR_EL2 points to this CPU's block since its first Rust code, and nothing writes `index` after that.
    unsafe { (*block).index }
}

/// CPUs of the machine, started or not.
pub fn count() -> usize {
    COUNT.load(Ordering::Relaxed)
}

/// Affinity of CPU `index`: MPIDR_EL1 without its flags.
///
/// # Panics
///
/// If there is no such CPU.
pub fn affinity_of(index: usize) -> u64 {
    assert!(index < count(), "CPU {index} of {}", count());
    // SAFETY: below the count, blocks were written before anyone could ask.
    unsafe { (*block(index)).affinity }
}

/// Affinity of this CPU, before it has a block.
pub(crate) fn affinity() -> u64 {
    mrs!("mpidr_el1") & crate::boot::AFFINITY
}

/// Sleeps until an interrupt is pending for this CPU. Interrupts stay masked: it is acknowledged by `gic::ack`.
#[inline]
pub fn wait_for_interrupt() {
    // SAFETY: a barrier and a hint.
    unsafe {
        instruction!("dsb sy");
        instruction!("wfi");
    }
}

/// Lets other hardware threads, or an emulator's other CPUs, run while this CPU waits for a short time.
#[inline]
pub fn relax() {
    // SAFETY: a hint.
    unsafe { instruction!("yield") };
}

/// Stops this CPU for good.
pub fn halt() -> ! {
    loop {
        // SAFETY: a hint; interrupts are masked.
        unsafe { instruction!("wfe") };
    }
}

/// End of the boot CPU's stack area.
pub(crate) fn boot_stack_end() -> usize {
    stacks_of(0).main.end as usize
}

/// Makes this CPU number 0. Without MMU, before any other CPU runs.
pub(crate) fn init_self() {
    init_block(0, affinity(), RUNNING);
    set_block(0);
}

/// Writes the blocks of the other CPUs. Without MMU, before any of them runs.
pub(crate) fn init_others(info: &BootInfo) {
    for (index, affinity) in info.cpus.iter().enumerate().skip(1) {
        init_block(index, *affinity, OFF);
    }
    COUNT.store(info.cpus.len(), Ordering::Relaxed);
}

fn init_block(index: usize, affinity: u64, state: u32) {
    let area = stacks_of(index);
    let (stack_top, emergency_top) = (area.main.end, area.emergency.end);
    let content = PerCpu { index, stack_top, emergency_top, affinity, state: AtomicU32::new(state) };
    // SAFETY: one CPU, no references; `StackArea::of` has checked the index.
    unsafe { block(index).write(content) };
}

fn block(index: usize) -> *mut PerCpu {
    BLOCKS.0.get().cast::<PerCpu>().wrapping_add(index)
}

fn set_block(index: usize) {
    // SAFETY: TPIDR_EL2 is ours alone; the pointer is to a static.
    unsafe { msr!("tpidr_el2", block(index)) };
}

/// Starts every other CPU, in order.
///
/// # Errors
///
/// [`StartError`] of the first that does not start; those before it run.
pub fn start_all() -> Result<(), StartError> {
    (1..count()).try_for_each(start)
}

fn start(cpu: usize) -> Result<(), StartError> {
    let (block, mpidr) = (block(cpu), affinity_of(cpu));
    // The new CPU reads its block and the MMU's registers past the caches.
    clean(block as u64, size_of::<PerCpu>());
    clean(&raw const entresol_mmu as u64, size_of::<crate::paging::MmuRegisters>());
    let entry = entresol_secondary_head as *const () as u64;
    psci::cpu_on::<Smc>(mpidr, entry, block as u64).map_err(|reason| StartError {
        cpu,
        mpidr,
        reason: Some(reason),
    })?;
    let limit = timer::now() + START_LIMIT_SECONDS * timer::frequency();
    // SAFETY: the block is a static; its state is atomic.
    while unsafe { &(*block).state }.load(Ordering::Acquire) != RUNNING {
        if timer::now() > limit {
            return Err(StartError { cpu, mpidr, reason: None });
        }
        relax();
    }
    Ok(())
}

unsafe extern "C" {
    static entresol_mmu: crate::paging::MmuRegisters;
}

/// Cleans data cache lines to the point of coherency.
fn clean(address: u64, bytes: usize) {
    let line = 4u64 << (mrs!("ctr_el0") >> 16 & 0xf);
    let mut at = address & !(line - 1);
    while at < address + bytes as u64 {
        // SAFETY: a clean changes no data.
        unsafe { instruction_on!("dc cvac", at) };
        at += line;
    }
    // SAFETY: a barrier.
    unsafe { instruction!("dsb sy") };
}

/// First Rust code of a CPU that `start` started: MMU on, on its own stack.
#[unsafe(no_mangle)]
extern "C" fn entresol_secondary_start(block: *const PerCpu) -> ! {
    // SAFETY: the start code passes what `start` gave to PSCI.
    let own = unsafe { &*block };
    set_block(own.index);
    exception::install();
    traps::init_cpu();
    own.state.store(RUNNING, Ordering::Release);
    // SAFETY: the hypervisor defines it with this type, as the crate's documentation demands.
    unsafe { entresol_secondary(own.index) }
}
