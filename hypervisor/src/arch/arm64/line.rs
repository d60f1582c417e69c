//! Interrupt lines from devices to the virtual machine's interrupt controller.

use alloc::sync::Arc;

use entresol_devices::bus::Interrupt;
use entresol_devices::gic::{Spi, Vgic};

use crate::vm::Link;

/// A device's wire.
pub struct Line {
    link: Link,
    gic: Arc<Vgic>,
    spi: Spi,
}

impl Line {
    /// The wire of `spi`.
    pub fn new(link: Link, gic: Arc<Vgic>, spi: Spi) -> Self {
        Self { link, gic, spi }
    }
}

impl Interrupt for Line {
    fn set_level(&self, high: bool) {
        self.link.kick(self.gic.set_spi(self.spi, high));
    }
}
