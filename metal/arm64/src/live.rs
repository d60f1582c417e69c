//! EL1 and EL0 registers of the vCPU that is loaded, for whoever gives its guest an exception or carries its instruction
//! out.
//!
//! Protocol: valid between a vCPU's load and its save (`switch::El1State`).

/// VBAR_EL1.
pub fn vbar_el1() -> u64 {
    mrs!("vbar_el1")
}

/// SCTLR_EL1.
pub fn sctlr_el1() -> u64 {
    mrs!("sctlr_el1")
}

/// TCR_EL1.
pub fn tcr_el1() -> u64 {
    mrs!("tcr_el1")
}

macro_rules! setters {
    ($($name:ident = $register:literal, $manual:literal;)*) => {$(
        #[doc = concat!("Sets ", $manual, ", as the guest would have.")]
        pub fn $name(value: u64) {
            // SAFETY: a register of EL1, which runs no code of ours; EL2 translates by its own.
            unsafe { msr!($register, value) };
        }
    )*};
}

setters! {
    set_sctlr_el1 = "sctlr_el1", "SCTLR_EL1";
    set_ttbr0_el1 = "ttbr0_el1", "TTBR0_EL1";
    set_ttbr1_el1 = "ttbr1_el1", "TTBR1_EL1";
    set_tcr_el1 = "tcr_el1", "TCR_EL1";
    set_afsr0_el1 = "afsr0_el1", "AFSR0_EL1";
    set_afsr1_el1 = "afsr1_el1", "AFSR1_EL1";
    set_esr_el1 = "esr_el1", "ESR_EL1";
    set_far_el1 = "far_el1", "FAR_EL1";
    set_mair_el1 = "mair_el1", "MAIR_EL1";
    set_amair_el1 = "amair_el1", "AMAIR_EL1";
    set_contextidr_el1 = "contextidr_el1", "CONTEXTIDR_EL1";
}

/// TTBR0_EL1 and TTBR1_EL1.
pub fn ttbrs_el1() -> [u64; 2] {
    [mrs!("ttbr0_el1"), mrs!("ttbr1_el1")]
}

/// SP_EL1 if `el1`, else SP_EL0. EL2 runs on its own.
pub fn stack_pointer(el1: bool) -> u64 {
    if el1 { mrs!("sp_el1") } else { mrs!("sp_el0") }
}

/// Sets SP_EL1 if `el1`, else SP_EL0.
pub fn set_stack_pointer(el1: bool, value: u64) {
    // SAFETY: EL2 uses SP_EL2 only (SPSel is 1); the guest is entered next and finds what its instruction left.
    unsafe {
        if el1 {
            msr!("sp_el1", value);
        } else {
            msr!("sp_el0", value);
        }
    }
}

/// DCZID_EL0: what DC ZVA zeroes; the same for every guest.
pub fn zero_block_id() -> u64 {
    mrs!("dczid_el0")
}

/// What an exception entry to EL1 leaves in its registers; `far` only where the exception writes it.
pub fn set_exception(elr: u64, spsr: u64, esr: u64, far: Option<u64>) {
    // SAFETY: registers of EL1, which runs no code of ours; the guest is entered next and reads them.
    unsafe {
        msr!("elr_el1", elr);
        msr!("spsr_el1", spsr);
        msr!("esr_el1", esr);
        if let Some(far) = far {
            msr!("far_el1", far);
        }
    }
}

/// Invalidates the instruction caches of all CPUs, as a guest's IC IALLUIS would.
pub fn invalidate_instructions() {
    // SAFETY: it can only cost time.
    unsafe {
        instruction!("ic ialluis");
        instruction!("dsb ish");
        instruction!("isb");
    }
}

/// Forgets, on this CPU, what stage 1 of the loaded VMID has cached: another vCPU's ASIDs mean something else.
pub fn flush_stage1() {
    // SAFETY: TLB maintenance of EL1&0 by the VMID that VTTBR_EL2 names; it can only cost time.
    unsafe {
        instruction!("tlbi vmalle1");
        instruction!("dsb nsh");
        instruction!("isb");
    }
}
