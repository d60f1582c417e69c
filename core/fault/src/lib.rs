//! One guest access that could not proceed, in terms that no architecture owns.
//!
//! Purpose: `arch/*` decodes a hardware exit into a [`Fault`]; everything after that reads only this. The access kind
//! is decided once, here, by the rule of the specification: a stage-1 walk is a write exactly if it took a permission
//! fault, a fetch is never a write, everything else says so itself.
//!
//! Invariants: a `Fault` is a copy of what the hardware reported; making one has no effect.
#![no_std]
#![forbid(unsafe_code)]

use entresol_addr::{Gfn, Gpa};

/// What the guest's instruction was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A load.
    Read,
    /// A store, or an atomic update.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// Why the second stage refused it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// No valid entry.
    Translation,
    /// A valid entry that does not permit the access; `level` is the table level of that entry (3 = 4 KiB).
    Permission {
        /// Level of the entry, 0–3.
        level: u8,
    },
    /// A valid entry whose access flag is clear.
    AccessFlag,
    /// An atomic or exclusive access that the memory type does not support.
    UnsupportedAtomic,
    /// The address has more bits than the tables translate.
    AddressSize,
    /// A synchronous external abort.
    External,
    /// Anything else that the hardware can report; the raw syndrome is the only description.
    Other,
}

/// How a data access that the hardware described completely moves its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Transfer {
    /// Bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// Whether a load extends the sign.
    pub sign_extend: bool,
    /// General-purpose register, 0–31; 31 is the zero register.
    pub register: u8,
    /// Whether the register is 64 bits wide (else the upper half becomes zero).
    pub wide: bool,
}

/// A guest access that needs the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fault {
    /// The guest physical address, complete to the byte where the hardware tells it.
    pub gpa: Gpa,
    /// What was being done.
    pub access: Access,
    /// What refused it.
    pub cause: Cause,
    /// The access was the hardware's, to a stage-1 table.
    pub stage1_walk: bool,
    /// The access was cache maintenance by virtual address.
    pub cache_maintenance: bool,
    /// How data moves, if the hardware says.
    pub transfer: Option<Transfer>,
    /// The architecture's raw syndrome, for exits that nobody here can explain.
    pub syndrome: u64,
}

impl Fault {
    /// The frame that was touched.
    #[inline]
    pub const fn gfn(&self) -> Gfn {
        self.gpa.frame()
    }

    /// Whether memory must be writable before the access can be made again.
    #[inline]
    pub const fn is_write(&self) -> bool {
        if self.stage1_walk {
            return matches!(self.cause, Cause::Permission { .. });
        }
        // A maintenance operation is told apart from a store by what it needs: spec "cache-ops", required outcomes.
        if self.cache_maintenance {
            return matches!(self.cause, Cause::Permission { .. });
        }
        matches!(self.access, Access::Write)
    }

    /// Whether memory must be executable before the access can be made again.
    #[inline]
    pub const fn is_fetch(&self) -> bool {
        matches!(self.access, Access::Fetch) && !self.stage1_walk
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(access: Access, cause: Cause, stage1_walk: bool, cache_maintenance: bool) -> Fault {
        Fault { gpa: Gpa::new(0x4000_0123), access, cause, stage1_walk, cache_maintenance, transfer: None, syndrome: 0 }
    }

    #[test]
    fn write_follows_the_specification() {
        let permission = Cause::Permission { level: 3 };
        for (access, cause, walk, maintenance, write) in [
            (Access::Read, Cause::Translation, false, false, false),
            (Access::Write, Cause::Translation, false, false, true),
            (Access::Fetch, permission, false, false, false),
            // Hardware update of the access flag or dirty state in a stage-1 table.
            (Access::Read, permission, true, false, true),
            (Access::Fetch, permission, true, false, true),
            (Access::Write, Cause::Translation, true, false, false),
            // Maintenance reports a write always; only a permission fault means that one is needed.
            (Access::Write, Cause::Translation, false, true, false),
            (Access::Write, permission, false, true, true),
        ] {
            assert_eq!(fault(access, cause, walk, maintenance).is_write(), write, "{access:?} {cause:?} {walk}");
        }
    }

    #[test]
    fn a_walk_for_a_fetch_is_no_fetch() {
        assert!(fault(Access::Fetch, Cause::Translation, false, false).is_fetch());
        assert!(!fault(Access::Fetch, Cause::Translation, true, false).is_fetch());
    }
}
