//! The distributor's registers (`GICD_*`), 64 KiB.
//!
//! Source: Arm IHI 0069H 12.8 and 12.9. Affinity routing is always on, so the registers of INTIDs 0–31 are the
//! redistributors' and read as zero here. An access that no register supports reads as zero and is ignored when written.

use entresol_sync::atomic::Ordering;

use super::frame::{self, BankRegister, IIDR, Part, Span};
use super::{Kick, Vgic};

/// `GICD_CTLR`: EnableGrp0 and EnableGrp1, the writable bits.
const CTLR_GROUPS: u64 = 0x3;
/// `GICD_CTLR`: ARE (bit 4) and DS (bit 6), always one.
const CTLR_FIXED: u64 = 1 << 4 | 1 << 6;
/// `GICD_TYPER`: Aff3 may be non-zero (A3V, bit 24), ten bits of INTID (IDbits, bits \[23:19\], less one), message-based
/// SPIs (MBIS, bit 16). No LPIs, no extended SPIs, 1-of-N supported, Aff0 below 16.
const TYPER_FIXED: u64 = 1 << 24 | 9 << 19 | 1 << 16;

/// A distributor register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Ctlr,
    Typer,
    Iidr,
    SetSpi,
    ClearSpi,
    /// Of the SPIs in this word, counted from INTID 32.
    Spis(usize, BankRegister),
    Router {
        intid: u32,
        span: Span,
    },
    Identification,
}

fn decode(offset: u64, size: u8) -> Option<Register> {
    match (offset, size) {
        (0x0000, 4) => Some(Register::Ctlr),
        (0x0004, 4) => Some(Register::Typer),
        (0x0008, 4) => Some(Register::Iidr),
        (0x0040, 2 | 4) => Some(Register::SetSpi),
        (0x0048, 2 | 4) => Some(Register::ClearSpi),
        (0x6000..=0x7fff, _) => {
            Some(Register::Router { intid: (offset - 0x6000) as u32 / 8, span: Span::decode(offset, size)? })
        }
        (0xffd0..=0xffff, 4) => Some(Register::Identification),
        _ => {
            let (word, register) = frame::bank(offset, size)?;
            Some(Register::Spis(word.checked_sub(1)?, register))
        }
    }
}

impl Vgic {
    /// Reads `size` bytes at `offset` of the distributor's frame. The kicked vCPUs have to unload what the guest asked for:
    /// their next answer will be newer.
    pub fn dist_read(&self, offset: u64, size: u8) -> (u64, Kick) {
        let Some(register) = decode(offset, size) else { return (0, Kick::NONE) };
        let value = match register {
            Register::Ctlr => CTLR_FIXED | u64::from(self.groups.load(Ordering::Acquire)),
            Register::Typer => TYPER_FIXED | self.spis.lock().len() as u64,
            Register::Iidr => IIDR,
            Register::SetSpi | Register::ClearSpi => 0,
            Register::Spis(word, register) => return self.read_spis(word, register),
            Register::Router { intid, span } => {
                let spis = self.spis.lock();
                let place = spis.find(intid);
                place.map_or(0, |(word, bit)| span.read(spis.router(word, bit.trailing_zeros() as usize)))
            }
            Register::Identification => frame::identification(offset, Part::Distributor),
        };
        (value, Kick::NONE)
    }

    /// Writes `size` bytes at `offset` of the distributor's frame.
    pub fn dist_write(&self, offset: u64, size: u8, value: u64) -> Kick {
        match decode(offset, size) {
            Some(Register::Ctlr) => self.write_control(value),
            Some(Register::SetSpi) => self.message(value, true),
            Some(Register::ClearSpi) => self.message(value, false),
            Some(Register::Spis(word, register)) => {
                let mut spis = self.spis.lock();
                let changed = spis.get(word).map_or(0, |spis| spis.write(register, value as u32));
                self.refresh_spis(&mut spis, word, changed)
            }
            Some(Register::Router { intid, span }) => {
                let mut spis = self.spis.lock();
                let Some((word, bit)) = spis.find(intid) else { return Kick::NONE };
                let index = bit.trailing_zeros() as usize;
                let value = span.write(spis.router(word, index), value);
                let changed = spis.route(word, index, value, &self.cpus);
                self.refresh_spis(&mut spis, word, changed)
            }
            Some(Register::Typer | Register::Iidr | Register::Identification) | None => Kick::NONE,
        }
    }

    fn read_spis(&self, word: usize, register: BankRegister) -> (u64, Kick) {
        let mut spis = self.spis.lock();
        let Some(value) = spis.get(word).map(|spis| spis.bank.read(register)) else { return (0, Kick::NONE) };
        let kick = match register {
            BankRegister::Bits(field) if field.is_live() => spis.holders(word),
            _ => Kick::NONE,
        };
        (value.into(), self.publish(kick))
    }

    fn write_control(&self, value: u64) -> Kick {
        let mut spis = self.spis.lock();
        let groups = (value & CTLR_GROUPS) as u8;
        if self.groups.swap(groups, Ordering::AcqRel) == groups {
            return Kick::NONE;
        }
        let kick = spis.refresh_all(&self.cpus, self.groups());
        // Their own interrupts are judged by it as well.
        self.publish(kick | Kick::all(self.cpus.len()))
    }

    /// `GICD_SETSPI_NSR` and `GICD_CLRSPI_NSR`: INTID in bits \[9:0\].
    fn message(&self, value: u64, set: bool) -> Kick {
        let mut spis = self.spis.lock();
        let Some((word, mask)) = spis.find(value as u32 & 0x3ff) else { return Kick::NONE };
        let bank = &mut spis.word(word).bank;
        let changed = if set { bank.set_message(mask) } else { bank.clear_message(mask) };
        self.refresh_spis(&mut spis, word, changed)
    }
}
