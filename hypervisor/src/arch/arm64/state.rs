//! What stands in the hardware while a vCPU runs, and where it stands otherwise.

use entresol_arch_arm64::mpidr::Affinity;
use entresol_arch_arm64::policy::MDSCR_GUEST;
use entresol_arch_arm64::syndrome;
use entresol_devices::gic::ListRegisters;
use entresol_metal_arm64::switch::gic::{self, GicState};
use entresol_metal_arm64::switch::{El1State, FpState, Registers, TagState, TimerState};
use entresol_slot::Hint;
use entresol_wire::bundle::FileIndex;
use entresol_wire::config;
use serde::{Deserialize, Serialize};

use crate::vcpu::Counts;
use crate::vm::OutOfHeap;

use super::physical_timer::PhysicalTimer;

/// PSTATE of a vCPU at its first instruction: EL1h, all exceptions masked (PSCI, CPU_ON; Linux boot protocol).
const RESET_PSTATE: u64 = 0b1111 << 6 | 0b0101;

/// SPSR_EL2.SS: a software step that is due is taken before the next instruction, not again for this one.
const SINGLE_STEP: u64 = 1 << 21;

/// The registers that a vCPU starts with.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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

/// The same outside the machine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
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
}

/// What a vCPU takes of the heap beside its place: nothing.
pub struct Room;

impl Room {
    /// It.
    ///
    /// # Errors
    ///
    /// None.
    pub fn new() -> Result<Self, OutOfHeap> {
        Ok(Self)
    }
}

impl State {
    /// Of vCPU `index`, powered off.
    pub fn new(index: u8, _room: Room) -> Self {
        Self {
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
        }
    }

    /// The same for the same vCPU of a copy of its virtual machine.
    #[inline(always)]
    pub fn fork(&self, _room: Room) -> Self {
        Self {
            regs: self.regs.clone(),
            el1: self.el1.clone(),
            fp: self.fp.clone(),
            tags: self.tags,
            gic: self.gic.clone(),
            interface: self.interface.clone(),
            timer: self.timer,
            physical_timer: self.physical_timer,
            watched: self.watched,
            hint: Hint::new(),
        }
    }

    /// Outside the machine.
    pub fn save(&self) -> Saved {
        Saved {
            regs: self.regs.clone(),
            el1: self.el1.clone(),
            fp: self.fp.clone(),
            tags: self.tags,
            vmcr: self.interface.vmcr,
            active: (self.interface.ap0, self.interface.ap1),
            timer: (self.timer.control, self.timer.compare),
            physical_timer: self.physical_timer,
            watched: self.watched,
        }
    }

    /// Of vCPU `index` as it was saved. Its virtual count has `offset`; the physical one has jumped by `counts` since. What a guest
    /// cannot set itself does not come from `saved`.
    pub fn load(
        index: u8,
        room: Room,
        saved: Saved,
        Counts { offset, jump }: Counts,
        _config: &config::Vm<FileIndex>,
    ) -> Self {
        let mut state = Self::new(index, room);
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
        state.physical_timer = saved.physical_timer.moved(jump);
        state.watched = saved.watched;
        state
    }

    /// What the counter that the guest takes its time from lags behind the machine's.
    pub fn offset(&self) -> u64 {
        self.timer.offset
    }

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
