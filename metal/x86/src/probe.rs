//! A load that may fault: whether the hypervisor can read an address, answered by the hardware.
//!
//! Purpose: audits and tests of the hypervisor's own mapping (INV-10) ask what a stray access would find, not what tables say.
//!
//! Protocol: [`read`] executes one load at a known place. The handler of exceptions knows the place ([`recover`]), and has it continue with
//! the error code instead of reporting a bug.
//!
//! Source: System V ABI, AMD64 supplement 3.2.3 (RDI; a pair in RAX and RDX); APM 8.2.15 and 8.4.2 (#PF and its error code).

use core::arch::global_asm;
use core::fmt;

use entresol_addr::Hpa;

global_asm!(
    r#"
    .text
    // RDI = address. Returns the word in RAX and 0 in RDX, or what `recover` put there.
    .global entresol_probe
    .global entresol_probe_faulted
entresol_probe:
    mov     rax, [rdi]
    xor     edx, edx
entresol_probe_faulted:
    ret
    "#
);

/// A page fault of the probing load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Aborted {
    /// CR2: the address.
    pub address: u64,
    /// The error code.
    pub syndrome: u64,
}

impl fmt::Display for Aborted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a page fault was taken: error code {:#x}, CR2 {:#x}", self.syndrome, self.address)
    }
}

#[repr(C)]
struct Answer {
    value: u64,
    fault: u64,
}

/// Says that there was a fault, beside an error code that may be 0. Error codes have 32 bits.
const FAULTED: u64 = 1 << 63;

unsafe extern "C" {
    fn entresol_probe(address: u64) -> Answer;
    static entresol_probe_faulted: u8;
}

/// Loads the aligned word of 64 bits at or below `address`, as any code of the hypervisor would.
///
/// # Errors
///
/// [`Aborted`]: it cannot.
pub fn read(address: Hpa) -> Result<u64, Aborted> {
    // SAFETY: a load of memory has no effect; the caller asks about memory. If it faults, the handler returns to it.
    let answer = unsafe { entresol_probe(address.get() & !7) };
    match answer.fault {
        0 => Ok(answer.value),
        fault => Err(Aborted { address: answer.value, syndrome: fault & !FAULTED }),
    }
}

/// Where a page fault of the instruction at `rip` continues, with which RAX and RDX, if it was the probe's.
pub(crate) fn recover(rip: u64, address: u64, error: u64) -> Option<(u64, [u64; 2])> {
    let load = entresol_probe as *const () as u64;
    (rip == load).then_some((&raw const entresol_probe_faulted as u64, [address, FAULTED | error]))
}
