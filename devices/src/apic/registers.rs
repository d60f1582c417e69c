//! The local APIC's registers, in memory and as MSRs (SDM volume 3, 11.4.1 and 11.12.1).
//!
//! Purpose: one numbering for both: a register's number is its offset in memory, or its MSR less 800h, in units of 16 bytes.
//!
//! Invariants: what is not defined reads as zero and marks an error in memory, and is refused as an MSR.

use super::Refused;
use super::local::{Face, Local, error, lvt};
use super::message::{Message, Target};
use super::timer::Mode;

/// Register numbers.
mod number {
    pub const ID: u16 = 0x02;
    pub const VERSION: u16 = 0x03;
    pub const TPR: u16 = 0x08;
    pub const APR: u16 = 0x09;
    pub const PPR: u16 = 0x0a;
    pub const EOI: u16 = 0x0b;
    pub const RRD: u16 = 0x0c;
    pub const LDR: u16 = 0x0d;
    pub const DFR: u16 = 0x0e;
    pub const SVR: u16 = 0x0f;
    pub const ISR: u16 = 0x10;
    pub const TMR: u16 = 0x18;
    pub const IRR: u16 = 0x20;
    pub const IRR_LAST: u16 = 0x27;
    pub const ESR: u16 = 0x28;
    pub const ICR: u16 = 0x30;
    pub const ICR_HIGH: u16 = 0x31;
    pub const LVT: u16 = 0x32;
    pub const LVT_LAST: u16 = 0x37;
    pub const INITIAL: u16 = 0x38;
    pub const CURRENT: u16 = 0x39;
    pub const DIVIDE: u16 = 0x3e;
    pub const SELF_IPI: u16 = 0x3f;
}

/// Version 14h with six LVT entries, without suppression of EOI messages.
const VERSION: u32 = 0x14 | (lvt::COUNT as u32 - 1) << 16;
/// SVR: vector and enable; focus checking is gone, EOI messages cannot be suppressed.
const SVR_WRITABLE: u32 = 0x1ff;
/// The command register: vector, delivery mode, destination mode, level, trigger, shorthand. Bit 12 reads as idle.
const ICR_WRITABLE: u32 = 0xc_cfff;

/// What a store asks of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing, but the vCPU itself must look.
    Look,
    /// An interrupt ended, and the I/O APIC may wait for it.
    End(Option<u8>),
    /// To deliver this.
    Send(Message),
}

/// A register that is not there, or not to be loaded or stored.
struct Unknown;

impl Local {
    /// A load from memory at `offset`.
    pub fn load(&mut self, offset: u64, now: u64) -> u32 {
        let Some(number) = aligned(offset).filter(|_| self.face == Face::Memory) else { return 0 };
        match self.register(number, now) {
            Ok(value) => value,
            Err(Unknown) => {
                self.fail(error::REGISTER);
                0
            }
        }
    }

    /// A store to memory at `offset`.
    pub fn store(&mut self, offset: u64, value: u32, now: u64) -> Effect {
        let Some(number) = aligned(offset).filter(|_| self.face == Face::Memory) else { return Effect::Look };
        let stored = match number {
            number::ICR => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value & ICR_WRITABLE);
                self.command(value, (self.icr >> 56) as u32, 0xff)
            }
            number::ICR_HIGH => {
                self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
                Ok(Effect::Look)
            }
            number::LDR => {
                self.ldr = (value >> 24) as u8;
                Ok(Effect::Look)
            }
            number::DFR => {
                self.dfr = (value >> 28) as u8;
                Ok(Effect::Look)
            }
            // The identity stays the processor's own.
            number::ID | number::APR | number::RRD => Ok(Effect::Look),
            number::SELF_IPI => Err(Unknown),
            number => self.set_register(number, value, now),
        };
        stored.unwrap_or_else(|Unknown| {
            self.fail(error::REGISTER);
            Effect::Look
        })
    }

    /// RDMSR of 800h + `number`.
    pub fn load_msr(&self, number: u16, now: u64) -> Result<u64, Refused> {
        if self.face != Face::Msrs {
            return Err(Refused);
        }
        match number {
            number::ID => Ok(u64::from(self.id)),
            number::LDR => Ok(u64::from(self.logical_id())),
            number::ICR => Ok(self.icr),
            number::EOI | number::SELF_IPI | number::ICR_HIGH | number::DFR | number::APR | number::RRD => Err(Refused),
            number => self.register(number, now).map(u64::from).map_err(|Unknown| Refused),
        }
    }

    /// WRMSR of 800h + `number`. Reserved bits are refused.
    pub fn store_msr(&mut self, number: u16, value: u64, now: u64) -> Result<Effect, Refused> {
        if self.face != Face::Msrs {
            return Err(Refused);
        }
        let writable = match number {
            number::ICR => u64::from(u32::MAX) << 32 | u64::from(ICR_WRITABLE),
            number::TPR | number::SELF_IPI => 0xff,
            number::SVR => u64::from(SVR_WRITABLE),
            number::EOI | number::ESR => 0,
            number::LVT..=number::LVT_LAST => u64::from(lvt::WRITABLE[usize::from(number - number::LVT)]),
            number::INITIAL => u64::from(u32::MAX),
            number::DIVIDE => 0xb,
            _ => return Err(Refused),
        };
        // Delivery status is the processor's own, and may be stored as it was read.
        let status = match number {
            number::ICR | number::LVT..=number::LVT_LAST => 1 << 12,
            _ => 0,
        };
        if value & !(writable | status) != 0 {
            return Err(Refused);
        }
        let low = value as u32;
        let stored = match number {
            number::ICR => {
                self.icr = value & writable;
                self.command(low, (value >> 32) as u32, u32::MAX)
            }
            number::SELF_IPI => self.command(low | 1 << 18, 0, u32::MAX),
            number => self.set_register(number, low, now),
        };
        stored.map_err(|Unknown| Refused)
    }

    /// A register that reads alike in both.
    fn register(&self, number: u16, now: u64) -> Result<u32, Unknown> {
        Ok(match number {
            number::ID => u32::from(self.id) << 24,
            number::VERSION => VERSION,
            number::TPR => u32::from(self.tpr),
            number::APR | number::RRD | number::EOI => 0,
            number::PPR => u32::from(self.ppr()),
            number::LDR => self.logical_id(),
            number::DFR => u32::from(self.dfr) << 28 | 0x0fff_ffff,
            number::SVR => self.svr,
            number::ISR..number::TMR => self.isr.register(usize::from(number - number::ISR)),
            number::TMR..number::IRR => self.tmr.register(usize::from(number - number::TMR)),
            number::IRR..=number::IRR_LAST => self.irr.register(usize::from(number - number::IRR)),
            number::ESR => self.errors,
            number::ICR => self.icr as u32,
            number::ICR_HIGH => (self.icr >> 32) as u32,
            number::LVT..=number::LVT_LAST => self.lvt[usize::from(number - number::LVT)],
            number::INITIAL => self.timer.initial,
            number::CURRENT => self.timer.count(self.mode(), now),
            number::DIVIDE => self.timer.divide,
            _ => return Err(Unknown),
        })
    }

    /// A register that is stored to alike in both.
    fn set_register(&mut self, number: u16, value: u32, now: u64) -> Result<Effect, Unknown> {
        match number {
            number::TPR => self.tpr = value as u8,
            number::EOI => return Ok(Effect::End(self.end())),
            number::SVR => self.set_svr(value & SVR_WRITABLE),
            number::ESR => self.errors = core::mem::take(&mut self.new_errors),
            number::LVT..=number::LVT_LAST => self.set_lvt(usize::from(number - number::LVT), value),
            number::INITIAL => self.timer.start(self.mode(), value, now),
            number::DIVIDE => self.timer.set_divide(self.mode(), value, now),
            _ => return Err(Unknown),
        }
        Ok(Effect::Look)
    }

    /// Sends what a store to the command register asks for.
    fn command(&mut self, low: u32, destination: u32, broadcast: u32) -> Result<Effect, Unknown> {
        let Some(message) = Message::command(low, destination, broadcast) else { return Ok(Effect::Look) };
        let has_vector = matches!(message.delivery, super::message::Delivery::Fixed | super::message::Delivery::Lowest);
        if has_vector && message.vector < 16 {
            self.fail(error::SEND_VECTOR);
            return Ok(Effect::Look);
        }
        // Nobody is itself the target of INIT or SIPI by shorthand (11.6.1, table 11-3).
        if !has_vector && message.target == Target::Myself {
            return Ok(Effect::Look);
        }
        Ok(Effect::Send(message))
    }

    /// The timer's mode.
    pub fn mode(&self) -> Mode {
        Mode::of(self.lvt[lvt::TIMER])
    }

    /// A store to SVR. While the APIC is off, every LVT entry is masked (11.4.7.2).
    fn set_svr(&mut self, value: u32) {
        self.svr = value;
        if value & super::local::ENABLED == 0 {
            for entry in &mut self.lvt {
                *entry |= lvt::MASKED;
            }
        }
    }

    fn set_lvt(&mut self, index: usize, value: u32) {
        let masked = if self.svr & super::local::ENABLED == 0 { lvt::MASKED } else { 0 };
        let before = self.mode();
        self.lvt[index] = value & lvt::WRITABLE[index] | masked;
        self.timer.change_mode(before, self.mode());
    }
}

/// The register at an offset in memory: each begins at a multiple of 16.
fn aligned(offset: u64) -> Option<u16> {
    offset.is_multiple_of(16).then(|| u16::try_from(offset / 16).ok()).flatten()
}
