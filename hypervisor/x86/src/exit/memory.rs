//! Nested page faults: into the core's pipeline, and what its outcomes mean here.

use entresol_addr::Gpa;
use entresol_arch_x86::fault::SecondStage;
use entresol_fault::Fault;
use entresol_mmu::{Outcome, Reason};

use super::{GENERAL_PROTECTION, Next, inject, mmio};
use crate::host;
use crate::vm::{Crash, End, Vm};

/// An access that the nested tables did not let through.
#[inline(always)]
pub fn fault(cpu: usize, vm: &mut Vm, fault: SecondStage) -> Next {
    let vcpu = &mut vm.vcpu;
    let (fault, refused) = match fault {
        SecondStage::Fault(fault) => (fault, false),
        SecondStage::Refused(fault) => (fault, true),
    };
    let outcome = {
        let pin = vm.memory.host().epoch.pin(cpu);
        if refused {
            vm.memory.handle_refused(&pin, &vcpu.hint, &mut vcpu.mmio, &fault)
        } else {
            vm.memory.handle_noting(&pin, &vcpu.hint, &mut vcpu.mmio, &fault)
        }
    };
    match outcome {
        Outcome::Resume => Next::Again,
        other => conclude(cpu, vm, &fault, other),
    }
}

/// What a rarer outcome means here.
#[cold]
pub fn conclude(cpu: usize, vm: &mut Vm, fault: &Fault, outcome: Outcome) -> Next {
    match outcome {
        Outcome::Resume | Outcome::Retry => Next::Again,
        Outcome::Unshare => match vm.memory.unshare(cpu, fault.gpa) {
            Outcome::Unshare => Next::Again,
            other => conclude(cpu, vm, fault, other),
        },
        // The architecture has no abort for an address that nobody answers: what a guest fetches from, or walks, must be memory.
        Outcome::Inject(_) | Outcome::Skip => inject(&mut vm.vcpu.guest, GENERAL_PROTECTION, Some(0)),
        Outcome::Mmio => mmio::access(cpu, vm, fault),
        Outcome::Exit(Reason::OutOfMemory) => crash(Crash::OutOfMemory),
        Outcome::Exit(Reason::Malformed) => malformed(cpu, vm, fault.gpa),
        Outcome::Exit(
            Reason::Unsupported { .. }
            | Reason::Stored { .. }
            | Reason::MemoryFault(_)
            | Reason::BadObject
            | Reason::DirtyRingFull,
        ) => crash(Crash::Access(fault.gpa)),
    }
}

/// The processor refuses a word of the nested tables that nobody wrote: the words, for whoever looks for the reason.
#[cold]
fn malformed(cpu: usize, vm: &Vm, gpa: Gpa) -> Next {
    let pin = host::get().epoch.pin(cpu);
    log::error!("vm {}: the way to {gpa:x?} is {:x?}", vm.name, vm.memory.way(&pin, gpa.frame()));
    crash(Crash::Malformed(gpa))
}

fn crash(crash: Crash) -> Next {
    Next::End(End::Crash(crash))
}
