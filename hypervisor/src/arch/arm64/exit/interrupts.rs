//! Between the hardware's virtual CPU interface and the emulated GIC.

use entresol_devices::gic::Kick;
use entresol_metal_arm64::switch::gic as hardware;

use crate::arch::State;
use crate::sched::{self, VcpuRef};

/// Reads what the hardware may have changed of the image.
fn read_back(state: &mut State) {
    hardware::read_list(&mut state.gic.lr);
    state.gic.hcr = hardware::hcr();
    state.gic.vmcr = hardware::vmcr();
}

fn write_out(state: &State) {
    hardware::write_list(&state.gic.lr);
    hardware::set_hcr(state.gic.hcr);
}

/// Settles the loaded vCPU's interrupts before it enters its guest.
#[cold]
pub fn flush(vcpu: &VcpuRef, state: &mut State) {
    read_back(state);
    let flush = vcpu.vm.board.gic.flush(vcpu.index, &mut state.gic);
    write_out(state);
    kick(vcpu, flush.kick);
}

/// Takes the loaded vCPU's interrupts back into the emulated GIC, so that an access to it sees them.
pub fn sync(vcpu: &VcpuRef, state: &mut State) {
    read_back(state);
    let others = vcpu.vm.board.gic.sync(vcpu.index, &mut state.gic);
    write_out(state);
    kick(vcpu, others);
}

/// Puts a vCPU's interrupt interface into the hardware.
pub fn load(state: &mut State) {
    state.interface.lr = state.gic.lr;
    state.interface.hcr = state.gic.hcr;
    state.interface.vmcr = state.gic.vmcr;
    state.interface.load();
}

/// Takes the loaded vCPU's interrupt interface out of the hardware.
pub fn save(vcpu: &VcpuRef, state: &mut State) {
    state.interface.save();
    state.gic.lr = state.interface.lr;
    state.gic.hcr = state.interface.hcr;
    state.gic.vmcr = state.interface.vmcr;
    let others = vcpu.vm.board.gic.sync(vcpu.index, &mut state.gic);
    kick(vcpu, others);
}

/// Whether an interrupt waits that would end the loaded vCPU's WFI.
pub fn deliverable(vcpu: &VcpuRef, state: &mut State) -> bool {
    flush(vcpu, state);
    vcpu.vm.board.gic.deliverable(vcpu.index, &state.gic)
}

/// Tells others that their interrupts changed.
pub fn kick(vcpu: &VcpuRef, kick: Kick) {
    if !kick.is_empty() {
        sched::kick(&vcpu.vm, kick);
    }
}
