//! GICv3 (Arm IHI 0069): distributor, redistributors, the CPU interface's system registers; everything in group 1.

use crate::entry::cpu;
use crate::machine::{GICD, GICR};
use crate::memory::{load32, store32};
use crate::{sysreg_read, sysreg_write};

const GICD_CTLR: u64 = GICD;
const GICD_TYPER: u64 = GICD + 4;
/// GICD_CTLR: affinity routing, group 1 of the one security state.
const ARE_GROUP1: u32 = 1 << 4 | 1 << 1;
/// GICD_CTLR: a write is still on its way.
const RWP: u32 = 1 << 31;
const IGROUPR: u64 = 0x80;
const ISENABLER: u64 = 0x100;
const ICENABLER: u64 = 0x180;
const ISPENDR: u64 = 0x200;
const ICPENDR: u64 = 0x280;
const ISACTIVER: u64 = 0x300;
const IPRIORITYR: u64 = 0x400;
const ICFGR: u64 = 0xc00;
const IROUTER: u64 = 0x6000;
const GICR_WAKER: u64 = 0x14;
/// GICR_WAKER: ProcessorSleep, ChildrenAsleep.
const PROCESSOR_SLEEP: u32 = 1 << 1;
const CHILDREN_ASLEEP: u32 = 1 << 2;
/// Where a redistributor's SGI frame is.
const SGI_FRAME: u64 = 0x1_0000;
/// Bytes of a redistributor's two frames.
const REDISTRIBUTOR: u64 = 0x2_0000;

/// The number that means: nothing is pending.
pub const SPURIOUS: u32 = 1023;

/// This CPU's redistributor.
pub fn redistributor() -> u64 {
    GICR + REDISTRIBUTOR * cpu() as u64
}

/// Turns the distributor on: once, by one CPU.
pub fn init_distributor() {
    store32(GICD_CTLR, ARE_GROUP1);
    while load32(GICD_CTLR) & RWP != 0 {
        core::hint::spin_loop();
    }
}

/// Wakes this CPU's redistributor and turns its interface on with everything let through.
pub fn init_cpu() {
    let frame = redistributor();
    store32(frame + GICR_WAKER, load32(frame + GICR_WAKER) & !PROCESSOR_SLEEP);
    while load32(frame + GICR_WAKER) & CHILDREN_ASLEEP != 0 {
        core::hint::spin_loop();
    }
    store32(frame + SGI_FRAME + IGROUPR, u32::MAX);
    sysreg_write!("S3_0_C12_C12_5", 7); // ICC_SRE_EL1
    sysreg_write!("S3_0_C4_C6_0", 0xff); // ICC_PMR_EL1
    sysreg_write!("S3_0_C12_C12_4", 0); // ICC_CTLR_EL1: EOI also deactivates
    sysreg_write!("S3_0_C12_C12_7", 1); // ICC_IGRPEN1_EL1
}

/// The frame and the number's register for an interrupt.
fn frame(intid: u32) -> u64 {
    if intid < 32 { redistributor() + SGI_FRAME } else { GICD }
}

fn bit(intid: u32, register: u64) -> (u64, u32) {
    (frame(intid) + register + 4 * u64::from(intid / 32), 1 << (intid % 32))
}

fn set(intid: u32, register: u64) {
    let (address, bit) = bit(intid, register);
    store32(address, bit);
}

/// Lets an interrupt through, with a priority; an SPI goes to this CPU.
pub fn enable(intid: u32, priority: u8) {
    set_priority(intid, priority);
    if intid >= 32 {
        let (address, bit) = bit(intid, IGROUPR);
        store32(address, load32(address) | bit);
        crate::memory::store64(GICD + IROUTER + 8 * u64::from(intid), cpu() as u64);
    }
    set(intid, ISENABLER);
}

/// Holds an interrupt back.
pub fn disable(intid: u32) {
    set(intid, ICENABLER);
}

/// Sets an interrupt's priority; lower is more urgent.
pub fn set_priority(intid: u32, priority: u8) {
    crate::memory::store8(frame(intid) + IPRIORITYR + u64::from(intid), priority);
}

/// Makes an interrupt pending.
pub fn set_pending(intid: u32) {
    set(intid, ISPENDR);
}

/// Makes an interrupt not pending.
pub fn clear_pending(intid: u32) {
    set(intid, ICPENDR);
}

/// Whether it is pending.
pub fn is_pending(intid: u32) -> bool {
    let (address, bit) = bit(intid, ISPENDR);
    load32(address) & bit != 0
}

/// Whether it is active.
pub fn is_active(intid: u32) -> bool {
    let (address, bit) = bit(intid, ISACTIVER);
    load32(address) & bit != 0
}

/// Makes an interrupt edge-triggered, or level.
pub fn set_edge(intid: u32, edge: bool) {
    let address = frame(intid) + ICFGR + 4 * u64::from(intid / 16);
    let bit = 2 << (2 * (intid % 16));
    let old = load32(address);
    store32(address, if edge { old | bit } else { old & !bit });
}

/// Takes the most urgent interrupt (ICC_IAR1_EL1); [`SPURIOUS`] if there is none.
pub fn acknowledge() -> u32 {
    let intid = sysreg_read!("S3_0_C12_C12_0") as u32 & 0xff_ffff;
    crate::memory::barrier();
    intid
}

/// Ends an interrupt (ICC_EOIR1_EL1).
pub fn end(intid: u32) {
    sysreg_write!("S3_0_C12_C12_1", intid.into());
}

/// Sends SGI `intid` to the CPUs in `targets`, a bit each (ICC_SGI1R_EL1).
pub fn send(intid: u32, targets: u16) {
    crate::memory::barrier();
    sysreg_write!("S3_0_C12_C11_5", u64::from(intid) << 24 | u64::from(targets));
}

/// Sends SGI `intid` to every CPU but this one.
pub fn send_to_others(intid: u32) {
    crate::memory::barrier();
    sysreg_write!("S3_0_C12_C11_5", u64::from(intid) << 24 | 1 << 40);
}

/// Only interrupts more urgent than `priority` are let through.
pub fn mask_below(priority: u8) {
    sysreg_write!("S3_0_C4_C6_0", priority.into());
}

/// How many interrupt numbers the distributor has.
pub fn lines() -> u32 {
    32 * ((load32(GICD_TYPER) & 0x1f) + 1)
}
