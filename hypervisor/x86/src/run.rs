//! What the CPU does all day: enter the guest, answer why it came back.
//!
//! Invariants: nothing here allocates. The CPU is pinned to the grace period only inside `exit`, never across an entry.

use entresol_metal_x86::{cpu, switch};

use crate::exit::{self, Next};
use crate::vm::{End, Vm};

/// Runs a virtual machine until it ends.
pub fn to_its_end(vm: &mut Vm) -> End {
    let cpu = cpu::index();
    let end = match (vm.load(cpu), switch::is_intel()) {
        (Err(crash), _) => End::Crash(crash),
        (Ok(()), false) => on_amd(cpu, vm),
        (Ok(()), true) => on_intel(cpu, vm),
    };
    vm.put(cpu);
    end
}

/// One loop for each maker's processors, so that nothing asks at each entry whose it is.
#[inline(never)]
fn on_amd(cpu: usize, vm: &mut Vm) -> End {
    loop {
        // SAFETY: `load` made the hardware hold its state; its nested tables are the core's, no port is passed through, and of the
        // model-specific registers only those that the processor keeps for it.
        unsafe { switch::enter_amd(cpu, &mut vm.vcpu.guest) };
        match exit::handle(cpu, vm) {
            // Nearly always, and nothing is due that was not before.
            Next::Again => {}
            Next::Look => exit::interrupts::settle(vm),
            Next::End(end) => return end,
        }
    }
}

#[inline(never)]
fn on_intel(cpu: usize, vm: &mut Vm) -> End {
    loop {
        // SAFETY: as above.
        unsafe { switch::enter_intel(cpu, &mut vm.vcpu.guest) };
        match exit::handle_intel(cpu, vm) {
            Next::Again => {}
            Next::Look => exit::settle_intel(vm),
            Next::End(end) => return end,
        }
    }
}
