//! The way from a device back to its virtual machine.

use alloc::sync::{Arc, Weak};

use entresol_devices::kick::Kick;
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

    /// Tells vCPUs that their interrupts changed. While the virtual machine is being built or dropped there is nobody to tell.
    pub fn kick(&self, kick: Kick) {
        if !kick.is_empty()
            && let Some(vm) = self.vm()
        {
            sched::kick(&vm, kick);
        }
    }
}
