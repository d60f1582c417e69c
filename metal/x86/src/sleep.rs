//! Which value turns a machine off: `\_S5` of its DSDT.
//!
//! Purpose: the register that turns a PC off takes a value that only AML names (ACPI 6.5, 7.4.2.6 and 4.8.3.2.1). An interpreter
//! for one constant would be the larger part of this crate, so the package is looked for as it is encoded (20.2): every
//! firmware that we know writes it as a constant.
//!
//! Invariants: any bytes are accepted.
//!
//! Known holes: a DSDT that computes the package has none for us, and such a machine is halted, not turned off.

/// AML: NameOp, PackageOp, BytePrefix, ZeroOp, OneOp (20.3).
const NAME: u8 = 0x08;
const PACKAGE: u8 = 0x12;
const BYTE: u8 = 0x0a;
const ZERO: u8 = 0x00;
const ONE: u8 = 0x01;

/// SLP_TYPa of the state S5, if `aml` says it.
pub fn soft_off(aml: &[u8]) -> Option<u8> {
    (0..aml.len()).find_map(|at| package(&aml[at..]))
}

/// What a `Name (_S5, Package {…})` at the first byte says.
fn package(aml: &[u8]) -> Option<u8> {
    let rest = aml.strip_prefix(&[NAME])?;
    let rest = rest.strip_prefix(b"\\").unwrap_or(rest).strip_prefix(b"_S5_")?.strip_prefix(&[PACKAGE])?;
    // PkgLength: bits 7:6 of its first byte say how many more it has; then the number of elements.
    let skip = usize::from(rest.first()? >> 6) + 2;
    match *rest.get(skip..)? {
        [BYTE, value, ..] => Some(value & 0b111),
        [value @ (ZERO | ONE), ..] => Some(value),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_package_is_found_in_every_encoding() {
        let qemu = b"\x10\x08_SB_\x08_S5_\x12\x06\x04\x00\x00\x00\x00";
        assert_eq!(soft_off(qemu), Some(0));
        assert_eq!(soft_off(b"x\x08\\_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00"), Some(5));
        assert_eq!(soft_off(b"\x08_S5_\x12\x47\x00\x04\x01\x01\x00\x00"), Some(1));
    }

    #[test]
    fn nothing_else_is_taken_for_it() {
        for end in 0..7 {
            assert_eq!(soft_off(&b"\x08_S5_\x12\x06\x04\x00"[..end]), None);
        }
        assert_eq!(soft_off(b"\x08_S4_\x12\x06\x04\x00"), None);
        assert_eq!(soft_off(b"\x08_S5_\x12\x06\x04\x0e\x00\x00"), None);
        assert_eq!(soft_off(b"\x08_S5_\x12\xff"), None);
    }
}
