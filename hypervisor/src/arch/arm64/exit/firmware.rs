//! What a guest asks of its firmware: SMCCC and PSCI.

use entresol_addr::Gpa;
use entresol_arch_arm64::mpidr::Affinity;
use entresol_arch_arm64::psci::{self, Power, Status};
use entresol_arch_arm64::smccc;

use super::{Next, wait};
use crate::arch::{Boot, State};
use crate::sched::{self, Leave, Run, VcpuRef};
use crate::service;
use crate::vm::Stop;

/// StateType of CPU_SUSPEND's power state, original format: power-down (DEN 0022 5.4.2).
const POWER_DOWN: u32 = 1 << 16;

/// An HVC or SMC whose registers are the vCPU's; the PC is past it.
#[inline(always)]
pub fn call(vcpu: &VcpuRef, state: &mut State) -> Next {
    let x = &state.regs.x;
    let (answer, next) = match smccc::decode([x[0], x[1], x[2], x[3]]) {
        smccc::Call::Version => (smccc::VERSION, Next::Again),
        smccc::Call::ArchFeatures { function } => (smccc::features(function), Next::Again),
        smccc::Call::Psci(psci::Call::Version) => (psci::VERSION, Next::Again),
        smccc::Call::Psci(call) => match power(vcpu, state, call) {
            Some(answered) => answered,
            None => return Next::Leave(Leave::Park),
        },
        smccc::Call::PvTimeFeatures { function } => (smccc::pv_time_features(function), Next::Again),
        smccc::Call::StolenTime => (vcpu.vm.stolen_time_record(vcpu.index), Next::Again),
        smccc::Call::Unknown { function } => {
            let arguments = [x[1], x[2], x[3]];
            (service::call(vcpu, function, arguments).unwrap_or(smccc::NOT_SUPPORTED), Next::Again)
        }
    };
    state.regs.x[0] = answer;
    next
}

/// A PSCI call; `None` if the virtual machine no longer runs.
#[cold]
fn power(vcpu: &VcpuRef, state: &mut State, call: psci::Call) -> Option<(u64, Next)> {
    let again = |status: Status| Some((status.x0(), Next::Again));
    match call {
        psci::Call::Version => Some((psci::VERSION, Next::Again)),
        psci::Call::Features { function } => Some((psci::features(function), Next::Again)),
        psci::Call::MigrateInfoType => Some((psci::NO_MIGRATION, Next::Again)),
        psci::Call::CpuOff => Some((Status::Success.x0(), Next::Leave(Leave::Off))),
        psci::Call::CpuOn { target, entry, context } => again(cpu_on(vcpu, target, Boot { entry, argument: context })),
        psci::Call::AffinityInfo { target, level } => Some((affinity_info(vcpu, target, level), Next::Again)),
        psci::Call::CpuSuspend { power_state, entry, context } => {
            let next = wait::until_interrupt(vcpu, state);
            // With an interrupt pending there is no power-down, and the call returns as from standby (DEN 0022 5.4.5).
            if power_state & POWER_DOWN != 0 && matches!(next, Next::Leave(_)) {
                *vcpu.vm.vcpu(vcpu.index).boot.lock() = Some(Boot { entry, argument: context });
            }
            Some((Status::Success.x0(), next))
        }
        psci::Call::SystemOff => {
            vcpu.vm.stop(Stop::PowerOff);
            None
        }
        psci::Call::SystemReset => {
            vcpu.vm.stop(Stop::Reset);
            None
        }
        psci::Call::SystemReset2 { kind, .. } => {
            // Architectural warm reset is type 0; all others are a vendor's (DEN 0022 5.12).
            if kind != 0 {
                return again(Status::InvalidParameters);
            }
            vcpu.vm.stop(Stop::Reset);
            None
        }
    }
}

fn target_of(vcpu: &VcpuRef, target: u64) -> Option<usize> {
    Affinity::from_psci(target)?.vcpu(vcpu.vm.vcpus())
}

fn cpu_on(vcpu: &VcpuRef, target: u64, boot: Boot) -> Status {
    let Some(index) = target_of(vcpu, target) else { return Status::InvalidParameters };
    if !boot.entry.is_multiple_of(4) || !vcpu.vm.is_memory(Gpa::new(boot.entry)) {
        return Status::InvalidAddress;
    }
    let vm = vcpu.vm.clone();
    let on = sched::power_on(VcpuRef { vm, index }, || *vcpu.vm.vcpu(index).boot.lock() = Some(boot));
    if on { Status::Success } else { Status::AlreadyOn }
}

fn affinity_info(vcpu: &VcpuRef, target: u64, level: u32) -> u64 {
    // Only single CPUs have a state; higher levels are not kept (DEN 0022 5.7: level 1 and above may be refused).
    match target_of(vcpu, target) {
        Some(index) if level == 0 => match vcpu.vm.vcpu(index).run() {
            Run::Off => Power::Off as u64,
            Run::Ready if vcpu.vm.vcpu(index).boot.lock().is_some() => Power::OnPending as u64,
            _ => Power::On as u64,
        },
        _ => Status::InvalidParameters.x0(),
    }
}
