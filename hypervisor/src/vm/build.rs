//! Making a virtual machine from its configuration and its files.
//!
//! Everything that can be wrong with them is found before anything is started; what was made until then is given back.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem::ManuallyDrop;

use entresol_addr::{PAGE_SIZE, PageSize};
use entresol_backing::{ConvertError, ObjectHandle, Policy, Spec};
use entresol_mmu::{Counter, Options, ReadOnlyIvac};
use entresol_sync::Mutex;
use entresol_sync::atomic::AtomicBool;
use entresol_wire::bundle::{Bundle, FileIndex};
use entresol_wire::config::{self, LargestEntry, SharedBlock};

use super::devices::Devices;
use super::flash::FlashMemoryError;
use super::link::Link;
use super::pass_through::Passed;
use super::{Media, OutOfHeap, Pause, Posted, Status, Vm, slots};
use crate::arch::{Board, Boot, Guest, Memory, SavedBoard, cpu, map, window};
use crate::console::Terminal;
use crate::counters::Counters;
use crate::host;
use crate::sched;
use crate::vcpu::{Vcpu, rooms};

/// Slots of a virtual machine.
pub(super) const SLOTS: u32 = 64;

/// Why a virtual machine was not made: which, and the rule.
#[derive(Clone, Debug)]
pub struct BuildError(String);

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<FlashMemoryError> for BuildError {
    fn from(error: FlashMemoryError) -> Self {
        match error {
            FlashMemoryError::Create(error) => Self::because("flash", &error),
            FlashMemoryError::Write(error) => Self::because("flash", &error),
        }
    }
}

impl From<OutOfHeap> for BuildError {
    fn from(_: OutOfHeap) -> Self {
        Self(OutOfHeap::text())
    }
}

impl BuildError {
    /// The rule that is broken.
    pub fn new(rule: &str) -> Self {
        Self(String::from(rule))
    }

    /// What is wrong with `field`.
    pub fn because(field: &str, what: &dyn fmt::Display) -> Self {
        Self(alloc::format!("{field}: {what}"))
    }

    /// What is wrong with a state that was saved.
    pub fn saved(what: &dyn fmt::Display) -> Self {
        Self::because("the snapshot's state", what)
    }
}

/// A virtual machine that is ready to start at `boot`.
pub struct Built {
    /// It.
    pub vm: Arc<Vm>,
    /// Where vCPU 0 starts.
    pub boot: Boot,
}

/// Makes the virtual machine `config` says, with files of `bundle`, its console on `terminal`.
///
/// # Errors
///
/// [`BuildError`]; nothing is left behind.
pub fn build(
    config: &config::Vm<FileIndex>,
    bundle: &Bundle<'static>,
    terminal: &Arc<Terminal>,
    media: &Media,
) -> Result<Built, BuildError> {
    let guest = Guest::recognise(config, bundle)?;
    let vcpus = config.vcpus as usize;
    let mut all = Vec::new();
    all.try_reserve_exact(vcpus).map_err(|_| OutOfHeap)?;
    all.extend(rooms(vcpus)?.into_iter().enumerate().map(|(index, room)| Vcpu::new(index as u8, room)));
    let vm = assemble(config, bundle, terminal, media, Inside { board: None, vcpus: all, ram: create_ram(config)? })?;
    let boot = guest.place(&vm.memory)?;
    if config.merge {
        vm.memory.enable_merging(cpu::index()).map_err(|error| BuildError::because("merge", &error))?;
    }
    vm.limit_memory();
    Ok(Built { vm, boot })
}

/// What of a virtual machine is new when it starts, and not when it goes on from a saved state.
pub struct Inside {
    /// What its board's state was.
    pub board: Option<SavedBoard>,
    /// Its vCPUs.
    pub vcpus: Vec<Vcpu>,
    /// Its memory, which becomes its own.
    pub ram: ObjectHandle,
}

/// Everything but the guest's files. What can fail fails before the virtual machine exists; from then on dropping it
/// gives everything back.
///
/// # Errors
///
/// [`BuildError`]; nothing is left behind, and the memory is gone.
pub fn assemble(
    config: &config::Vm<FileIndex>,
    bundle: &Bundle<'static>,
    terminal: &Arc<Terminal>,
    media: &Media,
    inside: Inside,
) -> Result<Arc<Vm>, BuildError> {
    let ram = inside.ram;
    put_together(config, bundle, terminal, media, inside).inspect_err(|_| destroy_ram(ram))
}

fn put_together(
    config: &config::Vm<FileIndex>,
    bundle: &Bundle<'static>,
    terminal: &Arc<Terminal>,
    media: &Media,
    Inside { board, vcpus: all, ram }: Inside,
) -> Result<Arc<Vm>, BuildError> {
    Board::check(config)?;
    let (vcpus, link) = (all.len(), Link::default());
    let posted = Posted::new(config)?;
    let passed = Passed::new(&config.pass_through).map_err(BuildError)?;
    let memory = create_memory(config)?;
    let board = match Board::new(&link, terminal, config, &memory, board) {
        Ok(board) => board,
        Err(error) => {
            memory.destroy(cpu::index());
            return Err(error);
        }
    };
    let furnish = || {
        let devices = Devices::new(&link, &board, terminal, media, config)?;
        slots::create(&memory, config, bundle, ram, media).map_err(BuildError)?;
        passed.show(&memory).map_err(BuildError)?;
        board.show(&memory)?;
        memory.make_caches(devices.caches()).map_err(|_| OutOfHeap)?;
        sched::reserve(vcpus)?;
        Ok::<_, BuildError>(devices)
    };
    let devices = match furnish() {
        Ok(devices) => devices,
        // What is shown goes after the memory that shows it.
        Err(error) => {
            memory.destroy(cpu::index());
            return Err(error);
        }
    };
    let vm = Arc::new(Vm {
        config: config.clone(),
        memory: ManuallyDrop::new(memory),
        counters: Counters::default(),
        posted,
        tracking: Default::default(),
        unclaimed: Counter::new(),
        devices,
        board,
        passed,
        ram,
        short: Default::default(),
        vcpus: all.into_boxed_slice(),
        status: Mutex::new(Status::Paused(Pause::NotStarted)),
        runs: AtomicBool::new(false),
    });
    link.tie(&vm);
    Ok(vm)
}

/// The memory, without a slot.
fn create_memory(config: &config::Vm<FileIndex>) -> Result<Memory, BuildError> {
    let largest = match config.policies.page_size {
        LargestEntry::Block2M => PageSize::Size2M,
        LargestEntry::Page4K => PageSize::Size4K,
    };
    let read_only_ivac = match config.policies.read_only_ivac {
        config::ReadOnlyIvac::Abort => ReadOnlyIvac::Abort,
        config::ReadOnlyIvac::Clean => ReadOnlyIvac::Clean,
    };
    let ipa_bits = map::GPA_BITS.min(Board::physical_bits());
    let options = Options { ipa_bits, slots: SLOTS, largest, read_only_ivac, tags: config.mte };
    let memory = Memory::new(host::get(), cpu::index(), Board::format(config), options);
    let mut memory = memory.map_err(|error| BuildError::because("memory", &format_args!("{error:?}")))?;
    match Board::shade(&mut memory, config) {
        Ok(()) => Ok(memory),
        Err(error) => {
            memory.destroy(cpu::index());
            Err(error.into())
        }
    }
}

/// Memory for a machine like `config`, all vacant. What it shares with the hypervisor at boot is shared.
///
/// # Errors
///
/// [`BuildError`].
pub fn create_ram(config: &config::Vm<FileIndex>) -> Result<ObjectHandle, BuildError> {
    let ram = create_closed_ram(config)?;
    match share_window(config, ram) {
        Ok(()) => Ok(ram),
        Err(error) => {
            destroy_ram(ram);
            Err(BuildError::because("memory", &error))
        }
    }
}

/// The same; what is private is all private.
///
/// # Errors
///
/// [`BuildError`].
pub fn create_closed_ram(config: &config::Vm<FileIndex>) -> Result<ObjectHandle, BuildError> {
    let host = host::get();
    let policy = match config.policies.page_size {
        LargestEntry::Block2M if config.policies.shared_block == SharedBlock::Whole => Policy::WholeBlocks,
        LargestEntry::Block2M => Policy::Blocks,
        LargestEntry::Page4K => Policy::Pages,
    };
    let (frames, tagged) = (config.memory / PAGE_SIZE, config.mte);
    let spec =
        if config.private { Spec::Private { frames, policy } } else { Spec::Anonymous { frames, policy, tagged } };
    host.objects.create(&host.supply(cpu::index()), spec).map_err(|error| BuildError::because("memory", &error))
}

/// What the devices of a machine that bounces reach is shared before anything is in it.
fn share_window(config: &config::Vm<FileIndex>, ram: ObjectHandle) -> Result<(), ConvertError> {
    let Some(window) = window(config) else { return Ok(()) };
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let object = host.objects.get(&pin, ram).expect("it was made for this");
    let first = map::frame_of(window.start).expect("the window lies in memory");
    object.convert(&host.supply(cpu::index()), first, window.size / PAGE_SIZE, true).map(drop)
}

/// Gives memory back that no machine has.
pub fn destroy_ram(ram: ObjectHandle) {
    let host = host::get();
    if let Err(error) = host.objects.destroy(&host.supply(cpu::index()), &host.epoch, ram) {
        log::error!("a memory object stays: {error:?}");
    }
}
