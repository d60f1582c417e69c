//! Amounts of memory as people write them: a whole number and a binary unit.

use alloc::format;
use alloc::string::String;

/// Units, largest first, with the base-two logarithm of their bytes.
const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

/// The rule that [`parse_size`] checks, for error messages.
pub(super) const RULE: &str = "must be a whole number followed by K, M, G or T (powers of 1024), like \"512M\"";

/// Bytes of a text like `512M`. `None` for anything else, and for what has more than 64 bits.
pub fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = UNITS.iter().find_map(|(unit, shift)| Some((text.strip_suffix(*unit)?, *shift)))?;
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The shortest exact text for a number of bytes: `512M`, or `1000 bytes` where no unit divides it.
pub fn format_size(bytes: u64) -> String {
    let fits = |(_, shift): &&(char, u32)| bytes != 0 && bytes.trailing_zeros() >= *shift;
    match UNITS.iter().find(fits) {
        Some((unit, shift)) => format!("{}{unit}", bytes >> shift),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_read_as_written() {
        assert_eq!(parse_size("512M"), Some(512 << 20));
        assert_eq!(parse_size("1G"), Some(1 << 30));
        assert_eq!(parse_size("0K"), Some(0));
        assert_eq!(parse_size("16777215T"), Some(16_777_215 << 40));
    }

    #[test]
    fn other_texts_are_no_sizes() {
        for text in
            ["", "M", "512", "512m", "512MB", "512 M", "-1M", "+1M", "1.5G", "16777216T", "1é", "99999999999999999999K"]
        {
            assert_eq!(parse_size(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn format_then_parse_is_identity(kib in 1..u64::MAX >> 10) {
            let bytes = kib << 10;
            prop_assert_eq!(parse_size(&format_size(bytes)), Some(bytes));
        }

        #[test]
        fn any_text_is_read_without_panic(text in ".*") {
            let _: Option<u64> = parse_size(&text);
        }
    }
}
