//! Ports: what the processor tells of an IN or OUT, and the device behind it.
//!
//! Known holes: string instructions are not carried out.

use entresol_arch_x86::exit::Io;
use entresol_devices::power::Request;

use super::{Next, UNDEFINED, go_on, inject};
use crate::vm::{End, Vm};

/// An IN or OUT.
#[inline]
pub fn access(vm: &mut Vm, io: Io) -> Next {
    let guest = &mut *vm.vcpu.guest;
    if io.string {
        return inject(guest, UNDEFINED, None);
    }
    let next = guest.behind_port();
    let mask = u32::MAX >> (32 - 8 * u32::from(io.size));
    if io.write {
        let value = *guest.rax() as u32 & mask;
        return match vm.devices.port_out(io.port, io.size, value) {
            None => go_on(guest, next),
            Some(Request::Off) => Next::End(End::PowerOff),
            Some(Request::Reset) => Next::End(End::Reset),
        };
    }
    let value = u64::from(vm.devices.port_in(io.port, io.size) & mask);
    let rax = guest.rax();
    // A 32-bit result clears the upper half; narrower ones leave the rest (APM volume 3, 1.2.3).
    *rax = if io.size == 4 { value } else { *rax & !u64::from(mask) | value };
    go_on(guest, next)
}
