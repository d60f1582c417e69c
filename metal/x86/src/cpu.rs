//! The CPUs: their stacks, their numbers, how they start and how they wait.
//!
//! Purpose: each CPU has a block that its GS base points to, and a stack area of [`STACK_STRIDE`] bytes, lowest address first: a
//! guard page, the stacks on which exceptions are reported, a guard page, the stack. The guards are mapped to nothing.
//!
//! Protocol: the boot CPU is number 0. [`init_self`] gives it its block, its GDT with a task state segment, and with that its
//! interrupt stacks; [`enable_svm`] lets it enter guests. [`start_all`] starts the others, one after the other: INIT, then twice
//! start-up to a page below 1 MiB whose few instructions lead into the image ([`crate::boot`]). Each says that it runs, and waits in
//! `entresol_secondary`.
//!
//! Invariants: a block is written before its CPU uses it, and is its own afterwards, except for its atomics and what never changes
//! any more. Lock order: none.
//!
//! Sources: APM 4.8 (descriptors), 12.2.5 (the 64-bit TSS), 15.4 and 15.30.4 (EFER.SVME, VM_HSAVE_PA), 14.1.4 and 16.5 (INIT and
//! start-up); Intel SDM volume 3A, 9.4.4.1 (the waits between them).

use core::cell::UnsafeCell;
use core::fmt;
use core::mem::offset_of;

use entresol_metal_common::stack::StackArea;
use entresol_sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use x86_64::VirtAddr;
use x86_64::instructions::tables::load_tss;
use x86_64::registers::model_specific::{Efer, EferFlags, GsBase, Msr};
use x86_64::registers::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;

use crate::boot::{BootInfo, MAX_CPUS};
use crate::switch::Vmcb;
use crate::{apic, exception, features, flush, interrupts, switch, timer, vmx};

const PAGE: usize = 4096;
/// Interrupt stacks: for every exception, for NMIs, for machine checks. The last two may come on top of the first.
const EXCEPTION_STACK: usize = 4 * PAGE;
const OTHER_STACK: usize = 2 * PAGE;
/// Their places in the task state segment, from 0.
pub(crate) const IST_EXCEPTION: u8 = 0;
pub(crate) const IST_NMI: u8 = 1;
pub(crate) const IST_MACHINE_CHECK: u8 = 2;

/// Bytes of a CPU's stack area, guards included.
pub const STACK_STRIDE: usize = 128 << 10;

/// Physical address of the page in which VMRUN keeps the host's state.
const VM_HSAVE_PA: u32 = 0xc001_0117;

/// What a CPU may take from its second start-up to its first instruction of ours; what it is left alone for after INIT, and after a
/// start-up.
const START_LIMIT_MS: u64 = 5_000;
const AFTER_INIT_US: u64 = 10_000;
const AFTER_START_UP_US: u64 = 200;

unsafe extern "Rust" {
    fn entresol_secondary(cpu: usize) -> !;
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
    StackArea::new(start as u64, STACK_STRIDE as u64, (EXCEPTION_STACK + 2 * OTHER_STACK) as u64)
}

/// Tops of the interrupt stacks in an area, in the order of the task state segment.
fn interrupt_stacks(area: &StackArea) -> [u64; 3] {
    let first = area.emergency.start + EXCEPTION_STACK as u64;
    [first, first + OTHER_STACK as u64, first + 2 * OTHER_STACK as u64]
}

/// What a CPU knows of itself.
#[repr(C, align(4096))]
struct PerCpu {
    /// Where VMRUN keeps the host's state: a page of its own.
    host_state: [u8; PAGE],
    /// What VMRUN does not keep of it, as VMSAVE left it.
    host_rest: Vmcb,
    /// What it knows of guests' translations.
    flush: flush::Cpu,
    index: usize,
    /// The vector of an interrupt that is in service and not handled; 0: none.
    note: u64,
    stack_top: u64,
    apic_id: u32,
    state: AtomicU32,
    tss: TaskStateSegment,
    gdt: GlobalDescriptorTable,
}

impl PerCpu {
    const fn new() -> Self {
        Self {
            host_state: [0; PAGE],
            host_rest: Vmcb::ZERO,
            flush: flush::Cpu::new(),
            index: 0,
            note: 0,
            stack_top: 0,
            apic_id: 0,
            state: AtomicU32::new(OFF),
            tss: TaskStateSegment::new(),
            gdt: GlobalDescriptorTable::new(),
        }
    }
}

const OFF: u32 = 0;
const RUNNING: u32 = 1;

/// Where GS finds the number, and the note.
const INDEX: usize = offset_of!(PerCpu, index);
pub(crate) const NOTE: usize = offset_of!(PerCpu, note);
/// Where it says that it is outside its guest.
pub(crate) const OUTSIDE: usize = offset_of!(PerCpu, flush) + flush::Cpu::STATE;
/// Where the start code finds the stack.
pub(crate) const STACK_TOP: usize = offset_of!(PerCpu, stack_top);

struct Blocks(UnsafeCell<[PerCpu; MAX_CPUS]>);

// SAFETY: a block is written before its CPU uses it, and after that by its CPU only, which others do not read; they read what never
// changes, and atomics.
unsafe impl Sync for Blocks {}

static BLOCKS: Blocks = Blocks(UnsafeCell::new([const { PerCpu::new() }; MAX_CPUS]));
static COUNT: AtomicUsize = AtomicUsize::new(1);
/// The page in which CPUs start; 0: there is none.
static START_PAGE: AtomicU64 = AtomicU64::new(0);

/// The block of the CPU that is being started, for the start code.
#[unsafe(export_name = "entresol_starting")]
static STARTING: AtomicU64 = AtomicU64::new(0);

/// A CPU did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartError {
    /// Its number.
    pub cpu: usize,
    /// Its local APIC's identifier.
    pub apic_id: u32,
    /// There is no memory below 1 MiB in which it could start; otherwise it never came.
    pub no_page: bool,
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CPU {} (APIC {:#x}) ", self.cpu, self.apic_id)?;
        if self.no_page {
            write!(f, "has no page of RAM below 1 MiB to start in")
        } else {
            write!(f, "did not run {START_LIMIT_MS} ms after its start-up interrupts")
        }
    }
}

/// Number of the CPU that asks, below [`count`].
#[inline]
pub fn index() -> usize {
    let index: usize;
    // SAFETY: GS points to this CPU's block since its first Rust code, and nothing writes `index` after that.
    unsafe {
        core::arch::asm!(
            "mov {}, gs:[{offset}]",
            out(reg) index,
            offset = const INDEX,
            options(nostack, readonly, preserves_flags)
        );
    }
    index
}

/// CPUs of the machine, started or not.
#[inline]
pub fn count() -> usize {
    COUNT.load(Ordering::Relaxed)
}

/// Identifier of CPU `index`'s local APIC.
///
/// # Panics
///
/// If there is no such CPU.
#[inline]
pub fn apic_id_of(index: usize) -> u32 {
    assert!(index < count(), "CPU {index} of {}", count());
    // SAFETY: below the count, blocks were written before anyone could ask; this part never changes.
    unsafe { (*block(index)).apic_id }
}

/// Sleeps until an interrupt is pending for this CPU: it is acknowledged by [`interrupts::ack`].
#[inline]
pub fn wait_for_interrupt() {
    interrupts::wait();
}

/// Stops this CPU for good.
pub fn halt() -> ! {
    loop {
        x86_64::instructions::hlt();
    }
}

/// Lets other hardware threads run while this CPU waits for a short time.
#[inline]
pub fn relax() {
    core::hint::spin_loop();
}

fn block(index: usize) -> *mut PerCpu {
    assert!(index < MAX_CPUS, "CPU {index} of {MAX_CPUS}");
    BLOCKS.0.get().cast::<PerCpu>().wrapping_add(index)
}

/// Makes this CPU number 0. Before any other CPU runs.
pub(crate) fn init_self() {
    init_block(0, 0, RUNNING);
    take_block(0);
}

/// Writes the blocks of the other CPUs, whose identifiers `info` has. Before any of them runs.
pub(crate) fn init_others(info: &BootInfo) {
    for (index, apic_id) in info.cpus.iter().enumerate() {
        match index {
            // SAFETY: the boot CPU's own block, which nobody else reads yet.
            0 => unsafe { (*block(0)).apic_id = *apic_id },
            other => init_block(other, *apic_id, OFF),
        }
    }
    COUNT.store(info.cpus.len(), Ordering::Relaxed);
    START_PAGE.store(info.start_page.unwrap_or(0), Ordering::Relaxed);
}

fn init_block(index: usize, apic_id: u32, state: u32) {
    let area = stacks_of(index);
    let mut tss = TaskStateSegment::new();
    for (place, top) in interrupt_stacks(&area).into_iter().enumerate() {
        tss.interrupt_stack_table[place] = VirtAddr::new(top);
    }
    let block = block(index);
    // SAFETY: one CPU runs, and no reference to the block exists.
    unsafe {
        (*block).index = index;
        (*block).stack_top = area.main.end;
        (*block).apic_id = apic_id;
        (*block).state = AtomicU32::new(state);
        (*block).tss = tss;
    }
}

/// Makes this CPU use the block of number `index`, which is its own.
fn take_block(index: usize) {
    let block = block(index);
    GsBase::write(VirtAddr::from_ptr(block));
    // SAFETY: the block is this CPU's, which makes its only reference to this part; afterwards nobody writes it but the processor.
    let gdt = unsafe { &mut (*block).gdt };
    let code = gdt.append(Descriptor::kernel_code_segment());
    let data = gdt.append(Descriptor::kernel_data_segment());
    // SAFETY: the task state segment is in a static, and whole.
    let task = gdt.append(unsafe { Descriptor::tss_segment_unchecked(&raw const (*block).tss) });
    // SAFETY: the table is in a static; the selectors are its own, and GS keeps its base: it is not loaded.
    unsafe {
        gdt.load_unsafe();
        CS::set_reg(code);
        SS::set_reg(data);
        DS::set_reg(data);
        ES::set_reg(data);
        load_tss(task);
    }
}

/// What every CPU needs before it enters guests, or is interrupted. On our own tables.
pub(crate) fn init_this() {
    match features::get().vmx {
        Some(_) => vmx::enable(),
        None => enable_svm(),
    }
    switch::init_cpu();
    interrupts::switch_on();
}

/// Lets this CPU enter guests.
fn enable_svm() {
    // SAFETY: `features` has found SVM; the page is this CPU's block's, mapped where it is, and nothing else is in it.
    unsafe {
        Efer::update(|efer| efer.insert(EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE));
        Msr::new(VM_HSAVE_PA).write(block(index()) as u64);
    }
}

/// Where CPU `index` keeps what VMRUN does not of its own state.
pub(crate) fn host_rest(index: usize) -> *mut Vmcb {
    // SAFETY: the address of a field of a static.
    unsafe { &raw mut (*block(index)).host_rest }
}

/// What CPU `index` knows of guests' translations.
#[inline]
pub(crate) fn flush_of(index: usize) -> &'static flush::Cpu {
    // SAFETY: a part of a static block, of atomics only.
    unsafe { &(*block(index)).flush }
}

/// The same of all CPUs but this one.
pub(crate) fn other_flushes() -> impl Iterator<Item = (usize, &'static flush::Cpu)> {
    let own = index();
    (0..count()).filter(move |cpu| *cpu != own).map(|cpu| (cpu, flush_of(cpu)))
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
    let (block, apic_id) = (block(cpu), apic_id_of(cpu));
    let number = u8::try_from(START_PAGE.load(Ordering::Relaxed) >> 12).ok().filter(|number| *number != 0);
    let page = number.ok_or(StartError { cpu, apic_id, no_page: true })?;
    STARTING.store(block as u64, Ordering::SeqCst);
    // SAFETY: the block is in a static; its state is atomic.
    let state = unsafe { &(*block).state };
    let runs = || state.load(Ordering::Acquire) == RUNNING;
    apic::send_init(apic_id);
    waits(AFTER_INIT_US, || false);
    // The second one is for CPUs that missed the first, and nothing to others.
    let started = (0..2).any(|_| {
        apic::send_start_up(apic_id, page);
        waits(AFTER_START_UP_US, runs)
    });
    if started || waits(START_LIMIT_MS * 1_000, runs) {
        Ok(())
    } else {
        Err(StartError { cpu, apic_id, no_page: false })
    }
}

/// Waits until it is `done`, at most so many microseconds; says whether it is.
fn waits(microseconds: u64, done: impl Fn() -> bool) -> bool {
    let end = timer::now() + timer::frequency() * microseconds / 1_000_000;
    while !done() {
        if timer::now() > end {
            return false;
        }
        relax();
    }
    true
}

/// First Rust code of a CPU that `start` started: on our own tables, on its own stack.
#[unsafe(no_mangle)]
extern "C" fn entresol_secondary_start(block: *const PerCpu) -> ! {
    // SAFETY: the start code passes what `start` stored; these parts do not change any more.
    let (index, state) = unsafe { ((*block).index, &(*block).state) };
    take_block(index);
    exception::load();
    init_this();
    state.store(RUNNING, Ordering::Release);
    // SAFETY: the hypervisor defines it with this type, as the crate's documentation demands.
    unsafe { entresol_secondary(index) }
}
