//! The hypervisor's side of the control channel: what an owner on the host asks of it, and what it tells.
//!
//! Rooms:
//!
//! | room | what it does |
//! |---|---|
//! | [`ring`], [`ports`], [`channel`] | move bytes through the outer machine's virtio console, never waiting |
//! | [`stream`] | cuts them into lines, and holds a bounded amount of lines that wait |
//! | [`session`] | one request after the other, and events of the attached console |
//! | [`ops`], [`private`], [`poison`], [`stored`], [`tags`] | what each request does |
//! | [`later`] | an answer that a task gives |
//!
//! Protocol: everything is done in [`serve`], the host's work, on the boot CPU with no vCPU loaded and no grace period
//! pinned. [`printed`], [`input_wanted`] and [`state_changed`] are called from exits on any CPU and only raise that work, and
//! only if that virtual machine's console is attached. The channel's interrupt comes to the boot CPU.
//!
//! Trust: a client owns the machine, but a request is read as a stranger's, and a client that never reads stops nobody:
//! its answers fill a bounded queue, then its requests are not read any more, and output that it does not take is counted.
//!
//! Lock order: session → everything that host's work takes; the channel is a leaf.
//!
//! Known holes: a guest that reboots while its console is attached is told as running all the time. With QEMU's
//! `virtconsole`, which has no flow control, a client that reads slowly finds torn lines.

mod channel;
mod dirty;
mod later;
mod ops;
mod poison;
mod ports;
mod private;
mod ring;
mod session;
mod stored;
mod stream;
mod tags;

use core::fmt::{self, Write};

use crate::arch::boot::BootInfo;
use crate::arch::lines;
use entresol_sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use entresol_sync::{Mutex, Once};
use entresol_wire::control::State;

use crate::host_work::{self, Work};
use crate::registry;
use crate::vm::{Crash, OutOfHeap, Pause, Status, Stop, Vm};
use channel::Channel;
use session::{Session, Then};

pub use later::Later;
pub use ops::fork_refused;
pub use stored::refused as store_refused;

/// What [`ATTACHED`] holds when no console is attached.
const NOBODY: usize = usize::MAX;

/// The virtual machine whose console is attached.
static ATTACHED: AtomicUsize = AtomicUsize::new(NOBODY);
/// It has printed, and the work was raised for that.
static PRINTED: AtomicBool = AtomicBool::new(false);
/// It has had room for input since it was last given some.
static ROOM: AtomicBool = AtomicBool::new(false);

static INTID: AtomicU32 = AtomicU32::new(u32::MAX);
static CHANNEL: Once<Mutex<Channel>> = Once::new();
static SESSION: Once<Mutex<Session>> = Once::new();

/// Finds the channel among the machine's devices. A machine without one runs without control.
///
/// # Errors
///
/// [`OutOfHeap`].
pub fn init(info: &BootInfo) -> Result<(), OutOfHeap> {
    let (channel, device) = match Channel::find(&info.virtio_mmio) {
        Ok(Some(found)) => found,
        Ok(None) => {
            log::info!("control: the machine has no virtio console, so there is no control channel");
            return Ok(());
        }
        Err(virtio_drivers::Error::DmaError) => return Err(OutOfHeap),
        Err(error) => {
            log::error!("control: no control channel: its device does not start: {error}");
            return Ok(());
        }
    };
    let session = Session::new()?;
    CHANNEL.call_once(|| Mutex::new(channel));
    SESSION.call_once(|| Mutex::new(session));
    INTID.store(device.intid, Ordering::Relaxed);
    if let Err(error) = lines::set_edge(device.intid, device.edge).and_then(|()| lines::enable(device.intid)) {
        log::error!("control: no control channel: {error}");
    }
    // The line may have risen before the interrupt was edge-triggered, and would never rise again: it is lowered, and what
    // it stood for is looked at.
    acknowledge();
    host_work::raise(Work::Control);
    Ok(())
}

/// Whether `intid` is the channel's.
pub fn owns(intid: u32) -> bool {
    INTID.load(Ordering::Relaxed) == intid
}

/// Its interrupt has come.
pub fn acknowledge() {
    if let Some(channel) = CHANNEL.get() {
        channel.lock().acknowledge();
    }
}

/// Host's work: reads requests, answers, sends events.
pub fn serve() {
    let (Some(channel), Some(session)) = (CHANNEL.get(), SESSION.get()) else { return };
    loop {
        let then = session.lock().serve(channel);
        match then {
            Then::Return => return,
            Then::Settle => registry::settle(),
        }
    }
}

/// Host's work: no virtual machine is left and the machine is about to turn off. Says what is left to say, for a bounded time.
pub fn farewell() {
    if let (Some(channel), Some(session)) = (CHANNEL.get(), SESSION.get()) {
        session.lock().farewell(channel);
    }
}

/// Whether the console of virtual machine `number` is attached.
pub fn is_attached(number: usize) -> bool {
    ATTACHED.load(Ordering::SeqCst) == number
}

/// Virtual machine `number` has printed.
pub fn printed(number: usize) {
    if ATTACHED.load(Ordering::Relaxed) == number && !PRINTED.swap(true, Ordering::SeqCst) {
        host_work::raise(Work::Control);
    }
}

/// A doorbell rang. The work finds out whether it is one of the attached virtual machine.
pub fn rung() {
    if ATTACHED.load(Ordering::SeqCst) != NOBODY {
        host_work::raise(Work::Control);
    }
}

/// Virtual machine `number` has room for input.
pub fn input_wanted(number: usize) {
    if ATTACHED.load(Ordering::Relaxed) == number {
        ROOM.store(true, Ordering::SeqCst);
        host_work::raise(Work::Control);
    }
}

/// `vm` has changed its state. The work finds out whether that is the attached one.
pub fn state_changed(_vm: &Vm) {
    if ATTACHED.load(Ordering::Relaxed) != NOBODY {
        host_work::raise(Work::Control);
    }
}

/// A reason in words, in memory of its own: a guest can cause it at any time. What does not fit is cut off.
struct Reason {
    text: [u8; Self::LONGEST],
    len: usize,
}

impl Reason {
    const LONGEST: usize = 80;

    fn new(text: fmt::Arguments<'_>) -> Self {
        let mut reason = Self { text: [0; Self::LONGEST], len: 0 };
        // It fails where it is cut off.
        let _cut = reason.write_fmt(text);
        reason
    }

    fn as_str(&self) -> &str {
        core::str::from_utf8(&self.text[..self.len]).unwrap_or_default()
    }
}

impl fmt::Write for Reason {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.text.get_mut(self.len..self.len + text.len()).ok_or(fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.len += text.len();
        Ok(())
    }
}

/// A status as the protocol tells it.
fn describe(status: Status) -> (State, Option<Reason>) {
    let crashed = |text: fmt::Arguments<'_>| (State::Crashed, Some(Reason::new(text)));
    let named = |state, text: &str| (state, Some(Reason::new(format_args!("{text}"))));
    match status {
        Status::Running => (State::Running, None),
        Status::Paused(Pause::NotStarted) => named(State::Paused, "NotStarted"),
        Status::Paused(Pause::Owner) => named(State::Paused, "Owner"),
        Status::Paused(Pause::OutOfMemory) => named(State::Paused, "OutOfMemory"),
        Status::Paused(Pause::CoalescedFull) => named(State::Paused, "CoalescedFull"),
        Status::Paused(Pause::Storage) => named(State::Paused, "Storage"),
        Status::Paused(Pause::DirtyRingFull) => named(State::Paused, "DirtyRingFull"),
        Status::Stopped(Stop::PowerOff) => named(State::Stopped, "PowerOff"),
        Status::Stopped(Stop::Reset) => named(State::Stopped, "Reset"),
        Status::Stopped(Stop::Killed) => named(State::Stopped, "Killed"),
        Status::Crashed(Crash::SystemError { syndrome }) => {
            crashed(format_args!("SystemError: ESR_EL2 = {syndrome:#x}"))
        }
        Status::Crashed(Crash::Unsupported { syndrome }) => {
            crashed(format_args!("Unsupported fault: ESR_EL2 = {syndrome:#x}"))
        }
        Status::Crashed(Crash::TripleFault) => crashed(format_args!("TripleFault")),
        Status::Crashed(Crash::InvalidState) => crashed(format_args!("InvalidState")),
        Status::Crashed(Crash::Unexpected) => crashed(format_args!("Unexpected exit")),
        Status::Crashed(Crash::BadObject { gpa }) => crashed(format_args!("BadObject at {gpa:#x}")),
        Status::Crashed(Crash::NoSyndrome { instruction: Some(word), gpa, syndrome }) => {
            crashed(format_args!("NoSyndrome: instruction {word:#010x} at {gpa:#x}, ESR_EL2 = {syndrome:#x}"))
        }
        Status::Crashed(Crash::NoSyndrome { instruction: None, gpa, syndrome }) => {
            crashed(format_args!("NoSyndrome: at {gpa:#x}, ESR_EL2 = {syndrome:#x}"))
        }
    }
}
