//! Trapped system registers and system instructions.

use entresol_arch_arm64::policy::{self, MDSCR_GUEST, Policy, SgiRegister, TimerRegister};
use entresol_arch_arm64::syndrome::{Coprocessor, CoprocessorPair};
use entresol_arch_arm64::sysreg::{Access, SysReg};
use entresol_devices::gic;
use entresol_metal_arm64::switch::el1;
use entresol_metal_arm64::timer;

use super::{Next, interrupts, maintenance, timers, toggles, undefined};
use crate::arch::State;
use crate::sched::VcpuRef;

/// An MSR, MRS or SYS.
pub fn system(vcpu: &VcpuRef, state: &mut State, esr: u64, access: Access) -> Next {
    let value = state.read(access.rt);
    // Only the emulated GIC can deactivate what is in no list register of this vCPU.
    if access.reg == SysReg::ICC_DIR_EL1 && !access.read {
        interrupts::sync(vcpu, state);
        let kick = vcpu.vm.board.gic.deactivate(vcpu.index, &mut state.gic, value);
        interrupts::kick(vcpu, kick);
        state.skip(esr);
        return Next::Again;
    }
    match policy::answer(access.reg, access.read) {
        Policy::IdRegister(reg) => state.write(access.rt, vcpu.vm.board.id_register(reg)),
        Policy::ReadAs(value) if access.read => state.write(access.rt, value),
        Policy::ReadAs(_) => {}
        Policy::DebugControl if access.read => state.write(access.rt, el1::mdscr()),
        Policy::DebugControl => el1::set_mdscr(value & MDSCR_GUEST),
        Policy::Timer(register) => {
            match timer_access(state, register, (!access.read).then_some(value)) {
                Some(read) => state.write(access.rt, read),
                None => timers::sample_physical(vcpu, state),
            }
            state.skip(esr);
            return Next::Look;
        }
        Policy::Sgi(register) => {
            let register = match register {
                SgiRegister::Group1 => gic::SgiRegister::Sgi1r,
                SgiRegister::AliasGroup1 => gic::SgiRegister::Asgi1r,
                SgiRegister::Group0 => gic::SgiRegister::Sgi0r,
            };
            interrupts::kick(vcpu, vcpu.vm.board.gic.sgi(vcpu.index, register, value));
        }
        Policy::SetWay => toggles::set_way(vcpu, state),
        Policy::Translation(register) => toggles::write(vcpu, state, register, value),
        Policy::Cache(operation) => return maintenance::maintain(vcpu, state, esr, operation, value),
        Policy::Undefined => {
            undefined::inject(state);
            return Next::Again;
        }
    }
    state.skip(esr);
    Next::Again
}

/// Reads a register of the physical timer, or writes `value`.
fn timer_access(state: &mut State, register: TimerRegister, value: Option<u64>) -> Option<u64> {
    let now = timer::now();
    let physical = &mut state.physical_timer;
    match (register, value) {
        (TimerRegister::Count, _) => return Some(now),
        (TimerRegister::Control, None) => return Some(physical.control(now)),
        (TimerRegister::CompareValue, None) => return Some(physical.compare()),
        (TimerRegister::TimerValue, None) => return Some(physical.value(now)),
        (TimerRegister::Control, Some(value)) => physical.set_control(value),
        (TimerRegister::CompareValue, Some(value)) => physical.set_compare(value),
        (TimerRegister::TimerValue, Some(value)) => physical.set_value(now, value),
    }
    None
}

/// An AArch32 MCR or MRC at EL0.
pub fn coprocessor(vcpu: &VcpuRef, state: &mut State, esr: u64, access: &Coprocessor) -> Next {
    if !access.condition.holds(state.regs.pstate) {
        state.skip(esr);
        return Next::Again;
    }
    let Policy::Timer(register) = policy::coprocessor(access) else {
        undefined::inject(state);
        return Next::Again;
    };
    let value = (!access.read).then(|| state.read(access.rt) & 0xffff_ffff);
    match timer_access(state, register, value) {
        Some(read) => state.write(access.rt, read & 0xffff_ffff),
        None => timers::sample_physical(vcpu, state),
    }
    state.skip(esr);
    Next::Look
}

/// An AArch32 MCRR or MRRC at EL0.
pub fn coprocessor_pair(vcpu: &VcpuRef, state: &mut State, esr: u64, access: &CoprocessorPair) -> Next {
    if !access.condition.holds(state.regs.pstate) {
        state.skip(esr);
        return Next::Again;
    }
    let Policy::Timer(register) = policy::coprocessor_pair(access) else {
        undefined::inject(state);
        return Next::Again;
    };
    let value = (!access.read).then(|| state.read(access.rt2) << 32 | state.read(access.rt) & 0xffff_ffff);
    match timer_access(state, register, value) {
        Some(read) => {
            state.write(access.rt, read & 0xffff_ffff);
            state.write(access.rt2, read >> 32);
        }
        None => timers::sample_physical(vcpu, state),
    }
    state.skip(esr);
    Next::Look
}
