//! What follows an exit, and what the core's outcomes mean wherever the guest runs.
//!
//! Why it came back is the architecture's to say ([`crate::arch::exit`]). Protocol: the vCPU is loaded. A handler either lets it run on
//! ([`Next::Again`]), has it look up first ([`Next::Look`]: a slice may be over, the hypervisor may have work), or makes it leave its CPU.
//!
//! Invariants: nothing that a guest does ends in a panic.

use entresol_addr::Gpa;

use crate::paging::{self, Wanted};
use crate::sched::{Leave, VcpuRef};
use crate::vm::{Crash, Pause, Vm};

/// What follows an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Into the guest again.
    Again,
    /// Into the guest again, unless its turn is over.
    Look,
    /// Off the CPU.
    Leave(Leave),
}

// Two registers: every exit returns one.
const _: () = assert!(size_of::<Next>() == 16);

/// The page at `gpa` is in a store: the vCPU sleeps until it has been fetched, and makes its access again.
#[cold]
pub fn absent(vcpu: &VcpuRef, gpa: Gpa) -> Next {
    let pause = match paging::want(&vcpu.vm, gpa) {
        Wanted::Later(reading) => return Next::Leave(Leave::Fetch(reading)),
        Wanted::Now => return Next::Look,
        Wanted::OutOfMemory => return starve(vcpu),
        Wanted::Lost => Pause::Storage,
    };
    park(&vcpu.vm, pause)
}

/// There is no frame: the vCPU sleeps until some have been reclaimed, and makes its access again; or its virtual machine is paused.
#[cold]
pub fn starve(vcpu: &VcpuRef) -> Next {
    match paging::frames_for(&vcpu.vm) {
        Ok(frames) => Next::Leave(Leave::Fetch(frames)),
        Err(lack) => park(&vcpu.vm, lack),
    }
}

/// Its owner has to do something first.
#[cold]
pub fn park(vm: &Vm, pause: Pause) -> Next {
    vm.pause(pause);
    Next::Leave(Leave::Park)
}

/// It cannot go on.
#[cold]
pub fn crash(vcpu: &VcpuRef, crash: Crash) -> Next {
    vcpu.vm.crash(crash);
    Next::Leave(Leave::Park)
}
