//! arm64: stage 2, a GICv3, PSCI, and QEMU's `virt` machine.
//!
//! | room | question |
//! |---|---|
//! | [`board`](Board), [`stolen`], `map` | what does a guest find, and where? |
//! | [`guest`](Guest) | how does it start? |
//! | [`state`](State), `physical_timer` | what is a vCPU? |
//! | `turn`, `exit` | what happens between two entries? |

mod board;
pub mod exit;
mod guest;
mod line;
pub mod map;
mod physical_timer;
mod places;
mod state;
mod stolen;
pub mod turn;

pub use entresol_arch_arm64::stage2::Stage2 as Format;
pub use entresol_metal_arm64::gic as lines;
pub use entresol_metal_arm64::{Metal, boot, console, cpu, own, power, probe, random, timer};

use boot::BootInfo;
use core::fmt;
use entresol_metal_arm64::switch::gic as interface;
use entresol_wire::config::Arch;

pub use board::{Board, Saved as SavedBoard};
pub use guest::{Guest, window};
pub use line::Line;
pub use state::{Boot, Room, Saved as SavedState, State};

/// The core's part of a virtual machine.
pub type Memory = entresol_mmu::Vm<'static, Metal, Format>;

/// What of a vCPU its access to an interrupt controller needs.
pub type Accessor<'s> = &'s mut State;

/// What configurations call this architecture.
pub const ARCH: Arch = Arch::Arm64;
/// Software-generated interrupt that makes another CPU look up from what it does.
pub const KICK: u32 = 1;
/// The hypervisor's own timer.
pub const TIMER: u32 = lines::HYPERVISOR_TIMER;
/// vCPUs that are powered on with their virtual machine: the others wait for PSCI's CPU_ON.
pub const fn first_vcpus(_vcpus: usize) -> usize {
    1
}

/// The next interrupt of the machine that is pending for this CPU; others may come from then on.
pub fn take_interrupt() -> Option<u32> {
    let intid = lines::ack()?;
    lines::drop_priority(intid);
    Some(intid)
}

/// It is handled.
pub fn end_interrupt(intid: u32) {
    lines::deactivate(intid);
}

/// Makes CPU `cpu` look up.
#[inline]
pub fn kick(cpu: usize) {
    lines::send_sgi(cpu, KICK);
}

/// The machine's part of the hypervisor's start, on the boot CPU, before any other.
///
/// # Errors
///
/// What the machine lacks.
pub fn start(info: &'static BootInfo) -> Result<(), Lacks> {
    lines::init(info).map_err(Lacks::Controller)?;
    if interface::traps_deactivation() { Ok(()) } else { Err(Lacks::Deactivation) }
}

/// What each CPU needs before it runs vCPUs.
///
/// # Errors
///
/// What it lacks.
pub fn start_cpu() -> Result<(), Lacks> {
    let ready = lines::init_cpu().and_then(|()| lines::enable(TIMER)).and_then(|()| lines::enable(lines::MAINTENANCE));
    ready.map_err(Lacks::Controller)
}

/// What the machine does not have.
#[derive(Clone, Copy, Debug)]
pub enum Lacks {
    /// An interrupt controller that can be used.
    Controller(lines::Error),
    /// One that traps a guest's deactivations.
    Deactivation,
}

impl fmt::Display for Lacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Controller(error) => write!(f, "{error}"),
            Self::Deactivation => f.write_str("GICv3: ICH_VTR_EL2.TDS is 0: deactivation by guests cannot be trapped"),
        }
    }
}

/// Unix time in seconds by the outer machine's clock. `None`: it has none.
pub fn unix_seconds(info: &BootInfo) -> Option<u64> {
    /// PL031 RTCDR: seconds of Unix time (DDI 0224, 3.3.1).
    const DATA: u64 = 0;
    let rtc = info.rtc.as_ref()?;
    // SAFETY: the device tree names a PL031 there; EL2 maps it as Device memory, and reading the time changes nothing.
    let now = unsafe { ((rtc.registers.start + DATA) as *const u32).read_volatile() };
    Some(now.into())
}
