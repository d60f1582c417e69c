//! Which ports and model-specific registers a guest reaches without coming back: the permission maps (APM 15.10, 15.11).
//!
//! Purpose: no port at all, and of the registers those that the processor keeps for each guest by itself, in its VMCB.
//!
//! Invariants: a map is written before its guest runs, and never after.

/// The ports that every guest reaches, and the registers.
pub(super) static PORTS: IoPermissions = IoPermissions::NONE;
pub(super) static REGISTERS: MsrPermissions = MsrPermissions::KEPT;

/// Three pages: a bit for each port, and for what a wide access at the last one touches. Set: the guest comes back.
#[repr(C, align(4096))]
pub(super) struct IoPermissions([u8; 3 * 4096]);

impl IoPermissions {
    /// No port.
    const NONE: Self = Self([0xff; 3 * 4096]);

    /// Its physical address: the mapping is the identity.
    pub(super) fn address(&'static self) -> u64 {
        self.0.as_ptr() as u64
    }
}

/// Two pages: two bits for each register of three ranges, read and write.
#[repr(C, align(4096))]
pub(super) struct MsrPermissions([u8; 2 * 4096]);

/// Registers that VMRUN, VMLOAD and VMSAVE move between guest and host (15.5.1, 15.5.2): FS and GS base, KernelGSBase, STAR, LSTAR, CSTAR,
/// SFMASK, SYSENTER's.
const KEPT: [u32; 10] =
    [0xc000_0100, 0xc000_0101, 0xc000_0102, 0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0x174, 0x175, 0x176];

impl MsrPermissions {
    /// The registers that a guest has for itself.
    const KEPT: Self = Self::passing(&KEPT);

    const fn passing(registers: &[u32]) -> Self {
        let mut map = [0xff; 2 * 4096];
        let mut index = 0;
        while index < registers.len() {
            // Each range has 2 KiB; within one, two bits a register.
            let (base, number) = match registers[index] {
                low @ 0..=0x1fff => (0, low),
                extended @ 0xc000_0000..=0xc000_1fff => (0x800, extended - 0xc000_0000),
                _ => panic!("a register without a place in the map"),
            };
            map[base + number as usize / 4] &= !(0b11 << (number % 4 * 2));
            index += 1;
        }
        Self(map)
    }

    /// Its physical address: the mapping is the identity.
    pub(super) fn address(&'static self) -> u64 {
        self.0.as_ptr() as u64
    }
}
