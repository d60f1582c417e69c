//! From the start code to `entresol_main`: on the start code's tables first, then on ours.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;

use acpi::madt::Madt;
use entresol_metal_common::memory::Region;

use super::info::{self, StartInfo};
use super::machine::BootInfo;
use super::{multiboot, secondary};
use crate::{apic, console, cpu, exception, features, paging, power, tables, timer};

unsafe extern "Rust" {
    fn entresol_main(info: &'static BootInfo) -> !;
}

unsafe extern "C" {
    static __image_start: u8;
    static __stacks_start: u8;
}

struct InfoCell(UnsafeCell<MaybeUninit<BootInfo>>);

// SAFETY: written once by the boot CPU before another CPU is started, read-only after.
unsafe impl Sync for InfoCell {}

static INFO: InfoCell = InfoCell(UnsafeCell::new(MaybeUninit::uninit()));

/// First Rust code of the boot CPU. Called by the start code only: the first 4 GiB are mapped where they are, one CPU,
/// `start_info` as the loader gave it; `loader` says whose it is.
#[unsafe(no_mangle)]
pub extern "C" fn entresol_boot(start_info: u64, loader: u32) -> ! {
    console::early_init();
    cpu::init_self();
    exception::install();
    let start = match loader {
        multiboot::LOADER => multiboot::parse(start_info, read_physical),
        _ => info::parse(start_info, read_physical),
    };
    let start = start.unwrap_or_else(|error| panic!("{error}"));
    // SAFETY: one CPU, no reference to the cell exists yet.
    let info = unsafe { (*INFO.0.get()).write(machine_of(start)) };
    cpu::init_others(info);
    info.image = image();
    features::init().unwrap_or_else(|missing| panic!("{missing}"));
    if let Some(page) = info.start_page {
        // SAFETY: the memory map says that it is RAM, and everything that the loader put below 1 MiB was read.
        unsafe { secondary::install(page) };
    }
    let registers = apic::find().into_iter().chain(power::register());
    // SAFETY: the tables map the image, the stacks, RAM and devices where they are. Only the boot CPU runs.
    unsafe { paging::load(paging::build(info, registers)) };
    console::init();
    cpu::init_this();
    timer::init();
    // SAFETY: the hypervisor defines it with this type, as the crate's documentation demands.
    unsafe { entresol_main(info) }
}

/// What the loader says and what ACPI's tables say.
fn machine_of(start: StartInfo) -> BootInfo {
    let Some(rsdp) = start.rsdp else { panic!("the loader knows no ACPI tables: the machine must have them") };
    // SAFETY: the loader names it; ACPI's tables lie below 4 GiB and are mapped until the last one is read, below.
    let tables = unsafe { tables::open(rsdp) }.unwrap_or_else(|error| panic!("ACPI's tables: {error:?}"));
    power::init(&tables);
    let madt = tables.find_table::<Madt>().unwrap_or_else(|error| panic!("ACPI's MADT: {error:?}"));
    BootInfo::new(start, tables::entries(&madt), apic::identifier()).unwrap_or_else(|error| panic!("{error}"))
}

/// The image with the stack areas of the CPUs that exist; areas beyond are RAM like any other.
fn image() -> Region {
    let stacks = &raw const __stacks_start as u64;
    Region { start: &raw const __image_start as u64, end: stacks + (cpu::count() * cpu::STACK_STRIDE) as u64 }
}

/// Reads what the loader wrote below 4 GiB, and zero elsewhere: nothing of it can be there.
fn read_physical(address: u64, to: &mut [u8]) {
    let inside = address != 0 && address.checked_add(to.len() as u64).is_some_and(|end| end <= 1 << 32);
    for (offset, byte) in to.iter_mut().enumerate() {
        // SAFETY: mapped by the start code's tables; nobody writes there while the boot CPU reads.
        *byte = if inside { unsafe { core::ptr::read_volatile((address as usize + offset) as *const u8) } } else { 0 };
    }
}
