//! Why a guest came back: the syndrome registers, read only by who needs them.
//!
//! Protocol: valid from [`crate::switch::enter`]'s return with `Synchronous` or `SError` until the next exception to EL2,
//! which is the next exit of this CPU.

use entresol_addr::{Hpa, PAGE_SIZE};

use crate::features::{self, Feature};

/// ESR_EL2: the syndrome.
#[inline]
pub fn esr() -> u64 {
    mrs!("esr_el2")
}

/// FAR_EL2: the faulting virtual address, whole.
#[inline]
pub fn far() -> u64 {
    mrs!("far_el2")
}

/// HPFAR_EL2: the faulting intermediate physical address; bits 43:4 are its bits 51:12.
#[inline]
pub fn hpfar() -> u64 {
    mrs!("hpfar_el2")
}

/// Takes the physical SError that waits, if one does, and returns a syndrome for it in ESR_EL2's layout. Asked when a
/// guest leaves, so that what it did is not blamed on the next one.
///
/// ESB orders what the guest did before it; SError is masked at EL2, so it is deferred to DISR_EL1 (Arm DDI 0487 D1.3.5,
/// D24.2 DISR_EL1). A machine without FEAT_RAS has nothing like it: there the SError stays pending.
#[inline]
pub fn take_system_error() -> Option<u64> {
    const A: u64 = 1 << 31;
    const ISS: u64 = 0x01ff_ffff;
    const CLASS: u64 = 0x2f << 26 | 1 << 25;
    if !features::has(Feature::RAS) {
        return None;
    }
    // SAFETY: ESB and DISR_EL1 exist with FEAT_RAS; at EL2 DISR_EL1 is the hypervisor's own, and nothing else uses it.
    unsafe {
        instruction!("hint #16");
        let deferred = mrs!("s3_0_c12_c1_1");
        if deferred & A == 0 {
            return None;
        }
        msr!("s3_0_c12_c1_1", 0u64);
        Some(CLASS | deferred & ISS)
    }
}

/// With whose rights, and for what, a virtual address is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// EL1 reads (AT S1E1R).
    El1Read,
    /// EL1 writes (AT S1E1W).
    El1Write,
    /// EL0, or an unprivileged access of EL1, reads (AT S1E0R).
    El0Read,
    /// The same writes (AT S1E0W).
    El0Write,
}

/// PAR_EL1 of a translation that succeeded: the intermediate physical page in bits 51:12, attributes in bits 63:56.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translated(u64);

impl Translated {
    /// PAR_EL1, whole.
    pub const fn par(self) -> u64 {
        self.0
    }

    /// The intermediate physical page's address.
    pub const fn page(self) -> u64 {
        self.0 & 0x000f_ffff_ffff_f000
    }

    /// Whether stage 1 makes it Device memory (PAR_EL1.ATTR\[7:4\] is 0), which refuses what is not aligned.
    pub const fn is_device(self) -> bool {
        self.0 >> 60 == 0
    }
}

/// Translates a guest's virtual address by both stages of the loaded vCPU, for a read of EL1 (AT S12E1R): where it is in
/// the machine. `None` if either stage refuses: whatever the reason, there is a slower way to find it. PAR_EL1 is kept.
#[inline]
pub fn translate_to_machine(virtual_address: u64) -> Option<Hpa> {
    let kept = mrs!("par_el1");
    // SAFETY: AT reads both stages' tables and writes PAR_EL1 only.
    unsafe {
        instruction_on!("at s12e1r", virtual_address);
        instruction!("isb");
    }
    let result = mrs!("par_el1");
    // SAFETY: puts back what was there.
    unsafe { msr!("par_el1", kept) };
    (result & 1 == 0).then(|| Hpa::new(Translated(result).page() | virtual_address & (PAGE_SIZE - 1)))
}

/// Translates a guest's virtual address by its own stage 1. PAR_EL1 is the guest's and is kept. PSTATE.PAN is EL2's and
/// has no say.
///
/// # Errors
///
/// PAR_EL1 with F (bit 0) set.
pub fn translate(virtual_address: u64, rights: Rights) -> Result<Translated, u64> {
    let kept = mrs!("par_el1");
    // SAFETY: AT reads the guest's tables, which the guest owns and stage 2 bounds; it writes PAR_EL1 only.
    unsafe {
        match rights {
            Rights::El1Read => instruction_on!("at s1e1r", virtual_address),
            Rights::El1Write => instruction_on!("at s1e1w", virtual_address),
            Rights::El0Read => instruction_on!("at s1e0r", virtual_address),
            Rights::El0Write => instruction_on!("at s1e0w", virtual_address),
        }
        instruction!("isb");
    }
    let result = mrs!("par_el1");
    // SAFETY: puts back what was there.
    unsafe { msr!("par_el1", kept) };
    if result & 1 == 0 { Ok(Translated(result)) } else { Err(result) }
}
