//! The local APIC's timer (SDM volume 3, 11.5.4): one-shot, periodic, TSC deadline.
//!
//! Time is the guest's TSC, in ticks: the timer's own clock runs at its rate. So a copy or a snapshot of a guest needs nothing
//! converted.
//!
//! Invariants: total. Between accesses nothing runs: the count is a function of when it was started and of the time.

use serde::{Deserialize, Serialize};

/// Ticks between two interrupts of a periodic timer at least: what a guest asks beyond that is its own storm.
pub(super) const LEAST_PERIOD: u64 = 1 << 15;

/// Bits 18:17 of the LVT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    OneShot,
    Periodic,
    Deadline,
}

impl Mode {
    /// The mode in an LVT entry; the reserved one counts as one-shot.
    pub const fn of(lvt: u32) -> Self {
        match lvt >> 17 & 3 {
            1 => Self::Periodic,
            2 => Self::Deadline,
            _ => Self::OneShot,
        }
    }
}

/// The registers, and when the count began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Timer {
    /// Divide configuration, as stored.
    pub divide: u32,
    pub initial: u32,
    started: u64,
    /// When it fires next.
    next: Option<u64>,
}

impl Timer {
    /// Base-two logarithm of the divisor: bits 3, 1 and 0.
    const fn shift(self) -> u32 {
        ((self.divide >> 1 & 4 | self.divide & 3) + 1) & 7
    }

    /// Ticks of the whole count.
    const fn period(self) -> u64 {
        (self.initial as u64) << self.shift()
    }

    /// When it fires next, if it does.
    pub const fn next(self) -> Option<u64> {
        self.next
    }

    /// A store to the initial count. In deadline mode it does nothing.
    pub fn start(&mut self, mode: Mode, initial: u32, now: u64) {
        if mode != Mode::Deadline {
            (self.initial, self.started) = (initial, now);
            self.next = (initial != 0).then(|| now.saturating_add(self.period()));
        }
    }

    /// A store to the divide configuration: the count goes on from where it is.
    pub fn set_divide(&mut self, mode: Mode, divide: u32, now: u64) {
        let counted = self.initial - self.count(mode, now);
        self.divide = divide & 0xb;
        if self.next.is_some() && mode != Mode::Deadline {
            self.started = now.saturating_sub(u64::from(counted) << self.shift());
            self.next = Some(self.started.saturating_add(self.period()));
        }
    }

    /// A store to the LVT entry. Into and out of deadline mode the timer is disarmed.
    pub fn change_mode(&mut self, before: Mode, after: Mode) {
        if (before == Mode::Deadline) != (after == Mode::Deadline) {
            (self.next, self.initial) = (None, 0);
        }
    }

    /// A store to IA32_TSC_DEADLINE; 0 disarms.
    pub fn set_deadline(&mut self, mode: Mode, deadline: u64) {
        if mode == Mode::Deadline {
            self.next = (deadline != 0).then_some(deadline);
        }
    }

    /// IA32_TSC_DEADLINE.
    pub fn deadline(self, mode: Mode) -> u64 {
        self.next.filter(|_| mode == Mode::Deadline).unwrap_or_default()
    }

    /// The current count.
    pub fn count(self, mode: Mode, now: u64) -> u32 {
        let Some(next) = self.next.filter(|_| mode != Mode::Deadline) else { return 0 };
        // A period that was stretched shows its last part only.
        let left = next.saturating_sub(now).div_ceil(1 << self.shift());
        left.min(u64::from(self.initial)) as u32
    }

    /// Whether it has fired by `now`. A periodic timer that was not looked at for long has fired once.
    pub fn expire(&mut self, mode: Mode, now: u64) -> bool {
        let Some(due) = self.next.filter(|due| *due <= now) else { return false };
        self.next = (mode == Mode::Periodic && self.initial != 0).then(|| {
            let period = self.period();
            let missed = (now - due) / period;
            let next = due.saturating_add(missed.saturating_add(1).saturating_mul(period));
            if period < LEAST_PERIOD { now.saturating_add(LEAST_PERIOD) } else { next }
        });
        true
    }
}
