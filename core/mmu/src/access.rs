//! What becomes of an access that memory will not serve: pure decisions, in the order of the specification
//! ("What a fault becomes, in order").

use entresol_addr::Gpa;
use entresol_fault::{Access, Cause, Fault};
use entresol_sync::planted;

use crate::maintain::{ReadOnlyIvac, Target, Triage, triage};
use crate::outcome::{Abort, Outcome, Reason};

/// Rows 1–4: what needs no slot to be decided. `None` means: look for a slot.
#[inline]
pub fn before_lookup(fault: &Fault, machine_limit: Gpa, vm_limit: Gpa) -> Option<Outcome> {
    match fault.cause {
        Cause::Translation if fault.gpa >= vm_limit => Some(beyond(fault, machine_limit)),
        Cause::Translation | Cause::Permission { .. } | Cause::AccessFlag => None,
        _ => Some(not_ours(fault)),
    }
}

#[cold]
pub fn beyond(fault: &Fault, machine_limit: Gpa) -> Outcome {
    let abort = if fault.gpa >= machine_limit { Abort::AddressSize } else { Abort::External };
    Outcome::Inject(abort)
}

#[cold]
fn not_ours(fault: &Fault) -> Outcome {
    match fault.cause {
        Cause::External => Outcome::Inject(Abort::SystemError),
        Cause::AddressSize => Outcome::Inject(Abort::AddressSize),
        Cause::UnsupportedAtomic => Outcome::Inject(Abort::External),
        _ => Outcome::Exit(Reason::Unsupported { syndrome: fault.syndrome }),
    }
}

/// Rows 5–8 for an access outside every slot.
#[cold]
pub fn outside(fault: &Fault) -> Outcome {
    if fault.access == Access::Fetch || fault.stage1_walk {
        return Outcome::Inject(Abort::External);
    }
    if !fault.cache_maintenance {
        return Outcome::Mmio;
    }
    match triage(Target::Nothing, fault.is_write(), ReadOnlyIvac::Abort) {
        Triage::Skip => Outcome::Skip,
        _ => Outcome::Inject(Abort::External),
    }
}

/// Rows 5–8 for a write to read-only memory that is no cache maintenance.
#[cold]
pub fn read_only(fault: &Fault) -> Outcome {
    if fault.access == Access::Fetch || fault.stage1_walk && !planted!(ZB4) {
        return Outcome::Inject(Abort::External);
    }
    Outcome::Mmio
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACHINE: Gpa = Gpa::new(1 << 48);
    const VM: Gpa = Gpa::new(1 << 40);

    fn fault(gpa: u64, access: Access, cause: Cause) -> Fault {
        Fault {
            gpa: Gpa::new(gpa),
            access,
            cause,
            stage1_walk: false,
            cache_maintenance: false,
            transfer: None,
            syndrome: 0x93,
        }
    }

    #[test]
    fn the_first_four_rows_in_order() {
        let rows = [
            (0, Cause::External, Some(Outcome::Inject(Abort::SystemError))),
            (1 << 48, Cause::Translation, Some(Outcome::Inject(Abort::AddressSize))),
            (1 << 40, Cause::Translation, Some(Outcome::Inject(Abort::External))),
            ((1 << 40) - 1, Cause::Translation, None),
            (0, Cause::Permission { level: 3 }, None),
            (0, Cause::AccessFlag, None),
            (0, Cause::Other, Some(Outcome::Exit(Reason::Unsupported { syndrome: 0x93 }))),
        ];
        for (gpa, cause, expected) in rows {
            assert_eq!(before_lookup(&fault(gpa, Access::Read, cause), MACHINE, VM), expected, "{gpa:#x} {cause:?}");
        }
    }

    #[test]
    fn outside_a_slot() {
        let load = fault(0, Access::Read, Cause::Translation);
        assert_eq!(outside(&load), Outcome::Mmio);
        assert_eq!(outside(&Fault { access: Access::Fetch, ..load }), Outcome::Inject(Abort::External));
        assert_eq!(outside(&Fault { stage1_walk: true, ..load }), Outcome::Inject(Abort::External));
        assert_eq!(outside(&Fault { cache_maintenance: true, access: Access::Write, ..load }), Outcome::Skip);
    }

    #[test]
    fn a_write_to_read_only_memory() {
        let store = fault(0, Access::Write, Cause::Permission { level: 3 });
        assert_eq!(read_only(&store), Outcome::Mmio);
        assert_eq!(read_only(&Fault { stage1_walk: true, ..store }), Outcome::Inject(Abort::External));
    }
}
