//! Interrupt lines from devices to the virtual machine's interrupt controller.

use alloc::sync::{Arc, Weak};

use entresol_devices::bus::Interrupt;
use entresol_devices::gic::{Spi, Vgic};
use entresol_sync::Once;

use super::Vm;
use crate::sched;

/// The way from a device back to its virtual machine, which is made after it.
#[derive(Clone, Default)]
pub struct Link(Arc<Once<Weak<Vm>>>);

impl Link {
    /// Ties the devices that have this link to `vm`.
    pub fn tie(&self, vm: &Arc<Vm>) {
        self.0.call_once(|| Arc::downgrade(vm));
    }

    /// The virtual machine, while it exists.
    pub fn vm(&self) -> Option<Arc<Vm>> {
        self.0.get()?.upgrade()
    }
}

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
        let kick = self.gic.set_spi(self.spi, high);
        // While the virtual machine is being built or dropped there is nobody to tell.
        if !kick.is_empty()
            && let Some(vm) = self.link.vm()
        {
            sched::kick(&vm, kick);
        }
    }
}
