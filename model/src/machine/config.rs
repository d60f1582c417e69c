//! Which machine: the features that decide what the core owes.

use entresol_machine::Features;
use serde::Deserialize;

/// CPUs that a model can have.
pub const MAX_CPUS: usize = 4;

/// Which processor's second-stage tables a machine has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Paging {
    /// arm64's.
    #[default]
    Stage2,
    /// AMD's nested tables.
    Npt,
    /// Intel's extended tables.
    Ept,
    /// AMD's, and no hardware walks them: guests run on shadow tables.
    Shadow,
}

impl Paging {
    /// Whether the processor is an x86: caches are coherent, and there is no maintenance of them to trap.
    pub const fn is_x86(self) -> bool {
        !matches!(self, Self::Stage2)
    }
}

/// A machine to explore. Constant for one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Its second-stage tables.
    pub format: Paging,
    /// FEAT_S2FWB.
    pub fwb: bool,
    /// CTR_EL0.DIC.
    pub dic: bool,
    /// FEAT_MTE2.
    pub tags: bool,
    /// Bits of a VMID. 8 and 16 exist; a model may have as few as 6, so that rollover is near.
    pub vmid_bits: u8,
    /// Bits of a physical address.
    pub physical_bits: u8,
    /// Bits of a guest physical address.
    pub ipa_bits: u8,
    /// Frames of the pool.
    pub frames: u64,
    /// Taking a frame out of the hypervisor's own mapping may fail.
    pub removals_fail: bool,
    /// Places of its swap device; none, without one.
    pub swap: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            format: Paging::Stage2,
            fwb: false,
            dic: true,
            tags: false,
            vmid_bits: 8,
            physical_bits: 44,
            ipa_bits: 36,
            frames: 48,
            removals_fail: false,
            swap: 0,
        }
    }
}

impl Config {
    /// Whether guests run on shadow tables.
    pub const fn is_shadowed(&self) -> bool {
        matches!(self.format, Paging::Shadow)
    }

    /// What the core is told.
    pub fn features(&self) -> Features {
        Features {
            forced_write_back: self.fwb,
            coherent_icache: self.dic,
            physical_bits: self.physical_bits,
            vmid_bits: self.vmid_bits,
            tags: self.tags,
        }
    }
}
