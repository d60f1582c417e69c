//! The EL1 physical timer, emulated: the hypervisor keeps CNTHP for itself and lets no guest have CNTP.
//!
//! Purpose: CNTP_CTL_EL0, CNTP_CVAL_EL0 and CNTP_TVAL_EL0 trap; this is their state (Arm DDI 0487 D12.2). The guest
//! compares with the physical count, which it also reads directly.
//!
//! Pure: the count comes in as an argument, the interrupt level goes out as an answer.

/// CNTP_CTL_EL0.ENABLE.
const ENABLE: u64 = 1 << 0;
/// CNTP_CTL_EL0.IMASK.
const MASKED: u64 = 1 << 1;
/// CNTP_CTL_EL0.ISTATUS, read-only.
const STATUS: u64 = 1 << 2;

/// The timer's registers.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PhysicalTimer {
    control: u64,
    compare: u64,
}

impl PhysicalTimer {
    /// CNTP_CTL_EL0 at count `now`.
    pub fn control(&self, now: u64) -> u64 {
        self.control | if self.condition(now) { STATUS } else { 0 }
    }

    /// Writes CNTP_CTL_EL0.
    pub fn set_control(&mut self, value: u64) {
        self.control = value & (ENABLE | MASKED);
    }

    /// The same after the physical count has jumped by `counts`: as far from its match as before. Bits that the register has
    /// not are left out.
    pub fn moved(self, counts: u64) -> Self {
        Self { control: self.control & (ENABLE | MASKED), compare: self.compare.wrapping_add(counts) }
    }

    /// CNTP_CVAL_EL0.
    pub fn compare(&self) -> u64 {
        self.compare
    }

    /// Writes CNTP_CVAL_EL0.
    pub fn set_compare(&mut self, value: u64) {
        self.compare = value;
    }

    /// CNTP_TVAL_EL0 at count `now`: the signed 32-bit distance.
    pub fn value(&self, now: u64) -> u64 {
        self.compare.wrapping_sub(now) & 0xffff_ffff
    }

    /// Writes CNTP_TVAL_EL0 at count `now`.
    pub fn set_value(&mut self, now: u64, value: u64) {
        self.compare = now.wrapping_add(value as i32 as i64 as u64);
    }

    fn condition(&self, now: u64) -> bool {
        self.control & ENABLE != 0 && now >= self.compare
    }

    /// The interrupt line at count `now`.
    pub fn line(&self, now: u64) -> bool {
        self.condition(now) && self.control & MASKED == 0
    }

    /// When the line will rise by itself, if it is low and will.
    pub fn deadline(&self, now: u64) -> Option<u64> {
        (self.control & (ENABLE | MASKED) == ENABLE && now < self.compare).then_some(self.compare)
    }
}
