//! The Entresol hypervisor: the program that owns the machine.
//!
//! Purpose: starts on the bare machine (`entresol-metal-arm64` or `entresol-metal-x86` brings it up), reads the boot bundle, makes the virtual
//! machines that it describes, and runs their vCPUs on all CPUs until none is left.
//!
//! Rooms:
//!
//! | room | question |
//! |---|---|
//! | [`run`], [`sched`] | which vCPU runs on this CPU, and when does it leave? |
//! | [`arch`] | what do the two architectures do differently? |
//! | [`exit`] | what follows when a guest has left? |
//! | [`vm`], [`vcpu`] | what is a virtual machine made of? |
//! | [`irq`], [`host_work`] | what does the hypervisor do for itself? |
//! | [`console`], [`control`] | how do people reach guests, and the hypervisor? |
//! | [`paging`] | who waits for pages that are not in memory? |
//! | [`registry`] | which virtual machines are there? |
//! | [`block`], [`store`], [`swap`] | what is kept on the outer machine's disks? |
//! | [`snapshot`] | how does a virtual machine become a file, and a file one? |
//!
//! Invariants: a guest is hostile. Nothing it does may panic here, allocate on the heap, or wait without bound.
//!
//! Lock order, first to last: a vCPU's state · registry · a VM's status · a device · console input · scheduler · readings of pages · vGIC ·
//! core's own locks · machine's console.
//!
//! It builds for the bare machine only: `cargo xtask run`.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "entry symbols, the heap, entering guests: every block says why it is sound")]

extern crate alloc;

mod arch;
mod block;
mod clock;
mod console;
mod control;
mod counters;
mod dma;
mod entropy;
mod exit;
mod heap;
mod host;
mod host_work;
mod irq;
mod merge;
mod paging;
mod registry;
mod report;
mod run;
mod sched;
mod service;
mod snapshot;
mod store;
mod swap;
mod vcpu;
mod vm;

use alloc::vec::Vec;

use arch::boot::{BootInfo, memory};
use arch::{Metal, console as machine_console, cpu, own, power};
use entresol_sync::Once;
use entresol_wire::bundle::Bundle;
use entresol_wire::config::{Console, format_size};

/// Set when the secondary CPUs may run vCPUs.
static READY: Once<()> = Once::new();

#[unsafe(no_mangle)]
fn entresol_main(info: &'static BootInfo) -> ! {
    start(info);
    READY.call_once(|| ());
    run::forever(cpu::index())
}

#[unsafe(no_mangle)]
fn entresol_secondary(cpu: usize) -> ! {
    READY.wait();
    start_cpu();
    run::forever(cpu)
}

/// Ends the machine with what is wrong: nothing was started. The line begins as a panic's does, so that whoever watches the
/// console knows that this run failed.
fn refuse(what: core::fmt::Arguments<'_>) -> ! {
    machine_console::write_fmt(format_args!("\nPANIC: refused to start: {what}\nEND OF PANIC\n"));
    power::off()
}

fn start(info: &'static BootInfo) {
    let frames: u64 = info.ram.iter().map(|region| region.size() >> entresol_addr::PAGE_SHIFT).sum();
    let mut memory = memory::split(info, heap::size(frames)).unwrap_or_else(|error| {
        refuse(format_args!(
            "the machine's memory is too small: {} bytes of heap do not fit in {}",
            error.wanted, error.largest
        ))
    });
    // SAFETY: `split` took the region out of free RAM, and gives it to nobody else.
    unsafe { heap::init(memory.heap) };
    let ranges = memory.frames.len().min(Metal::POOL_RANGES);
    let (pool, crumbs) = memory.frames.split_at_mut(ranges);
    host::set_own_tables_aside(pool, cpu::count());
    for crumb in &*crumbs {
        // SAFETY: as above; the frame pool does not get it.
        unsafe { heap::extend(*crumb) };
    }
    if host::init(pool, cpu::count()).is_err() {
        refuse(format_args!("the heap has no room for the records of {frames} frames"));
    }
    arch::start(info).unwrap_or_else(|error| refuse(format_args!("{error}")));
    start_cpu();
    clock::init(info);
    log::info!(
        "entresol {}: {} CPUs, {} MiB for guests",
        env!("CARGO_PKG_VERSION"),
        cpu::count(),
        host::get().pool.free_frames() >> 8
    );
    if let Err(error) = cpu::start_all() {
        log::error!("{error}: going on with fewer");
    }
    start_guests(info);
}

/// What each CPU needs before it runs vCPUs.
fn start_cpu() {
    own::init_cpu();
    arch::start_cpu().unwrap_or_else(|error| refuse(format_args!("CPU {}: {error}", cpu::index())));
}

fn start_guests(info: &'static BootInfo) {
    let Some(region) = info.bundle else {
        refuse(format_args!("no boot bundle: the loader must pass one as initial RAM disk"));
    };
    // SAFETY: the loader put the bundle there, `split` keeps it out of heap and frames, and nothing writes to it.
    let bytes = unsafe { core::slice::from_raw_parts(region.start as *const u8, region.size() as usize) };
    let bundle = Bundle::parse(bytes).unwrap_or_else(|error| refuse(format_args!("boot bundle: {error}")));
    if bundle.config().outer.arch != arch::ARCH {
        let (wanted, ours) = (bundle.config().outer.arch, arch::ARCH);
        refuse(format_args!("outer.arch = {wanted:?}: must be this machine's, {ours:?}"));
    }
    let own = bundle.config().outer.housekeeping_cpus as usize;
    if own >= cpu::count() {
        let most = cpu::count() - 1;
        refuse(format_args!("outer.housekeeping_cpus = {own}: must be from 0 to {most} on this machine"));
    }
    sched::set_aside(own);
    vm::rom::init(&bytes[..bundle.total() as usize]);
    // The bundle was checked against the machine that its owner had in mind.
    let ram: u64 = info.ram.iter().map(|region| region.size()).sum();
    if let Some(vm) = bundle.config().vms.iter().find(|vm| vm.memory > ram) {
        let (memory, ram) = (format_size(vm.memory), format_size(ram));
        refuse(format_args!("vm {}: memory = {memory}: must be at most the machine's: {ram}", vm.name));
    }
    let names: Vec<&str> = bundle.config().vms.iter().map(|vm| vm.name.as_str()).collect();
    let foreground = bundle.config().vms.iter().position(|vm| vm.policies.console == Console::Foreground);
    if console::init(info, &names, foreground.unwrap_or(0)).is_err() || control::init(info).is_err() {
        refuse(format_args!("the heap has no room for consoles and the control channel"));
    }
    drop(names);
    block::init(info);
    swap::init();
    vm::pass_through::init(info);
    if let Err((name, error)) = registry::init(bundle) {
        refuse(format_args!("vm {name}: {error}"));
    }
}
