//! What a guest program needs of a machine that has no operating system.
//!
//! A guest is one flat image for QEMU's `virt` machine at EL1: started at its first byte with X0 = device tree, MMU off,
//! on one CPU. [`entry`] relocates the image, drops from EL2 if the machine starts there (so that every guest also runs
//! on the bare machine), gives each CPU a stack and exception vectors, and calls `guest_main`, which [`guest!`] names.
//!
//! | room | what |
//! |---|---|
//! | [`entry`], [`trap`] | start, stacks, exceptions; [`trap::attempt`] turns an exception into a value |
//! | [`console`], [`report`] | the PL011; PASS and FAIL lines that a test harness reads |
//! | [`fdt`], [`machine`] | what the device tree says; where things are on `virt` |
//! | [`smccc`], [`smp`] | calls to the firmware; CPUs on and off |
//! | [`memory`], [`mmu`] | raw loads, stores, cache maintenance; stage-1 tables |
//! | [`gic`], [`timer`] | GICv3 and generic timers |
//! | [`rng`] | a generator whose seed replays a run |
//!
//! Rule of memory: the image belongs to Rust. [`memory`] reads and writes any other address as the guest likes, and
//! refuses addresses inside the image, so no safe function can touch what a reference may point to.
//!
//! Known hole: atomics are used with the MMU off, where exclusives to what is then Device memory need not work on every
//! machine (Arm DDI 0487 B2.12). On QEMU's they do, and that is the machine these programs are for.

#![no_std]

pub mod console;
pub mod entry;
pub mod fdt;
pub mod gic;
pub mod machine;
pub mod memory;
pub mod mmu;
pub mod report;
pub mod rng;
pub mod smccc;
pub mod smp;
pub mod timer;
pub mod trap;

/// Reads a system register by its name (or `S3_…` encoding).
#[macro_export]
macro_rules! sysreg_read {
    ($name:literal) => {{
        let value: u64;
        // SAFETY: reading a system register changes no memory; a register that does not exist is an exception.
        unsafe { core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nostack)) };
        value
    }};
}

/// Writes a system register by its name, and synchronises the context.
#[macro_export]
macro_rules! sysreg_write {
    ($name:literal, $value:expr) => {{
        let value: u64 = $value;
        // SAFETY: the guest owns its CPU; registers that change translation are written only by mmu.rs and by guests
        // whose purpose it is.
        unsafe { core::arch::asm!(concat!("msr ", $name, ", {}"), "isb", in(reg) value, options(nostack)) };
    }};
}

/// Names the guest's main function, which takes a [`machine::Machine`] and returns nothing: the machine powers off
/// when it returns.
#[macro_export]
macro_rules! guest {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "Rust" fn guest_main(machine: &$crate::machine::Machine) {
            let main: fn(&$crate::machine::Machine) = $main;
            main(machine);
        }
    };
}
