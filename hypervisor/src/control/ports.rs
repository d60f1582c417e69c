//! Ports of a virtio console that has several: which there are, and whether somebody is at the other end.
//!
//! Protocol (virtio 1.2, 5.3.6.2): we say DEVICE_READY; the device says PORT_ADD for each port; we answer PORT_READY, and
//! PORT_OPEN for the port that we use; from then on its PORT_OPEN tells when the other end opens and closes.
//! The device drops what it has to say while we have given it no buffer, so a close can be missed: whoever relies on
//! it must be right without it.

use virtio_drivers::Error;
use virtio_drivers::transport::Transport;

use super::ring::Ring;

/// The port that we use. Port 0 is a console's, and QEMU lets nothing else be there.
pub const PORT: u32 = 1;
/// Queues of port 1, from the device and to it (virtio 1.2, 5.3.2).
pub const PORT_QUEUES: (u16, u16) = (4, 5);
/// Queues of the control messages, likewise.
const CONTROL_QUEUES: (u16, u16) = (2, 3);

/// What happens to a port.
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;

/// Bytes of a message.
const MESSAGE: usize = 8;

/// `struct virtio_console_control`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Message {
    port: u32,
    event: u16,
    value: u16,
}

impl Message {
    fn encode(self) -> [u8; MESSAGE] {
        let [a, b, c, d] = self.port.to_le_bytes();
        let ([e, f], [g, h]) = (self.event.to_le_bytes(), self.value.to_le_bytes());
        [a, b, c, d, e, f, g, h]
    }

    /// A name may follow, which does not concern us.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h] = *bytes.first_chunk::<MESSAGE>()?;
        Some(Self {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        })
    }
}

/// The control queues of a device with several ports.
pub struct Ports {
    incoming: Ring<16, 64>,
    outgoing: Ring<4, MESSAGE>,
}

impl Ports {
    /// Sets up the control queues. Before DRIVER_OK.
    ///
    /// # Errors
    ///
    /// As [`Ring::new`].
    pub fn new(transport: &mut impl Transport) -> Result<Self, Error> {
        let incoming = Ring::new(transport, CONTROL_QUEUES.0, true)?;
        let mut outgoing = Ring::new(transport, CONTROL_QUEUES.1, false)?;
        outgoing.interrupts(false);
        Ok(Self { incoming, outgoing })
    }

    /// Asks for the ports. After DRIVER_OK.
    ///
    /// # Errors
    ///
    /// The queues do not work.
    pub fn start(&mut self, transport: &mut impl Transport) -> Result<(), Error> {
        self.incoming.lend_all(transport)?;
        self.say(transport, Message { port: 0, event: DEVICE_READY, value: 1 })
    }

    /// Obeys what the device has said since. Returns whether the other end was closed meanwhile.
    ///
    /// # Errors
    ///
    /// The queues do not work.
    pub fn poll(&mut self, transport: &mut impl Transport) -> Result<bool, Error> {
        let mut closed = false;
        while let Some(bytes) = self.incoming.take_back()? {
            let message = Message::decode(bytes);
            self.incoming.lend_all(transport)?;
            match message {
                Some(Message { port: PORT, event: PORT_ADD, .. }) => {
                    self.say(transport, Message { port: PORT, event: PORT_READY, value: 1 })?;
                    self.say(transport, Message { port: PORT, event: PORT_OPEN, value: 1 })?;
                }
                Some(Message { port: PORT, event: PORT_OPEN, value: 0 }) => closed = true,
                _ => {}
            }
        }
        Ok(closed)
    }

    fn say(&mut self, transport: &mut impl Transport, message: Message) -> Result<(), Error> {
        self.outgoing.reclaim()?;
        match self.outgoing.send(transport, &message.encode())? {
            MESSAGE => Ok(()),
            _ => Err(Error::QueueFull),
        }
    }
}
