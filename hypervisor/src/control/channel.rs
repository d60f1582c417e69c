//! The byte stream to the host: a port of the outer machine's virtio console (virtio 1.2, 5.3), driven without ever
//! waiting for it.
//!
//! Protocol: [`Channel::find`] starts the device; its interrupt is answered by [`Channel::acknowledge`]; then
//! [`Channel::receive`] until there is nothing, and [`Channel::send`] as far as there is room. Who has more to send asks
//! for an interrupt with [`Channel::want_room`].
//!
//! A device with several ports is used at its port 1, QEMU's `virtserialport`: it holds back what the host does not
//! read, and tells when the host's end is closed. A device with one port, QEMU's `virtconsole`, does neither: QEMU throws
//! away what a slow reader does not take, in the middle of a line.
//!
//! Invariants: buffers are made once. A device that breaks the rules of its queues is left alone from then on.

use crate::arch::boot::Device;
use crate::arch::timer;
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};
use virtio_drivers::transport::{DeviceStatus, DeviceType, Transport};
use virtio_drivers::{Error, PAGE_SIZE};

use super::ports::{self, Ports};
use super::ring::Ring;

/// Bytes of one buffer.
pub const BUFFER: usize = 4096;
/// Buffers for what the host says; what does not fit into them waits on the host.
const INCOMING: usize = 8;
/// Buffers for what we say.
const OUTGOING: usize = 16;

/// VIRTIO_CONSOLE_F_MULTIPORT (virtio 1.2, 5.3.3).
const MULTIPORT: u64 = 1 << 1;
/// VIRTIO_F_VERSION_1 (virtio 1.2, 6).
const VERSION_1: u64 = 1 << 32;
/// Queues of the only port.
const SINGLE_PORT_QUEUES: (u16, u16) = (0, 1);

/// A byte stream to whoever is connected on the host, if anybody is.
pub struct Channel {
    transport: MmioTransport<'static>,
    ports: Option<Ports>,
    incoming: Ring<INCOMING, BUFFER>,
    outgoing: Ring<OUTGOING, BUFFER>,
    broken: bool,
}

/// What came from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// So many bytes.
    Bytes(usize),
    /// The host's end was closed; what comes after is of somebody else.
    Closed,
}

impl Channel {
    /// Starts the first virtio console among `slots`.
    ///
    /// # Errors
    ///
    /// [`Error::DmaError`]: the heap has no room. Others: the device does not do what it should.
    pub fn find(slots: &[Device]) -> Result<Option<(Self, Device)>, Error> {
        for slot in slots {
            let Some(header) = core::ptr::NonNull::new(slot.registers.start as *mut VirtIOHeader) else { continue };
            // SAFETY: the device tree says that these are a virtio-mmio slot's registers; EL2 maps them as Device memory
            // for ever, and no other code uses them.
            let transport = unsafe { MmioTransport::new(header, slot.registers.size() as usize) };
            // An error: the slot is empty, or of a kind that is not known. It is not ours either way.
            if let Ok(transport) = transport
                && transport.device_type() == DeviceType::Console
            {
                return Self::start(transport).map(|channel| Some((channel, *slot)));
            }
        }
        Ok(None)
    }

    /// Initialises the device (virtio 1.2, 3.1.1).
    fn start(mut transport: MmioTransport<'static>) -> Result<Self, Error> {
        let begun = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        transport.set_status(DeviceStatus::empty());
        transport.set_status(begun);
        let features = transport.read_device_features() & (MULTIPORT | VERSION_1);
        transport.write_driver_features(features);
        transport.set_status(begun | DeviceStatus::FEATURES_OK);
        if !transport.get_status().contains(DeviceStatus::FEATURES_OK) {
            return Err(Error::Unsupported);
        }
        transport.set_guest_page_size(PAGE_SIZE as u32);
        let several = features & MULTIPORT != 0;
        let (from_host, to_host) = if several { ports::PORT_QUEUES } else { SINGLE_PORT_QUEUES };
        let ports = if several { Some(Ports::new(&mut transport)?) } else { None };
        let incoming = Ring::new(&mut transport, from_host, true)?;
        let mut outgoing = Ring::new(&mut transport, to_host, false)?;
        outgoing.interrupts(false);
        transport.finish_init();
        let mut channel = Self { transport, ports, incoming, outgoing, broken: false };
        channel.incoming.lend_all(&mut channel.transport)?;
        if let Some(ports) = &mut channel.ports {
            ports.start(&mut channel.transport)?;
        }
        Ok(channel)
    }

    /// Answers the device's interrupt.
    pub fn acknowledge(&mut self) {
        self.transport.ack_interrupt();
    }

    /// The next that came from the host; its bytes are in `to`.
    pub fn receive(&mut self, to: &mut [u8; BUFFER]) -> Option<Received> {
        let received = self.try_receive(to);
        self.working(received).flatten()
    }

    fn try_receive(&mut self, to: &mut [u8; BUFFER]) -> Result<Option<Received>, Error> {
        if self.broken {
            return Ok(None);
        }
        // Looked at first: the end that is closed was closed before it if the message is there now.
        let there = self.incoming.has_come_back();
        if let Some(ports) = &mut self.ports
            && ports.poll(&mut self.transport)?
        {
            return Ok(Some(Received::Closed));
        }
        if !there {
            return Ok(None);
        }
        let Some(bytes) = self.incoming.take_back()? else { return Ok(None) };
        let len = bytes.len();
        to[..len].copy_from_slice(bytes);
        self.incoming.lend_all(&mut self.transport)?;
        Ok(Some(Received::Bytes(len)))
    }

    /// Sends as many of the first bytes as there is room for; returns how many.
    pub fn send(&mut self, bytes: &[u8]) -> usize {
        if self.broken {
            return 0;
        }
        let sent = self.outgoing.reclaim().and_then(|()| self.outgoing.send(&mut self.transport, bytes));
        self.working(sent).unwrap_or(0)
    }

    /// Asks for an interrupt when there is room to send, or no longer. Returns whether there is some already, so that none
    /// may come.
    pub fn want_room(&mut self, wanted: bool) -> bool {
        if self.broken {
            return false;
        }
        self.outgoing.interrupts(wanted);
        wanted && self.outgoing.has_come_back()
    }

    /// Waits until the device has taken everything that was sent, at the latest until `deadline`, a count of the physical
    /// counter. For the machine's last words.
    pub fn flush(&mut self, deadline: u64) {
        while !self.broken && !self.outgoing.is_idle() && timer::now() < deadline {
            let reclaimed = self.outgoing.reclaim();
            self.working(reclaimed);
            core::hint::spin_loop();
        }
    }

    /// What worked; an error ends the use of the device.
    fn working<T>(&mut self, result: Result<T, Error>) -> Option<T> {
        result
            .inspect_err(|error| {
                log::error!("control: the channel's device fails: {error}");
                self.broken = true;
            })
            .ok()
    }
}
