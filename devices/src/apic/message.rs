//! What travels between APICs: a vector, how it is delivered, and to whom (SDM volume 3, 11.6 and 11.11.3; 82093AA, 3.2.4).

/// How an interrupt is delivered: bits 10:8 of the command register, of LVT entries and of redirection entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    Fixed,
    Lowest,
    NonMaskable,
    Init,
    Startup,
}

impl Delivery {
    /// SMI is for firmware, ExtINT for an 8259: there is neither.
    pub const fn of(bits: u32) -> Option<Self> {
        match bits >> 8 & 7 {
            0 => Some(Self::Fixed),
            1 => Some(Self::Lowest),
            4 => Some(Self::NonMaskable),
            5 => Some(Self::Init),
            6 => Some(Self::Startup),
            _ => None,
        }
    }
}

/// Who is meant, from the sender's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Who has this identity; all ones is everybody.
    Physical(u32),
    /// Who is in this set.
    Logical(u32),
    /// The sender.
    Myself,
    /// Everybody.
    All,
    /// Everybody but the sender.
    Others,
}

/// An interrupt on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub vector: u8,
    pub delivery: Delivery,
    pub target: Target,
    /// Level-triggered: its end is told to the I/O APIC.
    pub level: bool,
}

/// Logical, not physical destination: bit 11.
const LOGICAL: u32 = 1 << 11;
/// Bit 14: assert. Without it, and with bit 15, INIT is only taken back (11.6.1), which nothing waits for.
const ASSERT: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;

/// Whom a destination field means. A field of eight bits that is all ones is everybody.
pub(super) const fn target(low: u32, destination: u32, broadcast: u32) -> Target {
    match (low & LOGICAL != 0, destination == broadcast) {
        (false, true) => Target::All,
        (false, false) => Target::Physical(destination),
        (true, _) => Target::Logical(destination),
    }
}

impl Message {
    /// What a store to the command register sends; `broadcast` is all ones in the width of the destination.
    pub const fn command(low: u32, destination: u32, broadcast: u32) -> Option<Self> {
        let Some(delivery) = Delivery::of(low) else { return None };
        if matches!(delivery, Delivery::Init) && low & (ASSERT | LEVEL) == LEVEL {
            return None;
        }
        let target = match low >> 18 & 3 {
            0 => target(low, destination, broadcast),
            1 => Target::Myself,
            2 => Target::All,
            _ => Target::Others,
        };
        // Between local APICs everything but INIT is an edge.
        Some(Self { vector: low as u8, delivery, target, level: false })
    }

    /// What a redirection entry sends when its input is active.
    pub const fn redirection(entry: u64) -> Option<Self> {
        let low = entry as u32;
        let Some(delivery) = Delivery::of(low) else { return None };
        let level = low & LEVEL != 0;
        Some(Self { vector: low as u8, delivery, target: target(low, (entry >> 56) as u32, 0xff), level })
    }
}
