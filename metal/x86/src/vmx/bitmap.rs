//! Which model-specific registers a guest reaches without coming back (SDM 25.6.9).
//!
//! Purpose: those that a guest has for itself: the processor moves some with the control structure, [`super::guest`] the others.
//!
//! Invariants: never written.

/// Reads and writes of registers 0 to 1FFFh and C000_0000h to C000_1FFFh: one KiB each. Set: the guest comes back.
#[repr(C, align(4096))]
pub struct MsrBitmap([u8; 4096]);

/// FS, GS and KernelGS base, STAR, LSTAR, CSTAR, SFMASK, SYSENTER's.
const KEPT: [u32; 10] =
    [0xc000_0100, 0xc000_0101, 0xc000_0102, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0x174, 0x175, 0x176];

/// The registers that every guest reaches.
pub static REGISTERS: MsrBitmap = MsrBitmap::passing(&KEPT);

impl MsrBitmap {
    const fn passing(registers: &[u32]) -> Self {
        let mut map = [0xff; 4096];
        let mut index = 0;
        while index < registers.len() {
            let (base, number) = match registers[index] {
                low @ 0..=0x1fff => (0, low),
                extended @ 0xc000_0000..=0xc000_1fff => (1024, extended - 0xc000_0000),
                _ => panic!("a register without a place in the map"),
            };
            let (byte, bit) = (base + number as usize / 8, number % 8);
            map[byte] &= !(1 << bit);
            map[2048 + byte] &= !(1 << bit);
            index += 1;
        }
        Self(map)
    }

    /// Its physical address: the mapping is the identity.
    pub fn address(&'static self) -> u64 {
        self.0.as_ptr() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_register_has_its_two_bits_and_no_other() {
        let MsrBitmap(map) = &REGISTERS;
        assert_eq!(map.iter().map(|byte| byte.count_zeros()).sum::<u32>(), 2 * KEPT.len() as u32);
        for base in [0, 2048] {
            // LSTAR and SYSENTER_EIP.
            assert_eq!(map[base + 1024 + 0x82 / 8] & 1 << (0x82 % 8), 0);
            assert_eq!(map[base + 0x176 / 8] & 1 << (0x176 % 8), 0);
            // EFER comes back.
            assert_ne!(map[base + 1024 + 0x80 / 8] & 1 << (0x80 % 8), 0);
        }
    }
}
