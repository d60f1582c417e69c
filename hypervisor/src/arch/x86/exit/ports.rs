//! Ports: what the processor tells of an IN or OUT, and the device behind it.
//!
//! Known holes: string instructions are not carried out.

use entresol_arch_x86::exit::Io;
use entresol_devices::power::Request;

use super::{UNDEFINED, inject};
use crate::arch::State;
use crate::counters::Reason;
use crate::exit::Next;
use crate::sched::{Leave, VcpuRef};
use crate::vm::Stop;

/// An IN or OUT.
#[inline]
pub fn access(vcpu: &VcpuRef, state: &mut State, io: Io) -> Next {
    vcpu.vm.counters.bump(Reason::Port);
    if io.string {
        return inject(state, UNDEFINED, None);
    }
    let (next, now, pc) = (state.guest.behind_port(), state.now(), vcpu.vm.board.pc());
    let mask = u32::MAX >> (32 - 8 * u32::from(io.size));
    if io.write {
        let value = *state.guest.rax() as u32 & mask;
        let request = pc.port_write(io.port, io.size, value, &now);
        state.guest.go_on(next);
        return match request {
            None => Next::Again,
            Some(Request::Off) => end(vcpu, Stop::PowerOff),
            Some(Request::Reset) => end(vcpu, Stop::Reset),
        };
    }
    let value = u64::from(pc.port_read(io.port, io.size, &now) & mask);
    let rax = state.guest.rax();
    // A 32-bit result clears the upper half; narrower ones leave the rest (APM volume 3, 1.2.3).
    *rax = if io.size == 4 { value } else { *rax & !u64::from(mask) | value };
    state.guest.go_on(next);
    Next::Again
}

#[cold]
fn end(vcpu: &VcpuRef, stop: Stop) -> Next {
    vcpu.vm.stop(stop);
    Next::Leave(Leave::Park)
}
