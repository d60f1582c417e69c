//! PL011 (Arm DDI 0183) and PL031 (Arm DDI 0224): what Linux's drivers ask for. Every other address reads as zero.

/// Where they are.
const UART: u64 = 0x0900_0000;
const RTC: u64 = 0x0901_0000;
const PAGE: u64 = 0x1000;

/// PL011 registers, as offsets.
const DR: u64 = 0x00;
const FR: u64 = 0x18;
const IMSC: u64 = 0x38;
const RIS: u64 = 0x3c;
const MIS: u64 = 0x40;
const ICR: u64 = 0x44;
/// Identification of PL011 and PL031, and of every PrimeCell.
const ID: u64 = 0xfe0;
const PL011_ID: [u32; 4] = [0x11, 0x10, 0x34, 0x00];
const PL031_ID: [u32; 4] = [0x31, 0x10, 0x04, 0x00];
const CELL_ID: [u32; 4] = [0x0d, 0xf0, 0x05, 0xb1];
/// FR: both FIFOs are empty.
const EMPTY: u32 = 1 << 7 | 1 << 4;
/// The transmit interrupt.
const TRANSMITTED: u32 = 1 << 5;

/// The devices of one guest.
#[derive(Default)]
pub struct Devices {
    /// What the guest has printed.
    pub console: Vec<u8>,
    /// Registers that hold what was written.
    kept: [u32; 32],
    raised: u32,
}

impl Devices {
    /// A load of the guest.
    pub fn read(&mut self, address: u64, data: &mut [u8]) {
        let value = match (address & !(PAGE - 1), address & (PAGE - 1)) {
            (UART, FR) => EMPTY,
            (UART, RIS) => self.raised,
            (UART, MIS) => self.raised & self.kept[IMSC as usize / 4],
            (UART, offset @ ID..) => identification(PL011_ID, offset),
            (RTC, offset @ ID..) => identification(PL031_ID, offset),
            (UART, offset) => self.kept.get(offset as usize / 4).copied().unwrap_or(0),
            _ => 0,
        };
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = value.to_le_bytes().get(index).copied().unwrap_or(0);
        }
    }

    /// A store of the guest.
    pub fn write(&mut self, address: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        bytes.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let value = u32::from_le_bytes(bytes);
        match (address & !(PAGE - 1), address & (PAGE - 1)) {
            (UART, DR) => {
                self.console.push(bytes[0]);
                // The FIFO is empty again at once.
                self.raised |= TRANSMITTED;
            }
            (UART, ICR) => self.raised &= !value,
            (UART, offset) => {
                if let Some(kept) = self.kept.get_mut(offset as usize / 4) {
                    *kept = value;
                }
            }
            _ => {}
        }
    }

    /// Whether the UART's interrupt line is high.
    pub fn interrupt(&self) -> bool {
        self.raised & self.kept[IMSC as usize / 4] != 0
    }
}

fn identification(own: [u32; 4], offset: u64) -> u32 {
    let index = ((offset - ID) / 4) as usize;
    own.into_iter().chain(CELL_ID).nth(index).unwrap_or(0)
}
