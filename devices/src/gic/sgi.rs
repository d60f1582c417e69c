//! Software-generated interrupts: `ICC_SGI0R_EL1`, `ICC_SGI1R_EL1`, `ICC_ASGI1R_EL1`.
//!
//! Source: Arm IHI 0069H, 12.2 (register formats) and 4.4 (forwarding). With one Security state, `SGI1R` reaches an SGI of
//! either group, `SGI0R` and `ASGI1R` only one that its target configured as Group 0.

use super::{Kick, Vgic};

/// Which register the guest wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SgiRegister {
    /// `ICC_SGI0R_EL1`.
    Sgi0r,
    /// `ICC_SGI1R_EL1`.
    Sgi1r,
    /// `ICC_ASGI1R_EL1`.
    Asgi1r,
}

/// A decoded request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Request {
    /// INTID, 0–15.
    intid: u32,
    /// IRM: everyone but the sender.
    all_others: bool,
    /// Bit `n`: the PE with affinity 0.0.0.`n`.
    targets: u16,
}

impl Request {
    /// Targets in clusters or ranges that have no vCPU are nobody.
    const fn decode(value: u64) -> Self {
        const AFF1: u64 = 0xff << 16;
        const AFF2: u64 = 0xff << 32;
        const RS: u64 = 0xf << 44;
        const AFF3: u64 = 0xff << 48;
        Self {
            intid: (value >> 24) as u32 & 0xf,
            all_others: value & 1 << 40 != 0,
            targets: if value & (AFF1 | AFF2 | AFF3 | RS) == 0 { value as u16 } else { 0 },
        }
    }

    const fn reaches(self, from: usize, to: usize) -> bool {
        if self.all_others { to != from } else { self.targets >> to & 1 == 1 }
    }
}

impl Vgic {
    /// A vCPU's write of `value` to one of the SGI registers.
    pub fn sgi(&self, from: usize, register: SgiRegister, value: u64) -> Kick {
        let request = Request::decode(value);
        (0..self.cpus.len()).filter(|&to| request.reaches(from, to)).fold(Kick::NONE, |kick, to| {
            kick | self.change_private(to, |bank| {
                let sgi = 1 << request.intid;
                let forwarded = match register {
                    SgiRegister::Sgi1r => sgi,
                    SgiRegister::Sgi0r | SgiRegister::Asgi1r => bank.group_zero(sgi),
                };
                bank.set_latch(forwarded)
            })
        })
    }
}
