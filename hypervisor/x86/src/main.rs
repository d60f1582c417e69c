//! The Entresol hypervisor on x86-64: the program that owns the machine.
//!
//! Purpose: starts on the bare machine (`entresol-metal-x86` brings it up), reads the boot bundle, makes the virtual machine that it
//! describes on the same core as on arm64, and runs it by AMD's SVM or Intel's VMX until it ends, with tables of the processor's second stage, or
//! on shadow tables where that is SVM.
//!
//! Rooms:
//!
//! | room | question |
//! |---|---|
//! | [`run`] | what happens between two entries? |
//! | [`exit`] | why did a guest leave, and what is done about it? |
//! | [`vm`], [`devices`] | what is a virtual machine made of? |
//! | [`host`], [`heap`] | what do all of them share? |
//!
//! A crate of its own, beside the arm64 hypervisor: nearly every file there names that architecture's interrupt controller,
//! registers or firmware, and what both need is in the core, `devices`, `loader` and `wire` already.
//!
//! Invariants: a guest is hostile. Nothing it does may panic here, allocate on the heap, or wait without bound.
//!
//! Known holes: one virtual machine of one vCPU; no interrupts of the machine, hence no time slices, guests' timers that are looked
//! at when the guest comes back, and no control channel; no transports, a serial port that only sends. What a configuration asks
//! for beyond is refused by name.
#![no_std]
#![no_main]
#![allow(unsafe_code, reason = "entry symbols, the heap, entering guests: every block says why it is sound")]

extern crate alloc;

mod devices;
mod exit;
mod heap;
mod host;
mod run;
mod vm;

use alloc::vec::Vec;

use entresol_addr::PfnRange;
use entresol_metal_x86::boot::{BootInfo, memory};
use entresol_metal_x86::{Metal, console, cpu, features, interrupts, own, power};
use entresol_wire::bundle::Bundle;

#[unsafe(no_mangle)]
fn entresol_main(info: &'static BootInfo) -> ! {
    start(info);
    let bundle = bundle(info);
    let vm = match bundle.config().vms.as_slice() {
        [config] => vm::Vm::build(config, &bundle),
        vms => refuse(format_args!("vms: {} of them: must be one on x86-64", vms.len())),
    };
    let mut vm = vm.unwrap_or_else(|error| refuse(format_args!("{error}")));
    let end = run::to_its_end(&mut vm);
    vm.report(end);
    power::off()
}

/// The virtual machine has one vCPU: the other CPUs sleep.
#[unsafe(no_mangle)]
fn entresol_secondary(_cpu: usize) -> ! {
    own::init_cpu();
    interrupts::init_cpu();
    loop {
        cpu::wait_for_interrupt();
        while let Some(line) = interrupts::ack() {
            interrupts::deactivate(line);
        }
    }
}

/// Ends the machine with what is wrong: nothing was started. The line begins as a panic's does, so that whoever watches the
/// console knows that this run failed.
fn refuse(what: core::fmt::Arguments<'_>) -> ! {
    console::write_fmt(format_args!("\nPANIC: refused to start: {what}\nEND OF PANIC\n"));
    power::off()
}

fn start(info: &'static BootInfo) {
    let frames: u64 = info.ram.iter().map(|region| region.size() >> entresol_addr::PAGE_SHIFT).sum();
    let memory = memory::split(info, heap::size(frames)).unwrap_or_else(|error| {
        refuse(format_args!(
            "the machine's memory is too small: {} bytes of heap do not fit in {}",
            error.wanted, error.largest
        ))
    });
    // SAFETY: `split` took the region out of free RAM, and gives it to nobody else.
    unsafe { heap::init(memory.heap) };
    let ranges = memory.frames.len().min(Metal::POOL_RANGES);
    let (pool, crumbs) = memory.frames.split_at(ranges);
    for crumb in crumbs {
        // SAFETY: as above; the frame pool does not get it.
        unsafe { heap::extend(*crumb) };
    }
    let mut pool: Vec<PfnRange> = pool.to_vec();
    host::set_own_tables_aside(&mut pool, cpu::count());
    own::init_cpu();
    if host::init(&pool, cpu::count()).is_err() {
        refuse(format_args!("the heap has no room for the records of {frames} frames"));
    }
    interrupts::init(info).unwrap_or_else(|error| refuse(format_args!("{error}")));
    interrupts::init_cpu();
    if let Err(error) = cpu::start_all() {
        log::error!("{error}: going on with fewer");
    }
    entresol_arch_x86::emulate::prepare();
    let bits = features::get().physical_bits;
    log::info!(
        "entresol {} on x86-64: {}, {bits} physical bits, {} CPUs, {} MiB for guests",
        env!("CARGO_PKG_VERSION"),
        if features::get().vmx.is_some() { "VMX" } else { "SVM" },
        cpu::count(),
        host::get().pool.free_frames() >> 8
    );
}

fn bundle(info: &'static BootInfo) -> Bundle<'static> {
    let Some(region) = info.bundle else {
        refuse(format_args!("no boot bundle: the loader must pass one as initial RAM disk"));
    };
    // SAFETY: the loader put the bundle there, `split` keeps it out of heap and frames, and nothing writes to it.
    let bytes = unsafe { core::slice::from_raw_parts(region.start as *const u8, region.size() as usize) };
    Bundle::parse(bytes).unwrap_or_else(|error| refuse(format_args!("boot bundle: {error}")))
}
