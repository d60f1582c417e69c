//! The redistributors' registers (`GICR_*`), 128 KiB for each vCPU: `RD_base`, then `SGI_base`.
//!
//! Source: Arm IHI 0069H 12.10 and 12.11. Without LPIs, `GICR_CTLR`, `PROPBASER`, `PENDBASER` and the invalidation
//! registers read as zero and are ignored when written, as is every access that no register supports.

use entresol_sync::atomic::Ordering;

use super::frame::{self, BankRegister, IIDR, Part, Span};
use super::{Kick, Vgic};

/// Bytes of one vCPU's redistributor.
pub const REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
/// Offset of `SGI_base`.
const SGI_BASE: u64 = 0x1_0000;

/// `GICR_TYPER.Last`.
const TYPER_LAST: u64 = 1 << 4;
/// `GICR_WAKER.ProcessorSleep`.
const WAKER_PROCESSOR_SLEEP: u64 = 1 << 1;
/// `GICR_WAKER.ChildrenAsleep`: follows at once.
const WAKER_CHILDREN_ASLEEP: u64 = 1 << 2;

/// A redistributor register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Iidr,
    Typer(Span),
    Waker,
    Identification,
    Private(BankRegister),
}

fn decode(offset: u64, size: u8) -> Option<Register> {
    match (offset, size) {
        (0x0004, 4) => Some(Register::Iidr),
        (0x0008..=0x000f, _) => Span::decode(offset, size).map(Register::Typer),
        (0x0014, 4) => Some(Register::Waker),
        (0xffd0..=0xffff | 0x1_ffd0..=0x1_ffff, 4) => Some(Register::Identification),
        (SGI_BASE..REDISTRIBUTOR_SIZE, _) => {
            frame::bank(offset - SGI_BASE, size).filter(|&(word, _)| word == 0).map(|(_, it)| Register::Private(it))
        }
        _ => None,
    }
}

impl Vgic {
    /// Reads `size` bytes at `offset` of the redistributor of vCPU `frame`; zero if there is none. The kicked vCPU has to
    /// unload what the guest asked for: its next answer will be newer.
    pub fn redist_read(&self, frame: usize, offset: u64, size: u8) -> (u64, Kick) {
        let (Some(cpu), Some(register)) = (self.cpus.get(frame), decode(offset, size)) else {
            return (0, Kick::NONE);
        };
        let value = match register {
            Register::Iidr => IIDR,
            Register::Typer(span) => span.read(self.typer(frame)),
            Register::Waker if cpu.asleep.load(Ordering::Relaxed) => WAKER_PROCESSOR_SLEEP | WAKER_CHILDREN_ASLEEP,
            Register::Waker => 0,
            Register::Identification => frame::identification(offset % SGI_BASE, Part::Redistributor),
            Register::Private(register) => return self.read_private(frame, register),
        };
        (value, Kick::NONE)
    }

    /// Writes `size` bytes at `offset` of the redistributor of vCPU `frame`.
    pub fn redist_write(&self, frame: usize, offset: u64, size: u8, value: u64) -> Kick {
        if frame >= self.cpus.len() {
            return Kick::NONE;
        }
        match decode(offset, size) {
            Some(Register::Waker) => self.write_waker(frame, value & WAKER_PROCESSOR_SLEEP != 0),
            Some(Register::Private(register)) => self.change_private(frame, |bank| bank.write(register, value as u32)),
            Some(Register::Iidr | Register::Typer(_) | Register::Identification) | None => Kick::NONE,
        }
    }

    /// `GICR_TYPER`: affinity 0.0.0.`frame`, the processor number, and whether it is the last.
    fn typer(&self, frame: usize) -> u64 {
        let last = if frame + 1 == self.cpus.len() { TYPER_LAST } else { 0 };
        (frame as u64) << 32 | (frame as u64) << 8 | last
    }

    fn read_private(&self, vcpu: usize, register: BankRegister) -> (u64, Kick) {
        let bank = self.cpus[vcpu].private.lock();
        let kick = match register {
            BankRegister::Bits(field) if field.is_live() && bank.resident() != 0 => Kick::one(vcpu),
            _ => Kick::NONE,
        };
        (bank.read(register).into(), self.publish(kick))
    }

    /// A vCPU that goes to sleep hands the 1-of-N interrupts that wait for it to others.
    fn write_waker(&self, vcpu: usize, asleep: bool) -> Kick {
        let mut spis = self.spis.lock();
        if self.cpus[vcpu].asleep.swap(asleep, Ordering::Relaxed) || !asleep {
            return Kick::NONE;
        }
        let kick = spis.give_away(vcpu, &self.cpus, self.groups());
        self.publish(kick)
    }
}
