//! What a virtual machine has beside memory, vCPUs and virtio: its interrupt controller, its serial port, its clock, the page with its
//! generation, the records of stolen time; what its vCPUs are told of the machine, and what the hardware is told of them.
//!
//! Addresses are those of QEMU's `virt` machine ([`entresol_loader::virt`]).

use alloc::boxed::Box;
use alloc::sync::Arc;

use entresol_addr::PAGE_SIZE;
use entresol_arch_arm64::idregs::{self, VmFeatures};
use entresol_arch_arm64::stage2;
use entresol_arch_arm64::sysreg::SysReg;
use entresol_devices::bus::Device;
use entresol_devices::gic::{self, Config as GicConfig, GicError, REDISTRIBUTOR_SIZE, Vgic};
use entresol_devices::kick::Flag;
use entresol_devices::pl011::{self, Pl011};
use entresol_devices::pl031::{self, Clock, Pl031};
use entresol_devices::vmgenid::VmGenId;
use entresol_loader::virt;
use entresol_metal_arm64::features::{self, Feature};
use entresol_metal_arm64::traps::{self, Hcr};
use entresol_metal_arm64::{identity, live, timer};
use entresol_sync::atomic::{AtomicUsize, Ordering};
use entresol_wire::bundle::FileIndex;
use entresol_wire::config::{self, CacheMaintenance};
use serde::{Deserialize, Serialize};

use super::exit::interrupts;
use super::stolen::Records;
use super::{Format, Line, Memory, State, map};
use crate::clock;
use crate::console::Terminal;
use crate::entropy;
use crate::sched::VcpuRef;
use crate::vm::{BuildError, Link, OutOfHeap};

/// SPIs of a guest's interrupt controller, as QEMU's `virt` has.
const SPIS: usize = 256;
/// First SPI's INTID.
const FIRST_SPI: u32 = 32;
/// ID registers a guest may read: op1 0, CRn 0, CRm 1–7, op2 0–7.
const ID_REGISTERS: usize = 56;

type SerialPort = Pl011<Arc<Terminal>, Line>;

/// See the module.
pub struct Board {
    /// Its interrupt controller.
    pub gic: Arc<Vgic>,
    link: Link,
    serial: SerialPort,
    clock: Pl031<WallClock, Line>,
    generation: VmGenId<Line>,
    /// Dropped after the memory that shows them. `None` in a copy whose memory is not made yet.
    records: Option<Records>,
    id_registers: [u64; ID_REGISTERS],
    vtcr: u64,
    hcr: Hcr,
    /// The vCPU that ran last on each CPU, plus one: the ASIDs of another mean something else.
    last: [AtomicUsize; entresol_sync::epoch::MAX_CPUS],
}

/// The same outside the machine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    gic: gic::Saved,
    serial: pl011::Saved,
    clock: pl031::Saved,
}

impl From<GicError> for OutOfHeap {
    fn from(_: GicError) -> Self {
        Self
    }
}

const fn nobody() -> [AtomicUsize; entresol_sync::epoch::MAX_CPUS] {
    [const { AtomicUsize::new(0) }; entresol_sync::epoch::MAX_CPUS]
}

impl Board {
    /// That the machine can run what `config` asks for.
    ///
    /// # Errors
    ///
    /// The field, and the rule.
    pub fn check(config: &config::Vm<FileIndex>) -> Result<(), BuildError> {
        if config.mte && !features::has(Feature::MTE) {
            return Err(BuildError::new("mte = true: the machine's CPUs must have tag storage (FEAT_MTE2)"));
        }
        Ok(())
    }

    /// Gives `memory`, which no vCPU runs on yet, what else of tables its guest needs: nothing.
    ///
    /// # Errors
    ///
    /// None.
    pub fn shade(_memory: &mut Memory, _config: &config::Vm<FileIndex>) -> Result<(), OutOfHeap> {
        Ok(())
    }

    /// The format of its tables.
    pub fn format(_config: &config::Vm<FileIndex>) -> Format {
        Format { fwb: features::has(Feature::FORCED_WRITE_BACK) }
    }

    /// Bits of physical address that the machine has.
    pub fn physical_bits() -> u8 {
        features::physical_bits()
    }

    /// That of the virtual machine at the end of `link`, which is as `config` says and has `memory`, with `terminal`; as it was saved, if
    /// it was.
    ///
    /// # Errors
    ///
    /// [`BuildError`].
    pub fn new(
        link: &Link,
        terminal: &Arc<Terminal>,
        config: &config::Vm<FileIndex>,
        memory: &Memory,
        saved: Option<Saved>,
    ) -> Result<Box<Self>, BuildError> {
        let physical_bits = features::physical_bits();
        let vtcr = stage2::vtcr(memory.table().geometry(), physical_bits, features::has(Feature::VMID_16));
        let vtcr = vtcr.map_err(|error| BuildError::because("memory", &format_args!("{error:?}")))?;
        let wanted = GicConfig { vcpus: config.vcpus as usize, spis: SPIS };
        let (gic, rest) = match saved {
            None => (Vgic::new(wanted).map_err(|error| BuildError::because("interrupts", &error))?, None),
            Some(Saved { gic, serial, clock }) => {
                (gic.load(wanted).map_err(|error| BuildError::saved(&error))?, Some((serial, clock)))
            }
        };
        let gic = Arc::new(gic);
        let wires = Wires { link, gic: &gic };
        let serial = Pl011::new(terminal.clone(), wires.line(virt::UART_SPI)?);
        let clock = Pl031::new(WallClock, wires.line(virt::RTC_SPI)?);
        let generation = VmGenId::new(entropy::generation(), wires.line(virt::VMGENID_SPI)?);
        if let Some((serial_was, clock_was)) = rest {
            serial.load(serial_was).map_err(|error| BuildError::saved(&error))?;
            clock.load(&clock_was);
        }
        let records = Records::new(config).map_err(|error| BuildError::because("stolen time", &error))?;
        Ok(Box::new(Self {
            link: link.clone(),
            serial,
            clock,
            generation,
            records: Some(records),
            id_registers: id_registers(memory.ipa_bits(), config.mte),
            vtcr,
            hcr: hcr(config),
            last: nobody(),
            gic,
        }))
    }

    /// Shows in `memory` what of it is memory.
    ///
    /// # Errors
    ///
    /// [`BuildError`].
    pub fn show(&self, memory: &Memory) -> Result<(), BuildError> {
        let shown = self.records.as_ref().map_or(Ok(()), |records| records.show(memory));
        shown.map_err(|error| BuildError::because("stolen time", &error))
    }

    /// The same state for the copy of the virtual machine at the end of `link`, on the copy's `terminal`. No vCPU is on a CPU.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn fork(&self, link: &Link, terminal: &Arc<Terminal>) -> Result<Box<Self>, OutOfHeap> {
        let gic = Arc::new(self.gic.fork()?);
        let wires = Wires { link, gic: &gic };
        Ok(Box::new(Self {
            link: link.clone(),
            serial: self.serial.fork(terminal.clone(), wires.line(virt::UART_SPI)?),
            clock: self.clock.fork(WallClock, wires.line(virt::RTC_SPI)?),
            generation: VmGenId::new(self.generation.id(), wires.line(virt::VMGENID_SPI)?),
            records: None,
            id_registers: self.id_registers,
            vtcr: self.vtcr,
            hcr: self.hcr,
            last: nobody(),
            gic,
        }))
    }

    /// A copy's, when its memory is there.
    pub fn take_over(&mut self, memory: &Memory) {
        self.records = Some(Records::of_copy(memory));
    }

    /// Its state outside the machine; no vCPU is on a CPU.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn save(&self) -> Result<Saved, OutOfHeap> {
        Ok(Saved { gic: self.gic.save()?, serial: self.serial.save(), clock: self.clock.save() })
    }

    /// Tells the guest that it is another than before: a copy.
    pub fn renew_generation(&self) {
        self.generation.renew(entropy::generation());
    }

    /// The line of virtio transport `slot`.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn transport_line(&self, slot: usize) -> Result<Line, OutOfHeap> {
        Wires { link: &self.link, gic: &self.gic }.line(virt::VIRTIO_SPI + slot as u32)
    }

    /// Gives the guest's serial port input; returns how many of the first bytes it took.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        self.serial.offer(bytes)
    }

    /// Whether the guest listens at its serial port.
    pub fn is_heard(&self) -> bool {
        self.serial.is_heard()
    }

    /// The count at which its clock's alarm must be looked at.
    pub fn alarm(&self) -> Option<u64> {
        self.clock.next_alarm().map(count_at)
    }

    /// Time passes: to be called when a turn of its first vCPU begins, and every slice of it.
    pub fn tick(&self) {
        self.serial.tick();
        if self.clock.next_alarm().is_some() {
            self.clock.check(clock::unix_seconds());
        }
    }

    /// The device at `gpa`, and the offset in it.
    #[inline]
    pub fn device_at(&self, gpa: u64) -> Option<(&dyn Device, u64)> {
        let inside = |base: u64, size: u64| gpa.checked_sub(base).filter(|offset| *offset < size);
        if let Some(offset) = inside(virt::UART_BASE, virt::UART_SIZE) {
            return Some((&self.serial, offset));
        }
        if let Some(offset) = inside(virt::VMGENID_BASE, virt::VMGENID_SIZE) {
            return Some((&self.generation, offset));
        }
        inside(virt::RTC_BASE, virt::RTC_SIZE).map(|offset| (&self.clock as &dyn Device, offset))
    }

    /// Whether the interrupt controller answers at `gpa`.
    pub fn is_controller(&self, gpa: u64) -> bool {
        gic_frame(gpa).is_some()
    }

    /// The loaded vCPU's load of `size` bytes at `gpa`, if the interrupt controller is there.
    #[inline]
    pub fn read(&self, vcpu: &VcpuRef, state: &mut State, gpa: u64, size: u8) -> Option<u64> {
        let (frame, offset) = gic_frame(gpa)?;
        interrupts::sync(vcpu, state);
        let (value, kick) = match frame {
            None => self.gic.dist_read(offset, size),
            Some(frame) => self.gic.redist_read(frame, offset, size),
        };
        interrupts::kick(vcpu, kick);
        Some(value)
    }

    /// Its store of the low `size` bytes of `value`; whether the controller is there.
    #[inline]
    pub fn write(&self, vcpu: &VcpuRef, state: &mut State, gpa: u64, size: u8, value: u64) -> bool {
        let Some((frame, offset)) = gic_frame(gpa) else { return false };
        interrupts::sync(vcpu, state);
        let kick = match frame {
            None => self.gic.dist_write(offset, size, value),
            Some(frame) => self.gic.redist_write(frame, offset, size, value),
        };
        interrupts::kick(vcpu, kick);
        true
    }

    /// Up while vCPU `index` must settle its interrupts before it enters its guest.
    #[inline]
    pub fn flag(&self, index: usize) -> Flag<'_> {
        self.gic.sync_flag(index)
    }

    /// Whether an interrupt waits that ends the wait of vCPU `index`, which is on no CPU.
    pub fn wakes(&self, index: usize, state: &State) -> bool {
        self.gic.deliverable(index, &state.gic)
    }

    /// The guest's view of an identification register.
    pub fn id_register(&self, reg: SysReg) -> u64 {
        self.id_registers.get(id_index(reg)).copied().unwrap_or(0)
    }

    /// CPU `cpu` is about to run vCPU `index`, which sees `memory`.
    pub fn load(&self, memory: &Memory, cpu: usize, index: usize) {
        let vmid = memory.load(cpu);
        let vttbr = stage2::vttbr(memory.table().root().start(), vmid);
        // SAFETY: the table maps this virtual machine's slots only, and lives until no CPU has it loaded.
        unsafe { traps::set_stage2(self.vtcr, vttbr) };
        if self.last[cpu].swap(index + 1, Ordering::Relaxed) != index + 1 {
            live::flush_stage1();
        }
    }

    /// Whether the loaded vCPU's writes of its translation registers trap.
    pub fn watch_translation(&self, watched: bool) {
        traps::set_hcr(if watched { self.hcr | Hcr::TVM } else { self.hcr });
    }
}

/// The clock as guests get it.
struct WallClock;

impl Clock for WallClock {
    fn unix_seconds(&self) -> u64 {
        clock::unix_seconds()
    }
}

/// The count of the physical counter at which `unix_seconds` begins.
fn count_at(unix_seconds: u64) -> u64 {
    unix_seconds.saturating_sub(clock::unix_at_zero()).saturating_mul(timer::frequency())
}

/// What devices are wired with.
struct Wires<'a> {
    link: &'a Link,
    gic: &'a Arc<Vgic>,
}

impl Wires<'_> {
    fn line(&self, spi: u32) -> Result<Line, OutOfHeap> {
        Ok(Line::new(self.link.clone(), self.gic.clone(), self.gic.spi(FIRST_SPI + spi)?))
    }
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

/// Place of an ID register among [`ID_REGISTERS`].
fn id_index(reg: SysReg) -> usize {
    usize::from(reg.crm()).wrapping_sub(1).wrapping_mul(8).wrapping_add(usize::from(reg.op2()))
}

const _: () = {
    let windows = [
        (virt::UART_BASE, virt::UART_SIZE),
        (virt::RTC_BASE, virt::RTC_SIZE),
        (virt::VMGENID_BASE, virt::VMGENID_SIZE),
        (map::VIRTIO_BASE, map::VIRTIO_SIZE * map::VIRTIO_SLOTS as u64),
        (virt::GICD_BASE, virt::GICD_SIZE),
        (virt::GICR_BASE, virt::GICR_SIZE),
    ];
    let mut index = 0;
    while index < windows.len() {
        let (base, size) = windows[index];
        assert!(base.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE), "a device has whole pages");
        index += 1;
    }
};

/// The GIC's frame at `address`: `None` for the distributor, or the number of a redistributor; and the offset in it.
fn gic_frame(address: u64) -> Option<(Option<usize>, u64)> {
    let inside = |base: u64, size: u64| address.checked_sub(base).filter(|offset| *offset < size);
    if let Some(offset) = inside(virt::GICD_BASE, virt::GICD_SIZE) {
        return Some((None, offset));
    }
    let offset = inside(virt::GICR_BASE, virt::GICR_SIZE)?;
    Some((Some((offset / REDISTRIBUTOR_SIZE) as usize), offset % REDISTRIBUTOR_SIZE))
}
