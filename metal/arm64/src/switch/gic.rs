//! The virtual CPU interface of a vCPU: list registers, active priorities, VMCR.
//!
//! Purpose: the guest's ICC_* accesses work on these in hardware; `devices::gic` decides what stands in the list
//! registers, which stay loaded between exits of the same vCPU.
//!
//! Source: IHI 0069H 12.4 (ICH_* registers).

use entresol_sync::atomic::{AtomicU32, Ordering};

use crate::gic;

/// List registers that the architecture allows.
pub const MAX_LIST_REGISTERS: usize = 16;
/// Active priority registers of a group that the architecture allows.
const MAX_ACTIVE: usize = 4;

/// ICH_HCR_EL2.En: the virtual CPU interface is on.
pub const HCR_EN: u64 = 1 << 0;
/// ICH_HCR_EL2.UIE: maintenance interrupt when at most one list register is in use.
pub const HCR_UIE: u64 = 1 << 1;
/// ICH_HCR_EL2.LRENPIE: maintenance interrupt when an EOI found no list register.
pub const HCR_LRENPIE: u64 = 1 << 2;
/// ICH_HCR_EL2.NPIE: maintenance interrupt when no list register is pending.
pub const HCR_NPIE: u64 = 1 << 3;

/// A vCPU's virtual CPU interface while it is not on a CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GicState {
    /// ICH_LR<n>_EL2; those beyond [`list_registers`] are ignored.
    pub lr: [u64; MAX_LIST_REGISTERS],
    /// ICH_VMCR_EL2: priority mask, group enables, EOI mode.
    pub vmcr: u64,
    /// ICH_AP0R<n>_EL2.
    pub ap0: [u64; MAX_ACTIVE],
    /// ICH_AP1R<n>_EL2.
    pub ap1: [u64; MAX_ACTIVE],
    /// ICH_HCR_EL2.
    pub hcr: u64,
}

impl GicState {
    /// After reset: nothing pending, groups off, the interface itself on.
    pub const RESET: Self =
        Self { lr: [0; MAX_LIST_REGISTERS], vmcr: 0, ap0: [0; MAX_ACTIVE], ap1: [0; MAX_ACTIVE], hcr: HCR_EN };

    /// Takes the interface off this CPU and turns it off there.
    pub fn save(&mut self) {
        self.hcr = hcr();
        self.vmcr = vmcr();
        read_list(&mut self.lr);
        active_registers().read(&mut self.ap0, &mut self.ap1);
        set_hcr(0);
    }

    /// Puts the interface onto this CPU.
    pub fn load(&self) {
        write_list(&self.lr);
        active_registers().write(&self.ap0, &self.ap1);
        // SAFETY: the virtual interface is seen by the guest only, and none runs.
        unsafe { msr!("ich_vmcr_el2", self.vmcr) };
        set_hcr(self.hcr);
        // SAFETY: a barrier.
        unsafe { instruction!("isb") };
    }
}

/// ICH_HCR_EL2 of the loaded vCPU.
#[inline]
pub fn hcr() -> u64 {
    mrs!("ich_hcr_el2")
}

/// Sets ICH_HCR_EL2.
#[inline]
pub fn set_hcr(value: u64) {
    // SAFETY: controls the virtual interface, which the guest alone sees, and the maintenance interrupt.
    unsafe { msr!("ich_hcr_el2", value) };
}

/// ICH_VMCR_EL2 of the loaded vCPU.
#[inline]
pub fn vmcr() -> u64 {
    mrs!("ich_vmcr_el2")
}

/// ICH_MISR_EL2: why the maintenance interrupt is asserted.
#[inline]
pub fn maintenance_status() -> u64 {
    mrs!("ich_misr_el2")
}

/// ICH_ELRSR_EL2: list registers that hold nothing, a bit each.
#[inline]
pub fn empty_list_registers() -> u64 {
    mrs!("ich_elrsr_el2")
}

/// Whether ICH_HCR_EL2.TDIR works (ICH_VTR_EL2.TDS).
pub fn traps_deactivation() -> bool {
    mrs!("ich_vtr_el2") >> 19 & 1 != 0
}

/// List registers of this machine, and active priority registers in each group (IHI 0069H 12.4.8, ICH_VTR_EL2).
/// Packed: list registers 7:0, active 15:8; 0 before the first question.
static SHAPE: AtomicU32 = AtomicU32::new(0);

fn shape() -> u32 {
    let known = SHAPE.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    let vtr = mrs!("ich_vtr_el2");
    let lists = (vtr as u32 & 0x1f) + 1;
    let preemption_bits = (vtr >> 26 & 7) as u32 + 1;
    let shape = lists.min(MAX_LIST_REGISTERS as u32) | (1 << preemption_bits.saturating_sub(5).min(2)) << 8;
    SHAPE.store(shape, Ordering::Relaxed);
    shape
}

/// List registers of this machine, 1–16.
#[inline]
pub fn list_registers() -> usize {
    (shape() & 0xff) as usize
}

fn active_registers() -> Active {
    match shape() >> 8 {
        1 => Active::One,
        2 => Active::Two,
        _ => Active::Four,
    }
}

macro_rules! list_registers {
    ($($number:literal $register:literal)*) => {
        /// Reads the machine's list registers into the first entries of `to`.
        pub fn read_list(to: &mut [u64; MAX_LIST_REGISTERS]) {
            let count = list_registers();
            $(
                if $number < count {
                    to[$number] = mrs!($register);
                }
            )*
        }

        /// Writes the machine's list registers from the first entries of `from`.
        pub fn write_list(from: &[u64; MAX_LIST_REGISTERS]) {
            let count = list_registers();
            $(
                if $number < count {
                    // SAFETY: the register exists; what it holds is shown to the guest only. It holds no physical
                    // interrupt (HW) unless the caller put one there.
                    unsafe { msr!($register, from[$number]) };
                }
            )*
        }
    };
}

list_registers!(
    0 "ich_lr0_el2"
    1 "ich_lr1_el2"
    2 "ich_lr2_el2"
    3 "ich_lr3_el2"
    4 "ich_lr4_el2"
    5 "ich_lr5_el2"
    6 "ich_lr6_el2"
    7 "ich_lr7_el2"
    8 "ich_lr8_el2"
    9 "ich_lr9_el2"
    10 "ich_lr10_el2"
    11 "ich_lr11_el2"
    12 "ich_lr12_el2"
    13 "ich_lr13_el2"
    14 "ich_lr14_el2"
    15 "ich_lr15_el2"
);

/// Active priority registers in each group, by preemption bits: 5, 6, 7.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Active {
    One,
    Two,
    Four,
}

impl Active {
    fn read(self, group0: &mut [u64; MAX_ACTIVE], group1: &mut [u64; MAX_ACTIVE]) {
        (group0[0], group1[0]) = (mrs!("ich_ap0r0_el2"), mrs!("ich_ap1r0_el2"));
        if self >= Self::Two {
            (group0[1], group1[1]) = (mrs!("ich_ap0r1_el2"), mrs!("ich_ap1r1_el2"));
        }
        if self == Self::Four {
            (group0[2], group1[2]) = (mrs!("ich_ap0r2_el2"), mrs!("ich_ap1r2_el2"));
            (group0[3], group1[3]) = (mrs!("ich_ap0r3_el2"), mrs!("ich_ap1r3_el2"));
        }
    }

    fn write(self, group0: &[u64; MAX_ACTIVE], group1: &[u64; MAX_ACTIVE]) {
        // SAFETY: the registers exist by ICH_VTR_EL2; what they hold is seen by the guest only.
        unsafe {
            msr!("ich_ap0r0_el2", group0[0]);
            msr!("ich_ap1r0_el2", group1[0]);
            if self >= Self::Two {
                msr!("ich_ap0r1_el2", group0[1]);
                msr!("ich_ap1r1_el2", group1[1]);
            }
            if self == Self::Four {
                msr!("ich_ap0r2_el2", group0[2]);
                msr!("ich_ap1r2_el2", group1[2]);
                msr!("ich_ap0r3_el2", group0[3]);
                msr!("ich_ap1r3_el2", group1[3]);
            }
        }
    }
}

/// Whether the maintenance interrupt (`gic::MAINTENANCE`) is asserted for the loaded vCPU.
#[inline]
pub fn needs_maintenance() -> bool {
    maintenance_status() != 0
}

const _: () = assert!(gic::MAINTENANCE < 32, "a private interrupt, so that it comes to the CPU whose vCPU needs it");
