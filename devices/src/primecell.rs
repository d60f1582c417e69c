//! What Arm's PrimeCell peripherals share: 32-bit registers on a byte-addressed bus, and identification registers.

/// Offset of the first identification register, UARTPeriphID0 / RTCPeriphID0 (Arm DDI 0183, 3.3.16; DDI 0224, 3.3.9).
const PERIPH_ID: u64 = 0xfe0;

/// UARTPCellID0–3 and RTCPCellID0–3: the same for every PrimeCell (Arm DDI 0183, 3.3.17).
const CELL_ID: [u8; 4] = [0x0d, 0xf0, 0x05, 0xb1];

/// The identification register at `offset`, if there is one. `periph` holds PeriphID0–3.
pub(crate) fn identification(periph: [u8; 4], offset: u64) -> Option<u32> {
    let index = usize::try_from(offset.checked_sub(PERIPH_ID)? / 4).ok()?;
    let byte = periph.iter().chain(&CELL_ID).nth(index)?;
    Some(u32::from(*byte))
}

/// The register that an access falls into, and the bit at which it starts. `None` if it would cross the register's
/// end or is no size that a bus carries: such an access reads as zero and ignores writes.
pub(crate) fn lane(offset: u64, size: u8) -> Option<(u64, u32)> {
    let byte = offset & 3;
    let fits = matches!(size, 1 | 2 | 4) && byte + u64::from(size) <= 4;
    fits.then_some((offset & !3, byte as u32 * 8))
}

/// The part of `register` that a load of `size` bytes starting at bit `shift` sees.
pub(crate) fn extract(register: u32, shift: u32, size: u8) -> u64 {
    let mask = (1u64 << (u32::from(size) * 8)) - 1;
    (u64::from(register) >> shift) & mask
}

/// What a store of `size` bytes puts on the bus for a register. Peripherals on the APB have no byte strobes: bits that
/// the store does not carry are zero. A store that does not start at the register's lowest byte is dropped.
pub(crate) fn stored(offset: u64, size: u8, value: u64) -> Option<(u64, u32)> {
    let (register, shift) = lane(offset, size)?;
    (shift == 0).then(|| (register, extract(value as u32, 0, size) as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identification_is_eight_bytes_in_eight_words() {
        let ids: [_; 10] = core::array::from_fn(|i| identification([1, 2, 3, 4], 0xfdc + 4 * i as u64));
        let expected = [1, 2, 3, 4, 0x0d, 0xf0, 0x05, 0xb1].map(Some);
        assert_eq!(ids[1..9], expected);
        assert_eq!((ids[0], ids[9]), (None, None));
        assert_eq!(identification([1, 2, 3, 4], u64::MAX), None);
    }

    #[test]
    fn lanes_are_parts_of_one_register() {
        assert_eq!(lane(0x18, 4), Some((0x18, 0)));
        assert_eq!(lane(0x1a, 2), Some((0x18, 16)));
        assert_eq!(lane(0x1b, 1), Some((0x18, 24)));
        for (offset, size) in [(0x1b, 2), (0x19, 4), (0x18, 8), (0x18, 0), (0x18, 3), (0x18, 255)] {
            assert_eq!(lane(offset, size), None);
        }
        assert_eq!(extract(0x1234_5678, 16, 2), 0x1234);
        assert_eq!(extract(0x1234_5678, 8, 1), 0x56);
        assert_eq!(extract(0xffff_ffff, 0, 4), 0xffff_ffff);
        assert_eq!(stored(0, 1, 0x1ff), Some((0, 0xff)));
        assert_eq!(stored(1, 1, 0xff), None);
        assert_eq!(stored(0, 4, u64::MAX), Some((0, u32::MAX)));
    }
}
