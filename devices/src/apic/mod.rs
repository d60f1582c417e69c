//! A PC's interrupt controllers: a local APIC for each vCPU, in memory and as x2APIC, and one I/O APIC. No 8259.
//!
//! Purpose: everything between a device's line, another vCPU's command or a timer, and the vector that a vCPU takes (SDM volume
//! 3, chapter 11; 82093AA). Nothing here knows how a vector gets into a vCPU.
//!
//! Protocol, for the code that runs a vCPU:
//!
//! 1. Time is the guest's TSC and comes in with every call that needs it. [`Apic::deadline`] is when [`Apic::expire`] must be
//!    called next; ask again after each access to the vCPU's registers.
//! 2. Accesses: [`Apic::read`] and [`Apic::write`] for the page at [`Apic::base`], [`Apic::read_msr`] and [`Apic::write_msr`] for
//!    IA32_APIC_BASE, IA32_TSC_DEADLINE and 800h–8FFh, where a refusal is a general-protection fault; [`Apic::tpr`] and
//!    [`Apic::set_tpr`] for CR8. The I/O APIC is [`Apic::io_read`], [`Apic::io_write`], and [`Apic::set_input`] for its lines.
//! 3. Everything that changes interrupts returns a [`Kick`]: the vCPUs that must pass step 4 soon. Their flag is set already,
//!    with sequential consistency: the caller reads "runs now" (sequentially consistent) after the call and interrupts those
//!    CPUs; a CPU stores "runs now", with interrupts masked, before it checks the flag. So no change is missed.
//! 4. Before each entry: [`Apic::needs_look`], one atomic load. If it says so: [`Apic::take_event`] until there is none, then
//!    [`Apic::pending`]. What is pending and not masked by TPR is injected when the guest can take it, after [`Apic::acknowledge`];
//!    else the caller asks the processor for the moment when it can, and comes back. A vCPU that [`Apic::waits`] does not run.
//!
//! Invariants: a vector is acknowledged once for each time that it was raised while it was not pending; nobody acknowledges what
//! is not above everything in service and above TPR. Nothing is allocated after [`Apic::new`]; every call ends.
//!
//! Lock order: the I/O APIC's lock, then one vCPU's; never two vCPUs' at once.
//!
//! Known holes: the page cannot be moved (a store that would is refused). Lowest-priority delivery chooses by PPR at the moment,
//! and by turn among equals. LINT0, LINT1, the performance counters' and the thermal sensor's entries are stored and never fire.
//! INIT to the first vCPU has it wait for SIPI as the others do: there is no firmware for it to start in.

mod bits;
mod io;
mod local;
mod message;
mod registers;
#[cfg(test)]
mod tests;
mod timer;

use alloc::vec::Vec;
use core::fmt;

use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, AtomicU8, Ordering};
use serde::{Deserialize, Serialize};

use crate::saved::{BadState, check};
use io::Io;
use local::{Face, Local};
use message::{Delivery, Message};
use registers::Effect;

pub use crate::kick::{Flag, Kick, MAX_VCPUS};

/// Inputs of the I/O APIC.
pub const MAX_INPUTS: usize = 48;

const APIC_BASE: u32 = 0x1b;
const TSC_DEADLINE: u32 = 0x6e0;
const X2APIC: core::ops::Range<u32> = 0x800..0x900;

/// Bits of IA32_APIC_BASE (SDM volume 3, 11.4.4 and 11.12.1).
mod base {
    pub const BOOT_CPU: u64 = 1 << 8;
    pub const EXTENDED: u64 = 1 << 10;
    pub const ENABLED: u64 = 1 << 11;
    pub const ADDRESS: u64 = 0xfee0_0000;
}

/// What the controllers are made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Number of vCPUs, 1–[`MAX_VCPUS`]. vCPU `n` has identity `n`.
    pub vcpus: usize,
    /// The I/O APIC's identity after power-on.
    pub io_id: u8,
}

/// Why the controllers could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicError {
    /// `Config::vcpus` out of range.
    Vcpus(usize),
    /// No memory for them.
    OutOfMemory,
}

impl fmt::Display for ApicError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpus(vcpus) => write!(f, "vcpus = {vcpus}: must be 1 to {MAX_VCPUS}"),
            Self::OutOfMemory => f.write_str("no memory for the interrupt controllers"),
        }
    }
}

impl core::error::Error for ApicError {}

/// An access to an MSR that the processor refuses: the guest gets a general-protection fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// What a vCPU must do before it goes on, besides taking vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its registers are those after INIT, and it waits.
    Init,
    /// It starts in real mode at this page: CS:IP is `page << 8`:0.
    Startup(u8),
    /// It takes a non-maskable interrupt.
    NonMaskable,
}

/// The most urgent vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// It. Its upper four bits are its priority.
    pub vector: u8,
    /// TPR is not below its priority: the vCPU may take it when TPR has fallen.
    pub masked: bool,
}

/// The controllers of one virtual machine. See the module for the protocol.
pub struct Apic {
    io: Mutex<Io>,
    io_id: u8,
    cpus: Vec<Cpu>,
    /// Whose turn it is among equals.
    turn: AtomicU8,
}

#[repr(align(128))]
struct Cpu {
    needs_look: AtomicBool,
    local: Mutex<Local>,
}

/// The controllers' state, outside of the machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    io: Io,
    cpus: Vec<Local>,
}

impl Apic {
    /// Controllers after power-on.
    ///
    /// # Errors
    ///
    /// [`ApicError`].
    pub fn new(config: Config) -> Result<Self, ApicError> {
        if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
            return Err(ApicError::Vcpus(config.vcpus));
        }
        Self::with(config.io_id, Io::new(config.io_id), (0..config.vcpus).map(|id| Local::new(id as u8)))
    }

    fn with(io_id: u8, io: Io, locals: impl ExactSizeIterator<Item = Local>) -> Result<Self, ApicError> {
        let mut cpus = Vec::new();
        cpus.try_reserve_exact(locals.len()).map_err(|_| ApicError::OutOfMemory)?;
        cpus.extend(locals.map(|local| Cpu { needs_look: AtomicBool::new(true), local: Mutex::new(local) }));
        Ok(Self { io: Mutex::new(io), io_id, cpus, turn: AtomicU8::new(0) })
    }

    /// The same state for a copy of the virtual machine, whose vCPUs are stopped.
    ///
    /// # Errors
    ///
    /// [`ApicError::OutOfMemory`].
    pub fn fork(&self) -> Result<Self, ApicError> {
        let io = self.io.lock().clone();
        Self::with(self.io_id, io, self.cpus.iter().map(|cpu| cpu.local.lock().clone()))
    }

    /// The state. The vCPUs are stopped.
    ///
    /// # Errors
    ///
    /// [`ApicError::OutOfMemory`].
    pub fn save(&self) -> Result<Saved, ApicError> {
        let mut cpus = Vec::new();
        cpus.try_reserve_exact(self.cpus.len()).map_err(|_| ApicError::OutOfMemory)?;
        cpus.extend(self.cpus.iter().map(|cpu| cpu.local.lock().clone()));
        Ok(Saved { io: self.io.lock().clone(), cpus })
    }

    /// Back to power-on. Lines stay as their devices drive them. The vCPUs are stopped.
    pub fn reset(&self) -> Kick {
        self.io.lock().reset(self.io_id);
        for (id, cpu) in self.cpus.iter().enumerate() {
            *cpu.local.lock() = Local::new(id as u8);
        }
        self.publish(Kick::all(self.cpus.len()))
    }

    /// Where the registers of a local APIC lie in memory.
    pub const fn base() -> u64 {
        base::ADDRESS
    }

    /// Whether `vcpu` must look at [`Self::take_event`] and [`Self::pending`].
    ///
    /// # Panics
    ///
    /// This and every other call, if there is no such vCPU.
    #[inline]
    pub fn needs_look(&self, vcpu: usize) -> bool {
        self.look_flag(vcpu).is_up()
    }

    /// The same question, to be asked often of one vCPU.
    pub fn look_flag(&self, vcpu: usize) -> Flag<'_> {
        Flag::new(&self.cpus[vcpu].needs_look)
    }

    /// `vcpu` looks again before it enters its guest.
    pub fn look_again(&self, vcpu: usize) {
        self.cpus[vcpu].needs_look.store(true, Ordering::SeqCst);
    }

    /// Whether [`Self::take_event`] has something, which ends any wait.
    pub fn has_event(&self, vcpu: usize) -> bool {
        self.cpus[vcpu].local.lock().has_event()
    }

    /// What `vcpu` must do first. Call it until there is nothing; then its flag is clear unless something came meanwhile.
    pub fn take_event(&self, vcpu: usize) -> Option<Event> {
        let cpu = &self.cpus[vcpu];
        cpu.needs_look.store(false, Ordering::SeqCst);
        cpu.local.lock().take_event()
    }

    /// Whether `vcpu` waits for SIPI, and does not run.
    pub fn waits(&self, vcpu: usize) -> bool {
        self.cpus[vcpu].local.lock().waits
    }

    /// The most urgent vector for `vcpu` that is above everything in service.
    pub fn pending(&self, vcpu: usize) -> Option<Pending> {
        self.cpus[vcpu].local.lock().pending()
    }

    /// `vcpu` takes the most urgent vector, if TPR lets it.
    pub fn acknowledge(&self, vcpu: usize) -> Option<u8> {
        self.cpus[vcpu].local.lock().acknowledge()
    }

    /// TPR of `vcpu`; CR8 is its upper four bits.
    pub fn tpr(&self, vcpu: usize) -> u8 {
        self.cpus[vcpu].local.lock().tpr
    }

    /// Stores TPR of `vcpu`, which looks at [`Self::pending`] itself then.
    pub fn set_tpr(&self, vcpu: usize, tpr: u8) {
        self.cpus[vcpu].local.lock().tpr = tpr;
    }

    /// When [`Self::expire`] must be called for `vcpu`, in ticks of its TSC.
    pub fn deadline(&self, vcpu: usize) -> Option<u64> {
        self.cpus[vcpu].local.lock().deadline()
    }

    /// Time has come to `now`.
    pub fn expire(&self, vcpu: usize, now: u64) -> Kick {
        let fired = self.cpus[vcpu].local.lock().pass(now);
        if fired { self.publish(Kick::one(vcpu)) } else { Kick::NONE }
    }

    /// A load of `size` bytes by `vcpu` from its local APIC's page. Registers are loaded whole.
    pub fn read(&self, vcpu: usize, offset: u64, size: u8, now: u64) -> u64 {
        let mut local = self.cpus[vcpu].local.lock();
        if local.pass(now) {
            self.cpus[vcpu].needs_look.store(true, Ordering::SeqCst);
        }
        if size == 4 { u64::from(local.load(offset, now)) } else { 0 }
    }

    /// A store of `size` bytes by `vcpu` to its local APIC's page. Registers are stored whole.
    pub fn write(&self, vcpu: usize, offset: u64, size: u8, value: u64, now: u64) -> Kick {
        let effect = {
            let mut local = self.cpus[vcpu].local.lock();
            local.pass(now);
            if size == 4 { local.store(offset, value as u32, now) } else { Effect::Look }
        };
        self.settle(vcpu, effect)
    }

    /// RDMSR by `vcpu`.
    ///
    /// # Errors
    ///
    /// [`Refused`]; every MSR that is none of the local APIC's, too.
    pub fn read_msr(&self, vcpu: usize, msr: u32, now: u64) -> Result<u64, Refused> {
        let mut local = self.cpus[vcpu].local.lock();
        if local.pass(now) {
            self.cpus[vcpu].needs_look.store(true, Ordering::SeqCst);
        }
        match msr {
            APIC_BASE => Ok(base_of(&local)),
            TSC_DEADLINE => Ok(local.timer.deadline(local.mode())),
            msr if X2APIC.contains(&msr) => local.load_msr((msr - X2APIC.start) as u16, now),
            _ => Err(Refused),
        }
    }

    /// WRMSR by `vcpu`.
    ///
    /// # Errors
    ///
    /// As [`Self::read_msr`]; nothing has changed.
    pub fn write_msr(&self, vcpu: usize, msr: u32, value: u64, now: u64) -> Result<Kick, Refused> {
        let effect = {
            let mut local = self.cpus[vcpu].local.lock();
            local.pass(now);
            match msr {
                APIC_BASE => {
                    let face = face_of(&local, value).ok_or(Refused)?;
                    if face != local.face {
                        local.set_face(face);
                    }
                    Effect::Look
                }
                TSC_DEADLINE => {
                    let mode = local.mode();
                    local.timer.set_deadline(mode, value);
                    local.pass(now);
                    Effect::Look
                }
                msr if X2APIC.contains(&msr) => local.store_msr((msr - X2APIC.start) as u16, value, now)?,
                _ => return Err(Refused),
            }
        };
        Ok(self.settle(vcpu, effect))
    }

    /// A load of `size` bytes from the I/O APIC.
    pub fn io_read(&self, offset: u64, size: u8) -> u64 {
        if size == 4 { u64::from(self.io.lock().load(offset)) } else { 0 }
    }

    /// A store of `size` bytes to the I/O APIC.
    pub fn io_write(&self, offset: u64, size: u8, value: u64) -> Kick {
        if size != 4 {
            return Kick::NONE;
        }
        let mut io = self.io.lock();
        let sends = io.store(offset, value as u32);
        self.send_for(&mut io, sends)
    }

    /// A line of the I/O APIC changes. Inputs that there are not have no effect.
    pub fn set_input(&self, input: usize, high: bool) -> Kick {
        if input >= MAX_INPUTS {
            return Kick::NONE;
        }
        let mut io = self.io.lock();
        let sends = io.drive(input, high);
        self.send_for(&mut io, sends)
    }

    /// What a store by `vcpu` asked for.
    fn settle(&self, vcpu: usize, effect: Effect) -> Kick {
        let others = match effect {
            Effect::Look | Effect::End(None) => Kick::NONE,
            Effect::End(Some(vector)) => self.ended(vector),
            Effect::Send(message) => self.send(message, Some(vcpu as u8)).0,
        };
        self.publish(Kick::one(vcpu)) | others
    }

    /// The end of a level-triggered interrupt, for whoever waits for it.
    fn ended(&self, vector: u8) -> Kick {
        let mut io = self.io.lock();
        let mut kick = Kick::NONE;
        for input in 0..MAX_INPUTS {
            let sends = io.ended(input, vector);
            kick |= self.send_for(&mut io, sends);
        }
        kick
    }

    /// What an input of the I/O APIC sends.
    fn send_for(&self, io: &mut Io, sends: Option<(usize, Message)>) -> Kick {
        let Some((input, message)) = sends else { return Kick::NONE };
        let (kick, accepted) = self.send(message, None);
        if accepted {
            io.accepted(input);
        }
        kick
    }

    /// Delivers a message; who must look, and whether anybody accepted it.
    fn send(&self, message: Message, sender: Option<u8>) -> (Kick, bool) {
        if message.delivery == Delivery::Lowest {
            return self.send_lowest(message, sender);
        }
        let mut kick = Kick::NONE;
        for (index, cpu) in self.cpus.iter().enumerate() {
            let mut local = cpu.local.lock();
            if local.is_meant(message.target, sender) && local.accept(message.delivery, message.vector, message.level) {
                kick |= Kick::one(index);
            }
        }
        (self.publish(kick), !kick.is_empty())
    }

    /// To one of those who are meant: whose priority is lowest, by turn among equals.
    fn send_lowest(&self, message: Message, sender: Option<u8>) -> (Kick, bool) {
        let count = self.cpus.len();
        let first = usize::from(self.turn.fetch_add(1, Ordering::Relaxed)) % count;
        let mut best = None;
        for index in (0..count).map(|step| (first + step) % count) {
            let local = self.cpus[index].local.lock();
            if local.is_meant(message.target, sender) && local.is_enabled() {
                let priority = local.ppr() >> 4;
                if best.is_none_or(|(lowest, _)| priority < lowest) {
                    best = Some((priority, index));
                }
            }
        }
        let Some((_, index)) = best else { return (Kick::NONE, false) };
        let accepted = self.cpus[index].local.lock().accept(message.delivery, message.vector, message.level);
        if accepted { (self.publish(Kick::one(index)), true) } else { (Kick::NONE, false) }
    }

    /// Sets the flag of everyone in `kick`.
    fn publish(&self, kick: Kick) -> Kick {
        for vcpu in kick.iter() {
            self.cpus[vcpu].needs_look.store(true, Ordering::SeqCst);
        }
        kick
    }
}

impl Saved {
    /// Controllers in this state.
    ///
    /// # Errors
    ///
    /// [`BadState`]: it is none that controllers made with `config` can be in.
    pub fn load(self, config: Config) -> Result<Apic, BadState> {
        check(
            self.cpus.len() == config.vcpus && config.vcpus <= MAX_VCPUS,
            "apic.cpus",
            "must be as many as the machine has",
        )?;
        self.io.check()?;
        for (id, local) in self.cpus.iter().enumerate() {
            local.check(id as u8)?;
        }
        let made = Apic::with(config.io_id, self.io, self.cpus.into_iter());
        made.map_err(|_| BadState { field: "apic", rule: "must fit into the heap" })
    }
}

/// IA32_APIC_BASE.
fn base_of(local: &Local) -> u64 {
    let boot = if local.id == 0 { base::BOOT_CPU } else { 0 };
    let face = match local.face {
        Face::Off => 0,
        Face::Memory => base::ENABLED,
        Face::Msrs => base::ENABLED | base::EXTENDED,
    };
    base::ADDRESS | boot | face
}

/// What a store to IA32_APIC_BASE makes of it; `None` is refused (11.12.5: from x2APIC only off, from off only to memory).
fn face_of(local: &Local, value: u64) -> Option<Face> {
    if value & !(base::BOOT_CPU | base::EXTENDED | base::ENABLED) != base::ADDRESS {
        return None;
    }
    let new = match (value & base::ENABLED != 0, value & base::EXTENDED != 0) {
        (false, false) => Face::Off,
        (true, false) => Face::Memory,
        (true, true) => Face::Msrs,
        (false, true) => return None,
    };
    let allowed = !matches!((local.face, new), (Face::Off, Face::Msrs) | (Face::Msrs, Face::Memory));
    allowed.then_some(new)
}
