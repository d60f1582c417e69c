//! A small VMM on `/dev/kvm`, PID 1 of a Linux that is measured against the hypervisor: one vCPU, the kernel's vGICv3, a
//! PL011 and a PL031 good enough for Linux, PSCI by the kernel.
//!
//! The initial file system holds `/guest/kernel`, and for Linux `/guest/initrd` and `/guest/dtb`; without a device tree
//! the kernel is a flat image and gets a small tree of its own. Kernel parameters of the host:
//!
//! | parameter | meaning |
//! |---|---|
//! | `peer.page=4k` or `2m` | what backs the guest's memory: small pages, or transparent huge ones |
//! | `peer.memory=BYTES` | how much there is |
//! | `peer.args=A+B` | the flat guest's command line, `+` for each space; its `service=` is [`SERVICE`] |
//!
//! The guest's console is kept and printed when the guest has ended, so that the host's serial line costs nothing while
//! something is counted.

mod devices;
mod load;
mod memory;
mod vm;

use std::error::Error;
use std::ffi::CStr;
use std::fs;
use std::io::{self, Write};

use devices::Devices;
use memory::{Backing, Memory};
use vm::Vm;

/// Where the guest's memory is.
pub const RAM: u64 = 0x4000_0000;
/// A store of an address here, then of a length 8 bytes behind it, takes the range's second-stage entries away; one 16 bytes behind it
/// takes the coalesced writes.
pub const SERVICE: u64 = 0x0b00_0000;

fn main() {
    if let Err(error) = run() {
        println!("PEER FAILED: {error}");
    }
    // SAFETY: no memory is involved; the descriptor is open.
    unsafe {
        libc::tcdrain(1);
        libc::reboot(libc::RB_POWER_OFF);
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    mount(c"devtmpfs", c"/dev")?;
    mount(c"proc", c"/proc")?;
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    let parameter =
        |name: &str| cmdline.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap_or_default();
    let backing = match parameter("peer.page=") {
        "4k" => Backing::Pages,
        "2m" => Backing::Huge,
        other => return Err(format!("peer.page={other}: must be 4k or 2m").into()),
    };
    let size = parameter("peer.memory=");
    let size: u64 = size.parse().map_err(|error| format!("peer.memory={size}: {error}"))?;
    let mut memory = Memory::new(size, backing)?;
    let start = load::load(&mut memory, &parameter("peer.args=").replace('+', " "))?;
    let mut vm = Vm::new(memory)?;
    let mut devices = Devices::default();
    let ended = vm.run(start, &mut devices);
    io::stdout().write_all(&devices.console)?;
    ended
}

fn mount(kind: &CStr, place: &CStr) -> io::Result<()> {
    // SAFETY: the strings live, and no data is given.
    match unsafe { libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, core::ptr::null()) } {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // The kernel may have mounted /dev itself.
            error if error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
            error => Err(error),
        },
    }
}
