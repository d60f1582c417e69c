//! PID 1 of a boot whose length is measured: its first instruction ends the interval (`bench/icount.c`).
//!
//! Then, outside the interval, it prints the device tree that the kernel was given (`FDT` and hexadecimal lines), so that
//! the bare machine can be given the same one, and powers off. A kernel parameter `bootinit.quiet` leaves the tree out.

use core::arch::global_asm;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Write};

global_asm!(".globl bootinit_start", "bootinit_start:", "movz xzr, #0xe000", "b _start",);

fn main() {
    if let Err(error) = tell() {
        eprintln!("BOOT FAILED: {error}");
    }
    // SAFETY: no memory is involved; sync first, so that nothing is lost.
    unsafe {
        libc::sync();
        libc::reboot(libc::RB_POWER_OFF);
    }
    // Only without the right to power off: an init that ends makes the kernel panic, which the harness sees.
}

fn tell() -> io::Result<()> {
    mount(c"proc", c"/proc")?;
    mount(c"sysfs", c"/sys")?;
    let mut console = File::options().write(true).open("/dev/console")?;
    if !fs::read_to_string("/proc/cmdline")?.contains("bootinit.quiet") {
        for chunk in fs::read("/sys/firmware/fdt")?.chunks(32) {
            let hex: String = chunk.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(console, "FDT {hex}")?;
        }
    }
    writeln!(console, "BOOT DONE")?;
    // What was written must leave the serial line before the power does.
    // SAFETY: the descriptor is open.
    match unsafe { libc::tcdrain(std::os::fd::AsRawFd::as_raw_fd(&console)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn mount(kind: &CStr, place: &CStr) -> io::Result<()> {
    fs::create_dir_all(place.to_string_lossy().as_ref())?;
    // SAFETY: the strings live, and no data is given.
    match unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, core::ptr::null()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
