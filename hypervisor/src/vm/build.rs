//! Making a virtual machine from its configuration and its files.
//!
//! Everything that can be wrong with them is found before anything is started; what was made until then is given back.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem::ManuallyDrop;

use entresol_addr::{Gpa, PAGE_SIZE, PageSize};
use entresol_arch_arm64::idregs::{self, VmFeatures};
use entresol_arch_arm64::stage2::{self, Stage2};
use entresol_arch_arm64::sysreg::SysReg;
use entresol_backing::{ConvertError, ObjectHandle, Policy, Spec};
use entresol_devices::gic::{Config as GicConfig, Vgic};
use entresol_loader::kernel::{self, Hint};
use entresol_loader::layout::{self, Layout, LayoutError};
use entresol_loader::window::Window;
use entresol_loader::{Memory as _, Ram, Region, fdt, virt};
use entresol_metal_arm64::features::{self, Feature};
use entresol_metal_arm64::traps::Hcr;
use entresol_metal_arm64::{Metal, cpu, identity};
use entresol_mmu::{Counter, Options, ReadOnlyIvac, Vm as Memory};
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, AtomicUsize};
use entresol_wire::bundle::{Bundle, FileIndex};
use entresol_wire::config::{self, CacheMaintenance, KernelFormat, LargestEntry, PrivateIo, SharedBlock};

use super::devices::Devices;
use super::flash::FlashMemoryError;
use super::lines::Link;
use super::memory::BootMemory;
use super::pass_through::Passed;
use super::stolen::Records;
use super::{ID_REGISTERS, Media, OutOfHeap, Pause, Posted, Status, Vm, slots};
use crate::console::Terminal;
use crate::counters::Counters;
use crate::entropy;
use crate::host;
use crate::sched;
use crate::vcpu::{Boot, Vcpu};

/// SPIs of a guest's interrupt controller, as QEMU's `virt` has.
const SPIS: usize = 256;
/// Slots of a virtual machine.
pub(super) const SLOTS: u32 = 64;
/// Bits of guest physical address: enough for the most memory that a machine may have, from 1 GiB.
const IPA_BITS: u8 = 40;

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
            FlashMemoryError::Create(error) => because("flash")(&error),
            FlashMemoryError::Write(error) => because("flash")(&error),
        }
    }
}

impl From<OutOfHeap> for BuildError {
    fn from(_: OutOfHeap) -> Self {
        Self(OutOfHeap::text())
    }
}

fn because(what: &str) -> impl Fn(&dyn fmt::Display) -> BuildError + '_ {
    move |error| BuildError(alloc::format!("{what}: {error}"))
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
    let gic = Vgic::new(gic_config(config)).map_err(|error| because("interrupts")(&error))?;
    let mut all = Vec::new();
    all.try_reserve_exact(vcpus).map_err(|_| OutOfHeap)?;
    all.extend((0..vcpus).map(|index| Vcpu::new(index as u8)));
    let vm = assemble(config, bundle, terminal, media, Inside { gic, vcpus: all, ram: create_ram(config)? })?;
    let boot = guest.place(&vm.memory)?;
    if config.merge {
        vm.memory.enable_merging(cpu::index()).map_err(|error| because("merge")(&error))?;
    }
    vm.limit_memory();
    Ok(Built { vm, boot })
}

/// What of a virtual machine is new when it starts, and not when it goes on from a saved state.
pub struct Inside {
    /// Its interrupt controller.
    pub gic: Vgic,
    /// Its vCPUs.
    pub vcpus: Vec<Vcpu>,
    /// Its memory, which becomes its own.
    pub ram: ObjectHandle,
}

/// The interrupt controller of a machine like `config`.
pub fn gic_config<F>(config: &config::Vm<F>) -> GicConfig {
    GicConfig { vcpus: config.vcpus as usize, spis: SPIS }
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
    Inside { gic, vcpus: all, ram }: Inside,
) -> Result<Arc<Vm>, BuildError> {
    if config.mte && !features::has(Feature::MTE) {
        return Err(BuildError("mte = true: the machine's CPUs must have tag storage (FEAT_MTE2)".into()));
    }
    let vcpus = all.len();
    let (gic, link) = (Arc::new(gic), Link::default());
    let devices = Devices::new(&link, &gic, terminal, media, config)?;
    let posted = Posted::new(config)?;
    let passed = Passed::new(&config.pass_through).map_err(BuildError)?;
    let records = Records::new(config).map_err(|error| because("stolen time")(&error))?;
    let (memory, vtcr) = create_memory(config)?;
    let slots = slots::create(&memory, config, bundle, ram, media).map_err(BuildError);
    let shown = slots.and_then(|()| passed.show(&memory).map_err(BuildError));
    let shown = shown.and_then(|()| records.show(&memory).map_err(|error| because("stolen time")(&error)));
    let shown = shown.and_then(|()| memory.make_caches(devices.caches()).map_err(|_| OutOfHeap.into()));
    let ready = shown.and_then(|()| sched::reserve(vcpus).map_err(BuildError::from));
    if let Err(error) = ready {
        memory.destroy(cpu::index());
        return Err(error);
    }
    let id_registers = id_registers(memory.ipa_bits(), config.mte);
    let vm = Arc::new(Vm {
        config: config.clone(),
        memory: ManuallyDrop::new(memory),
        gic,
        counters: Counters::default(),
        posted,
        tracking: Default::default(),
        unclaimed: Counter::new(),
        devices,
        passed,
        ram,
        short: Default::default(),
        _records: records,
        vcpus: all.into_boxed_slice(),
        status: Mutex::new(Status::Paused(Pause::NotStarted)),
        runs: AtomicBool::new(false),
        id_registers,
        vtcr,
        hcr: hcr(config),
        last: [const { AtomicUsize::new(0) }; entresol_sync::epoch::MAX_CPUS],
    });
    link.tie(&vm);
    Ok(vm)
}

/// HCR_EL2 for its vCPUs.
fn hcr(config: &config::Vm<FileIndex>) -> Hcr {
    let maintenance = match config.policies.cache_maintenance {
        CacheMaintenance::Direct => Hcr::empty(),
        CacheMaintenance::Trap => Hcr::TPCP | Hcr::TPU,
    };
    let guest = if config.mte { Hcr::guest().with_tags() } else { Hcr::guest() };
    guest | Hcr::TWE | maintenance
}

/// The memory, without a slot, and VTCR_EL2 for it.
fn create_memory(config: &config::Vm<FileIndex>) -> Result<(Memory<'static, Metal, Stage2>, u64), BuildError> {
    let largest = match config.policies.page_size {
        LargestEntry::Block2M => PageSize::Size2M,
        LargestEntry::Page4K => PageSize::Size4K,
    };
    let physical_bits = features::physical_bits();
    let read_only_ivac = match config.policies.read_only_ivac {
        config::ReadOnlyIvac::Abort => ReadOnlyIvac::Abort,
        config::ReadOnlyIvac::Clean => ReadOnlyIvac::Clean,
    };
    let tags = config.mte;
    let options = Options { ipa_bits: IPA_BITS.min(physical_bits), slots: SLOTS, largest, read_only_ivac, tags };
    let format = Stage2 { fwb: features::has(Feature::FORCED_WRITE_BACK) };
    let failed = |error: &dyn fmt::Debug| BuildError(alloc::format!("memory: {error:?}"));
    let memory = Memory::new(host::get(), cpu::index(), format, options).map_err(|error| failed(&error))?;
    let vtcr = stage2::vtcr(memory.table().geometry(), physical_bits, features::has(Feature::VMID_16));
    match vtcr {
        Ok(vtcr) => Ok((memory, vtcr)),
        Err(error) => {
            memory.destroy(cpu::index());
            Err(failed(&error))
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
            Err(because("memory")(&error))
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
    host.objects.create(&host.supply(cpu::index()), spec).map_err(|error| because("memory")(&error))
}

/// What the devices of a machine that bounces reach is shared before anything is in it.
fn share_window(config: &config::Vm<FileIndex>, ram: ObjectHandle) -> Result<(), ConvertError> {
    let Some(window) = window(config) else { return Ok(()) };
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let object = host.objects.get(&pin, ram).expect("it was made for this");
    let (first, count) = ((window.region.start.get() - virt::RAM_BASE) / PAGE_SIZE, window.region.size / PAGE_SIZE);
    object.convert(&host.supply(cpu::index()), first, count, true).map(drop)
}

/// What of the memory of a machine like `config` its devices reach, if not all.
fn window(config: &config::Vm<FileIndex>) -> Option<Window> {
    (config.private_io == PrivateIo::Bounce).then(|| Window::of(ram(config)))
}

fn ram(config: &config::Vm<FileIndex>) -> Ram {
    Ram { base: Gpa::new(virt::RAM_BASE), size: config.memory }
}

/// Gives memory back that no machine has.
pub fn destroy_ram(ram: ObjectHandle) {
    let host = host::get();
    if let Err(error) = host.objects.destroy(&host.supply(cpu::index()), &host.epoch, ram) {
        log::error!("a memory object stays: {error:?}");
    }
}

/// What the guest reads of every identification register.
fn id_registers(physical_bits: u8, tags: bool) -> [u64; ID_REGISTERS] {
    let vm = VmFeatures {
        physical_bits,
        aarch32: features::has(Feature::AARCH32_EL0),
        pointer_auth: features::has(Feature::PAUTH),
        memory_copy: features::has(Feature::MOPS) && features::has(Feature::HCRX),
        tags,
    };
    core::array::from_fn(|index| {
        let (crm, op2) = (index as u8 / 8 + 1, index as u8 % 8);
        idregs::sanitise(SysReg::new(3, 0, 0, crm, op2), identity::register(crm, op2), &vm)
    })
}

/// The files of a guest, looked at but not yet in its memory.
struct Guest<'b> {
    config: &'b config::Vm<FileIndex>,
    /// `None`: firmware, which is not put into memory.
    kernel: Option<kernel::Kernel>,
    file: &'static [u8],
    initrd: &'static [u8],
    flash: Option<u64>,
}

impl<'b> Guest<'b> {
    fn recognise(config: &'b config::Vm<FileIndex>, bundle: &Bundle<'static>) -> Result<Self, BuildError> {
        let data = |index, what: &str| {
            let file = bundle.file(index).map(|file| file.data);
            file.ok_or_else(|| BuildError(alloc::format!("{what}: the bundle has no such file")))
        };
        let file = data(config.kernel, "kernel")?;
        let initrd = config.initrd.map_or(Ok(&[][..]), |index| data(index, "initrd"))?;
        let flash = config.flash.map(|index| data(index, "flash")).transpose()?.map(|image| image.len() as u64);
        let hint = match config.kernel_format {
            KernelFormat::Auto => Some(Hint::Auto),
            KernelFormat::Flat => Some(Hint::Flat),
            KernelFormat::Firmware => None,
        };
        let recognise = |hint| kernel::recognise(file, hint).map_err(|error| because("kernel")(&error));
        Ok(Self { config, kernel: hint.map(recognise).transpose()?, file, initrd, flash })
    }

    /// Where everything goes, for a tree of `size` bytes.
    fn layout(&self, ram: Ram, size: u64) -> Result<Layout, LayoutError> {
        match &self.kernel {
            Some(kernel) => layout::layout(ram, kernel, self.initrd.len() as u64, size),
            None => {
                let code = Region { start: Gpa::new(virt::FIRMWARE_BASE), size: self.file.len() as u64 };
                layout::firmware(ram, code, size)
            }
        }
    }

    /// Puts everything where it belongs, and says where to start.
    fn place(&self, memory: &Memory<'static, Metal, Stage2>) -> Result<Boot, BuildError> {
        let (ram, window) = (ram(self.config), window(self.config));
        let seeds = entropy::seeds();
        let mut machine = fdt::Machine {
            ram,
            vcpus: self.config.vcpus as u8,
            cmdline: &self.config.cmdline,
            initrd: (!self.initrd.is_empty()).then_some(Region { start: ram.base, size: self.initrd.len() as u64 }),
            virtio: u32::MAX,
            window,
            flash: self.flash,
            rng_seed: seeds.map(|(seed, _)| seed),
            kaslr_seed: seeds.map(|(_, seed)| seed),
        };
        let size = fdt::generate(&machine).map_err(|error| because("device tree")(&error))?.len() as u64;
        let layout = self
            .layout(window.map_or(ram, |window| window.below(ram)), size)
            .map_err(|error| because("memory")(&error))?;
        machine.initrd = layout.initrd;
        let tree = fdt::generate(&machine).map_err(|error| because("device tree")(&error))?;
        let mut boot = BootMemory::new(memory);
        if let Some(kernel) = &self.kernel {
            kernel::place(kernel, self.file, &layout, &mut boot)
                .map_err(|error| BuildError(alloc::format!("kernel: {error:?}")))?;
        }
        let put = |boot: &mut BootMemory<'_>, at: Region, bytes: &[u8]| {
            boot.write(at.start, bytes).map_err(|error| BuildError(alloc::format!("memory: {error:?}")))
        };
        if let Some(initrd) = layout.initrd {
            put(&mut boot, initrd, self.initrd)?;
        }
        put(&mut boot, layout.dtb, &tree)?;
        if let Some(copy) = layout.dtb_at_base {
            put(&mut boot, copy, &tree)?;
        }
        Ok(Boot { entry: layout.entry.get(), argument: layout.dtb.start.get() })
    }
}
