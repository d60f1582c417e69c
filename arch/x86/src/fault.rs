//! Second-stage exits as the core's [`Fault`].
//!
//! Purpose: the first step of every memory fault. AMD reports one in EXITINFO1 and EXITINFO2 of exit 400h (APM 15.25.6), Intel in
//! the exit qualification of reason 48 and the guest-physical address (SDM 28.2.1, "exit qualification for EPT violations"), or
//! as a misconfiguration, reason 49.
//!
//! Neither says at which level an entry refused: the level of a permission fault is given as that of a 4 KiB leaf, and who needs
//! the true one walks. Both report an access to the guest's own tables as a write whatever it was for, as the processor may have
//! to set accessed and dirty flags there.
//!
//! Invariants: pure; any 64-bit values are accepted.

use entresol_addr::Gpa;
use entresol_fault::{Access, Cause, Fault};
use entresol_table::LEAF_LEVEL;

/// What a second-stage exit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondStage {
    /// An access that no entry permits.
    Fault(Fault),
    /// An entry that no processor accepts: an MMIO entry, or a bug of ours.
    Refused(Fault),
}

/// EXITINFO1 of a nested page fault.
mod npf {
    pub const PRESENT: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const RESERVED: u64 = 1 << 3;
    pub const FETCH: u64 = 1 << 4;
    /// The fault was on the way to the guest's own tables.
    pub const WALK: u64 = 1 << 33;
}

/// Exit qualification of an EPT violation.
mod violation {
    pub const WRITE: u64 = 1 << 1;
    pub const FETCH: u64 = 1 << 2;
    /// Read, write or execute in the entries on the way.
    pub const PERMITTED: u64 = 0b111 << 3;
    /// A linear address is known; without one, page-directory pointers were being loaded.
    pub const LINEAR: u64 = 1 << 7;
    /// The access was to what the linear address means, not on the way there.
    pub const FINAL: u64 = 1 << 8;
}

const fn access(fetch: bool, write: bool) -> Access {
    match (fetch, write) {
        (true, _) => Access::Fetch,
        (false, true) => Access::Write,
        (false, false) => Access::Read,
    }
}

const fn cause(present: bool) -> Cause {
    if present { Cause::Permission { level: LEAF_LEVEL } } else { Cause::Translation }
}

const fn fault(gpa: u64, access: Access, cause: Cause, stage1_walk: bool, syndrome: u64) -> Fault {
    Fault { gpa: Gpa::new(gpa), access, cause, stage1_walk, cache_maintenance: false, transfer: None, syndrome }
}

/// A nested page fault: EXITINFO1 and EXITINFO2. QEMU's TCG reports a reserved bit with P clear, processors with P set: the
/// reserved bit alone decides.
#[inline]
pub const fn nested(info1: u64, info2: u64) -> SecondStage {
    let access = access(info1 & npf::FETCH != 0, info1 & npf::WRITE != 0);
    let fault = fault(info2, access, cause(info1 & npf::PRESENT != 0), info1 & npf::WALK != 0, info1);
    if info1 & npf::RESERVED != 0 { SecondStage::Refused(fault) } else { SecondStage::Fault(fault) }
}

/// An EPT violation: exit qualification and guest-physical address.
#[inline]
pub const fn violation(qualification: u64, gpa: u64) -> SecondStage {
    let access = access(qualification & violation::FETCH != 0, qualification & violation::WRITE != 0);
    let direct = qualification & violation::LINEAR != 0 && qualification & violation::FINAL != 0;
    let present = qualification & violation::PERMITTED != 0;
    SecondStage::Fault(fault(gpa, access, cause(present), !direct, qualification))
}

/// An EPT misconfiguration: the guest-physical address is all that is known.
#[inline]
pub const fn misconfiguration(gpa: u64) -> SecondStage {
    SecondStage::Refused(fault(gpa, Access::Read, Cause::Other, false, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PERMISSION: Cause = Cause::Permission { level: 3 };

    #[test]
    fn nested_faults_by_the_manual() {
        let (last, walk) = (1 << 32, 1 << 33);
        for (info1, want, cause, on_walk) in [
            (last | 0b0_0100, Access::Read, Cause::Translation, false),
            (last | 0b0_0110, Access::Write, Cause::Translation, false),
            (last | 0b0_0111, Access::Write, PERMISSION, false),
            (last | 0b1_0100, Access::Fetch, Cause::Translation, false),
            (last | 0b1_0101, Access::Fetch, PERMISSION, false),
            (walk | 0b0_0110, Access::Write, Cause::Translation, true),
            (walk | 0b0_0111, Access::Write, PERMISSION, true),
        ] {
            let SecondStage::Fault(fault) = nested(info1, 0x1234_5678) else { panic!("{info1:#x}") };
            assert_eq!((fault.access, fault.cause, fault.stage1_walk), (want, cause, on_walk), "{info1:#x}");
            assert_eq!((fault.gpa.get(), fault.syndrome), (0x1234_5678, info1));
        }
    }

    #[test]
    fn the_reserved_bit_alone_marks_an_mmio_entry() {
        for present in [0, 1] {
            let SecondStage::Refused(fault) = nested(1 << 32 | 0b1110 | present, 0xfee0_0010) else { panic!() };
            assert_eq!((fault.access, fault.gpa.get()), (Access::Write, 0xfee0_0010));
        }
        assert!(matches!(misconfiguration(0xfee0_0010), SecondStage::Refused(_)));
    }

    #[test]
    fn violations_by_the_manual() {
        let last = 0b11 << 7;
        for (qualification, want, cause, on_walk) in [
            (last | 0b00_0001, Access::Read, Cause::Translation, false),
            (last | 0b00_0010, Access::Write, Cause::Translation, false),
            (last | 0b00_0011, Access::Write, Cause::Translation, false),
            (last | 0b00_1010, Access::Write, PERMISSION, false),
            (last | 0b00_0100, Access::Fetch, Cause::Translation, false),
            (last | 0b01_1100, Access::Fetch, PERMISSION, false),
            (1 << 7 | 0b00_0011, Access::Write, Cause::Translation, true),
            (1 << 7 | 0b10_1011, Access::Write, PERMISSION, true),
            // Page-directory pointers at a MOV to CR3: no linear address.
            (0b00_0001, Access::Read, Cause::Translation, true),
        ] {
            let SecondStage::Fault(fault) = violation(qualification, 0x5000) else { panic!("{qualification:#x}") };
            assert_eq!((fault.access, fault.cause, fault.stage1_walk), (want, cause, on_walk), "{qualification:#x}");
        }
    }

    #[test]
    fn a_walk_writes_only_where_it_was_refused() {
        let (SecondStage::Fault(first), SecondStage::Fault(second)) =
            (nested(1 << 33 | 0b110, 0), nested(1 << 33 | 0b111, 0))
        else {
            panic!()
        };
        assert!(!first.is_write() && second.is_write());
    }
}
