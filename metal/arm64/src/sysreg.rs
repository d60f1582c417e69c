//! System registers by name.
//!
//! `mrs!` is safe: no register named in this crate has a side effect on reading, except the interrupt acknowledge
//! register, which [`crate::gic`] reads itself. `msr!` is for use inside an `unsafe` block that says why the value is
//! right. Registers of extensions that the assembler does not know for this target are named by encoding,
//! `s<op0>_<op1>_c<CRn>_c<CRm>_<op2>`.

/// Reads a 64-bit system register.
macro_rules! mrs {
    ($name:literal) => {{
        let value: u64;
        #[allow(unused_unsafe, reason = "used inside unsafe blocks that write, too")]
        // SAFETY: MRS of a register without read side effects, which exists at this exception level.
        unsafe { core::arch::asm!(concat!("mrs {}, ", $name), out(reg) value, options(nomem, nostack, preserves_flags)) };
        value
    }};
}

/// Writes a 64-bit system register. Ordered towards memory accesses by the compiler, but not by the CPU.
macro_rules! msr {
    ($name:literal, $value:expr) => {
        core::arch::asm!(concat!("msr ", $name, ", {}"), in(reg) $value, options(nostack, preserves_flags))
    };
}

/// A bare instruction that takes no operand, such as a barrier.
macro_rules! instruction {
    ($text:literal) => {
        core::arch::asm!($text, options(nostack, preserves_flags))
    };
}

/// An instruction with one register operand.
macro_rules! instruction_on {
    ($text:literal, $value:expr) => {
        core::arch::asm!(concat!($text, ", {}"), in(reg) $value, options(nostack, preserves_flags))
    };
}
