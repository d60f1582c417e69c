//! A load that may fault: whether EL2 can read an address, answered by the hardware.
//!
//! Purpose: audits and tests of the hypervisor's own mapping (INV-10) ask what a stray access would find, not what tables say.
//!
//! Protocol: [`read`] executes one load at a known place. The vector of exceptions from EL2 knows the place, and has it
//! continue with the syndrome instead of reporting a bug. The vector uses TPIDRRO_EL0, which is saved around it, and x0
//! to x2, which a call does not keep.
//!
//! Source: AAPCS64 6.1.1 (registers that a call keeps), Arm DDI 0487 D24.2.40 (ESR_EL2).

use core::arch::global_asm;
use core::fmt;

use entresol_addr::Hpa;

global_asm!(
    r#"
    .text
    // x0 = address. Returns the word in x0 and 0 in x1, or FAR_EL2 and ESR_EL2, which is never 0 for an abort.
    .global entresol_probe
    .global entresol_probe_load
    .global entresol_probe_faulted
entresol_probe:
entresol_probe_load:
    ldr     x0, [x0]
    mov     x1, xzr
    ret
    // In the vector.
entresol_probe_faulted:
    adr     x1, 1f
    msr     elr_el2, x1
    eret
1:  mrs     x0, far_el2
    mrs     x1, esr_el2
    ret
    "#
);

/// An abort of the probing load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aborted {
    /// FAR_EL2.
    pub address: u64,
    /// ESR_EL2.
    pub syndrome: u64,
}

impl fmt::Display for Aborted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EL2 took a data abort: ESR {:#x}, FAR {:#x}", self.syndrome, self.address)
    }
}

#[repr(C)]
struct Answer {
    value: u64,
    syndrome: u64,
}

unsafe extern "C" {
    fn entresol_probe(address: u64) -> Answer;
}

/// Loads the aligned word of 64 bits at or below `address`, as any code of the hypervisor would.
///
/// # Errors
///
/// [`Aborted`]: it cannot.
pub fn read(address: Hpa) -> Result<u64, Aborted> {
    let guest = mrs!("tpidrro_el0");
    // SAFETY: a load of memory has no effect; the caller asks about memory. If it faults, the vector returns to it.
    let answer = unsafe { entresol_probe(address.get() & !7) };
    // SAFETY: the value from before the vector may have changed it.
    unsafe { msr!("tpidrro_el0", guest) };
    match answer.syndrome {
        0 => Ok(answer.value),
        syndrome => Err(Aborted { address: answer.value, syndrome }),
    }
}
