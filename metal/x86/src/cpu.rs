//! The CPUs: their stacks, their numbers, how they wait.
//!
//! Purpose: each CPU has a block that its GS base points to, and a stack area of [`STACK_STRIDE`] bytes, lowest address first: a
//! guard page, the stacks on which exceptions are reported, a guard page, the stack. The guards are mapped to nothing.
//!
//! Protocol: the boot CPU is number 0. [`init_self`] gives it its block, its GDT with a task state segment, and with that its
//! interrupt stacks; [`enable_svm`] lets it enter guests.
//!
//! Invariants: a block is written before its CPU uses it, and is its own afterwards.
//!
//! Sources: APM 4.8 (descriptors), 12.2.5 (the 64-bit TSS), 15.4 and 15.30.4 (EFER.SVME, VM_HSAVE_PA).
//!
//! Known holes: no other CPU is started.

use core::cell::UnsafeCell;
use core::mem::offset_of;

use entresol_metal_common::memory::Region;
use x86_64::VirtAddr;
use x86_64::instructions::tables::load_tss;
use x86_64::registers::model_specific::{Efer, EferFlags, GsBase, Msr};
use x86_64::registers::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;

/// The most CPUs that are used.
pub const MAX_CPUS: usize = 1;

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

#[repr(C, align(4096))]
struct Stacks(UnsafeCell<[[u8; STACK_STRIDE]; MAX_CPUS]>);

// SAFETY: each area is its CPU's own; Rust code makes no reference into it.
unsafe impl Sync for Stacks {}

#[unsafe(link_section = ".stacks")]
#[used]
static STACKS: Stacks = Stacks(UnsafeCell::new([[0; STACK_STRIDE]; MAX_CPUS]));

/// The parts of a CPU's stack area that are mapped.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StackArea {
    pub emergency: Region,
    pub main: Region,
}

impl StackArea {
    /// The area of CPU `index`.
    pub fn of(index: usize) -> Self {
        assert!(index < MAX_CPUS, "CPU {index} of {MAX_CPUS}");
        let start = (STACKS.0.get() as usize + index * STACK_STRIDE) as u64;
        let emergency = (EXCEPTION_STACK + 2 * OTHER_STACK) as u64;
        let emergency = Region { start: start + PAGE as u64, end: start + PAGE as u64 + emergency };
        let main = Region { start: emergency.end + PAGE as u64, end: start + STACK_STRIDE as u64 };
        Self { emergency, main }
    }

    /// Tops of the interrupt stacks, in the order of the task state segment.
    fn interrupt_stacks(&self) -> [u64; 3] {
        let first = self.emergency.start + EXCEPTION_STACK as u64;
        [first, first + OTHER_STACK as u64, first + 2 * OTHER_STACK as u64]
    }
}

/// What a CPU knows of itself.
#[repr(C, align(4096))]
struct PerCpu {
    /// Where VMRUN keeps the host's state: a page of its own.
    host_state: [u8; PAGE],
    index: usize,
    tss: TaskStateSegment,
    gdt: GlobalDescriptorTable,
}

/// Where GS finds the number.
const INDEX: usize = offset_of!(PerCpu, index);

struct Blocks(UnsafeCell<[PerCpu; MAX_CPUS]>);

// SAFETY: a block is written before its CPU uses it, and read after by that CPU only.
unsafe impl Sync for Blocks {}

static BLOCKS: Blocks = Blocks(UnsafeCell::new(
    [const { PerCpu { host_state: [0; PAGE], index: 0, tss: TaskStateSegment::new(), gdt: GlobalDescriptorTable::new() } };
        MAX_CPUS],
));

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

/// CPUs that are used.
pub fn count() -> usize {
    MAX_CPUS
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
    let block = block(0);
    // SAFETY: one CPU, no reference to the block exists; afterwards nobody writes it but the processor.
    let block: &'static mut PerCpu = unsafe { &mut *block };
    for (place, top) in StackArea::of(0).interrupt_stacks().into_iter().enumerate() {
        block.tss.interrupt_stack_table[place] = VirtAddr::new(top);
    }
    GsBase::write(VirtAddr::from_ptr(&raw const *block));
    let code = block.gdt.append(Descriptor::kernel_code_segment());
    let data = block.gdt.append(Descriptor::kernel_data_segment());
    // SAFETY: the task state segment is a static, and whole.
    let task = block.gdt.append(unsafe { Descriptor::tss_segment_unchecked(&raw const block.tss) });
    // SAFETY: the table is a static; the selectors are its own, and GS keeps its base: it is not loaded.
    unsafe {
        block.gdt.load_unsafe();
        CS::set_reg(code);
        SS::set_reg(data);
        DS::set_reg(data);
        ES::set_reg(data);
        load_tss(task);
    }
}

/// Lets this CPU enter guests.
pub(crate) fn enable_svm() {
    // SAFETY: `features` has found SVM; the page is this CPU's block's, mapped where it is, and nothing else is in it.
    unsafe {
        Efer::update(|efer| efer.insert(EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE));
        Msr::new(VM_HSAVE_PA).write(block(index()) as u64);
    }
}
