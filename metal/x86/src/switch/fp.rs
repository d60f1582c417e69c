//! x87 and SSE registers of a vCPU.
//!
//! Purpose: the hypervisor touches none, so a vCPU's stay in hardware while it is on its CPU.
//!
//! Protocol: [`FpState::load`] when a vCPU comes to a CPU, [`FpState::save`] when it goes.
//!
//! Sources: APM volume 1, 11.4 (FXSAVE's image); CR4.OSFXSR is set by [`init_cpu`].
//!
//! Known holes: guests are not shown XSAVE, and XCR0 stays 1: there are no wider registers to keep.

use core::arch::asm;

use x86_64::registers::control::{Cr0, Cr0Flags, Cr4, Cr4Flags};

/// FXSAVE's image.
#[repr(C, align(16))]
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct FpState([[u64; 8]; 8]);

/// FCW and MXCSR as FNINIT and a reset leave them: all exceptions masked.
const FCW: u64 = 0x037f;
const MXCSR: u64 = 0x1f80;
/// Of the word with MXCSR: bits that FXRSTOR takes from whoever has them; it refuses the others.
const MXCSR_BITS: u64 = 0xffff;

impl Default for FpState {
    fn default() -> Self {
        Self::new()
    }
}

impl FpState {
    /// As after a reset.
    pub const fn new() -> Self {
        let mut image = [[0; 8]; 8];
        image[0][0] = FCW;
        image[0][3] = MXCSR;
        Self(image)
    }

    /// The same without what FXRSTOR would refuse: of a state that comes from elsewhere.
    #[must_use]
    pub fn confined(mut self) -> Self {
        self.0[0][3] &= MXCSR_BITS;
        self
    }

    /// Puts them into the hardware.
    pub fn load(&self) {
        // SAFETY: an image that `new` or FXSAVE made, aligned; the hypervisor has no such registers of its own.
        unsafe { asm!("fxrstor64 [{}]", in(reg) self.0.as_ptr(), options(nostack, readonly, preserves_flags)) };
    }

    /// Takes them out of the hardware.
    pub fn save(&mut self) {
        // SAFETY: 512 bytes, aligned, ours.
        unsafe { asm!("fxsave64 [{}]", in(reg) self.0.as_mut_ptr(), options(nostack, preserves_flags)) };
    }
}

/// Lets this CPU move them: CR4.OSFXSR set, CR0.EM and CR0.TS clear.
pub(crate) fn init_cpu() {
    // SAFETY: no code of ours touches the registers but the functions above.
    unsafe {
        Cr0::update(|cr0| cr0.remove(Cr0Flags::EMULATE_COPROCESSOR | Cr0Flags::TASK_SWITCHED));
        Cr4::update(|cr4| cr4.insert(Cr4Flags::OSFXSR | Cr4Flags::OSXMMEXCPT_ENABLE));
    }
}
