//! From the start code to `entresol_main`: without MMU first, then with it.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::slice;

use super::efi;
use super::info::{self, BootInfo, InfoError, Region};
use crate::{console, cpu, exception, features, machine, paging, power, traps};

unsafe extern "Rust" {
    fn entresol_main(info: &'static BootInfo) -> !;
}

unsafe extern "C" {
    static __image_start: u8;
    static __rodata_start: u8;
    static __bss_end: u8;
    static __stacks_start: u8;
    fn entresol_enable_mmu(registers: *const paging::MmuRegisters);
    fn entresol_invalidate_to_poc(start: usize, end: usize);
}

/// Bytes of a device tree's header, of which word 1 is the whole size (Devicetree Specification 5.2).
const FDT_HEADER: usize = 40;
/// booting.rst: the device tree is at most 2 MiB.
const FDT_MAX: usize = 2 << 20;

struct InfoCell(UnsafeCell<MaybeUninit<BootInfo>>);

// SAFETY: written once by the boot CPU before another CPU is started, read-only after.
unsafe impl Sync for InfoCell {}

static INFO: InfoCell = InfoCell(UnsafeCell::new(MaybeUninit::uninit()));

/// Where the image runs, in bytes: the difference between a run-time address and one in the ELF file.
pub fn image_base() -> usize {
    &raw const __image_start as usize
}

/// A run-time address as the ELF file has it, for `llvm-symbolizer`.
pub fn image_offset(address: u64) -> u64 {
    address.wrapping_sub(image_base() as u64)
}

/// First Rust code of the boot CPU. Called by the start code only: MMU off, one CPU, `dtb` as the loader gave it.
#[unsafe(no_mangle)]
pub extern "C" fn entresol_boot(dtb: usize, exception_level: u64) -> ! {
    // SAFETY: the boot protocol says what x0 points to; nothing writes there while we run.
    let blob = unsafe { device_tree(dtb) };
    if let Some(uart) = blob.and_then(info::console_of) {
        console::early_init(uart);
    }
    if exception_level != 2 {
        refuse_level(exception_level, blob);
    }
    cpu::init_self();
    exception::install();
    let Some(blob) = blob else { panic!("x0 = {dtb:#x} points to no device tree") };
    assert!(
        features::has_large_system_extensions(),
        "this CPU has no large system extensions (FEAT_LSE), which we use"
    );
    let info = machine_of(blob, dtb as u64).unwrap_or_else(|error| panic!("{error}"));
    // SAFETY: one CPU, no reference to the cell exists yet.
    let info = unsafe { (*INFO.0.get()).write(info) };
    cpu::init_others(info);
    traps::refuse_vhe();
    let registers = paging::build(info);
    // SAFETY: the tables map the image, RAM and devices where they are; what was written without caches is in memory,
    // and stale lines are dropped before caches are on. Only the boot CPU runs.
    unsafe {
        entresol_invalidate_to_poc(&raw const __rodata_start as usize, &raw const __bss_end as usize);
        entresol_invalidate_to_poc(&raw const __stacks_start as usize, cpu::boot_stack_end());
        entresol_enable_mmu(registers);
    }
    features::init();
    console::init(info);
    machine::init();
    traps::init_cpu();
    // SAFETY: the hypervisor defines it with this type, as the crate's documentation demands.
    unsafe { entresol_main(info) }
}

/// What the device tree says, and EFI firmware if it was there.
fn machine_of(blob: &'static [u8], address: u64) -> Result<BootInfo, InfoError> {
    let mut info = info::parse(blob, address, image(1), cpu::affinity())?;
    info.image = image(info.cpus.len());
    if let Some(handover) = efi::handover() {
        handover.apply(&mut info, blob)?;
    }
    Ok(info)
}

/// Says that this is not EL2, and turns the machine off as far as its firmware can be reached from here. Nothing of EL2
/// may be touched, so this is no panic.
fn refuse_level(level: u64, blob: Option<&'static [u8]>) -> ! {
    console::emergency(format_args!(
        "\nPANIC: entered at EL{level}; EL2 is needed: enable the machine's virtualization\nEND OF PANIC\n"
    ));
    if level == 1 && blob.is_some_and(info::psci_is_hvc) {
        power::off_by_hvc();
    }
    cpu::halt()
}

/// The image with the stack areas of `cpus` CPUs; areas beyond are RAM like any other.
fn image(cpus: usize) -> Region {
    let stacks = &raw const __stacks_start as u64;
    Region { start: image_base() as u64, end: stacks + (cpus * cpu::STACK_STRIDE) as u64 }
}

/// The whole device tree at `address`, if there is one.
///
/// # Safety
///
/// `address` is null or what a loader says to be the device tree's, which stays where it is.
pub(super) unsafe fn device_tree(address: usize) -> Option<&'static [u8]> {
    if address == 0 || !address.is_multiple_of(8) {
        return None;
    }
    // SAFETY: the protocol promises a device tree, whose header is readable.
    let header = unsafe { slice::from_raw_parts(address as *const u8, FDT_HEADER) };
    let size = u32::from_be_bytes([header[4], header[5], header[6], header[7]]) as usize;
    if header[..4] != [0xd0, 0x0d, 0xfe, 0xed] || !(FDT_HEADER..=FDT_MAX).contains(&size) {
        return None;
    }
    // SAFETY: as above, now for the size that the header states.
    Some(unsafe { slice::from_raw_parts(address as *const u8, size) })
}
