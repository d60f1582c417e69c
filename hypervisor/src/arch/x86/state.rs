//! What stands in the hardware while a vCPU runs, and where it stands otherwise.
//!
//! Halting is the hypervisor's: a vCPU that halts goes on behind its HLT, but not before something comes that ends it, which depends on
//! whether it was open to interrupts ([`Halt`]).

use alloc::boxed::Box;

use entresol_arch_x86::emulate::memo::Memo;
use entresol_arch_x86::paging::Regime;
use entresol_metal_x86::switch::{self, FpState, Guest, Segment};
use entresol_mmu::{Kept, MmioCache};
use entresol_slot::Hint;
use entresol_wire::bundle::FileIndex;
use entresol_wire::config::{self, Paging};
use serde::{Deserialize, Serialize};

use super::Now;
use super::exit::clock::KvmClock;
use crate::vcpu::Counts;
use crate::vm::OutOfHeap;

/// The registers that a vCPU starts with. What is not named is as after a reset.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// The processor's state.
    pub start: switch::Start,
    /// RBX.
    pub rbx: u64,
    /// RSI.
    pub rsi: u64,
}

/// Whether a vCPU halts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Halt {
    /// It does not.
    #[default]
    No,
    /// Until an interrupt comes, or what no flag holds back.
    Open,
    /// Its RFLAGS.IF is clear: until what no flag holds back comes.
    Closed,
}

/// What stands in the hardware while the vCPU runs.
pub struct State {
    /// What the processor works on.
    pub guest: Box<Guest>,
    /// x87 and SSE.
    pub fp: FpState,
    /// Where its last fault found its slot.
    pub hint: Hint,
    /// What was found to be no memory.
    pub mmio: MmioCache,
    /// The instructions that touched it.
    pub code: Memo<Kept>,
    /// Its record of kvm-clock.
    pub clock: KvmClock,
    /// Whether it halts.
    pub halt: Halt,
    /// What its control registers say of its tables, if it runs on shadow tables and has run.
    pub regime: Option<Regime>,
}

/// The same outside the machine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    guest: switch::Saved,
    fp: FpState,
    clock: KvmClock,
    halt: Halt,
}

/// What a vCPU takes of the heap.
pub struct Room(Box<Guest>);

impl Room {
    /// It.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn new() -> Result<Self, OutOfHeap> {
        Guest::new().map(Self).ok_or(OutOfHeap)
    }
}

/// Real mode (APM 14.1.3): a segment of 64 KiB, read and written; code that is read.
const LIMIT: u32 = 0xffff;
const DATA: u16 = 0x93;
const CODE: u16 = 0x9b;
const TASK: u16 = 0x8b;
const RFLAGS: u64 = 1 << 1;
/// CR0.ET, which is always set.
const CR0: u64 = 1 << 4;

impl State {
    /// Of vCPU `index`, powered off.
    pub fn new(_index: u8, Room(guest): Room) -> Self {
        Self {
            guest,
            fp: FpState::new(),
            hint: Hint::new(),
            mmio: MmioCache::new(),
            code: Memo::new(),
            clock: KvmClock::default(),
            halt: Halt::No,
            regime: None,
        }
    }

    /// The same for the same vCPU of a copy of its virtual machine.
    #[inline(always)]
    pub fn fork(&self, Room(mut guest): Room) -> Self {
        guest.become_copy(&self.guest);
        Self {
            guest,
            fp: self.fp.clone(),
            hint: Hint::new(),
            mmio: MmioCache::new(),
            code: Memo::new(),
            clock: self.clock,
            halt: self.halt,
            regime: None,
        }
    }

    /// Outside the machine.
    pub fn save(&self) -> Saved {
        Saved { guest: self.guest.save(), fp: self.fp.clone(), clock: self.clock, halt: self.halt }
    }

    /// Of vCPU `index` as it was saved. Its time stamp counter goes on from where it was.
    pub fn load(
        index: u8,
        room: Room,
        saved: Saved,
        Counts { jump, .. }: Counts,
        config: &config::Vm<FileIndex>,
    ) -> Self {
        let mut state = Self::new(index, room);
        state.guest.restore(&saved.guest, config.policies.paging == Paging::Shadow);
        let offset = state.guest.time_offset();
        *offset = offset.wrapping_sub(jump);
        (state.fp, state.clock, state.halt) = (saved.fp.confined(), saved.clock, saved.halt);
        state.clock.stale = true;
        state
    }

    /// What the counter that the guest takes its time from lags behind the machine's.
    pub fn offset(&self) -> u64 {
        self.now().offset.wrapping_neg()
    }

    /// What time it is for it.
    #[inline]
    pub fn now(&self) -> Now {
        Now { offset: self.guest.time() }
    }

    /// Whether interrupts end its wait.
    pub fn is_open(&self) -> bool {
        self.halt != Halt::Closed
    }

    /// Back to power-on, then to where `boot` says.
    pub fn start(&mut self, boot: Boot) {
        self.fp = FpState::new();
        self.clock = KvmClock::default();
        self.halt = Halt::No;
        self.guest.start(&boot.start);
        (self.guest.registers.rbx, self.guest.registers.rsi) = (boot.rbx, boot.rsi);
    }

    /// It begins in real mode at the start of page `page` below 1 MiB, as SIPI has it (SDM volume 3, 9.4.4.1).
    pub fn start_up(&mut self, page: u8) {
        let segment = |attributes| Segment { selector: 0, attributes, limit: LIMIT, base: 0 };
        let code = Segment { selector: u16::from(page) << 8, base: u64::from(page) << 12, ..segment(CODE) };
        let start = switch::Start {
            rip: 0,
            rflags: RFLAGS,
            cr0: CR0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            code,
            data: segment(DATA),
            task: segment(TASK),
            gdt_base: 0,
            gdt_limit: LIMIT as u16,
        };
        let offset = *self.guest.time_offset();
        self.halt = Halt::No;
        self.guest.start(&start);
        *self.guest.time_offset() = offset;
    }
}
