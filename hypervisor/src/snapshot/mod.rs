//! Snapshots: a virtual machine at one moment as a file of the store, and virtual machines made from such files.
//!
//! Rooms:
//!
//! | room | what it does |
//! |---|---|
//! | [`take`] | writes a file |
//! | [`restore`] | makes a virtual machine from a file, and those that it is the difference to |
//! | [`lazy`] | memory that is read while its machine runs |
//! | [`pages`] | pages between objects and files |
//! | [`shared`] | which pages a private machine shares with the hypervisor |
//! | [`kept`] | the last image of each virtual machine, to which the next can be the difference |
//!
//! Protocol of taking one: the machine is forked into a copy that never runs, which takes a time that does not grow with its
//! memory ([`crate::vm::Hold`]); it goes on at once. The copy's small state is written down, and its memory and disks are
//! kept as an [`Image`]; a task of the store writes what of them is not zero, or what differs from the base's image by
//! walking only what both do not share. The file counts when it is whole.
//!
//! Base: the image of a machine's last snapshot, or of the one that it was made from, stays in memory as long as the machine
//! does, so that a difference to it can be written. What the machine writes meanwhile is copied; the image costs that much.
//!
//! Trust: a file is read as if a stranger had made it; its configuration is checked as a bundle's is.
//!
//! Known holes: machines with flash, a balloon, devices of their own, or slots that were added are not saved.
//!
//! Lock order: as the store's tasks; the list of images is a leaf.

pub mod kept;
pub mod lazy;
mod pages;
pub mod restore;
mod shared;
pub mod take;

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::arch::cpu;
use entresol_backing::ObjectHandle;
use entresol_wire::control::{Code, Error};
use entresol_wire::snapshot::SnapshotError;

use crate::host;
use crate::store::Failure;
use crate::vm::{Overlay, build};

/// Why a snapshot was not taken or used, as the owner is told it.
pub struct Refused(pub Error);

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self(crate::control::store_refused(failure))
    }
}

impl From<entresol_wire::store::StoreError> for Refused {
    fn from(error: entresol_wire::store::StoreError) -> Self {
        Failure::Store(error).into()
    }
}

impl Refused {
    /// The file cannot be used.
    fn file(name: &str, error: &SnapshotError) -> Self {
        Self(Error::new(Code::StoreFailed, alloc::format!("file {name:?}: {error}")))
    }

    /// Something else than memory.
    fn because(text: impl Into<String>) -> Self {
        Self(Error::new(Code::StoreFailed, text))
    }

    /// No frames, or no heap.
    fn out_of_memory(what: impl core::fmt::Display) -> Self {
        Self(Error::new(Code::OutOfMemory, alloc::format!("{what}")))
    }
}

/// The memory and the disks of a machine at one moment. Nobody writes them.
pub struct Image {
    ram: ObjectHandle,
    disks: Vec<Arc<Overlay>>,
}

impl Image {
    /// What `ram` and `disks` hold now; nobody has a writable translation to them. Not called by a pinned CPU.
    fn of(ram: ObjectHandle, disks: &[Arc<Overlay>]) -> Result<Self, Refused> {
        let host = host::get();
        let forked = host.objects.fork(&host.supply(cpu::index()), &host.epoch, ram);
        let mut image = Self { ram: forked.map_err(Refused::out_of_memory)?, disks: Vec::new() };
        for disk in disks {
            image.disks.push(disk.fork().map_err(Refused::out_of_memory)?);
        }
        Ok(image)
    }

    /// Its memory has tags.
    fn is_tagged(&self) -> bool {
        let host = host::get();
        let pin = host.epoch.pin(cpu::index());
        host.objects.get(&pin, self.ram).is_some_and(entresol_backing::Object::is_tagged)
    }

    /// Its objects by their numbers in a snapshot's index: the memory, then what was written to each disk.
    fn objects(&self) -> Vec<Option<ObjectHandle>> {
        let disks = self.disks.iter().map(|disk| disk.written());
        core::iter::once(Some(self.ram)).chain(disks).collect()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        build::destroy_ram(self.ram);
    }
}
