//! Why a guest came back: the syndrome registers, read only by who needs them.
//!
//! Protocol: valid from [`crate::switch::enter`]'s return with `Synchronous` or `SError` until the next exception to EL2,
//! which is the next exit of this CPU.

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

/// Whether a physical SError waits that nobody has taken (ISR_EL1.A). Asked before another guest is loaded, so that it
/// is not blamed on that one.
#[inline]
pub fn serror_pending() -> bool {
    mrs!("isr_el1") & 1 << 8 != 0
}

/// Translates a guest's virtual address by its own stage 1 (AT S1E1R): the intermediate physical page (PAR_EL1 bits
/// 51:12), or PAR_EL1 with bit 0 set. Needed when HPFAR_EL2 is not valid. PAR_EL1 is the guest's and is kept.
pub fn translate_stage1(virtual_address: u64) -> Result<u64, u64> {
    let kept = mrs!("par_el1");
    // SAFETY: AT reads the guest's tables, which the guest owns and stage 2 bounds; it writes PAR_EL1 only.
    unsafe {
        instruction_on!("at s1e1r", virtual_address);
        instruction!("isb");
    }
    let result = mrs!("par_el1");
    // SAFETY: puts back what was there.
    unsafe { msr!("par_el1", kept) };
    if result & 1 == 0 { Ok(result & 0x000f_ffff_ffff_f000) } else { Err(result) }
}
