//! Nested page faults: into the core's pipeline, and what its outcomes mean here.

use entresol_addr::Gpa;
use entresol_arch_x86::fault::SecondStage;
use entresol_fault::Fault;
use entresol_mmu::{Outcome, Reason};

use super::{GENERAL_PROTECTION, inject, mmio};
use crate::arch::State;
use crate::exit::{Next, absent, crash, park, starve};
use crate::host;
use crate::sched::VcpuRef;
use crate::vm::{Crash, Pause};

/// An access that the nested tables did not let through.
#[inline(always)]
pub fn fault(cpu: usize, vcpu: &VcpuRef, state: &mut State, fault: SecondStage) -> Next {
    let (fault, refused) = match fault {
        SecondStage::Fault(fault) => (fault, false),
        SecondStage::Refused(fault) => (fault, true),
    };
    let outcome = {
        let pin = host::get().epoch.pin(cpu);
        if refused {
            vcpu.vm.memory.handle_refused(&pin, &state.hint, &mut state.mmio, &fault)
        } else {
            vcpu.vm.memory.handle_noting(&pin, &state.hint, &mut state.mmio, &fault)
        }
    };
    match outcome {
        Outcome::Resume => Next::Again,
        other => conclude(cpu, vcpu, state, &fault, other),
    }
}

/// What a rarer outcome means here.
#[cold]
pub fn conclude(cpu: usize, vcpu: &VcpuRef, state: &mut State, fault: &Fault, outcome: Outcome) -> Next {
    match outcome {
        Outcome::Resume => Next::Again,
        Outcome::Retry => Next::Look,
        Outcome::Unshare => match vcpu.vm.memory.unshare(cpu, fault.gpa) {
            Outcome::Unshare => Next::Look,
            other => conclude(cpu, vcpu, state, fault, other),
        },
        // The architecture has no abort for an address that nobody answers: what a guest fetches from, or walks, must be memory.
        Outcome::Inject(_) | Outcome::Skip => inject(state, GENERAL_PROTECTION, Some(0)),
        Outcome::Mmio => mmio::access(cpu, vcpu, state, fault),
        Outcome::Exit(Reason::OutOfMemory) => starve(vcpu),
        Outcome::Exit(Reason::Stored { .. }) => absent(vcpu, fault.gpa),
        Outcome::Exit(Reason::DirtyRingFull) => park(&vcpu.vm, Pause::DirtyRingFull),
        Outcome::Exit(Reason::Malformed) => malformed(cpu, vcpu, fault.gpa),
        Outcome::Exit(Reason::Unsupported { syndrome }) => crash(vcpu, Crash::Unsupported { syndrome }),
        Outcome::Exit(Reason::MemoryFault(_) | Reason::BadObject) => {
            crash(vcpu, Crash::BadObject { gpa: fault.gpa.get() })
        }
    }
}

/// The processor refuses a word of the nested tables that nobody wrote: the words, for whoever looks for the reason.
#[cold]
fn malformed(cpu: usize, vcpu: &VcpuRef, gpa: Gpa) -> Next {
    {
        let pin = host::get().epoch.pin(cpu);
        let vm = &vcpu.vm;
        log::error!("vm {}: the way to {gpa:x?} is {:x?}", vm.config.name, vm.memory.way(&pin, gpa.frame()));
    }
    crash(vcpu, Crash::BadObject { gpa: gpa.get() })
}
