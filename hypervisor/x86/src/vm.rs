//! A virtual machine: its memory, its vCPU, how it is made and how it ends.
//!
//! Purpose: [`Vm::build`] turns a configuration and its files into a machine that is ready to run, or says which field breaks which
//! rule. `entresol_loader::x86` decides what lies where and what is in the registers; here it is only put there.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use entresol_addr::{Gpa, PAGE_SIZE, PageSize, Pfn};
use entresol_arch_x86::either::{Either, Maker};
use entresol_arch_x86::emulate::Unsupported;
use entresol_arch_x86::emulate::memo::Memo;
use entresol_arch_x86::exit::Exit;
use entresol_arch_x86::paging::Regime;
use entresol_arch_x86::shadow::Shadow;
use entresol_backing::{ObjectHandle, Policy, Spec};
use entresol_loader::x86::map::LOW_END;
use entresol_loader::x86::start::{self, Start};
use entresol_loader::x86::{self, Boot};
use entresol_loader::{Memory as LoaderMemory, Region};
use entresol_metal_x86::switch::{self, FpState, Guest, Segment};
use entresol_metal_x86::{Metal, cpu, features, timer};
use entresol_mmu::{CopyError, Kept, LogError, MmioCache, MmioCounts, Options, ReadOnlyIvac, Vm as Memory};
use entresol_slot::{Hint, ObjectId, SlotError, SlotFlags, SlotRequest};
use entresol_wire::bundle::{Bundle, FileIndex};
use entresol_wire::config::{self, LargestEntry, Limits, Paging};

use crate::devices::{Devices, VCPU};
use crate::exit::clock::KvmClock;
use crate::exit::shadow;
use crate::host;

/// The core's part of a virtual machine.
pub type Made = Memory<'static, Metal, Either>;

/// Slots of a virtual machine.
const SLOTS: u32 = 64;
/// Slots of its memory: below 4 GiB, and the rest.
const LOW: u32 = 0;
const HIGH: u32 = 1;
/// Bits of guest physical address.
const GPA_BITS: u8 = 40;

/// Why a virtual machine was not made: which, and the rule.
pub struct BuildError(String);

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a virtual machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It turned itself off.
    PowerOff,
    /// It asked for a reset, and nobody starts it again.
    Reset,
    /// It cannot go on.
    Crash(Crash),
}

/// Why a virtual machine cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// No frame is free for its memory.
    OutOfMemory,
    /// An access that the core does not complete, at this address.
    Access(Gpa),
    /// An access to what is no memory, by an instruction that is not carried out.
    Instruction { gpa: Gpa, unsupported: Unsupported },
    /// The root of its shadow tables lies above 4 GiB, and it is not in long mode.
    RootTooHigh(Pfn),
    /// The nested tables hold a word that nobody wrote.
    Malformed(Gpa),
    /// It has waited for an interrupt that nobody sends.
    Halted,
    /// A triple fault.
    TripleFault,
    /// The processor refused its state.
    InvalidState,
    /// It came back for a reason that nobody asked for.
    Unexpected(Exit),
}

/// A virtual machine with its vCPU.
pub struct Vm {
    pub name: String,
    /// Whether it may drive the hypervisor, for measurements and tests.
    pub services: bool,
    pub memory: Made,
    pub vcpu: Vcpu,
    pub devices: Devices,
    pub clock: KvmClock,
    /// The slot of its lower memory.
    low: SlotRequest,
    /// Where a dirty log is fetched to, if there can be one.
    log: Vec<u64>,
}

/// Its vCPU.
pub struct Vcpu {
    /// Registers, and what the processor works on.
    pub guest: Box<Guest>,
    pub fp: FpState,
    /// The slot that was found last.
    pub hint: Hint,
    /// What was found to be no memory.
    pub mmio: MmioCache,
    /// The instructions that touched it.
    pub code: Memo<Kept>,
    /// What its control registers say of its tables, if it runs on shadow tables and has run.
    pub regime: Option<Regime>,
}

impl Vm {
    /// Makes the virtual machine `config` says, with files of `bundle`.
    ///
    /// # Errors
    ///
    /// [`BuildError`].
    pub fn build(config: &config::Vm<FileIndex>, bundle: &Bundle<'static>) -> Result<Self, BuildError> {
        let failed = |what: &dyn fmt::Display| BuildError(alloc::format!("vm {}: {what}", config.name));
        if config.policies.paging == Paging::Shadow && switch::is_intel() {
            return Err(failed(&"policies.paging = \"shadow\": runs by SVM, and this is an Intel processor"));
        }
        if let Some(field) = unsupported(config) {
            return Err(failed(&format_args!("{field}: x86-64 does not have it")));
        }
        let file = |index| bundle.file(index).map(|file| file.data).ok_or("a file is not in the bundle");
        let kernel = file(config.kernel).map_err(|error| failed(&error))?;
        let initrd = config.initrd.map_or(Ok(&[][..]), file).map_err(|error| failed(&error))?;
        let machine = x86::Machine { memory: config.memory, vcpus: 1, virtio: 0, cmdline: &config.cmdline };
        let boot = x86::boot(&machine, kernel, initrd).map_err(|error| failed(&error))?;
        let devices = Devices::new().map_err(|error| failed(&error))?;
        let log = log_room(config).map_err(|error| failed(&error))?;
        let (memory, low) = create_memory(config, &boot).map_err(|error| failed(&error))?;
        let mut writer = BootMemory { memory: &memory, hint: Hint::new() };
        if let Err(error) = boot.place(&mut writer) {
            memory.destroy(cpu::index());
            return Err(failed(&format_args!("memory: {error:?}")));
        }
        let guest = guest(&boot.start, memory.is_shaded());
        let clock = KvmClock::new(timer::now());
        let vcpu = Vcpu {
            guest,
            fp: FpState::new(),
            hint: Hint::new(),
            mmio: MmioCache::new(),
            code: Memo::new(),
            regime: None,
        };
        Ok(Self {
            name: config.name.clone(),
            services: config.policies.services,
            memory,
            vcpu,
            devices,
            clock,
            low,
            log,
        })
    }

    /// Starts (`true`) or ends the dirty log of its lower memory.
    ///
    /// # Errors
    ///
    /// The core's; nothing has changed.
    pub fn set_log(&mut self, on: bool) -> Result<(), SlotError> {
        let flags = if on { SlotFlags::LOG_DIRTY.bits() } else { 0 };
        let request = SlotRequest { flags, ..self.low };
        self.memory.set_slot(cpu::index(), &request)
    }

    /// Fetches and clears it; returns how many pages it named.
    ///
    /// # Errors
    ///
    /// The core's: above all that there is no log.
    pub fn take_log(&mut self) -> Result<u64, LogError> {
        self.memory.get_dirty_log(cpu::index(), LOW as u16, &mut self.log)
    }

    /// CPU `cpu` is about to run it: tables and registers are in the hardware until [`Self::put`].
    ///
    /// # Errors
    ///
    /// The processor cannot run it.
    pub fn load(&mut self, cpu: usize) -> Result<(), Crash> {
        // Its translations are told apart by who ran last on the CPU, not by the number.
        let _number = self.memory.load(cpu);
        self.vcpu.guest.set_root(self.memory.table().root().start());
        self.vcpu.guest.load(cpu);
        shadow::load(cpu, self)?;
        self.vcpu.fp.load();
        Ok(())
    }

    /// CPU `cpu` runs it no more.
    pub fn put(&mut self, cpu: usize) {
        self.vcpu.fp.save();
        self.vcpu.guest.put();
        self.memory.put(cpu);
    }

    /// How its accesses to what is no memory were answered.
    pub fn mmio_counts(&self) -> MmioCounts {
        self.memory.shadow_mmio_counts(VCPU).unwrap_or(self.vcpu.mmio.counts())
    }

    /// Says how it ended, and what its accesses to devices cost.
    pub fn report(&self, end: End) {
        let counts = self.mmio_counts();
        log::info!(
            "vm {}: mmio: {} by the cache, {} by a walk, {} the whole way again, {} entries made",
            self.name,
            counts.cached,
            counts.walked,
            counts.refreshed,
            counts.made
        );
        match end {
            End::PowerOff => log::info!("vm {}: powered off", self.name),
            End::Reset => log::info!("vm {}: asked for a reset", self.name),
            End::Crash(crash) => log::error!("vm {}: crashed: {crash:x?}", self.name),
        }
    }
}

/// The first field that asks for what is not there yet.
fn unsupported(config: &config::Vm<FileIndex>) -> Option<&'static str> {
    [
        (config.vcpus != 1, "vcpus (more than one)"),
        (config.limits != Limits::default(), "limits"),
        (!config.disks.is_empty(), "disks"),
        (!config.roms.is_empty(), "roms"),
        (config.flash.is_some(), "flash"),
        (!config.coalesced_mmio.is_empty(), "coalesced_mmio"),
        (!config.doorbells.is_empty(), "doorbells"),
        (!config.pass_through.is_empty(), "pass_through"),
        (config.balloon, "balloon"),
        (config.mte, "mte"),
        (!config.autostart, "autostart = false"),
        (config.merge, "merge"),
    ]
    .into_iter()
    .find_map(|(asked, field)| asked.then_some(field))
}

/// Room for the log of all of its lower memory, for guests that may ask for one: nothing is allocated while they run.
fn log_room(config: &config::Vm<FileIndex>) -> Result<Vec<u64>, &'static str> {
    let mut room = Vec::new();
    if config.policies.services {
        let words = (config.memory.min(LOW_END) / PAGE_SIZE).div_ceil(u64::from(u64::BITS)) as usize;
        room.try_reserve_exact(words).map_err(|_| "memory: the heap has no room for its dirty log")?;
        room.resize(words, 0);
    }
    Ok(room)
}

/// Its memory, with its slots; returns that of the lower part.
fn create_memory(config: &config::Vm<FileIndex>, boot: &Boot<'_>) -> Result<(Made, SlotRequest), String> {
    let (host, cpu) = (host::get(), cpu::index());
    let (policy, largest) = match config.policies.page_size {
        LargestEntry::Block2M => (Policy::Blocks, PageSize::Size2M),
        LargestEntry::Page4K => (Policy::Pages, PageSize::Size4K),
    };
    let physical_bits = features::get().physical_bits;
    let maker = if features::get().vmx.is_some() { Maker::Intel } else { Maker::Amd };
    let options = Options {
        ipa_bits: GPA_BITS.min(physical_bits),
        slots: SLOTS,
        largest,
        read_only_ivac: ReadOnlyIvac::Clean,
        tags: false,
    };
    let mut memory = Memory::new(host, cpu, Either::new(maker, physical_bits, None), options)
        .map_err(|error| alloc::format!("memory: {error:?}"))?;
    if config.policies.paging == Paging::Shadow
        && let Err(error) =
            memory.shade(cpu, Box::new(Shadow::new(physical_bits, None)), shadow_tables(config.memory), 1)
    {
        memory.destroy(cpu);
        return Err(alloc::format!("policies.paging: {error:?}"));
    }
    match fill(&memory, config, policy, boot) {
        Ok(low) => Ok((memory, low)),
        Err(error) => {
            memory.destroy(cpu);
            Err(error)
        }
    }
}

/// How many shadow tables a guest with so many bytes of memory has: for all of it twice, in 4 KiB pages, and those of its programs.
fn shadow_tables(bytes: u64) -> usize {
    const MOST: u64 = 1536;
    (2 * bytes.div_ceil(PageSize::Size2M.bytes()) + 256).min(MOST) as usize
}

fn fill(memory: &Made, config: &config::Vm<FileIndex>, policy: Policy, boot: &Boot<'_>) -> Result<SlotRequest, String> {
    let (host, cpu) = (host::get(), cpu::index());
    let frames = config.memory / PAGE_SIZE;
    let spec = if config.private {
        Spec::Private { frames, policy }
    } else {
        Spec::Anonymous { frames, policy, tagged: false }
    };
    let supply = host.supply(cpu);
    let ram: ObjectHandle = host.objects.create(&supply, spec).map_err(|error| alloc::format!("memory: {error}"))?;
    let slot = |id, region: Region, offset| {
        let object = ObjectId::new(ram.raw());
        let request = SlotRequest { id, base: region.start, size: region.size, object, offset, flags: 0 };
        memory.set_slot(cpu, &request).map(|()| request).map_err(|error| alloc::format!("memory: {error}"))
    };
    let low = slot(LOW, boot.memory.low, 0)?;
    if let Some(high) = boot.memory.high {
        slot(HIGH, high, low.size)?;
    }
    Ok(low)
}

/// The vCPU's processor state, as the loader wants it.
fn guest(boot: &Start, shaded: bool) -> Box<Guest> {
    let mut guest = Box::new(Guest::new());
    let segment = |from: &start::Segment| Segment {
        selector: from.selector,
        attributes: from.attributes,
        limit: from.limit,
        base: from.base,
    };
    guest.start(&switch::Start {
        rip: boot.rip,
        rflags: boot.rflags,
        cr0: boot.cr0,
        cr3: boot.cr3,
        cr4: boot.cr4,
        efer: boot.efer,
        code: segment(&boot.code),
        data: segment(&boot.data),
        task: segment(&boot.task),
        gdt_base: boot.gdt.base,
        gdt_limit: boot.gdt.limit,
    });
    (guest.registers.rbx, guest.registers.rsi) = (boot.rbx, boot.rsi);
    if shaded {
        guest.shade();
    }
    guest
}

/// Guest memory for the loader, before the virtual machine runs.
struct BootMemory<'m> {
    memory: &'m Made,
    hint: Hint,
}

impl LoaderMemory for BootMemory<'_> {
    type Error = CopyError;

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), CopyError> {
        let pin = host::get().epoch.pin(cpu::index());
        self.memory.write(&pin, &self.hint, gpa, bytes)
    }

    /// Fresh memory reads as zero already.
    fn zero(&mut self, _gpa: Gpa, _size: u64) -> Result<(), CopyError> {
        Ok(())
    }
}
