//! A controller's state outside the machine.
//!
//! Only of vCPUs that are synced: what stands in a list register is nobody's while it is written down, so nothing does.

use alloc::vec::Vec;

use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use serde::{Deserialize, Serialize};

use super::bank::{Bank, Groups};
use super::spis::Spis;
use super::{Config, Cpu, GicError, Vgic};
use crate::saved::{BadState, check};

/// A controller, outside of the machine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    groups: u8,
    cpus: Vec<SavedCpu>,
    spis: Spis,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedCpu {
    asleep: bool,
    private: Bank,
}

impl Vgic {
    /// Its state. The vCPUs are stopped and synced.
    ///
    /// # Errors
    ///
    /// [`GicError::OutOfMemory`].
    pub fn save(&self) -> Result<Saved, GicError> {
        let mut cpus = Vec::new();
        cpus.try_reserve_exact(self.cpus.len()).map_err(|_| GicError::OutOfMemory)?;
        let spis = self.spis.lock().fork()?;
        cpus.extend(
            self.cpus.iter().map(|cpu| SavedCpu {
                asleep: cpu.asleep.load(Ordering::Relaxed),
                private: cpu.private.lock().clone(),
            }),
        );
        Ok(Saved { groups: self.groups.load(Ordering::Acquire), cpus, spis })
    }
}

impl Saved {
    /// A controller in this state.
    ///
    /// # Errors
    ///
    /// [`BadState`]: it is none that a controller made with `config` can be in.
    pub fn load(self, config: Config) -> Result<Vgic, BadState> {
        check(self.groups & !0b11 == 0, "gic.groups", "must have two bits")?;
        check(self.cpus.len() == config.vcpus, "gic.cpus", "must be as many as the machine has")?;
        self.spis.check(config.vcpus, config.spis)?;
        for cpu in &self.cpus {
            cpu.private.check(true)?;
        }
        let made = Vgic::new(config).map_err(|_| BadState { field: "gic", rule: "must fit into the heap" })?;
        let cpus = made.cpus.iter().zip(self.cpus).map(|(_, cpu)| Cpu {
            needs_sync: AtomicBool::new(true),
            asleep: AtomicBool::new(cpu.asleep),
            spi_words: AtomicU32::new(0),
            private: Mutex::new(cpu.private),
        });
        let gic = Vgic { cpus: cpus.collect(), spis: Mutex::new(self.spis), groups: AtomicU8::new(self.groups) };
        let _nobody_runs = gic.spis.lock().refresh_all(&gic.cpus, Groups::from_control(self.groups));
        Ok(gic)
    }
}
