//! Devices that the loader's command line names, as Linux lets it: `virtio_mmio.device=SIZE@BASE:IRQ`, more than once.
//!
//! Numbers are decimal, or hexadecimal after `0x`; a size may end with K, M or G; another number after a second colon is a name, and
//! nothing to us. The interrupt is an input of the I/O APICs.
//!
//! Sources: Linux, Documentation/admin-guide/kernel-parameters.txt; virtio 1.2, 4.2 (the transport).
//!
//! Invariants: any bytes are read or refused.

use core::fmt;

use arrayvec::ArrayVec;
use entresol_metal_common::memory::Region;

use super::machine::{Device, FIRST_INPUT, MAX_INPUTS, MAX_VIRTIO};

const NAME: &[u8] = b"virtio_mmio.device=";

/// A device that is not said as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The word at this byte of the line is none of the form.
    Form(usize),
    /// Its range wraps, is empty, or does not begin at a multiple of 4.
    Range {
        /// First byte.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// No such input.
    Input(u64),
    /// More than we have room for.
    TooMany,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Form(at) => write!(f, "byte {at}: virtio_mmio.device must be SIZE@BASE:IRQ"),
            Self::Range { base, size } => {
                write!(f, "virtio_mmio.device: {size:#x} bytes at {base:#x} are no registers")
            }
            Self::Input(input) => write!(f, "virtio_mmio.device: interrupt {input}: must be below {MAX_INPUTS}"),
            Self::TooMany => write!(f, "more than {MAX_VIRTIO} of virtio_mmio.device"),
        }
    }
}

/// The transports that `line` names, by address.
///
/// # Errors
///
/// [`Error`].
pub fn virtio_mmio(line: &[u8]) -> Result<ArrayVec<Device, MAX_VIRTIO>, Error> {
    let mut found = ArrayVec::<Device, MAX_VIRTIO>::new();
    let mut at = 0;
    for word in line.split(u8::is_ascii_whitespace) {
        if let Some(value) = word.strip_prefix(NAME) {
            let numbers = triple(value).ok_or(Error::Form(at))?;
            found.try_push(device(numbers)?).map_err(|_| Error::TooMany)?;
        }
        at += word.len() + 1;
    }
    found.sort_unstable_by_key(|device| device.registers.start);
    Ok(found)
}

fn device((size, base, input): (u64, u64, u64)) -> Result<Device, Error> {
    let wrong = Error::Range { base, size };
    let registers = Region::sized(base, size).ok_or(wrong)?;
    if size == 0 || base == 0 || !base.is_multiple_of(4) {
        return Err(wrong);
    }
    match u32::try_from(input) {
        Ok(input) if (input as usize) < MAX_INPUTS => Ok(Device { registers, intid: FIRST_INPUT + input, edge: false }),
        _ => Err(Error::Input(input)),
    }
}

/// `SIZE@BASE:IRQ`, perhaps with `:ID`.
fn triple(value: &[u8]) -> Option<(u64, u64, u64)> {
    let value = core::str::from_utf8(value).ok()?;
    let (size, rest) = value.split_once('@')?;
    let mut parts = rest.split(':');
    let numbers = (number_of_bytes(size)?, number(parts.next()?)?, number(parts.next()?)?);
    let named = parts.next().is_none_or(|id| number(id).is_some());
    (named && parts.next().is_none()).then_some(numbers)
}

fn number_of_bytes(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 1 << 10),
        b'M' | b'm' => (&text[..text.len() - 1], 1 << 20),
        b'G' | b'g' => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1),
    };
    number(digits)?.checked_mul(unit)
}

fn number(text: &str) -> Option<u64> {
    let (digits, radix) = text.strip_prefix("0x").map_or((text, 10), |digits| (digits, 16));
    // `from_str_radix` takes a sign.
    digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u64::from_str_radix(digits, radix).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn transports_are_read_by_address() {
        let line =
            b"quiet virtio_mmio.device=512@0xfeb00200:17 virtio_mmio.device=4K@3221225472:5:2 virtio_mmio.devices=x";
        let found = virtio_mmio(line).unwrap();
        let seen: std::vec::Vec<_> = found.iter().map(|device| (device.registers, device.intid, device.edge)).collect();
        let (first, second) = (Region::sized(0xc000_0000, 4096), Region::sized(0xfeb0_0200, 512));
        assert_eq!(seen, [(first.unwrap(), 37, false), (second.unwrap(), 49, false)]);
        assert!(virtio_mmio(b"").unwrap().is_empty());
    }

    #[test]
    fn what_is_no_device_is_refused() {
        for (value, error) in [
            ("", Error::Form(3)),
            ("512", Error::Form(3)),
            ("512@1000", Error::Form(3)),
            ("512@0x1000:", Error::Form(3)),
            ("512@0x1000:+5", Error::Form(3)),
            ("512@0x1000:5:1:1", Error::Form(3)),
            ("512@0x1000:5:z", Error::Form(3)),
            ("K@0x1000:5", Error::Form(3)),
            ("0@0x1000:5", Error::Range { base: 0x1000, size: 0 }),
            ("512@0:5", Error::Range { base: 0, size: 512 }),
            ("512@0x1001:5", Error::Range { base: 0x1001, size: 512 }),
            ("512@0xfffffffffffffffc:5", Error::Range { base: u64::MAX - 3, size: 512 }),
            ("17179869184G@0x1000:5", Error::Form(3)),
            ("512@0x1000:160", Error::Input(160)),
        ] {
            let line = std::format!("xy virtio_mmio.device={value}");
            assert_eq!(virtio_mmio(line.as_bytes()).unwrap_err(), error, "{value}");
        }
        let many = " virtio_mmio.device=4@0x1000:5".repeat(MAX_VIRTIO + 1);
        let error = virtio_mmio(many.as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), std::format!("more than {MAX_VIRTIO} of virtio_mmio.device"));
        assert!(virtio_mmio(b"virtio_mmio.device=\xff@1:1").is_err());
    }
}
