//! Ports: COM1 as far as it sends, and ACPI's sleep and reset registers (`entresol_loader::x86::map`).
//!
//! A port that nobody has reads as ones and takes every store, as on a PC.
//!
//! Known holes: of COM1 there are the data register and a transmitter that is always empty; string instructions are not carried
//! out.

use entresol_arch_x86::exit::Io;
use entresol_loader::x86::map;
use entresol_metal_x86::console;

use super::{Next, UNDEFINED, go_on, inject};
use crate::vm::{End, Vm};

/// Line status: the transmitter is empty, and so is its holding register.
const TRANSMITTER_EMPTY: u32 = 0b11 << 5;
const LINE_STATUS: u16 = map::COM1_PORT + 5;

/// SLP_EN and SLP_TYPx of the sleep control register (ACPI 6.5, 4.8.4.1).
const SLEEP: u8 = 1 << 5 | map::SLEEP_OFF << 2;

/// An IN or OUT.
#[inline]
pub fn access(vm: &mut Vm, io: Io) -> Next {
    let guest = &mut *vm.vcpu.guest;
    if io.string {
        return inject(guest, UNDEFINED, None);
    }
    // EXITINFO2 is the next instruction's address (APM 15.10.2).
    let next = guest.control().exit_info_2;
    let mask = u32::MAX >> (32 - 8 * u32::from(io.size));
    let rax = &mut guest.state().rax;
    if !io.write {
        let value = u64::from(read(io.port) & mask);
        // A 32-bit result clears the upper half; narrower ones leave the rest (APM volume 3, 1.2.3).
        *rax = if io.size == 4 { value } else { *rax & !u64::from(mask) | value };
        return go_on(guest, next);
    }
    let value = *rax as u32 & mask;
    match (io.port, value as u8) {
        (map::COM1_PORT, byte) => console::write_bytes(&[byte]),
        (map::POWER_PORT, SLEEP) => return Next::End(End::PowerOff),
        (map::RESET_PORT, map::RESET_VALUE) => return Next::End(End::Reset),
        _ => {}
    }
    go_on(guest, next)
}

fn read(port: u16) -> u32 {
    match port {
        LINE_STATUS => TRANSMITTER_EMPTY,
        map::COM1_PORT..LINE_STATUS => 0,
        _ => u32::MAX,
    }
}
