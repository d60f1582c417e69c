//! The devices of a virtual machine, and how its accesses find them: the map is `entresol_loader::x86::map`.
//!
//! What nobody has reads as ones and takes every store, as on a PC's bus.
//!
//! Lock order: a device, then the interrupt controllers.
//!
//! Known holes: no transports, no real-time clock; COM1 sends only; counter 0 of the interval timer interrupts nobody, which nothing
//! describes anyway.

use alloc::sync::Arc;

use entresol_addr::Gpa;
use entresol_devices::apic::{Apic, ApicError, Config};
use entresol_devices::bus::{Device, Interrupt, Terminal};
use entresol_devices::pit::Pit;
use entresol_devices::power::{self, Request};
use entresol_devices::uart16550::Uart16550;
use entresol_loader::x86::map;
use entresol_metal_x86::{console, timer};

/// The one vCPU.
pub const VCPU: usize = 0;

/// They.
pub struct Devices {
    pub apic: Arc<Apic>,
    serial: Uart16550<Screen, Line>,
    pit: Pit,
}

/// The host's end of COM1.
struct Screen;

impl Terminal for Screen {
    fn put(&self, bytes: &[u8]) {
        console::write_bytes(bytes);
    }

    /// Nothing is ever offered.
    fn input_wanted(&self) {}
}

/// COM1's input of the I/O APIC.
struct Line(Arc<Apic>);

impl Interrupt for Line {
    fn set_level(&self, high: bool) {
        // The one vCPU is out of its guest, and looks before it goes on.
        let _kicked = self.0.set_input(map::COM1_GSI as usize, high);
    }
}

impl Devices {
    /// Devices at power-on.
    ///
    /// # Errors
    ///
    /// [`ApicError`].
    pub fn new() -> Result<Self, ApicError> {
        let apic = Arc::new(Apic::new(Config { vcpus: 1, io_id: map::IOAPIC_ID })?);
        Ok(Self { serial: Uart16550::new(Screen, Line(apic.clone())), apic, pit: Pit::new() })
    }

    /// IN of `size` bytes.
    pub fn port_in(&self, port: u16, size: u8) -> u32 {
        let now = timer::nanoseconds(timer::now());
        if let Some(offset) = within(port, map::COM1_PORT, map::COM1_PORTS) {
            return self.serial.read(offset, size) as u32;
        }
        let byte = if let Some(offset) = within(port, map::PIT_PORT, map::PIT_PORTS) {
            self.pit.read(offset, now)
        } else if port == map::PIT_GATE_PORT {
            self.pit.read_gate(now)
        } else if let Some(offset) = within(port, map::POWER_PORT, map::POWER_PORTS) {
            power::read(offset)
        } else {
            return u32::MAX;
        };
        // The ports beside it are nobody's, as far as a wide access is concerned.
        u32::MAX << 8 | u32::from(byte)
    }

    /// OUT of `size` bytes; what the guest asks for by it.
    pub fn port_out(&self, port: u16, size: u8, value: u32) -> Option<Request> {
        let (now, byte) = (timer::nanoseconds(timer::now()), value as u8);
        if let Some(offset) = within(port, map::COM1_PORT, map::COM1_PORTS) {
            // It is complete when it returns.
            let _idle = self.serial.write(offset, size, value.into());
        } else if let Some(offset) = within(port, map::PIT_PORT, map::PIT_PORTS) {
            self.pit.write(offset, byte, now);
        } else if port == map::PIT_GATE_PORT {
            self.pit.write_gate(byte, now);
        } else if let Some(offset) = within(port, map::POWER_PORT, map::POWER_PORTS) {
            return power::write(offset, byte);
        }
        None
    }

    /// A load of bytes that no slot has. `now`: the guest's time stamp counter.
    pub fn load(&self, gpa: Gpa, to: &mut [u8], now: u64) {
        let size = to.len() as u8;
        let value = match inside(gpa) {
            Some(Controller::Local(offset)) => self.apic.read(VCPU, offset, size, now),
            Some(Controller::Io(offset)) => self.apic.io_read(offset, size),
            None => u64::MAX,
        };
        for (to, from) in to.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// A store to them.
    pub fn store(&self, gpa: Gpa, from: &[u8], now: u64) {
        let mut bytes = [0; 8];
        for (to, from) in bytes.iter_mut().zip(from) {
            *to = *from;
        }
        let (value, size) = (u64::from_le_bytes(bytes), from.len() as u8);
        // The one vCPU is out of its guest, and looks before it goes on.
        let _kicked = match inside(gpa) {
            Some(Controller::Local(offset)) => Some(self.apic.write(VCPU, offset, size, value, now)),
            Some(Controller::Io(offset)) => Some(self.apic.io_write(offset, size, value)),
            None => None,
        };
    }
}

fn within(port: u16, first: u16, count: u16) -> Option<u64> {
    port.checked_sub(first).filter(|offset| *offset < count).map(u64::from)
}

/// An interrupt controller, and the byte of its page.
enum Controller {
    Local(u64),
    Io(u64),
}

fn inside(gpa: Gpa) -> Option<Controller> {
    let offset = |base: u64, size: u64| gpa.get().checked_sub(base).filter(|offset| *offset < size);
    offset(map::LAPIC_BASE, map::LAPIC_SIZE)
        .map(Controller::Local)
        .or_else(|| offset(map::IOAPIC_BASE, map::IOAPIC_SIZE).map(Controller::Io))
}
