//! Bytes of tables, and the few constructs of AML that a description of devices needs (ACPI 6.5, 20.2; resources: 6.4).
//!
//! Invariants: a [`Bytes`] never grows beyond what was set aside when it was made; what does not fit is remembered, and
//! [`Bytes::finish`] refuses.

use alloc::vec::Vec;

/// No memory, or more to say than there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// A buffer that takes heap once.
pub(super) struct Bytes {
    bytes: Vec<u8>,
    most: usize,
    full: bool,
}

impl Bytes {
    /// Room for `most` bytes.
    pub fn new(most: usize) -> Result<Self, Full> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(most).map_err(|_| Full)?;
        Ok(Self { bytes, most, full: false })
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn put(&mut self, bytes: &[u8]) {
        if bytes.len() > self.most - self.bytes.len() {
            self.full = true;
        } else {
            self.bytes.extend_from_slice(bytes);
        }
    }

    /// Replaces bytes that were put before.
    pub fn set(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.bytes.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.bytes
    }

    /// All bytes, if they fitted.
    pub fn finish(self) -> Result<Vec<u8>, Full> {
        if self.full { Err(Full) } else { Ok(self.bytes) }
    }

    /// `prefix`, then a package length of two bytes around what `inner` puts (20.2.4: up to 4095 bytes).
    pub fn package(&mut self, prefix: &[u8], inner: impl FnOnce(&mut Self)) {
        self.put(prefix);
        let at = self.len();
        self.put(&[0; 2]);
        inner(self);
        let length = self.len().saturating_sub(at);
        if length > 0xfff {
            self.full = true;
        }
        self.set(at, &[0x40 | length as u8 & 0xf, (length >> 4) as u8]);
    }

    /// Scope(`\_SB`).
    pub fn system_bus(&mut self, inner: impl FnOnce(&mut Self)) {
        self.package(&[0x10], |bytes| {
            bytes.put(b"\\_SB_");
            inner(bytes);
        });
    }

    /// Device(`name`).
    pub fn device(&mut self, name: [u8; 4], inner: impl FnOnce(&mut Self)) {
        self.package(&[0x5b, 0x82], |bytes| {
            bytes.put(&name);
            inner(bytes);
        });
    }

    /// Name(`name`, …), whose value follows.
    pub fn name(&mut self, name: &[u8; 4]) -> &mut Self {
        self.put(&[0x08]);
        self.put(name);
        self
    }

    /// A string.
    pub fn string(&mut self, text: &[u8]) {
        self.put(&[0x0d]);
        self.put(text);
        self.put(&[0]);
    }

    /// An integer of four bytes.
    pub fn dword(&mut self, value: u32) {
        self.put(&[0x0c]);
        self.put(&value.to_le_bytes());
    }

    /// A package of small integers.
    pub fn integers(&mut self, values: &[u8]) {
        self.package(&[0x12], |bytes| {
            bytes.put(&[values.len() as u8]);
            for value in values {
                bytes.put(&[0x0a, *value]);
            }
        });
    }

    /// A buffer that holds `resources` and the tag that ends them (6.4.2.9, without a checksum).
    pub fn resources(&mut self, resources: &[&[u8]]) {
        self.package(&[0x11], |bytes| {
            let size: usize = resources.iter().map(|resource| resource.len()).sum::<usize>() + 2;
            bytes.put(&[0x0b]);
            bytes.put(&(size as u16).to_le_bytes());
            for resource in resources {
                bytes.put(resource);
            }
            bytes.put(&[0x79, 0]);
        });
    }
}

/// An EISA identification (`PNP0501`) as its integer (19.3.4): three letters of five bits, four digits, the bytes swapped.
pub(super) const fn eisa(text: &[u8; 7]) -> u32 {
    const fn digit(byte: u8) -> u32 {
        (if byte <= b'9' { byte - b'0' } else { byte - b'A' + 10 }) as u32
    }
    let letters = (text[0] as u32 - 0x40) << 26 | (text[1] as u32 - 0x40) << 21 | (text[2] as u32 - 0x40) << 16;
    let digits = digit(text[3]) << 12 | digit(text[4]) << 8 | digit(text[5]) << 4 | digit(text[6]);
    (letters | digits).swap_bytes()
}

/// IO(Decode16, `port`, `port`, 1, `count`) (6.4.2.5).
pub(super) const fn io(port: u16, count: u8) -> [u8; 8] {
    let [low, high] = port.to_le_bytes();
    [0x47, 1, low, high, low, high, 1, count]
}

/// Memory32Fixed(ReadWrite, `base`, `size`) (6.4.3.4).
pub(super) const fn memory(base: u32, size: u32) -> [u8; 12] {
    let (base, size) = (base.to_le_bytes(), size.to_le_bytes());
    [0x86, 9, 0, 1, base[0], base[1], base[2], base[3], size[0], size[1], size[2], size[3]]
}

/// Interrupt(ResourceConsumer, Edge, ActiveHigh, Exclusive) {`gsi`} (6.4.3.6).
pub(super) const fn interrupt(gsi: u32) -> [u8; 9] {
    let gsi = gsi.to_le_bytes();
    [0x89, 6, 0, 0b011, 1, gsi[0], gsi[1], gsi[2], gsi[3]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifications_are_the_manuals() {
        assert_eq!(eisa(b"PNP0501"), 0x0105_d041);
        assert_eq!(eisa(b"PNP0A03"), 0x030a_d041);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut bytes = Bytes::new(4).unwrap();
        bytes.put(&[1; 4]);
        bytes.put(&[]);
        assert_eq!(bytes.finish(), Ok([1; 4].into()));
        let mut bytes = Bytes::new(4).unwrap();
        bytes.put(&[1; 5]);
        assert_eq!(bytes.finish(), Err(Full));
        let mut bytes = Bytes::new(5000).unwrap();
        bytes.package(&[0x11], |bytes| bytes.put(&[0; 4094]));
        assert_eq!(bytes.finish(), Err(Full), "a package length of two bytes ends at 4095");
    }
}
