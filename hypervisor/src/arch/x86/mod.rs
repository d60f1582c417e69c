//! x86-64: AMD's SVM or Intel's VMX with a second stage, local APICs and an I/O APIC, and a machine in the manner of QEMU's `microvm` (`docs/x86.md`).
//!
//! | room | question |
//! |---|---|
//! | [`board`](Board), `map` | what does a guest find, and where? |
//! | [`guest`](Guest) | how does it start? |
//! | [`state`](State) | what is a vCPU? |
//! | `turn`, `exit` | what happens between two entries? |

mod board;
pub mod exit;
mod guest;
pub mod map;
mod state;
pub mod turn;

pub use entresol_arch_x86::either::Either as Format;
pub use entresol_metal_x86::interrupts as lines;
pub use entresol_metal_x86::{Metal, boot, console, cpu, own, power, probe, random, timer};

use boot::BootInfo;
use entresol_metal_x86::{features, rtc};
use entresol_wire::config::Arch;

pub use board::{Board, Line, Now, Saved as SavedBoard};
pub use guest::{Guest, window};
pub use lines::{KICK, TIMER};
pub use state::{Boot, Room, Saved as SavedState, State};

/// What of a vCPU its access to an interrupt controller needs.
pub type Accessor<'s> = &'s Now;

/// What configurations call this architecture.
pub const ARCH: Arch = Arch::X86;

/// The core's part of a virtual machine.
pub type Memory = entresol_mmu::Vm<'static, Metal, Format>;

/// vCPUs that are powered on with their virtual machine: all. Those but the first wait for SIPI.
pub const fn first_vcpus(vcpus: usize) -> usize {
    vcpus
}

/// Makes CPU `cpu` look up.
#[inline]
pub fn kick(cpu: usize) {
    lines::send_sgi(cpu, KICK);
}

/// The next interrupt of the machine that is pending for this CPU.
pub fn take_interrupt() -> Option<u32> {
    lines::ack()
}

/// It is handled.
pub fn end_interrupt(line: u32) {
    lines::deactivate(line);
}

/// The machine's part of the hypervisor's start, on the boot CPU, before any other.
///
/// # Errors
///
/// What the machine lacks.
pub fn start(info: &'static BootInfo) -> Result<(), lines::Error> {
    entresol_arch_x86::emulate::prepare();
    lines::init(info)?;
    let way = if features::get().vmx.is_some() { "VMX" } else { "SVM" };
    log::info!("{way}, {} physical bits", features::get().physical_bits);
    Ok(())
}

/// What each CPU needs before it runs vCPUs.
///
/// # Errors
///
/// None: what a CPU lacks was found before.
pub fn start_cpu() -> Result<(), lines::Error> {
    lines::init_cpu();
    Ok(())
}

/// Unix time in seconds by the machine's clock. `None`: it makes no sense.
pub fn unix_seconds(_info: &BootInfo) -> Option<u64> {
    rtc::unix_seconds()
}
