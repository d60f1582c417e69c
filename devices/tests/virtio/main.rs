//! Virtio devices as a driver sees them, from reset to I/O, and as a hostile one does.
//!
//! [`host`] is the VM around a device: memory, line, disk, terminal. [`driver`] is a driver in miniature that follows
//! virtio 3.1.1. The rest are tests, a file for each concern.

mod balloon;
mod block;
mod console;
mod driver;
mod entropy;
mod host;
mod hostile;
mod transport;
