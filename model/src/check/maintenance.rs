//! Cache maintenance means what the specification's table says ("cache-ops", required outcomes), through either door.
//!
//! Watches each answer of the core to maintenance by virtual address whose target did not change meanwhile. The table is
//! written here a second time, as what the guest may see: the core's own is `triage`.

use entresol_mmu::{Abort, Outcome, ReadOnlyIvac, Reason};

use crate::guest::operation::Line;
use crate::guest::record::Target;
use crate::guest::vcpu::Door;

/// What the guest did, and what its owner decided.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    /// The instruction.
    pub line: Line,
    /// How it came to the core.
    pub door: Door,
    /// What DC IVAC does to read-only memory.
    pub policy: ReadOnlyIvac,
}

/// What the core may answer. The retry of an access that something else disturbed is always one of the answers.
fn expected(target: Target, asked: Asked) -> &'static [Outcome] {
    const MAPPED: &[Outcome] = &[Outcome::Resume, Outcome::Retry, Outcome::Exit(Reason::OutOfMemory)];
    const DONE: &[Outcome] = &[Outcome::Skip, Outcome::Retry, Outcome::Exit(Reason::OutOfMemory)];
    const ABORT: &[Outcome] = &[Outcome::Inject(Abort::External), Outcome::Retry];
    const SKIP: &[Outcome] = &[Outcome::Skip, Outcome::Retry];
    let needs_write = match asked.door {
        // A translation fault does not tell; a permission fault says that it was DC IVAC.
        Door::Abort { needs_write } => needs_write,
        Door::Trap => asked.line == Line::Ivac,
    };
    match (target, asked.door) {
        (Target::Nothing, _) => SKIP,
        (Target::ReadOnly, _) if needs_write => match asked.policy {
            ReadOnlyIvac::Abort => ABORT,
            ReadOnlyIvac::Clean => SKIP,
        },
        (_, Door::Abort { .. }) => MAPPED,
        (_, Door::Trap) => DONE,
    }
}

/// The core answered `outcome`. `target` is what lay at the address all the time, if it was one thing.
pub fn answered(target: Option<Target>, asked: Asked, gpa: u64, outcome: Outcome) -> Option<String> {
    let expected = expected(target?, asked);
    (!expected.contains(&outcome))
        .then(|| format!("{:?} of {gpa:#x} ({:?}) came to {outcome:?}, not to one of {expected:?}", asked.line, target))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ivac_on_read_only_memory_is_an_abort() {
        for (_, line) in Line::ALL {
            for target in [Target::Nothing, Target::ReadOnly, Target::Writable, Target::Device] {
                for policy in [ReadOnlyIvac::Abort, ReadOnlyIvac::Clean] {
                    let asked = Asked { line, door: Door::Trap, policy };
                    let abort = answered(Some(target), asked, 0x1000, Outcome::Inject(Abort::External)).is_none();
                    let ivac_of_rom = line == Line::Ivac && target == Target::ReadOnly;
                    assert_eq!(abort, ivac_of_rom && policy == ReadOnlyIvac::Abort, "{line:?} {target:?} {policy:?}");
                    assert!(answered(Some(target), asked, 0x1000, Outcome::Mmio).is_some(), "never emulated");
                    assert!(answered(None, asked, 0x1000, Outcome::Mmio).is_none(), "what changes is not judged");
                }
            }
        }
    }
}
