//! The guest's map: which device answers at which address.
//!
//! Disks come first among the virtio transports, then the console, then entropy, then the balloon; the others exist and are empty.
//! What else there is, is the [`Board`]'s. A flash answers where no memory does.
//!
//! Work that a device could not finish within one exit is remembered in a bit for each transport, and carried on before
//! some vCPU enters the guest again.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::cell::Cell;
use core::ops::Range;

use entresol_addr::Gpa;
use entresol_devices::bus::{Device, Work};
use entresol_devices::flash::{Flash, FlashError};
use entresol_devices::saved::BadState;
use entresol_devices::virtio::balloon::Balloon;
use entresol_devices::virtio::block::Block;
use entresol_devices::virtio::console::Console as VirtioConsole;
use entresol_devices::virtio::entropy::EntropySource;
use entresol_devices::virtio::{self, VirtioDevice, VirtioMmio, empty::EmptySlot};
use entresol_slot::Hint;
use entresol_sync::atomic::{AtomicBool, AtomicU32, Ordering};
use entresol_wire::bundle::FileIndex;
use entresol_wire::config::{self, MAX_VCPUS, PrivateIo, ReadOnlyStore, UnclaimedMmio};
use serde::{Deserialize, Serialize};

use super::balloon::GuestPages;
use super::flash::Window;
use super::link::Link;
use super::memory::{DeviceMemory, QUEUE_CACHES};
use super::{FlashMemory, Media, OutOfHeap, Overlay, Pause, Vm};
use crate::arch::{Accessor, Board, Line, cpu, map};
use crate::console::Terminal;
use crate::entropy::MachineEntropy;
use crate::sched::VcpuRef;
use crate::{host, paging};

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// A load's value.
    Value(u64),
    /// A store is done.
    Done,
    /// A store is done, and the vCPU has to look up.
    Look,
    /// Nobody is there, and the owner wants the guest to know.
    Abort,
    /// Memory is there by now: the guest tries again.
    Again,
}

type VirtioPort = VirtioMmio<VirtioConsole, DeviceMemory, Line>;
type DiskDevice = Block<Arc<Overlay>>;
type VirtioDisk = VirtioMmio<DiskDevice, DeviceMemory, Line>;
type EntropyDevice = EntropySource<MachineEntropy>;
type VirtioEntropy = VirtioMmio<EntropyDevice, DeviceMemory, Line>;
type BalloonDevice = Balloon<GuestPages>;
type VirtioBalloon = VirtioMmio<BalloonDevice, DeviceMemory, Line>;

/// The devices of one virtual machine.
pub struct Devices {
    flash: Option<Flash<Window>>,
    transports: Box<[Arc<dyn Device>]>,
    disks: Box<[Arc<VirtioDisk>]>,
    port: Arc<VirtioPort>,
    entropy: Option<Arc<VirtioEntropy>>,
    balloon: Option<Arc<VirtioBalloon>>,
    /// The page-frame caches of their queues. Small, so that faults reach the memory behind them by short offsets.
    caches: Range<u16>,
    unfinished: AtomicU32,
    /// Those whose work waits for a page.
    absent: AtomicU32,
    /// A page that one of them wants cannot be had.
    lost: AtomicBool,
}

/// The devices of one virtual machine, outside the machine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    disks: Vec<virtio::Saved>,
    console: virtio::Saved,
    entropy: Option<virtio::Saved>,
}

/// What devices of one virtual machine are wired with.
struct Wires<'a> {
    link: &'a Link,
    board: &'a Board,
    private_io: PrivateIo,
    /// The page-frame cache that no queue has yet.
    next_cache: Cell<u16>,
}

impl Wires<'_> {
    /// For a device of type `D`.
    fn memory<D: VirtioDevice>(&self) -> DeviceMemory {
        let first = self.next_cache.get();
        self.next_cache.set(first + (D::QUEUES * QUEUE_CACHES) as u16);
        DeviceMemory::new(self.link.clone(), self.private_io, first.into())
    }

    /// The line of transport `slot`.
    fn transport(&self, slot: usize) -> Result<Line, OutOfHeap> {
        self.board.transport_line(slot)
    }
}

/// The transports in their order: disks, console, entropy, balloon, and empty ones.
fn in_order(
    disks: &[Arc<VirtioDisk>],
    port: &Arc<VirtioPort>,
    entropy: Option<&Arc<VirtioEntropy>>,
    balloon: Option<&Arc<VirtioBalloon>>,
) -> Result<Box<[Arc<dyn Device>]>, OutOfHeap> {
    let mut transports: Vec<Arc<dyn Device>> = Vec::new();
    transports.try_reserve_exact(map::VIRTIO_SLOTS as usize).map_err(|_| OutOfHeap)?;
    transports.extend(disks.iter().map(|disk| disk.clone() as Arc<dyn Device>));
    transports.push(port.clone());
    transports.extend(entropy.map(|entropy| entropy.clone() as Arc<dyn Device>));
    transports.extend(balloon.map(|balloon| balloon.clone() as Arc<dyn Device>));
    let empty: Arc<dyn Device> = Arc::new(EmptySlot);
    transports.resize(map::VIRTIO_SLOTS as usize, empty);
    Ok(transports.into_boxed_slice())
}

impl From<FlashError> for OutOfHeap {
    fn from(_: FlashError) -> Self {
        Self
    }
}

impl From<virtio::OutOfMemory> for OutOfHeap {
    fn from(_: virtio::OutOfMemory) -> Self {
        Self
    }
}

impl Devices {
    /// The devices of the virtual machine at the end of `link`, which is as `config` says, with these media, on
    /// `terminal`.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn new(
        link: &Link,
        board: &Board,
        terminal: &Arc<Terminal>,
        media: &Media,
        config: &config::Vm<FileIndex>,
    ) -> Result<Self, OutOfHeap> {
        let private_io = config.private_io;
        let first = config.vcpus as u16;
        let wires = Wires { link, board, private_io, next_cache: Cell::new(first) };
        let mut blocks = Vec::new();
        blocks.try_reserve_exact(media.disks.len()).map_err(|_| OutOfHeap)?;
        for (slot, disk) in media.disks.iter().enumerate() {
            let name = [b'v', b'd', b'a' + slot as u8];
            let block = Block::new(disk.clone(), &name)?;
            blocks.push(Arc::new(VirtioMmio::new(block, wires.memory::<DiskDevice>(), wires.transport(slot)?)?));
        }
        let console = VirtioConsole::new(terminal.clone(), None)?;
        let slot = blocks.len();
        let port = Arc::new(VirtioMmio::new(console, wires.memory::<VirtioConsole>(), wires.transport(slot)?)?);
        let entropy = match MachineEntropy::of_this_machine() {
            Some(source) => {
                let source = EntropySource::new(source)?;
                Some(Arc::new(VirtioMmio::new(source, wires.memory::<EntropyDevice>(), wires.transport(slot + 1)?)?))
            }
            None => None,
        };
        let balloon = if config.balloon {
            let balloon = Balloon::new(GuestPages::new(link.clone()))?;
            let line = wires.transport(slot + 1 + usize::from(entropy.is_some()))?;
            Some(Arc::new(VirtioMmio::new(balloon, wires.memory::<BalloonDevice>(), line)?))
        } else {
            None
        };
        let window = |memory: &Arc<FlashMemory>| Flash::new(Window::new(memory.clone(), link.clone()));
        let flash = media.flash.as_ref().map(window).transpose()?;
        Ok(Self {
            flash,
            transports: in_order(&blocks, &port, entropy.as_ref(), balloon.as_ref())?,
            disks: blocks.into_boxed_slice(),
            port,
            entropy,
            balloon,
            caches: first..wires.next_cache.get(),
            unfinished: AtomicU32::new(0),
            absent: AtomicU32::new(0),
            lost: AtomicBool::new(false),
        })
    }

    /// Devices in the same state for the copy of the virtual machine at the end of `link`, whose disks are copies of this
    /// one's, and so is `flash`, on the copy's `terminal`. No vCPU is on a CPU.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn fork(
        &self,
        link: &Link,
        board: &Board,
        terminal: &Arc<Terminal>,
        disks: &[Arc<Overlay>],
        flash: Option<&Arc<FlashMemory>>,
        private_io: PrivateIo,
    ) -> Result<Self, OutOfHeap> {
        let first = self.caches.start;
        let wires = Wires { link, board, private_io, next_cache: Cell::new(first) };
        let mut blocks = Vec::new();
        blocks.try_reserve_exact(disks.len()).map_err(|_| OutOfHeap)?;
        for (slot, (block, disk)) in self.disks.iter().zip(disks).enumerate() {
            let line = wires.transport(slot)?;
            blocks.push(Arc::new(block.fork(|block| block.fork(disk.clone()), wires.memory::<DiskDevice>(), line)?));
        }
        let slot = blocks.len();
        let line = wires.transport(slot)?;
        let port = self.port.fork(|console| console.fork(terminal.clone()), wires.memory::<VirtioConsole>(), line)?;
        let port = Arc::new(port);
        let entropy = match (&self.entropy, MachineEntropy::of_this_machine()) {
            (Some(entropy), Some(source)) => {
                let line = wires.transport(slot + 1)?;
                Some(Arc::new(entropy.fork(|_| EntropySource::new(source), wires.memory::<EntropyDevice>(), line)?))
            }
            _ => None,
        };
        let balloon = match &self.balloon {
            Some(balloon) => {
                let pages = GuestPages::new(link.clone());
                let line = wires.transport(slot + 1 + usize::from(entropy.is_some()))?;
                Some(Arc::new(balloon.fork(|balloon| balloon.fork(pages), wires.memory::<BalloonDevice>(), line)?))
            }
            None => None,
        };
        let flash = match (&self.flash, flash) {
            (Some(flash), Some(copy)) => Some(flash.fork(Window::new(copy.clone(), link.clone()))?),
            _ => None,
        };
        Ok(Self {
            flash,
            transports: in_order(&blocks, &port, entropy.as_ref(), balloon.as_ref())?,
            disks: blocks.into_boxed_slice(),
            port,
            entropy,
            balloon,
            caches: first..wires.next_cache.get(),
            unfinished: AtomicU32::new(self.unfinished.load(Ordering::Acquire) | self.absent.load(Ordering::Acquire)),
            absent: AtomicU32::new(0),
            lost: AtomicBool::new(false),
        })
    }

    /// Their state outside the machine; no vCPU is on a CPU, and there is no flash.
    pub fn save(&self) -> Saved {
        Saved {
            disks: self.disks.iter().map(|disk| disk.save()).collect(),
            console: self.port.save(),
            entropy: self.entropy.as_ref().map(|entropy| entropy.save()),
        }
    }

    /// Takes over a state that was saved; no vCPU has run yet.
    ///
    /// # Errors
    ///
    /// [`BadState`]: it is not theirs.
    pub fn load(&self, saved: Saved) -> Result<(), BadState> {
        let same = (saved.disks.len(), saved.entropy.is_some()) == (self.disks.len(), self.entropy.is_some());
        if !same {
            let rule = "must be as many disks as the configuration has, and an entropy source if the machine has one";
            return Err(BadState { field: "devices", rule });
        }
        self.disks.iter().zip(&saved.disks).try_for_each(|(disk, saved)| disk.load(saved))?;
        self.port.load(&saved.console)?;
        if let (Some(entropy), Some(saved)) = (&self.entropy, &saved.entropy) {
            entropy.load(saved)?;
        }
        self.resume();
        Ok(())
    }

    /// Gives the guest input at its virtio console; returns how many of the first bytes it took.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        self.port.offer(bytes)
    }

    /// Its balloon, if it has one.
    pub fn balloon(&self) -> Option<&VirtioBalloon> {
        self.balloon.as_deref()
    }

    /// Page-frame caches that the machine needs: the vCPUs', then those of its devices' rings.
    pub fn caches(&self) -> usize {
        self.caches.end.into()
    }

    /// Work that was stalled goes on.
    pub fn resume(&self) {
        self.unfinished.store(u32::MAX, Ordering::Release);
    }

    /// Work that waits for a page goes on. Whether there is some.
    pub fn go_on(&self) -> bool {
        let absent = self.absent.swap(0, Ordering::SeqCst);
        self.unfinished.fetch_or(absent, Ordering::SeqCst);
        absent != 0
    }

    /// A page that a device wants cannot be had.
    pub fn lose(&self) {
        self.lost.store(true, Ordering::SeqCst);
    }

    /// The transport at `gpa`, and the offset in it.
    #[inline]
    fn transport_at(&self, gpa: u64) -> Option<(&dyn Device, u64, usize)> {
        let offset = gpa.checked_sub(map::VIRTIO_BASE)?;
        let slot = (offset / map::VIRTIO_SIZE) as usize;
        self.transports.get(slot).map(|device| (&**device, offset % map::VIRTIO_SIZE, slot))
    }

    /// The flash, if it is what lies at `gpa`, and the offset in it.
    pub fn flash_at(&self, gpa: u64) -> Option<(&Flash<Window>, u64)> {
        let flash = self.flash.as_ref()?;
        gpa.checked_sub(map::FLASH_BASE).filter(|offset| *offset < flash.size()).map(|offset| (flash, offset))
    }
}

impl Vm {
    /// The device at `gpa`, the offset in it, and its transport, if it has one.
    #[inline]
    pub fn device_at(&self, gpa: u64) -> Option<(&dyn Device, u64, Option<usize>)> {
        if let Some((device, offset)) = self.board.device_at(gpa) {
            return Some((device, offset, None));
        }
        self.devices.transport_at(gpa).map(|(device, offset, slot)| (device, offset, Some(slot)))
    }

    /// A guest's load of `size` bytes at `gpa`.
    pub fn device_read(&self, vcpu: &VcpuRef, by: Accessor<'_>, gpa: Gpa, size: u8) -> Claim {
        if let Some((device, offset, _)) = self.device_at(gpa.get()) {
            return Claim::Value(device.read(offset, size));
        }
        if let Some(value) = self.board.read(vcpu, by, gpa.get(), size) {
            return Claim::Value(value);
        }
        self.read_elsewhere(gpa, size)
    }

    /// A load from the flash while it does not read as memory, or from nothing. That nothing is there is looked at and
    /// answered in one pin, which a slot update that is under way waits for (INV-9).
    #[cold]
    fn read_elsewhere(&self, gpa: Gpa, size: u8) -> Claim {
        if let Some((flash, offset)) = self.devices.flash_at(gpa.get()) {
            return Claim::Value(flash.read(offset, size));
        }
        let pin = host::get().epoch.pin(cpu::index());
        if self.memory.slots().find(&pin, gpa.frame(), &Hint::new()).is_some() {
            return Claim::Again;
        }
        self.nobody(false)
    }

    /// A load or store where nobody is, as the owner's policy has it.
    #[cold]
    pub fn nobody(&self, write: bool) -> Claim {
        self.unclaimed.bump();
        match (self.config.policies.unclaimed_mmio, write) {
            (UnclaimedMmio::Abort, _) => Claim::Abort,
            (UnclaimedMmio::ReadAsZero, false) => Claim::Value(0),
            (UnclaimedMmio::ReadAsZero, true) => Claim::Done,
        }
    }

    /// A guest's store of the low `size` bytes of `value` at `gpa`.
    pub fn device_write(&self, vcpu: &VcpuRef, by: Accessor<'_>, gpa: Gpa, size: u8, value: u64) -> Claim {
        if let Some((device, offset, slot)) = self.device_at(gpa.get()) {
            let work = device.write(offset, size, value);
            return if self.note(slot, work) { Claim::Look } else { Claim::Done };
        }
        if self.board.write(vcpu, by, gpa.get(), size, value) {
            return Claim::Done;
        }
        self.write_elsewhere(gpa, size, value)
    }

    /// A store to the flash, to read-only memory, or to nothing; looked at and answered in one pin.
    #[cold]
    fn write_elsewhere(&self, gpa: Gpa, size: u8, value: u64) -> Claim {
        if let Some((flash, offset)) = self.devices.flash_at(gpa.get()) {
            return if self.note(None, flash.write(offset, size, value)) { Claim::Look } else { Claim::Done };
        }
        let pin = host::get().epoch.pin(cpu::index());
        match self.memory.slots().find(&pin, gpa.frame(), &Hint::new()) {
            Some(slot) if slot.is_read_only() => match self.config.policies.read_only_store {
                ReadOnlyStore::Ignore => Claim::Done,
                ReadOnlyStore::Abort => Claim::Abort,
            },
            Some(_) => Claim::Again,
            None => self.nobody(true),
        }
    }

    /// Remembers what `work` left to do; true if there is something.
    fn note(&self, slot: Option<usize>, work: Work) -> bool {
        match (work, slot) {
            (Work::Idle, _) | (_, None) => false,
            (Work::More, Some(slot)) => {
                self.devices.unfinished.fetch_or(1 << slot, Ordering::AcqRel);
                true
            }
            (Work::Stalled, Some(slot)) => {
                let frames = match paging::frames_for(self) {
                    Ok(frames) => frames,
                    Err(lack) => return self.pause(lack),
                };
                self.devices.absent.fetch_or(1 << slot, Ordering::SeqCst);
                paging::device_waits_for(self, frames);
                self.has_device_work()
            }
            (Work::Waiting, Some(slot)) => {
                self.devices.absent.fetch_or(1 << slot, Ordering::SeqCst);
                if self.devices.lost.swap(false, Ordering::SeqCst) {
                    return self.pause(Pause::Storage);
                }
                paging::device_waits(self);
                self.has_device_work()
            }
        }
    }

    /// Whether a device has work to carry on.
    #[inline]
    pub fn has_device_work(&self) -> bool {
        self.devices.unfinished.load(Ordering::Acquire) != 0
    }

    /// Carries on the work of every device that has some, one part of each.
    #[cold]
    pub fn run_devices(&self) {
        let unfinished = self.devices.unfinished.swap(0, Ordering::AcqRel);
        for slot in (0..map::VIRTIO_SLOTS as usize).filter(|slot| unfinished >> slot & 1 != 0) {
            self.note(Some(slot), self.devices.transports[slot].run());
        }
    }
}

const _: () = {
    let queues = map::VIRTIO_SLOTS as usize * virtio::QUEUES_MAX;
    assert!(MAX_VCPUS as usize + queues * QUEUE_CACHES <= u16::MAX as usize, "page-frame caches have short numbers");
};
