//! A virtual machine's state outside the machine: everything but its memory and what its disks hold.
//!
//! Protocol: [`Vm::save`] of a machine none of whose vCPUs runs or ever will before its memory is saved as well; later, perhaps
//! on another machine, [`Saved::load`] makes one that goes on there.
//!
//! Time: the virtual count goes on from where it was. The physical count, which guests may read, is the machine's own and
//! jumps; timers that compare with it are moved along. The clock's counter goes on from where it was.
//!
//! Trust: a state that was read is a stranger's. Configuration, interrupt controller and devices are checked; of the vCPUs only
//! registers that a guest can write itself are taken, and the hypervisor forces what would lead outside
//! ([`SavedState`](crate::arch::SavedState)).

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use entresol_backing::ObjectHandle;
use entresol_wire::bundle::{Bundle, FileIndex};
use entresol_wire::config;
use entresol_wire::snapshot::Known;
use serde::{Deserialize, Serialize};

use super::build::{self, Inside};
use super::{Media, OutOfHeap, Pause, Status, Vm, devices, slots};
use crate::arch::{SavedBoard, cpu, timer};
use crate::console::Terminal;
use crate::host;
use crate::vcpu::{self, Counts, Vcpu, rooms};

/// The state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// Its configuration; files are known by what they hold.
    pub config: config::Vm<Known>,
    /// It ran, or was paused.
    running: bool,
    /// The physical count, and the virtual one.
    counts: (u64, u64),
    vcpus: Vec<vcpu::Saved>,
    board: SavedBoard,
    devices: devices::Saved,
}

impl Vm {
    /// What it has that cannot be saved, as the configuration calls it.
    pub fn unsavable(&self) -> Option<&'static str> {
        let pin = host::get().epoch.pin(cpu::index());
        if !self.passed.is_empty() {
            Some("pass_through")
        } else if self.config.balloon {
            Some("balloon")
        } else if self.config.flash.is_some() {
            Some("flash")
        } else if self.memory.slots().iter(&pin).any(|slot| u32::from(slot.id) >= slots::ALIASES) {
            Some("slots")
        } else {
            None
        }
    }

    /// Its state; it goes on as `status` says. No vCPU is on a CPU. `known` names a file by what it holds.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn save(&self, status: Status, known: impl Fn(FileIndex) -> Known) -> Result<Saved, OutOfHeap> {
        let config = self.config.clone().map_files(0, &mut |_, file| Ok::<_, OutOfHeap>(known(file)))?;
        let now = timer::now();
        let offset = self.vcpus.first().map_or(0, |vcpu| vcpu.state.lock().offset());
        Ok(Saved {
            config,
            running: status == Status::Running,
            counts: (now, now.wrapping_sub(offset)),
            vcpus: self.vcpus.iter().map(Vcpu::save).collect(),
            board: self.board.save()?,
            devices: self.devices.save(),
        })
    }
}

/// Why a state is not taken.
fn bad(error: &dyn core::fmt::Display) -> String {
    alloc::format!("the snapshot's state: {error}")
}

impl Saved {
    /// A machine in this state, configured as `config`, with this memory, which becomes its own, and these disks. It is
    /// paused; the second value is where it is to go on from.
    ///
    /// # Errors
    ///
    /// What is wrong. Nothing is left behind, and the memory is gone.
    pub fn load(
        self,
        config: &config::Vm<FileIndex>,
        bundle: &Bundle<'static>,
        terminal: &Arc<Terminal>,
        media: &Media,
        ram: ObjectHandle,
    ) -> Result<(Arc<Vm>, Status), String> {
        let (physical, virtual_count) = self.counts;
        let now = timer::now();
        if self.vcpus.len() != config.vcpus as usize {
            build::destroy_ram(ram);
            return Err(bad(&"vcpus: must be as many as the configuration has"));
        }
        let counts = Counts { offset: now.wrapping_sub(virtual_count), jump: now.wrapping_sub(physical) };
        let rooms =
            rooms(self.vcpus.len()).map_err(|OutOfHeap| OutOfHeap::text()).inspect_err(|_| build::destroy_ram(ram))?;
        let vcpus = self.vcpus.into_iter().zip(rooms).enumerate();
        let vcpus = vcpus.map(|(index, (saved, room))| Vcpu::load(index as u8, room, saved, counts, config)).collect();
        let inside = Inside { board: Some(self.board), vcpus, ram };
        let vm = build::assemble(config, bundle, terminal, media, inside).map_err(|error| error.to_string())?;
        vm.devices.load(self.devices).map_err(|error| bad(&error))?;
        vm.board.renew_generation();
        vm.limit_memory();
        Ok((vm, if self.running { Status::Running } else { Status::Paused(Pause::Owner) }))
    }
}
