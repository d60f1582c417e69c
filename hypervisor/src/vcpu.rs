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

use entresol_arch_arm64::mpidr::Affinity;
use entresol_arch_arm64::policy::MDSCR_GUEST;
use entresol_arch_arm64::syndrome;
use entresol_devices::gic::ListRegisters;
use entresol_metal_arm64::switch::gic::{self, GicState};
use entresol_metal_arm64::switch::{El1State, FpState, Registers, TagState, TimerState};
use entresol_slot::Hint;
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicU64, Ordering};
use serde::{Deserialize, Serialize};

use crate::physical_timer::PhysicalTimer;
use crate::sched::Run;
use crate::vm::Wait;

/// PSTATE of a vCPU at its first instruction: EL1h, all exceptions masked (PSCI, CPU_ON; Linux boot protocol).
const RESET_PSTATE: u64 = 0b1111 << 6 | 0b0101;

/// SPSR_EL2.SS: a software step that is due is taken before the next instruction, not again for this one.
const SINGLE_STEP: u64 = 1 << 21;

/// The registers that a vCPU starts with.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// First instruction.
    pub entry: u64,
    /// X0.
    pub argument: u64,
}

/// What stands in the hardware while the vCPU runs.
pub struct State {
    /// General registers, PC, PSTATE: saved at every exit.
    pub regs: Registers,
    /// EL1 and EL0 system registers.
    pub el1: El1State,
    /// SIMD and floating point.
    pub fp: FpState,
    /// Memory tagging, where its virtual machine has it.
    pub tags: TagState,
    /// List registers and the rest of the virtual CPU interface.
    pub gic: ListRegisters,
    /// The same as the hardware takes it, with the active priorities.
    pub interface: GicState,
    /// The virtual timer.
    pub timer: TimerState,
    /// The emulated physical timer.
    pub physical_timer: PhysicalTimer,
    /// Writes of its translation registers trap ([`crate::exit::toggles`]).
    pub watched: bool,
    /// Where its last fault found its slot.
    pub hint: Hint,
}

/// A vCPU outside the machine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    on: bool,
    boot: Option<(u64, u64)>,
    regs: Registers,
    el1: El1State,
    fp: FpState,
    /// Zero where the virtual machine has no memory tagging.
    #[serde(default)]
    tags: TagState,
    vmcr: u64,
    active: ([u64; 4], [u64; 4]),
    timer: (u64, u64),
    physical_timer: PhysicalTimer,
    watched: bool,
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

impl Vcpu {
    /// vCPU `index`, powered off.
    pub fn new(index: u8) -> Self {
        let state = State {
            regs: Registers::ZERO,
            el1: El1State::reset(Affinity::of_vcpu(index).fields()),
            fp: FpState::ZERO,
            tags: TagState::RESET,
            gic: ListRegisters::new(gic::list_registers() as u64 - 1),
            interface: GicState::RESET,
            timer: TimerState::default(),
            physical_timer: PhysicalTimer::default(),
            watched: false,
            hint: Hint::new(),
        };
        Self { run: AtomicU64::new(OFF), boot: Mutex::new(None), state: Mutex::new(state), wait: Wait::default() }
    }

    /// The same vCPU of a copy of its virtual machine. It is on no CPU, and neither is the copy's, which runs when that is let
    /// run; a wait for an interrupt ends then, as waits may.
    pub fn fork(&self) -> Self {
        let state = self.state.lock();
        let run = if self.run() == Run::Off { OFF } else { PARKED };
        // Made where it stays: it is large.
        let state = Mutex::new(State {
            regs: state.regs.clone(),
            el1: state.el1.clone(),
            fp: state.fp.clone(),
            tags: state.tags,
            gic: state.gic.clone(),
            interface: state.interface.clone(),
            timer: state.timer,
            physical_timer: state.physical_timer,
            watched: state.watched,
            hint: Hint::new(),
        });
        Self { run: AtomicU64::new(run), boot: Mutex::new(*self.boot.lock()), state, wait: self.wait.fork() }
    }

    /// Its state outside the machine; it is on no CPU.
    pub fn save(&self) -> Saved {
        let state = self.state.lock();
        Saved {
            on: self.run() != Run::Off,
            boot: self.boot.lock().map(|boot| (boot.entry, boot.argument)),
            regs: state.regs.clone(),
            el1: state.el1.clone(),
            fp: state.fp.clone(),
            tags: state.tags,
            vmcr: state.interface.vmcr,
            active: (state.interface.ap0, state.interface.ap1),
            timer: (state.timer.control, state.timer.compare),
            physical_timer: state.physical_timer,
            watched: state.watched,
            stolen: self.wait.save(),
        }
    }

    /// vCPU `index` as it was saved, on no CPU. Its virtual count has `offset`; the physical one has jumped by `counts`
    /// since. What a guest cannot set itself does not come from `saved`.
    pub fn load(index: u8, saved: Saved, offset: u64, counts: u64) -> Self {
        let vcpu = Self { wait: Wait::load(saved.stolen), ..Self::new(index) };
        {
            let mut state = vcpu.state.lock();
            let identity = state.el1.vmpidr;
            state.regs = saved.regs;
            state.el1 = El1State { vmpidr: identity, mdscr: saved.el1.mdscr & MDSCR_GUEST, ..saved.el1 };
            state.fp = saved.fp;
            state.tags = saved.tags;
            state.gic.vmcr = saved.vmcr;
            state.interface.vmcr = saved.vmcr;
            (state.interface.ap0, state.interface.ap1) = saved.active;
            let (control, compare) = saved.timer;
            state.timer = TimerState { control, compare, offset };
            state.physical_timer = saved.physical_timer.moved(counts);
            state.watched = saved.watched;
        }
        *vcpu.boot.lock() = saved.boot.map(|(entry, argument)| Boot { entry, argument });
        vcpu.set_run(if saved.on { Run::Parked } else { Run::Off });
        vcpu
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

impl State {
    /// Back to power-on, then to where `boot` says.
    pub fn start(&mut self, boot: Boot) {
        self.el1 = El1State::reset(self.el1.vmpidr);
        self.fp = FpState::ZERO;
        self.tags = TagState::RESET;
        self.timer = TimerState { offset: self.timer.offset, ..TimerState::default() };
        self.physical_timer = PhysicalTimer::default();
        self.watched = false;
        self.regs = Registers::ZERO;
        self.regs.x[0] = boot.argument;
        self.regs.pc = boot.entry;
        self.regs.pstate = RESET_PSTATE;
    }

    /// Steps over the instruction that exited with syndrome `esr`.
    #[inline]
    pub fn skip(&mut self, esr: u64) {
        self.regs.pc = self.regs.pc.wrapping_add(syndrome::instruction_bytes(esr));
        self.regs.pstate &= !SINGLE_STEP;
    }

    /// General register `index` as an instruction reads it: 31 is zero.
    pub fn read(&self, index: u8) -> u64 {
        self.regs.x.get(usize::from(index)).copied().unwrap_or(0)
    }

    /// General register `index` as an instruction writes it: 31 is discarded.
    pub fn write(&mut self, index: u8, value: u64) {
        if let Some(register) = self.regs.x.get_mut(usize::from(index)) {
            *register = value;
        }
    }
}
