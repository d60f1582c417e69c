//! What a vCPU does with an address: what the second stage must permit, and what the syndrome says when it does not.
//!
//! Purpose: pure facts of the architecture, written from the manual a second time so that the core's decoder is tested and
//! not repeated. The interpreter ([`super::vcpu`]) turns a refusal into the registers that an exit would have.
//!
//! Known holes: a vCPU's own translation is not modelled, so a stage-1 walk is a step of its own here, and so is the
//! hardware's update of a descriptor's access flag. TLBI by a guest promises nothing about the second stage and has no
//! effect on what this model keeps (Arm DDI 0487 D8.17.6: it need not reach entries that hold stage 2 alone).

use entresol_fault::Access;
use entresol_mmu::Maintenance;

/// What an instruction, or the hardware on its behalf, does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// LDR.
    Load,
    /// STR of this value.
    Store(u64),
    /// The fetch of an instruction.
    Fetch,
    /// LDXR: a load that watches its location.
    LoadExclusive,
    /// STXR of this value: happens only if nobody stored there since.
    StoreExclusive(u64),
    /// LDG: loads the allocation tag of a granule.
    LoadTag,
    /// STG: stores it, the low four bits of this.
    StoreTag(u8),
    /// The walk of a stage-1 table reads a descriptor, for a load or a fetch.
    Walk(For),
    /// The walk sets a descriptor's access flag (FEAT_HAFDBS).
    Update(For),
    /// Cache maintenance by virtual address.
    Maintain(Line),
}

/// For what a stage-1 table is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    /// A load or a store.
    Data,
    /// A fetch.
    Fetch,
}

/// Cache maintenance of one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    /// DC IVAC, which cleans too while HCR_EL2.VM is 1 (Arm DDI 0487 D24.2, HCR_EL2.VM).
    Ivac,
    /// DC CVAC.
    Cvac,
    /// DC CIVAC.
    Civac,
    /// DC CVAU.
    Cvau,
    /// IC IVAU.
    Ivau,
}

/// The access flag of a stage-1 descriptor (Arm DDI 0487 D8.3).
pub const STAGE1_AF: u64 = 1 << 10;

impl Line {
    /// All, with the names that litmus files use.
    pub const ALL: [(&'static str, Self); 5] = [
        ("ivac", Self::Ivac),
        ("cvac", Self::Cvac),
        ("civac", Self::Civac),
        ("cvau", Self::Cvau),
        ("ivau", Self::Ivau),
    ];

    /// What the core is asked for when it traps.
    pub const fn trapped(self) -> Maintenance {
        match self {
            Self::Ivac => Maintenance::Invalidate,
            Self::Cvac | Self::Civac => Maintenance::Clean,
            Self::Cvau => Maintenance::CleanToUnification,
            Self::Ivau => Maintenance::Instructions,
        }
    }
}

impl Operation {
    /// What the second stage must permit (Arm DDI 0487 D8.4.3; D8.16.2 for maintenance: DC IVAC needs to write, the others
    /// need to read).
    pub const fn needs(self) -> Access {
        match self {
            Self::Load | Self::LoadExclusive | Self::LoadTag | Self::Walk(_) => Access::Read,
            Self::StoreTag(_)
            | Self::Store(_)
            | Self::StoreExclusive(_)
            | Self::Update(_)
            | Self::Maintain(Line::Ivac) => Access::Write,
            Self::Maintain(_) => Access::Read,
            Self::Fetch => Access::Fetch,
        }
    }

    /// Whether it loads a register.
    pub const fn loads(self) -> bool {
        matches!(self, Self::Load | Self::LoadExclusive | Self::LoadTag)
    }

    /// Whether bytes or tags of memory become others by it.
    pub const fn stores(self) -> bool {
        matches!(self, Self::Store(_) | Self::StoreExclusive(_) | Self::StoreTag(_) | Self::Update(_))
    }

    /// Whether it is the hardware's own access to a stage-1 table.
    pub const fn is_walk(self) -> bool {
        matches!(self, Self::Walk(_) | Self::Update(_))
    }

    /// The cache maintenance that it is.
    pub const fn line(self) -> Option<Line> {
        match self {
            Self::Maintain(line) => Some(line),
            _ => None,
        }
    }

    /// ESR_EL2 of the abort (Arm DDI 0487 D24.2): class, 32-bit instruction, CM, S1PTW, WnR, status code and level. WnR is 1
    /// for every maintenance instruction.
    pub const fn syndrome(self, status: u64, level: u8) -> u64 {
        let fetch = matches!(self, Self::Fetch | Self::Walk(For::Fetch) | Self::Update(For::Fetch));
        let class: u64 = if fetch { 0b10_0000 } else { 0b10_0100 };
        let maintenance = self.line().is_some();
        let write = maintenance || matches!(self, Self::Store(_) | Self::StoreExclusive(_) | Self::StoreTag(_));
        class << 26
            | 1 << 25
            | (maintenance as u64) << 8
            | (self.is_walk() as u64) << 7
            | (write as u64) << 6
            | status << 2
            | level as u64
    }

    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Store(_) => "store",
            Self::Fetch => "fetch",
            Self::LoadExclusive => "load exclusive",
            Self::StoreExclusive(_) => "store exclusive",
            Self::LoadTag => "LDG",
            Self::StoreTag(_) => "STG",
            Self::Walk(For::Data) => "table walk for data",
            Self::Walk(For::Fetch) => "table walk for a fetch",
            Self::Update(For::Data) => "table update for data",
            Self::Update(For::Fetch) => "table update for a fetch",
            Self::Maintain(Line::Ivac) => "DC IVAC",
            Self::Maintain(Line::Cvac) => "DC CVAC",
            Self::Maintain(Line::Civac) => "DC CIVAC",
            Self::Maintain(Line::Cvau) => "DC CVAU",
            Self::Maintain(Line::Ivau) => "IC IVAU",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_arch_arm64::abort;
    use entresol_fault::Cause;

    /// The core's decoder reads back what the model's hardware reports.
    #[test]
    fn a_syndrome_says_what_was_done() {
        let all = [
            (Operation::Load, Access::Read),
            (Operation::Store(1), Access::Write),
            (Operation::Fetch, Access::Fetch),
            (Operation::LoadExclusive, Access::Read),
            (Operation::StoreExclusive(1), Access::Write),
            (Operation::LoadTag, Access::Read),
            (Operation::StoreTag(1), Access::Write),
            (Operation::Walk(For::Data), Access::Read),
            (Operation::Walk(For::Fetch), Access::Fetch),
            (Operation::Update(For::Data), Access::Read),
            (Operation::Update(For::Fetch), Access::Fetch),
        ];
        let lines = Line::ALL.map(|(_, line)| (Operation::Maintain(line), Access::Write));
        for (operation, access) in all.into_iter().chain(lines) {
            let fault = abort::fault(operation.syndrome(0b0011, 3), 0x1008, 0x10);
            assert_eq!(fault.access, access, "{operation:?}");
            assert_eq!(fault.cause, Cause::Permission { level: 3 });
            assert_eq!(fault.stage1_walk, operation.is_walk(), "{operation:?}");
            assert_eq!(fault.cache_maintenance, operation.line().is_some(), "{operation:?}");
            assert_eq!(
                fault.is_write(),
                operation.needs() == Access::Write || operation.line().is_some() || operation.is_walk(),
                "a permission fault: {operation:?}"
            );
        }
    }
}
