//! The machine's own GICv3.
//!
//! Purpose: interrupts of the machine all come to EL2. Distributor and redistributors are driven by `arm-gic`; the CPU
//! interface is driven here, with priority drop and deactivation apart (EOImode 1), so that an interrupt that belongs to
//! a guest (its virtual timer's) can stay active, and thereby silent, until that guest is done with it.
//!
//! Protocol: [`init`] on the boot CPU, then [`init_cpu`] on every CPU, the boot CPU included. On an `Interrupt` exit and
//! after `wfi`: [`ack`] until `None`; for each, [`drop_priority`], handle, [`deactivate`] (now or later).
//!
//! All interrupts have one priority, so none preempts; shared ones go to the boot CPU.
//!
//! Sources: IHI 0069H chapters 4, 11, 12; Arm BSA 1.0 (DEN 0094) 3.7 for the numbers of the private interrupts.
//!
//! Lock order: the driver's lock is taken alone.
//!
//! Known holes: no LPIs, so no message-signalled interrupts; extended PPIs and SPIs are not used.

use core::fmt;
use core::ptr::NonNull;

use arm_gic::gicv3::registers::{Gicd, GicrSgi};
use arm_gic::gicv3::{GicError, GicV3};
use arm_gic::{IntId, Trigger};
use entresol_sync::{Mutex, Once};
use safe_mmio::UniqueMmioPointer;

use crate::boot::{BootInfo, MAX_CPUS};
use crate::cpu;

/// Interrupt of a virtual CPU interface that wants attention.
pub const MAINTENANCE: u32 = 25;
/// EL2's physical timer (`crate::timer`).
pub const HYPERVISOR_TIMER: u32 = 26;
/// The virtual timer of the guest that is loaded.
pub const VIRTUAL_TIMER: u32 = 27;
/// First SPI.
const FIRST_SPI: u32 = 32;
/// First special INTID; from here on nothing was acknowledged (1020–1023).
const FIRST_SPECIAL: u64 = 1020;

/// ICC_CTLR_EL1.EOImode.
const EOI_MODE: u64 = 1 << 1;
/// Bytes of a redistributor: RD_base and SGI_base, 64 KiB each.
const REDISTRIBUTOR: u64 = 128 << 10;

/// The driver, and which redistributor is which CPU's.
struct Driver {
    gic: GicV3<'static>,
    frame_of: [usize; MAX_CPUS],
}

// SAFETY: device registers are reached from any CPU; the driver is only used under its lock.
unsafe impl Send for Driver {}

static DRIVER: Once<Mutex<Driver>> = Once::new();

/// The interrupt controller cannot be driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// `arm-gic` refuses it.
    Driver(GicError),
    /// The device tree puts its registers at address 0.
    NoRegisters,
    /// No redistributor has this CPU's affinity.
    NoRedistributor {
        /// The CPU.
        cpu: usize,
        /// Its affinity.
        mpidr: u64,
    },
    /// The INTID is no SPI or PPI of this machine.
    NoSuchInterrupt(u32),
}

impl From<GicError> for Error {
    fn from(error: GicError) -> Self {
        Self::Driver(error)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Driver(error) => write!(f, "GICv3: {error}"),
            Self::NoRegisters => write!(f, "GICv3: registers at address 0"),
            Self::NoRedistributor { cpu, mpidr } => {
                write!(f, "GICv3: no redistributor for CPU {cpu}, MPIDR {mpidr:#x}")
            }
            Self::NoSuchInterrupt(intid) => write!(f, "GICv3: INTID {intid} is no private or shared interrupt"),
        }
    }
}

/// Sets up the distributor: everything group 1, disabled, one priority; SPIs go to the boot CPU. Boot CPU, once.
///
/// # Errors
///
/// [`Error`]: the controller is not one that we can drive.
pub fn init(info: &BootInfo) -> Result<(), Error> {
    let gicd = NonNull::new(info.gicd.start as *mut Gicd).ok_or(Error::NoRegisters)?;
    let gicr = NonNull::new(info.gicr.start as *mut GicrSgi).ok_or(Error::NoRegisters)?;
    let frames = (info.gicr.size() / REDISTRIBUTOR) as usize;
    // SAFETY: the device tree says that these are the GIC's registers; EL2 maps them as Device memory, and no other
    // code uses them.
    let mut gic = unsafe { GicV3::new(UniqueMmioPointer::new(gicd), gicr, frames)? };
    let frame_of = frames_of_cpus(&mut gic, info)?;
    let distributor = gic.distributor();
    distributor.enable_all_interrupts(false);
    distributor.configure_default_settings();
    for intid in FIRST_SPI..FIRST_SPI + distributor.typer().num_spis() {
        distributor.set_routing(IntId::spi(intid - FIRST_SPI), Some(info.cpus[0]))?;
    }
    DRIVER.call_once(|| Mutex::new(Driver { gic, frame_of }));
    Ok(())
}

/// Finds each CPU's redistributor by GICR_TYPER's affinity; the last one says so.
fn frames_of_cpus(gic: &mut GicV3<'static>, info: &BootInfo) -> Result<[usize; MAX_CPUS], Error> {
    let mut frame_of = [0; MAX_CPUS];
    for (cpu, mpidr) in info.cpus.iter().enumerate() {
        let mut frame = 0;
        frame_of[cpu] = loop {
            let typer = gic.gicr_typer(frame).map_err(|_| Error::NoRedistributor { cpu, mpidr: *mpidr })?;
            if typer.core_mpidr() == *mpidr {
                break frame;
            }
            if typer.last_redistributor() {
                return Err(Error::NoRedistributor { cpu, mpidr: *mpidr });
            }
            frame += 1;
        };
    }
    Ok(frame_of)
}

fn with_driver<R>(f: impl FnOnce(&mut Driver) -> R) -> R {
    f(&mut DRIVER.get().expect("gic::init comes first").lock())
}

/// Sets up this CPU's redistributor and CPU interface. Its SGIs are enabled, its PPIs not.
///
/// # Errors
///
/// [`Error::Driver`]: the redistributor does not wake.
pub fn init_cpu() -> Result<(), Error> {
    with_driver(|driver| {
        let mut redistributor = driver.gic.redistributor(driver.frame_of[cpu::index()])?;
        match redistributor.mark_core_awake() {
            Ok(()) | Err(GicError::AlreadyAwake) => {}
            Err(error) => return Err(error),
        }
        redistributor.configure_default_settings();
        for sgi in 0..IntId::SGI_COUNT {
            redistributor.enable_interrupt(IntId::sgi(sgi), true)?;
        }
        Ok(())
    })?;
    // SAFETY: the physical CPU interface is EL2's alone: HCR_EL2.IMO and FMO send EL1's accesses to the virtual one.
    unsafe {
        msr!("icc_ctlr_el1", EOI_MODE);
        msr!("icc_pmr_el1", 0xffu64);
        msr!("icc_bpr1_el1", 0u64);
        msr!("icc_igrpen1_el1", 1u64);
        instruction!("isb");
    }
    Ok(())
}

fn set_enabled(intid: u32, enabled: bool) -> Result<(), Error> {
    let id = IntId::try_from(intid).map_err(|_| Error::NoSuchInterrupt(intid))?;
    with_driver(|driver| {
        let frame = driver.frame_of[cpu::index()];
        Ok(driver.gic.enable_interrupt(id, Some(frame), enabled)?)
    })
}

/// Lets an interrupt through: an SPI to the boot CPU, a PPI or SGI to this one.
///
/// # Errors
///
/// [`Error::NoSuchInterrupt`].
pub fn enable(intid: u32) -> Result<(), Error> {
    set_enabled(intid, true)
}

/// Holds an interrupt back, for whom [`enable`] lets it through.
///
/// # Errors
///
/// [`Error::NoSuchInterrupt`].
pub fn disable(intid: u32) -> Result<(), Error> {
    set_enabled(intid, false)
}

/// Says whether an SPI or PPI is edge-triggered. Before it is enabled.
///
/// # Errors
///
/// [`Error::NoSuchInterrupt`].
pub fn set_edge(intid: u32, edge: bool) -> Result<(), Error> {
    let id = IntId::try_from(intid).map_err(|_| Error::NoSuchInterrupt(intid))?;
    let trigger = if edge { Trigger::Edge } else { Trigger::Level };
    with_driver(|driver| {
        let frame = driver.frame_of[cpu::index()];
        Ok(driver.gic.set_trigger(id, Some(frame), trigger)?)
    })
}

/// Acknowledges the pending interrupt of highest priority: it becomes active. `None`: there is none.
#[inline]
pub fn ack() -> Option<u32> {
    let intid: u64;
    // SAFETY: reading ICC_IAR1_EL1 activates an interrupt, which the caller will drop and deactivate. The barrier
    // orders the acknowledgement before what the handler reads.
    unsafe {
        core::arch::asm!("mrs {}, icc_iar1_el1", "dsb sy", out(reg) intid, options(nostack, preserves_flags));
    }
    (intid < FIRST_SPECIAL).then_some(intid as u32)
}

/// Lets further interrupts of the same priority be signalled; `intid` itself stays active.
#[inline]
pub fn drop_priority(intid: u32) {
    // SAFETY: ends what `ack` began.
    unsafe {
        msr!("icc_eoir1_el1", u64::from(intid));
        instruction!("isb");
    }
}

/// Makes an interrupt inactive: it can be pending and acknowledged again.
#[inline]
pub fn deactivate(intid: u32) {
    // SAFETY: as above.
    unsafe {
        msr!("icc_dir_el1", u64::from(intid));
        instruction!("isb");
    }
}

/// Sends software-generated interrupt `id` (0–15) to CPU `cpu`, which has called [`init_cpu`]: before that, it is lost.
///
/// # Panics
///
/// If there is no such CPU or SGI.
pub fn send_sgi(cpu: usize, id: u32) {
    assert!(id < 16, "SGI {id}");
    let mpidr = cpu::affinity_of(cpu);
    let (aff0, aff1, aff2, aff3) = (mpidr & 0xff, mpidr >> 8 & 0xff, mpidr >> 16 & 0xff, mpidr >> 32 & 0xff);
    // ICC_SGI1R_EL1 (IHI 0069H 12.2.19): a list of sixteen targets, within the range of Aff0 that RS names.
    let value = 1 << (aff0 & 0xf) | aff1 << 16 | u64::from(id) << 24 | aff2 << 32 | (aff0 >> 4) << 44 | aff3 << 48;
    // SAFETY: the barrier makes what this CPU wrote before visible to the one that is interrupted.
    unsafe {
        instruction!("dsb ishst");
        msr!("icc_sgi1r_el1", value);
        instruction!("isb");
    }
}
