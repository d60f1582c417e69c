//! Memory aborts: into the core's pipeline, and what its outcomes mean here.

use entresol_arch_arm64::abort;
use entresol_arch_arm64::inject::{Exception, Status};
use entresol_fault::{Access, Fault};
use entresol_metal_arm64::cpu;
use entresol_metal_arm64::exit::{self as hardware, Rights};
use entresol_mmu::{Abort, Outcome, Reason};

use super::{Next, absent, crash, mmio, park, posted, starve, undefined, walk};
use crate::arch::State;
use crate::host;
use crate::sched::VcpuRef;
use crate::vm::{Crash, Pause};

/// SError syndrome for an asynchronous external abort of the guest's access: implementation defined, nothing known.
const SERROR_ISS: u32 = 1 << 24;

/// Handles an instruction or data abort from the second stage.
#[inline(always)]
pub fn abort(cpu: usize, vcpu: &VcpuRef, state: &mut State, esr: u64) -> Next {
    let far = hardware::far();
    let hpfar = if abort::hpfar_is_valid(esr) { Some(hardware::hpfar()) } else { translate(far) };
    // The guest's own tables changed meanwhile: it faults again, or not.
    let Some(hpfar) = hpfar else { return Next::Look };
    if vcpu.vm.posted.may_cover(abort::page(hpfar))
        && let Some(next) = posted::described(vcpu, state, esr, far, hpfar)
    {
        return next;
    }
    let fault = abort::fault(esr, far, hpfar);
    let outcome = {
        let pin = host::get().epoch.pin(cpu);
        vcpu.vm.memory.handle(&pin, &state.hint, &fault)
    };
    match outcome {
        Outcome::Resume => Next::Again,
        Outcome::Mmio => mmio::access(vcpu, state, &fault, esr, far),
        other => conclude(vcpu, state, &fault, esr, far, other),
    }
}

/// The intermediate address of `far`, in HPFAR_EL2's layout, where the hardware does not report it.
#[cold]
fn translate(far: u64) -> Option<u64> {
    hardware::translate(far, Rights::El1Read).ok().and_then(|translated| abort::hpfar_from_par(translated.par()))
}

/// What a rare outcome means here.
#[cold]
pub fn conclude(vcpu: &VcpuRef, state: &mut State, fault: &Fault, esr: u64, far: u64, outcome: Outcome) -> Next {
    match outcome {
        Outcome::Resume | Outcome::Mmio => Next::Again,
        Outcome::Retry => Next::Look,
        Outcome::Unshare => match vcpu.vm.memory.unshare(cpu::index(), fault.gpa) {
            // Off by now: the guest tries again, and is served.
            Outcome::Unshare => Next::Look,
            other => conclude(vcpu, state, fault, esr, far, other),
        },
        Outcome::Skip => {
            state.skip(esr);
            Next::Again
        }
        Outcome::Inject(abort) => {
            inject(vcpu, state, fault, far, abort);
            Next::Again
        }
        Outcome::Exit(Reason::OutOfMemory) => starve(vcpu),
        Outcome::Exit(Reason::Stored { .. }) => absent(vcpu, fault.gpa),
        Outcome::Exit(Reason::DirtyRingFull) => park(&vcpu.vm, Pause::DirtyRingFull),
        Outcome::Exit(Reason::Unsupported { syndrome }) => crash(vcpu, Crash::Unsupported { syndrome }),
        // These tables' format has no word that the hardware refuses.
        Outcome::Exit(Reason::Malformed) => crash(vcpu, Crash::Unsupported { syndrome: esr }),
        // Guests of arm64 have one kind of access: no vCPU's disagrees with what a page is.
        Outcome::Exit(Reason::BadObject | Reason::MemoryFault(_)) => {
            crash(vcpu, Crash::BadObject { gpa: fault.gpa.get() })
        }
    }
}

/// Gives the guest the abort that its access deserves.
#[cold]
pub fn inject(vcpu: &VcpuRef, state: &mut State, fault: &Fault, far: u64, abort: Abort) {
    let status = match abort {
        Abort::External if fault.stage1_walk => walk::abort(vcpu, state, far, fault.gpa),
        Abort::External => Status::External,
        Abort::AddressSize => Status::AddressSize,
        Abort::SystemError => return undefined::enter(state, Exception::SError { iss: SERROR_ISS }),
    };
    let exception = match fault.access {
        Access::Fetch => Exception::InstructionAbort { address: far, status },
        access => Exception::DataAbort {
            address: far,
            status,
            write: access == Access::Write,
            cache_maintenance: fault.cache_maintenance,
        },
    };
    undefined::enter(state, exception);
}
