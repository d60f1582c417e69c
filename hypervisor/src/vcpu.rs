//! One virtual CPU.
//!
//! Purpose: everything a guest believes to be its CPU: general registers, EL1 state, floating point, the image of its
//! interrupt interface, its timers. While it runs, most of it stands in the hardware; [`State`] is where it stands
//! otherwise.
//!
//! Protocol: the CPU that runs a vCPU holds the lock of its [`State`] from `load` to `put`. Where the vCPU *is* belongs to
//! the scheduler ([`crate::sched::Run`]). A sibling that powers it on leaves the first registers in [`Vcpu::boot`], which the
//! CPU that loads it next takes.
//!
//! Lock order: state → scheduler; the boot registers are a leaf.

use alloc::vec::Vec;

use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicU64, Ordering};
use entresol_wire::bundle::FileIndex;
use entresol_wire::config;
use serde::{Deserialize, Serialize};

use crate::arch::{Boot, Room, SavedState, State};
use crate::sched::Run;
use crate::vm::{OutOfHeap, Wait};

/// How the counts of a machine that goes on from a saved state relate to this machine's.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    /// What the guest's count lags behind.
    #[cfg_attr(target_arch = "x86_64", expect(dead_code, reason = "each vCPU has an offset of its own"))]
    pub offset: u64,
    /// How far this machine's count is ahead of the one that it was saved on.
    pub jump: u64,
}

/// A vCPU outside the machine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    on: bool,
    boot: Option<Boot>,
    state: SavedState,
    /// Stolen time: nanoseconds, and whether the guest has asked for it.
    stolen: (u64, bool),
}

/// A virtual CPU.
pub struct Vcpu {
    run: AtomicU64,
    /// The registers for its next start.
    pub boot: Mutex<Option<Boot>>,
    /// See the module.
    pub state: Mutex<State>,
    /// How long it has waited for a CPU.
    pub wait: Wait,
}

const OFF: u64 = 0;
const READY: u64 = 1;
const WAITING: u64 = 2;
const PARKED: u64 = 3;
const FETCHING: u64 = 4;
const RUNNING: u64 = 5;

/// Room for `count` vCPUs.
///
/// # Errors
///
/// [`OutOfHeap`].
pub fn rooms(count: usize) -> Result<Vec<Room>, OutOfHeap> {
    let mut rooms = Vec::new();
    rooms.try_reserve_exact(count).map_err(|_| OutOfHeap)?;
    for _ in 0..count {
        rooms.push(Room::new()?);
    }
    Ok(rooms)
}

impl Vcpu {
    /// vCPU `index`, powered off.
    pub fn new(index: u8, room: Room) -> Self {
        let state = Mutex::new(State::new(index, room));
        Self { run: AtomicU64::new(OFF), boot: Mutex::new(None), state, wait: Wait::default() }
    }

    /// The same vCPU of a copy of its virtual machine. It is on no CPU, and neither is the copy's, which runs when that is let
    /// run; a wait for an interrupt ends then, as waits may.
    pub fn fork(&self, room: Room) -> Self {
        let state = self.state.lock();
        let run = if self.run() == Run::Off { OFF } else { PARKED };
        // Made where it stays: it is large.
        let state = Mutex::new(state.fork(room));
        Self { run: AtomicU64::new(run), boot: Mutex::new(*self.boot.lock()), state, wait: self.wait.fork() }
    }

    /// Its state outside the machine; it is on no CPU.
    pub fn save(&self) -> Saved {
        Saved {
            on: self.run() != Run::Off,
            boot: *self.boot.lock(),
            state: self.state.lock().save(),
            stolen: self.wait.save(),
        }
    }

    /// vCPU `index` as it was saved, on no CPU, with such counts from now on, of a virtual machine as `config` says.
    pub fn load(index: u8, room: Room, saved: Saved, counts: Counts, config: &config::Vm<FileIndex>) -> Self {
        Self {
            run: AtomicU64::new(if saved.on { PARKED } else { OFF }),
            boot: Mutex::new(saved.boot),
            state: Mutex::new(State::load(index, room, saved.state, counts, config)),
            wait: Wait::load(saved.stolen),
        }
    }

    /// Where it is. Stable only under the scheduler's lock.
    pub fn run(&self) -> Run {
        match self.run.load(Ordering::Acquire) {
            OFF => Run::Off,
            READY => Run::Ready,
            WAITING => Run::Waiting,
            FETCHING => Run::Fetching,
            PARKED => Run::Parked,
            running => Run::Running((running - RUNNING) as usize),
        }
    }

    /// For the scheduler, under its lock.
    pub fn set_run(&self, run: Run) {
        let raw = match run {
            Run::Off => OFF,
            Run::Ready => READY,
            Run::Waiting => WAITING,
            Run::Fetching => FETCHING,
            Run::Parked => PARKED,
            Run::Running(cpu) => RUNNING + cpu as u64,
        };
        self.run.store(raw, Ordering::SeqCst);
    }
}
