//! The guest's timers: the virtual one in hardware, the physical one emulated.
//!
//! The virtual timer's interrupt arrives as the CPU's own PPI. It is masked at the redistributor while its level is shown
//! to the guest as a virtual level interrupt, and unmasked when the guest has lowered it: the list register asks for a
//! maintenance interrupt at the end of every level interrupt, and both lines are sampled there, and at load.

use entresol_devices::gic::Ppi;
use entresol_metal_arm64::switch::timer::is_asserted;
use entresol_metal_arm64::{gic as hardware, timer};

use super::interrupts;
use crate::arch::State;
use crate::sched::VcpuRef;

/// Shows both timers' levels to the guest.
pub fn sample(vcpu: &VcpuRef, state: &mut State) {
    let line = is_asserted();
    hold_back(line);
    interrupts::kick(vcpu, vcpu.vm.board.gic.set_ppi(vcpu.index, Ppi::VIRTUAL_TIMER, line));
    sample_physical(vcpu, state);
}

/// Masks the timer's own interrupt at this CPU while its level is shown, or lets it through.
fn hold_back(held: bool) {
    let done =
        if held { hardware::disable(hardware::VIRTUAL_TIMER) } else { hardware::enable(hardware::VIRTUAL_TIMER) };
    // The number is a constant that every GICv3 has (PPI 27).
    done.expect("every redistributor has the virtual timer's PPI");
}

/// Shows the physical timer's level to the guest.
pub fn sample_physical(vcpu: &VcpuRef, state: &mut State) {
    let line = state.physical_timer.line(timer::now());
    interrupts::kick(vcpu, vcpu.vm.board.gic.set_ppi(vcpu.index, Ppi::PHYSICAL_TIMER, line));
}

/// Puts the virtual timer into the hardware.
pub fn load(vcpu: &VcpuRef, state: &mut State) {
    state.timer.load();
    sample(vcpu, state);
}

/// Takes it out.
pub fn put(vcpu: &VcpuRef, state: &mut State) {
    sample(vcpu, state);
    state.timer.save();
    hold_back(true);
}
