//! One vCPU's local APIC: what waits, what is served, and what may be next (SDM volume 3, 11.8).
//!
//! Invariants: a vector below 16 is never in IRR; [`Local::pending`] is above every vector in service.

use serde::{Deserialize, Serialize};

use super::bits::Vectors;
use super::message::{Delivery, Target};
use super::timer::{Mode, Timer};
use super::{Event, Pending};
use crate::saved::{BadState, check};

/// LVT entries, in the order of their registers from 320h on.
pub(super) mod lvt {
    pub const TIMER: usize = 0;
    pub const ERROR: usize = 5;
    pub const COUNT: usize = 6;
    /// What can be stored: vector, delivery mode, polarity and trigger of the pins, mask, timer mode.
    pub const WRITABLE: [u32; COUNT] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
    pub const MASKED: u32 = 1 << 16;
}

/// Bits of ESR.
pub(super) mod error {
    pub const SEND_VECTOR: u32 = 1 << 5;
    pub const RECEIVED_VECTOR: u32 = 1 << 6;
    pub const REGISTER: u32 = 1 << 7;
}

/// SVR: the APIC is on.
pub(super) const ENABLED: u32 = 1 << 8;
/// Vectors below this are the processor's own.
const FIRST_VECTOR: u8 = 16;

/// What IA32_APIC_BASE makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Face {
    /// Off.
    Off,
    /// Registers in memory.
    Memory,
    /// Registers as MSRs: x2APIC.
    Msrs,
}

/// The state of one.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Local {
    pub id: u8,
    pub face: Face,
    pub tpr: u8,
    /// Bits 31:24 of LDR in memory; as MSR it follows from the identity.
    pub ldr: u8,
    /// Bits 31:28 of DFR: Fh is the flat model, 0 clusters.
    pub dfr: u8,
    pub svr: u32,
    pub irr: Vectors,
    pub isr: Vectors,
    pub tmr: Vectors,
    /// ESR as it reads, and what has happened since it was last stored to.
    pub errors: u32,
    pub new_errors: u32,
    pub icr: u64,
    pub lvt: [u32; lvt::COUNT],
    pub timer: Timer,
    nmi: bool,
    init: bool,
    startup: Option<u8>,
    /// After INIT, until SIPI.
    pub waits: bool,
}

impl Local {
    /// After power-on. Only the first vCPU runs.
    pub fn new(id: u8) -> Self {
        Self {
            id,
            face: Face::Memory,
            tpr: 0,
            ldr: 0,
            dfr: 0xf,
            svr: 0xff,
            irr: Vectors::NONE,
            isr: Vectors::NONE,
            tmr: Vectors::NONE,
            errors: 0,
            new_errors: 0,
            icr: 0,
            lvt: [lvt::MASKED; lvt::COUNT],
            timer: Timer::default(),
            nmi: false,
            init: false,
            startup: None,
            waits: id != 0,
        }
    }

    /// Whether a state that was read is one that vCPU `id` can be in.
    pub fn check(&self, id: u8) -> Result<(), BadState> {
        check(self.id == id, "apic.cpus.id", "must be the vCPU's number")?;
        let low = (0..FIRST_VECTOR).any(|vector| self.irr.has(vector) || self.isr.has(vector));
        check(!low, "apic.cpus", "must have no vectors below 16")?;
        let known = self.lvt.iter().zip(lvt::WRITABLE).all(|(entry, writable)| entry & !writable == 0);
        check(known && self.timer.divide & !0xb == 0, "apic.cpus", "must have no bits that a local APIC has not")
    }

    /// What INIT leaves (11.4.7.3): all but the identity and the mode of IA32_APIC_BASE.
    fn initialise(&mut self) {
        *self = Self { face: self.face, init: true, waits: true, ..Self::new(self.id) };
    }

    /// The mode changes; a local APIC that is switched off forgets.
    pub fn set_face(&mut self, face: Face) {
        if face == Face::Off {
            let (waits, init, startup) = (self.waits, self.init, self.startup);
            *self = Self { waits, init, startup, ..Self::new(self.id) };
        }
        self.face = face;
        self.icr = 0;
    }

    pub fn is_enabled(&self) -> bool {
        self.face != Face::Off && self.svr & ENABLED != 0
    }

    /// LDR as it reads (11.12.10.2: as MSR, cluster and bit from the identity).
    pub fn logical_id(&self) -> u32 {
        match self.face {
            Face::Msrs => u32::from(self.id >> 4) << 16 | 1 << (self.id & 0xf),
            _ => u32::from(self.ldr) << 24,
        }
    }

    /// Whether a message from the vCPU `sender`, or from the I/O APIC, means this one.
    pub fn is_meant(&self, target: Target, sender: Option<u8>) -> bool {
        match target {
            Target::All => true,
            Target::Myself => sender == Some(self.id),
            Target::Others => sender != Some(self.id),
            Target::Physical(id) => id == u32::from(self.id),
            Target::Logical(set) => self.is_in(set),
        }
    }

    fn is_in(&self, set: u32) -> bool {
        let flat = self.dfr == 0xf;
        match self.face {
            Face::Off => false,
            Face::Msrs => {
                let own = self.logical_id();
                set >> 16 == own >> 16 && set & own & 0xffff != 0
            }
            Face::Memory if flat => set & u32::from(self.ldr) & 0xff != 0,
            Face::Memory => {
                let own = u32::from(self.ldr);
                (set >> 4 & 0xf == own >> 4 || set >> 4 & 0xf == 0xf) && set & own & 0xf != 0
            }
        }
    }

    /// Takes a message that means this one; whether it did, and the vCPU must look.
    pub fn accept(&mut self, delivery: Delivery, vector: u8, level: bool) -> bool {
        match delivery {
            Delivery::Fixed | Delivery::Lowest => self.raise(vector, level),
            Delivery::NonMaskable => {
                self.nmi = self.face != Face::Off;
                self.nmi
            }
            Delivery::Init => {
                self.initialise();
                true
            }
            Delivery::Startup => {
                let heard = self.waits;
                if heard {
                    (self.startup, self.waits) = (Some(vector), false);
                }
                heard
            }
        }
    }

    /// An interrupt with a vector; whether it was accepted.
    fn raise(&mut self, vector: u8, level: bool) -> bool {
        if !self.is_enabled() {
            return false;
        }
        if vector < FIRST_VECTOR {
            self.fail(error::RECEIVED_VECTOR);
            return true;
        }
        self.irr.set(vector, true);
        self.tmr.set(vector, level);
        true
    }

    /// An error, which has an interrupt of its own. Its vector may be wrong too; that is remembered and ends there.
    pub fn fail(&mut self, error: u32) {
        let entry = self.lvt[lvt::ERROR];
        let vector = entry as u8;
        self.new_errors |= error;
        if entry & lvt::MASKED == 0 && self.is_enabled() {
            if vector < FIRST_VECTOR {
                self.new_errors |= error::RECEIVED_VECTOR;
            } else {
                self.irr.set(vector, true);
                self.tmr.set(vector, false);
            }
        }
    }

    /// Time has come to `now`; whether the vCPU must look.
    pub fn pass(&mut self, now: u64) -> bool {
        let entry = self.lvt[lvt::TIMER];
        let fired = self.timer.expire(Mode::of(entry), now);
        fired && entry & lvt::MASKED == 0 && self.raise(entry as u8, false)
    }

    /// When [`Self::pass`] has something to do next. A timer whose interrupt is masked needs nobody to look: its count is a
    /// function of the time.
    pub fn deadline(&self) -> Option<u64> {
        if self.lvt[lvt::TIMER] & lvt::MASKED != 0 { None } else { self.timer.next() }
    }

    /// PPR (11.8.3.1).
    pub fn ppr(&self) -> u8 {
        let served = self.isr.highest().unwrap_or_default() & 0xf0;
        if self.tpr & 0xf0 >= served { self.tpr } else { served }
    }

    /// The most urgent vector that is not below what is being served.
    pub fn pending(&self) -> Option<Pending> {
        let vector = self.irr.highest().filter(|_| self.is_enabled())?;
        let class = vector >> 4;
        let served = self.isr.highest().map_or(0, |vector| vector >> 4);
        (class > served).then_some(Pending { vector, masked: class <= self.tpr >> 4 })
    }

    /// The vCPU takes the most urgent vector.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let Pending { vector, .. } = self.pending().filter(|pending| !pending.masked)?;
        self.irr.set(vector, false);
        self.isr.set(vector, true);
        Some(vector)
    }

    /// EOI; the vector, if the I/O APIC waits for it.
    pub fn end(&mut self) -> Option<u8> {
        let vector = self.isr.highest()?;
        self.isr.set(vector, false);
        self.tmr.has(vector).then_some(vector)
    }

    /// Whether there is something that the vCPU must do before it goes on.
    pub fn has_event(&self) -> bool {
        self.init || self.startup.is_some() || self.nmi
    }

    /// What the vCPU must do before it goes on.
    pub fn take_event(&mut self) -> Option<Event> {
        if core::mem::take(&mut self.init) {
            return Some(Event::Init);
        }
        if let Some(page) = self.startup.take() {
            return Some(Event::Startup(page));
        }
        core::mem::take(&mut self.nmi).then_some(Event::NonMaskable)
    }
}
