//! The devices of a small x86-64 machine, put together: which port and which address is whose, and which line goes where.
//!
//! Purpose: one thing for the program that owns a VM to call at a port, a device's address or an MSR. What is not here (virtio
//! transports) gets its line by [`Pc::wire`] and is the owner's to find.
//!
//! Protocol: accesses come with the vCPU and a [`Time`], and are complete when the call returns; whoever must look at its
//! interrupts then is told through [`Kicks`], from within. The owner calls [`Pc::expire`] for a vCPU at [`Pc::deadline`] and
//! [`Pc::tick`] at [`Pc::next_tick`], and asks for both again after an access. How a vCPU looks is [`apic`](crate::apic)'s to say.
//!
//! The numbers are those that the loader tells a guest (`loader::x86::map`).
//!
//! Invariants: a port that nobody has reads as ones and takes every store.
//!
//! Lock order: the serial port's lock, then the APICs' ([`apic`](crate::apic)); [`Kicks`] may be called with both, and must not
//! call a device.

use alloc::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::apic::{self, Apic, ApicError, Config, Kick, Refused};
use crate::bus::{Device, Interrupt, Terminal};
use crate::cmos::{self, Cmos};
use crate::pit::{self, Pit};
use crate::power::{self, Request};
use crate::saved::BadState;
use crate::uart16550::{self, Uart16550};

/// COM1.
pub const COM1_PORT: u16 = 0x3f8;
/// Its line.
pub const COM1_INPUT: usize = 4;
/// The interval timer.
pub const PIT_PORT: u16 = 0x40;
/// The gate of its counter 2.
pub const PIT_GATE_PORT: u16 = 0x61;
/// The line of its counter 0.
pub const PIT_INPUT: usize = 0;
/// The real-time clock.
pub const RTC_PORT: u16 = 0x70;
/// Sleep control, sleep status, reset.
pub const POWER_PORT: u16 = 0x600;
/// The I/O APIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Bytes of an APIC's registers in memory.
pub const APIC_SIZE: u64 = 0x1000;
/// The I/O APIC's identity after power-on.
pub const IOAPIC_ID: u8 = 0xf0;

/// What time it is, asked when a device needs it. None of these goes back.
pub trait Time {
    /// The TSC of the guest's vCPU.
    fn tsc(&self) -> u64;

    /// Nanoseconds since some moment before the VM was made.
    fn nanoseconds(&self) -> u64;

    /// Seconds since 1970-01-01 00:00:00 UTC.
    fn unix_seconds(&self) -> u64;
}

/// Where vCPUs are told to look at their interrupts.
pub trait Kicks: Send + Sync {
    /// They have to, soon.
    fn kick(&self, who: Kick);
}

/// A line to the I/O APIC.
pub struct Wire<K> {
    apic: Arc<Apic>,
    kicks: Arc<K>,
    input: usize,
}

impl<K: Kicks> Interrupt for Wire<K> {
    fn set_level(&self, high: bool) {
        tell(&*self.kicks, self.apic.set_input(self.input, high));
    }
}

fn tell<K: Kicks>(kicks: &K, who: Kick) {
    if !who.is_empty() {
        kicks.kick(who);
    }
}

/// The devices.
pub struct Pc<T, K> {
    apic: Arc<Apic>,
    kicks: Arc<K>,
    uart: Uart16550<T, Wire<K>>,
    pit: Pit,
    cmos: Cmos,
}

/// Their state, outside of the machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    apic: apic::Saved,
    serial: uart16550::Saved,
    pit: pit::Saved,
    cmos: cmos::Saved,
}

impl<T: Terminal, K: Kicks> Pc<T, K> {
    /// The devices of a machine with `vcpus` vCPUs, at power-on.
    ///
    /// # Errors
    ///
    /// [`ApicError`].
    pub fn new(vcpus: usize, terminal: T, kicks: Arc<K>) -> Result<Self, ApicError> {
        let apic = Arc::new(Apic::new(config(vcpus))?);
        let line = Wire { apic: apic.clone(), kicks: kicks.clone(), input: COM1_INPUT };
        Ok(Self { uart: Uart16550::new(terminal, line), apic, kicks, pit: Pit::new(), cmos: Cmos::new() })
    }

    /// The same state for a copy of the virtual machine, whose vCPUs are stopped.
    ///
    /// # Errors
    ///
    /// [`ApicError::OutOfMemory`].
    pub fn fork(&self, terminal: T, kicks: Arc<K>) -> Result<Self, ApicError> {
        let apic = Arc::new(self.apic.fork()?);
        let line = Wire { apic: apic.clone(), kicks: kicks.clone(), input: COM1_INPUT };
        let uart = self.uart.fork(terminal, line);
        Ok(Self { uart, apic, kicks, pit: self.pit.fork(), cmos: self.cmos.fork() })
    }

    /// The state. The vCPUs are stopped.
    ///
    /// # Errors
    ///
    /// [`ApicError::OutOfMemory`].
    pub fn save(&self, now: &impl Time) -> Result<Saved, ApicError> {
        let (serial, cmos) = (self.uart.save(), self.cmos.save());
        Ok(Saved { apic: self.apic.save()?, serial, pit: self.pit.save(now.nanoseconds()), cmos })
    }

    /// Devices of a machine with `vcpus` vCPUs in a saved state.
    ///
    /// # Errors
    ///
    /// [`BadState`].
    pub fn load(saved: Saved, vcpus: usize, terminal: T, kicks: Arc<K>, now: &impl Time) -> Result<Self, BadState> {
        let apic = Arc::new(saved.apic.load(config(vcpus))?);
        let line = Wire { apic: apic.clone(), kicks: kicks.clone(), input: COM1_INPUT };
        let pc = Self { uart: Uart16550::new(terminal, line), apic, kicks, pit: Pit::new(), cmos: Cmos::new() };
        pc.uart.load(saved.serial)?;
        pc.pit.load(saved.pit, now.nanoseconds())?;
        pc.cmos.load(saved.cmos);
        Ok(pc)
    }

    /// The interrupt controllers, by which vCPUs look.
    pub fn apic(&self) -> &Apic {
        &self.apic
    }

    /// The serial port, which the host gives input.
    pub fn uart(&self) -> &Uart16550<T, Wire<K>> {
        &self.uart
    }

    /// The line to an input of the I/O APIC, for a device of the owner's.
    pub fn wire(&self, input: usize) -> Wire<K> {
        Wire { apic: self.apic.clone(), kicks: self.kicks.clone(), input }
    }

    /// IN of `size` bytes, zero-extended. Wider than a byte is one port after the other, as on a PC's bus.
    pub fn port_read(&self, port: u16, size: u8, now: &impl Time) -> u32 {
        let bytes = (0..u16::from(size.min(4))).map(|index| self.byte_read(port.wrapping_add(index), now));
        bytes.enumerate().fold(0, |value, (index, byte)| value | u32::from(byte) << (8 * index))
    }

    /// OUT of the low `size` bytes of `value`; what the guest asks for by it.
    pub fn port_write(&self, port: u16, size: u8, value: u32, now: &impl Time) -> Option<Request> {
        let bytes = value.to_le_bytes();
        let bytes = bytes.iter().take(usize::from(size)).zip(0..);
        bytes.filter_map(|(byte, index)| self.byte_write(port.wrapping_add(index), *byte, now)).last()
    }

    fn byte_read(&self, port: u16, now: &impl Time) -> u8 {
        match place(port) {
            Some(Port::Uart(offset)) => self.uart.read(offset, 1) as u8,
            Some(Port::Pit(offset)) => self.pit.read(offset, now.nanoseconds()),
            Some(Port::Gate) => self.pit.read_gate(now.nanoseconds()),
            Some(Port::Rtc(offset)) => self.cmos.read(offset, now.unix_seconds()),
            Some(Port::Power(offset)) => power::read(offset),
            None => 0xff,
        }
    }

    fn byte_write(&self, port: u16, value: u8, now: &impl Time) -> Option<Request> {
        match place(port)? {
            Port::Uart(offset) => {
                // A serial port is done when it is written to.
                let _ = self.uart.write(offset, 1, value.into());
            }
            Port::Pit(offset) => self.pit.write(offset, value, now.nanoseconds()),
            Port::Gate => self.pit.write_gate(value, now.nanoseconds()),
            Port::Rtc(offset) => self.cmos.write(offset, value, now.unix_seconds()),
            Port::Power(offset) => return power::write(offset, value),
        }
        None
    }

    /// A load of `size` bytes at the guest physical address `gpa`; `None` if nobody here has it.
    pub fn read(&self, vcpu: usize, gpa: u64, size: u8, now: &impl Time) -> Option<u64> {
        if let Some(offset) = offset(gpa, Apic::base()) {
            return Some(self.apic.read(vcpu, offset, size, now.tsc()));
        }
        offset(gpa, IOAPIC_BASE).map(|offset| self.apic.io_read(offset, size))
    }

    /// A store of the low `size` bytes of `value`; whether somebody here has the address.
    pub fn write(&self, vcpu: usize, gpa: u64, size: u8, value: u64, now: &impl Time) -> bool {
        let kick = if let Some(offset) = offset(gpa, Apic::base()) {
            self.apic.write(vcpu, offset, size, value, now.tsc())
        } else if let Some(offset) = offset(gpa, IOAPIC_BASE) {
            self.apic.io_write(offset, size, value)
        } else {
            return false;
        };
        tell(&*self.kicks, kick);
        true
    }

    /// RDMSR of one of the local APIC's.
    ///
    /// # Errors
    ///
    /// [`Refused`]: a general-protection fault.
    pub fn read_msr(&self, vcpu: usize, msr: u32, now: &impl Time) -> Result<u64, Refused> {
        self.apic.read_msr(vcpu, msr, now.tsc())
    }

    /// WRMSR of one of the local APIC's.
    ///
    /// # Errors
    ///
    /// [`Refused`]: a general-protection fault.
    pub fn write_msr(&self, vcpu: usize, msr: u32, value: u64, now: &impl Time) -> Result<(), Refused> {
        tell(&*self.kicks, self.apic.write_msr(vcpu, msr, value, now.tsc())?);
        Ok(())
    }

    /// When [`Self::expire`] must be called for `vcpu`, in ticks of its TSC.
    pub fn deadline(&self, vcpu: usize) -> Option<u64> {
        self.apic.deadline(vcpu)
    }

    /// The local APIC's timer of `vcpu` may have fired.
    pub fn expire(&self, vcpu: usize, now: &impl Time) {
        tell(&*self.kicks, self.apic.expire(vcpu, now.tsc()));
    }

    /// When [`Self::tick`] must be called, in nanoseconds.
    pub fn next_tick(&self) -> Option<u64> {
        self.pit.next_tick()
    }

    /// The interval timer may have ticked.
    pub fn tick(&self, now: &impl Time) {
        if self.pit.expire(now.nanoseconds()) {
            let line = self.wire(PIT_INPUT);
            line.set_level(true);
            line.set_level(false);
        }
    }

    /// Back to power-on, as the VM's reset does it; the clock and its memory have a battery. The vCPUs are stopped.
    pub fn reset(&self) {
        self.uart.reset();
        self.pit.reset();
        tell(&*self.kicks, self.apic.reset());
    }
}

const fn config(vcpus: usize) -> Config {
    Config { vcpus, io_id: IOAPIC_ID }
}

/// Whose a port is, and which of its.
enum Port {
    Uart(u64),
    Pit(u64),
    Gate,
    Rtc(u64),
    Power(u64),
}

fn place(port: u16) -> Option<Port> {
    let within = |first: u16, count: u64| port.checked_sub(first).map(u64::from).filter(|offset| *offset < count);
    within(COM1_PORT, uart16550::SIZE)
        .map(Port::Uart)
        .or_else(|| within(PIT_PORT, pit::SIZE).map(Port::Pit))
        .or_else(|| within(PIT_GATE_PORT, 1).map(|_| Port::Gate))
        .or_else(|| within(RTC_PORT, cmos::SIZE).map(Port::Rtc))
        .or_else(|| within(POWER_PORT, power::SIZE).map(Port::Power))
}

fn offset(gpa: u64, base: u64) -> Option<u64> {
    gpa.checked_sub(base).filter(|offset| *offset < APIC_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_sync::Mutex;
    use proptest::prelude::*;
    use std::vec::Vec;

    extern crate std;

    #[derive(Clone, Copy, Default)]
    struct At(u64);

    impl Time for At {
        fn tsc(&self) -> u64 {
            self.0 * 2
        }
        fn nanoseconds(&self) -> u64 {
            self.0
        }
        fn unix_seconds(&self) -> u64 {
            1_700_000_000 + self.0 / 1_000_000_000
        }
    }

    #[derive(Default)]
    struct World {
        text: Mutex<Vec<u8>>,
        kicked: Mutex<Vec<usize>>,
    }

    impl Terminal for World {
        fn put(&self, bytes: &[u8]) {
            self.text.lock().extend_from_slice(bytes);
        }
        fn input_wanted(&self) {}
    }

    impl Kicks for World {
        fn kick(&self, who: Kick) {
            self.kicked.lock().extend(who.iter());
        }
    }

    type Machine = Pc<Arc<World>, World>;

    fn machine() -> (Machine, Arc<World>) {
        let world = Arc::new(World::default());
        (Pc::new(2, world.clone(), world.clone()).unwrap(), world)
    }

    const NOW: At = At(1000);

    /// Both local APICs on; input `input` to vCPU 1 with `vector`.
    fn redirect(pc: &Machine, input: u64, vector: u64) {
        for vcpu in [0, 1] {
            assert!(pc.write(vcpu, 0xfee0_00f0, 4, 0x1ff, &NOW));
        }
        for (index, value) in [(0x11 + 2 * input, 1 << 24), (0x10 + 2 * input, vector)] {
            assert!(pc.write(0, 0xfec0_0000, 4, index, &NOW) && pc.write(0, 0xfec0_0010, 4, value, &NOW));
        }
    }

    #[test]
    fn a_byte_from_the_host_becomes_a_vector() {
        let (pc, world) = machine();
        redirect(&pc, 4, 0x34);
        for (register, value) in [(2, 7), (3, 3), (4, 0x0b), (1, 1), (2, 1)] {
            assert_eq!(pc.port_write(0x3f8 + register, 1, value, &NOW), None);
            let _ = pc.port_read(0x3fd, 1, &NOW);
        }
        world.kicked.lock().clear();
        (0..crate::serial::listener::TICKS).for_each(|_| pc.uart().tick());
        assert_eq!(pc.uart().offer(b"x"), 1);
        assert_eq!((world.kicked.lock().as_slice(), pc.apic().acknowledge(1)), (&[1][..], Some(0x34)));
        assert_eq!(pc.port_read(0x3f8, 1, &NOW), u32::from(b'x'));
        assert!(pc.write(1, 0xfee0_00b0, 4, 0, &NOW));
        assert_eq!(pc.apic().pending(1), None);
        let _ = pc.port_write(0x3f8, 1, u32::from(b'y'), &NOW);
        assert_eq!(*world.text.lock(), b"y");
    }

    #[test]
    fn a_tick_becomes_a_vector() {
        let (pc, _) = machine();
        redirect(&pc, 0, 0x30);
        for (port, value) in [(0x43, 0x34), (0x40, 0x9c), (0x40, 0x2e)] {
            assert_eq!(pc.port_write(port, 1, value, &NOW), None);
        }
        let at = pc.next_tick().unwrap();
        assert!((9_900_000..10_100_000).contains(&at), "100 Hz: {at}");
        pc.tick(&At(at - 1));
        assert_eq!(pc.apic().pending(1), None);
        pc.tick(&At(at));
        assert_eq!(pc.apic().acknowledge(1), Some(0x30));
        assert!(pc.write(0, 0xfee0_0320, 4, 0x4_00ec, &NOW));
        assert_eq!(pc.write_msr(0, 0x6e0, 5000, &NOW), Ok(()));
        assert_eq!((pc.deadline(0), pc.read_msr(0, 0x6e0, &NOW)), (Some(5000), Ok(5000)));
        pc.expire(0, &At(2500));
        assert_eq!(pc.apic().acknowledge(0), Some(0xec));
        assert_eq!(pc.write_msr(0, 0x10, 0, &NOW), Err(Refused));
    }

    #[test]
    fn ports_and_addresses_have_their_owners() {
        let (pc, _) = machine();
        assert_eq!(pc.port_write(0x600, 1, 0x34, &NOW), Some(Request::Off));
        assert_eq!(pc.port_write(0x602, 1, 1, &NOW), Some(Request::Reset));
        assert_eq!(pc.port_write(0x601, 2, 0x100, &NOW), Some(Request::Reset), "one port after the other");
        for port in [0, 0x20, 0x3f, 0x44, 0x60, 0x62, 0x64, 0x72, 0xa1, 0x3f7, 0x400, 0x603, 0xcf8, 0xffff] {
            let size = if port == 0x3f || port == 0x60 || port == 0x3f7 { 1 } else { 4 };
            assert_eq!(pc.port_read(port, size, &NOW), u32::MAX >> (32 - 8 * size), "{port:#x}");
            assert_eq!(pc.port_write(port, size, 0, &NOW), None);
        }
        let _ = pc.port_write(0x70, 1, 9, &NOW);
        assert_eq!(pc.port_read(0x71, 1, &NOW), 0x23, "2023");
        assert_eq!(pc.port_read(0x61, 1, &NOW) & 0x0f, 0);
        for gpa in [0, 0xfebf_ffff, 0xfec0_1000, 0xfedf_ffff, 0xfee0_1000, u64::MAX] {
            assert_eq!((pc.read(0, gpa, 4, &NOW), pc.write(0, gpa, 4, 0, &NOW)), (None, false), "{gpa:#x}");
        }
        assert_eq!(pc.read(1, 0xfee0_0020, 4, &NOW), Some(1 << 24));
    }

    #[test]
    fn a_saved_machine_goes_on() {
        let (pc, world) = machine();
        redirect(&pc, 20, 0x41);
        pc.wire(20).set_level(true);
        let saved = serde_json::to_string(&pc.save(&NOW).unwrap()).unwrap();
        let load =
            |text: &str| serde_json::from_str(text).map(|saved| Pc::load(saved, 2, world.clone(), world.clone(), &NOW));
        for other in [load(&saved).unwrap().unwrap(), pc.fork(world.clone(), world.clone()).unwrap()] {
            assert_eq!(other.apic().acknowledge(1), Some(0x41));
            other.reset();
            assert_eq!(other.apic().pending(1), None);
        }
        assert!(load(&saved.replace("\"gate\":0", "\"gate\":4")).unwrap().is_err());
    }

    proptest! {
        /// Nothing that a guest does at any port, address or MSR does harm.
        #[test]
        fn any_guest(accesses in prop::collection::vec((0u8..7, 0usize..2, any::<u16>(), 0u8..9, any::<u64>(), any::<u32>()), 0..200)) {
            const PORTS: [u16; 6] = [0x3f8, 0x40, 0x60, 0x70, 0x600, 0xfffe];
            let (pc, world) = machine();
            for (what, vcpu, at, size, value, now) in accesses {
                let now = At(now.into());
                let port = PORTS[usize::from(at) % 6].wrapping_add(at >> 13);
                let gpa = [0xfec0_0000, 0xfee0_0000][usize::from(at & 1)] + u64::from(at >> 2 & 0xff0);
                match what {
                    0 => { let _ = pc.port_read(port, size, &now); }
                    1 => { let _ = pc.port_write(port, size, value as u32, &now); }
                    2 => { let _ = pc.read(vcpu, gpa, size, &now); }
                    3 => { let _ = pc.write(vcpu, gpa, size, value, &now); }
                    4 => { let _ = pc.write_msr(vcpu, [0x1b, 0x6e0, 0x800 + u32::from(at & 0x3f)][usize::from(size) % 3], value, &now); }
                    5 => pc.wire(usize::from(at % 64)).set_level(value & 1 != 0),
                    _ => { pc.tick(&now); pc.expire(vcpu, &now); pc.uart().offer(&value.to_le_bytes()); }
                }
                prop_assert!(world.kicked.lock().drain(..).all(|vcpu| pc.apic().needs_look(vcpu)));
                while pc.apic().take_event(vcpu).is_some() {}
                prop_assert!(pc.apic().acknowledge(vcpu).is_none_or(|vector| vector >= 16));
            }
            let saved = pc.save(&NOW).unwrap();
            prop_assert!(Pc::load(saved, 2, world.clone(), world, &NOW).is_ok());
        }
    }
}
