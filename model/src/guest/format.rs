//! The entry format of a scenario's machine: one of the production formats, chosen while the lab runs.
//!
//! The formats themselves are `arch/*`'s. What differs is the marker of words in progress, which is one for all here: invalid to
//! each of these processors.

use entresol_addr::Pfn;
use entresol_arch_arm64::stage2::Stage2;
use entresol_arch_x86::either::{Either, Maker};
use entresol_table::{Entry, Format, Geometry, Leaf, MmioEntry};

use crate::machine::config::{Config, Paging};

/// A format.
#[derive(Clone, Copy, Debug)]
pub enum LabFormat {
    /// arm64's.
    Stage2(Stage2),
    /// That of an x86 processor, AMD's or Intel's.
    Either(Either),
}

impl LabFormat {
    /// The format of a machine.
    pub fn of(machine: &Config) -> Self {
        match machine.format {
            Paging::Stage2 => Self::Stage2(Stage2 { fwb: machine.fwb }),
            Paging::Npt | Paging::Shadow => Self::Either(Either::new(Maker::Amd, machine.physical_bits, None)),
            Paging::Ept => Self::Either(Either::new(Maker::Intel, machine.physical_bits, None)),
        }
    }
}

macro_rules! each {
    ($self:ident, $format:ident => $what:expr) => {
        match $self {
            LabFormat::Stage2($format) => $what,
            LabFormat::Either($format) => $what,
        }
    };
}

impl Format for LabFormat {
    /// Bits 2:0 clear are "not present" to every processor; bit 3 tells it from a vacant word.
    const BROKEN: u64 = 1 << 3;
    /// The fewest.
    const FRAME_BITS: u32 = Stage2::FRAME_BITS;

    fn geometry(&self, ipa_bits: u8) -> Option<Geometry> {
        each!(self, format => format.geometry(ipa_bits))
    }

    fn decode(&self, raw: u64, level: u8) -> Entry {
        each!(self, format => format.decode(raw, level))
    }

    fn leaf(&self, leaf: &Leaf) -> u64 {
        each!(self, format => format.leaf(leaf))
    }

    fn table(&self, frame: Pfn) -> u64 {
        each!(self, format => format.table(frame))
    }

    fn young(&self, raw: u64) -> u64 {
        each!(self, format => format.young(raw))
    }

    fn protected(&self, raw: u64, level: u8) -> Option<u64> {
        each!(self, format => format.protected(raw, level))
    }

    fn writable(&self, raw: u64, level: u8) -> u64 {
        each!(self, format => format.writable(raw, level))
    }

    fn generation_bits(&self) -> u32 {
        each!(self, format => format.generation_bits())
    }

    fn mmio(&self, entry: &MmioEntry) -> Option<u64> {
        each!(self, format => format.mmio(entry))
    }

    fn mmio_entry(&self, raw: u64) -> Option<MmioEntry> {
        each!(self, format => format.mmio_entry(raw))
    }

    fn is_malformed(&self, raw: u64, level: u8) -> bool {
        each!(self, format => format.is_malformed(raw, level))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::descriptor::Descriptor;

    #[test]
    fn the_marker_is_invalid_to_each_processor() {
        for paging in [Paging::Stage2, Paging::Npt, Paging::Ept] {
            let machine = Config { format: paging, ..Config::default() };
            let format = LabFormat::of(&machine);
            for level in 0..=3 {
                for above in (LabFormat::MARKER_BITS..u64::BITS).map(|bit| 1 << bit).chain([0, u64::MAX << 12]) {
                    let raw = LabFormat::BROKEN | above;
                    assert_eq!(format.decode(raw, level), Entry::Broken, "{paging:?} {raw:#x}");
                    assert_eq!(Descriptor::read(raw, level, &machine), Descriptor::Invalid, "{paging:?} {raw:#x}");
                }
            }
        }
    }
}
