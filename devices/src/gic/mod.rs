//! A virtual GICv3: distributor and redistributors emulated, CPU interfaces left to the hardware.
//!
//! Purpose: give up to eight vCPUs SGIs, PPIs and SPIs as Arm IHI 0069H describes them for one Security state
//! (`GICD_CTLR.DS` = 1, affinity routing always on, no LPIs, no extended ranges). Guests acknowledge and end interrupts
//! on the virtual CPU interface (`ICV_*`) without an exit; this module decides what stands in its list registers.
//!
//! Protocol, for the code that runs a vCPU:
//!
//! 1. A vCPU has one [`ListRegisters`]: the image of its `ICH_LR<n>_EL2`, `ICH_HCR_EL2` and `ICH_VMCR_EL2`. Between exits
//!    the list registers stay live in hardware; before any call that takes the image, the first [`ListRegisters::live`]
//!    of them, `ICH_HCR_EL2` and `ICH_VMCR_EL2` are read into it.
//! 2. Before each entry: [`Vgic::needs_sync`], one atomic load. If it says so, or after a maintenance interrupt:
//!    [`Vgic::flush`], then write [`Flush::write`] list registers and `ICH_HCR_EL2` back.
//! 3. Before a vCPU's own access to a GIC register frame: [`Vgic::sync`], so that it sees what it did itself. The image is
//!    then empty; write it back, the flush before the entry refills it.
//! 4. Everything that changes interrupts returns a [`Kick`]: the vCPUs that must pass step 2 soon. Their flag is set
//!    already, with sequential consistency: the caller reads "runs now" (sequentially consistent) after the call and
//!    interrupts those CPUs; a CPU stores "runs now", with interrupts masked, before it checks the flag. So no change is
//!    missed.
//! 5. `ICC_DIR_EL1` traps ([`Hcr::TDIR`] is always set) and goes to [`Vgic::deactivate`]: only so can a vCPU deactivate an
//!    SPI that another one holds, or one that found no list register. `ICC_SGI0R/SGI1R/ASGI1R_EL1` go to [`Vgic::sgi`].
//!
//! What an interrupt is, in one line: *deliverable* = enabled ∧ pending ∧ group enabled ∧ not active ∧ not in a list
//! register; *pending* = latch ∨ (level-sensitive ∧ line). Loading a list register moves the latch into it, so a new edge
//! is never confused with one that the guest may have taken already; unloading moves it back if it was not taken. What
//! the list register cannot say (a line that is still high, a second pending state) asks for a maintenance interrupt on
//! deactivation (`EOI`, bit 41), after which the line is sampled again. The `HW` bit is never used: vCPUs migrate.
//!
//! Invariants:
//! - an interrupt is in at most one list register; an SPI that is in one, or active, is owned by at most one vCPU;
//! - if pending interrupts did not fit, the image holds the most urgent of them, no list register is active *and* pending,
//!   and `NPIE` asks for the rest: the guest never acknowledges a less urgent interrupt first;
//! - active interrupts that did not fit are counted by `EOIcount` (`LRENPIE`) and end in order of priority;
//! - a [`Cpu::spi_words`] bit is set while that word has an SPI to deliver to the vCPU or one that it owns.
//!
//! Lock order: the distributor's lock ([`Vgic::spis`]), then one vCPU's ([`Cpu::private`]); never two vCPUs' at once. A
//! path that needs no SPI takes no distributor lock. Nothing is allocated after [`Vgic::new`].
//!
//! Known holes: a state change reaches a *running* vCPU when its kick does, so `GICD_CTLR.RWP` reads 0 although an
//! interrupt just disabled may still be taken once elsewhere (the architecture promises "in finite time"); reads of
//! pending and active state of interrupts in another running vCPU's list registers are as old as its last exit, and kick
//! it. A guest that ends what is not active, while more interrupts are active than list registers exist, may end another
//! of its own: hardware only counts. An SPI that software made active is the vCPU's that it targeted then: only that one's
//! `EOIR` ends it (`DIR` and `GICD_ICACTIVER` by anyone do). 1-of-N delivery chooses by wakefulness and turn, not by who
//! masks what. `GICR_WAKER` steers only that choice. `WFI` inside a handler is woken by what could not preempt it.
//! Error reporting (`GICD_STATUSR`), which is optional, reads as zero.

mod bank;
mod distributor;
mod error;
mod frame;
mod inject;
mod lr;
mod redistributor;
mod saved;
mod select;
mod sgi;
mod spis;
#[cfg(test)]
mod tests;

use alloc::vec::Vec;

use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use bank::{Bank, Groups};
use spis::Spis;

pub use crate::kick::{Flag, Kick, MAX_VCPUS};
pub use error::GicError;
pub use inject::Flush;
pub use lr::{Group, Hcr, ListRegister, ListRegisters, MAX_LIST_REGISTERS, State, Vmcr};
pub use redistributor::REDISTRIBUTOR_SIZE;
pub use saved::Saved;
pub use sgi::SgiRegister;

/// The first SPI's INTID.
pub const FIRST_SPI: u32 = 32;
/// The most SPIs: whole words of 32 below the special INTIDs 1020–1023.
pub const MAX_SPIS: usize = 960;

/// What an interrupt controller is made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Number of vCPUs, 1–[`MAX_VCPUS`]. vCPU `n` has affinity 0.0.0.`n`.
    pub vcpus: usize,
    /// Number of SPIs, a multiple of 32 from 32 to [`MAX_SPIS`]: INTIDs from 32.
    pub spis: usize,
}

/// An SPI that exists on the [`Vgic`] that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Spi(u16);

/// A PPI: INTID 16–31.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ppi(u8);

impl Ppi {
    /// The EL1 virtual timer (Arm BSA, PPI assignments).
    pub const VIRTUAL_TIMER: Self = Self(27);
    /// The EL1 physical timer (Arm BSA, PPI assignments).
    pub const PHYSICAL_TIMER: Self = Self(30);

    /// The PPI with this INTID.
    ///
    /// # Errors
    ///
    /// [`GicError::Ppi`] unless it is 16–31.
    pub const fn new(intid: u32) -> Result<Self, GicError> {
        if intid < 16 || intid >= FIRST_SPI { Err(GicError::Ppi(intid)) } else { Ok(Self(intid as u8)) }
    }
}

/// A virtual GICv3. See the module for the protocol.
pub struct Vgic {
    spis: Mutex<Spis>,
    cpus: Vec<Cpu>,
    /// `GICD_CTLR.EnableGrp{0,1}`. Written under the distributor's lock; read under the lock of what is judged by it, so
    /// that whoever sees the old value is followed by a flush that sees the new one.
    groups: AtomicU8,
}

/// What belongs to one vCPU, on cache lines of its own.
#[repr(align(128))]
struct Cpu {
    /// A change waits for the next flush.
    needs_sync: AtomicBool,
    /// `GICR_WAKER.ProcessorSleep`.
    asleep: AtomicBool,
    /// Words of SPIs that concern this vCPU; written under the distributor's lock.
    spi_words: AtomicU32,
    /// SGIs and PPIs.
    private: Mutex<Bank>,
}

impl Cpu {
    fn new() -> Self {
        Self {
            needs_sync: AtomicBool::new(true),
            asleep: AtomicBool::new(true),
            spi_words: AtomicU32::new(0),
            private: Mutex::new(Bank::private()),
        }
    }

    /// The same state for the same vCPU of another virtual machine.
    fn fork(&self) -> Self {
        Self {
            needs_sync: AtomicBool::new(true),
            asleep: AtomicBool::new(self.asleep.load(Ordering::Relaxed)),
            spi_words: AtomicU32::new(self.spi_words.load(Ordering::Acquire)),
            private: Mutex::new(self.private.lock().clone()),
        }
    }
}

impl Vgic {
    /// An interrupt controller after reset.
    ///
    /// # Errors
    ///
    /// [`GicError::Vcpus`] or [`GicError::Spis`] for a count outside its rule; [`GicError::OutOfMemory`].
    pub fn new(config: Config) -> Result<Self, GicError> {
        if config.vcpus == 0 || config.vcpus > MAX_VCPUS {
            return Err(GicError::Vcpus(config.vcpus));
        }
        let mut cpus = Vec::new();
        cpus.try_reserve_exact(config.vcpus).map_err(|_| GicError::OutOfMemory)?;
        cpus.extend((0..config.vcpus).map(|_| Cpu::new()));
        Ok(Self { spis: Mutex::new(Spis::new(config.vcpus, config.spis)?), cpus, groups: AtomicU8::new(0) })
    }

    /// A second controller in the same state, wires included, for a copy of the virtual machine. The vCPUs are stopped and
    /// synced, and their [`ListRegisters`] are copied with it: what stands in them belongs to both controllers alike.
    ///
    /// # Errors
    ///
    /// [`GicError::OutOfMemory`].
    pub fn fork(&self) -> Result<Self, GicError> {
        let mut cpus = Vec::new();
        cpus.try_reserve_exact(self.cpus.len()).map_err(|_| GicError::OutOfMemory)?;
        let spis = self.spis.lock();
        cpus.extend(self.cpus.iter().map(Cpu::fork));
        let groups = AtomicU8::new(self.groups.load(Ordering::Acquire));
        Ok(Self { spis: Mutex::new(spis.fork()?), cpus, groups })
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> usize {
        self.cpus.len()
    }

    /// The SPI with this INTID.
    ///
    /// # Errors
    ///
    /// [`GicError::Spi`] unless it exists here.
    pub fn spi(&self, intid: u32) -> Result<Spi, GicError> {
        let limit = self.spis.lock().limit();
        if (FIRST_SPI..limit).contains(&intid) { Ok(Spi(intid as u16)) } else { Err(GicError::Spi { intid, limit }) }
    }

    /// Drives an SPI's line. A rising line of an edge-triggered SPI makes it pending.
    ///
    /// # Panics
    ///
    /// If `spi` was made by a controller with more SPIs.
    pub fn set_spi(&self, spi: Spi, level: bool) -> Kick {
        let (word, mask) = spis::place(spi.0);
        let mut spis = self.spis.lock();
        let changed = spis.word(word).bank.set_wire(mask, level);
        self.refresh_spis(&mut spis, word, changed)
    }

    /// Drives the line of one vCPU's PPI. A rising line of an edge-triggered PPI makes it pending.
    ///
    /// # Panics
    ///
    /// If there is no such vCPU.
    pub fn set_ppi(&self, vcpu: usize, ppi: Ppi, level: bool) -> Kick {
        self.change_private(vcpu, |bank| bank.set_wire(1 << ppi.0, level))
    }

    /// Back to the state after [`Self::new`]. Lines stay as their devices drive them. The vCPUs are stopped.
    pub fn reset(&self) -> Kick {
        let mut spis = self.spis.lock();
        self.groups.store(0, Ordering::Release);
        spis.reset();
        for cpu in &self.cpus {
            cpu.private.lock().reset();
            cpu.asleep.store(true, Ordering::Relaxed);
            cpu.spi_words.store(0, Ordering::Release);
        }
        self.publish(Kick::all(self.cpus.len()))
    }

    /// The groups that the distributor forwards.
    fn groups(&self) -> Groups {
        Groups::from_control(self.groups.load(Ordering::Acquire))
    }

    /// Changes one vCPU's own interrupts; `change` returns which of them may have changed.
    fn change_private(&self, vcpu: usize, change: impl FnOnce(&mut Bank) -> u32) -> Kick {
        let mut bank = self.cpus[vcpu].private.lock();
        let changed = change(&mut bank);
        let concerns = bank.deliverable(self.groups()) | bank.resident() | bank.active();
        if concerns & changed == 0 { Kick::NONE } else { self.publish(Kick::one(vcpu)) }
    }

    /// After a change of `changed` in one word of SPIs.
    fn refresh_spis(&self, spis: &mut Spis, word: usize, changed: u32) -> Kick {
        if changed == 0 {
            return Kick::NONE;
        }
        let groups = self.groups();
        spis.choose(word, changed, &self.cpus, groups);
        let kick = spis.refresh(word, changed, &self.cpus, groups);
        self.publish(kick)
    }

    /// Sets the flag of everyone in `kick`.
    fn publish(&self, kick: Kick) -> Kick {
        for vcpu in kick.iter() {
            self.cpus[vcpu].needs_sync.store(true, Ordering::SeqCst);
        }
        kick
    }
}
