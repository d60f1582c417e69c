//! What the processor says when the second stage refuses an access: the registers of an exit, and the fault that the core's decoder
//! makes of them.

use entresol_addr::{Gpa, PAGE_SHIFT};
use entresol_arch_arm64::abort;
use entresol_arch_x86::fault::{self as x86_fault, SecondStage};

use super::operation::Operation;
use crate::machine::config::Paging;
use crate::machine::x86::{self, Refusal};

/// Why an access was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The entry is invalid.
    Translation,
    /// Its access flag is clear, where the processor does not set it.
    AccessFlag,
    /// It permits something else.
    Permission,
    /// It is one that the hardware refuses.
    Refused,
}

/// An access that was refused, by an entry at a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// What was done.
    pub what: Operation,
    /// Why it was refused.
    pub cause: Cause,
    /// By an entry of which level.
    pub level: u8,
}

impl Trap {
    /// The exit, decoded.
    pub fn decode(self, paging: Paging, gpa: Gpa) -> SecondStage {
        let access = self.what.needs();
        let refusal = match self.cause {
            Cause::Translation => Refusal::Absent,
            Cause::AccessFlag | Cause::Permission => Refusal::Permission,
            Cause::Refused => Refusal::Malformed,
        };
        match paging {
            Paging::Stage2 => {
                // Fault status codes, without the level (Arm DDI 0487 D24.2, ISS.DFSC).
                let status = match self.cause {
                    Cause::Translation | Cause::Refused => 0b0001,
                    Cause::AccessFlag => 0b0010,
                    Cause::Permission => 0b0011,
                };
                let esr = self.what.syndrome(status, self.level);
                SecondStage::Fault(abort::fault(esr, gpa.get(), gpa.get() >> PAGE_SHIFT << 4))
            }
            Paging::Npt | Paging::Shadow => x86_fault::nested(x86::exit_info(access, refusal), gpa.get()),
            Paging::Ept if refusal == Refusal::Malformed => x86_fault::misconfiguration(gpa.get()),
            Paging::Ept => x86_fault::violation(x86::qualification(access, refusal), gpa.get()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_fault as fault;

    /// The core's decoders read back what the model's hardware reports.
    #[test]
    fn an_x86_exit_says_what_was_done() {
        let done = [
            (Operation::Load, fault::Access::Read),
            (Operation::Store(1), fault::Access::Write),
            (Operation::Fetch, fault::Access::Fetch),
        ];
        let causes = [
            (Cause::Translation, fault::Cause::Translation),
            (Cause::Permission, fault::Cause::Permission { level: 3 }),
        ];
        for paging in [Paging::Npt, Paging::Ept] {
            for ((what, access), (cause, decoded)) in done.iter().flat_map(|one| causes.map(move |cause| (*one, cause)))
            {
                let trap = Trap { what, cause, level: 3 };
                let SecondStage::Fault(fault) = trap.decode(paging, Gpa::new(0x1008)) else {
                    panic!("{paging:?} {trap:?} is no refused entry");
                };
                assert_eq!((fault.gpa, fault.access, fault.cause), (Gpa::new(0x1008), access, decoded), "{paging:?}");
                assert!(!fault.stage1_walk);
            }
            let refused = Trap { what: Operation::Load, cause: Cause::Refused, level: 3 };
            let SecondStage::Refused(fault) = refused.decode(paging, Gpa::new(0x1008)) else {
                panic!("{paging:?}: a refused entry is told apart");
            };
            assert_eq!(fault.gpa, Gpa::new(0x1008));
        }
    }
}
