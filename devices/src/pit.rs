//! The PC's interval timer (Intel 8254, order number 231164) and the port that gates its counter 2.
//!
//! Purpose: what kernels measure other clocks with (counter 2, gated and seen through port 61h), and the tick of those that know
//! no better (counter 0). Counter 1, which refreshed memory, counts and does nothing.
//!
//! Protocol: time comes in as nanoseconds with each access and never goes back. [`Pit::next_tick`] says when counter 0's output
//! rises next; the program that owns the VM calls [`Pit::expire`] then, which says whether it has, and makes an edge of it. A
//! guest that asks for ticks faster than [`LEAST_PERIOD`] gets no more than that: the rest is one tick.
//!
//! Invariants: total. A count is a function of when it was loaded and of the time, so nothing runs between accesses.
//!
//! Known holes: BCD counts are not offered, as Linux has none; gates of counters 0 and 1 are tied high.

use entresol_sync::Mutex;
use serde::{Deserialize, Serialize};

use crate::saved::{BadState, check};

/// Ports of the counters and the control word.
pub const SIZE: u64 = 4;
/// Counts in a second.
pub const FREQUENCY: u64 = 1_193_182;
/// Nanoseconds between two ticks of counter 0 at least.
pub const LEAST_PERIOD: u64 = 100_000;

const SECOND: u64 = 1_000_000_000;
/// The port of the control word.
const CONTROL: u64 = 3;
/// The counter behind port 61h.
const GATED: usize = 2;

/// Port 61h.
mod gate {
    pub const GATE: u8 = 1 << 0;
    pub const SPEAKER: u8 = 1 << 1;
    /// Memory refresh: changes all the time, which kernels count.
    pub const REFRESH: u8 = 1 << 4;
    pub const OUTPUT: u8 = 1 << 5;
}

/// Nanoseconds between two changes of the refresh bit.
const REFRESH_HALF: u64 = 15_085;

/// The timer.
pub struct Pit {
    state: Mutex<State>,
}

/// The registers of a timer, outside of it; times are relative to the moment.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Saved(State);

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    counters: [Counter; 3],
    /// Bits 0 and 1 of port 61h.
    gate: u8,
    /// Until when counter 0's ticks were delivered.
    ticked: u64,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Counter {
    /// 0–5.
    mode: u8,
    access: Access,
    /// The count that was loaded, 1–65536; 0 before one was.
    reload: u32,
    /// When.
    loaded: u64,
    /// When its gate went low, which stops it.
    stopped: Option<u64>,
    /// The low byte of a count that waits for its high byte.
    low: Option<u8>,
    /// The next load gives the high byte.
    high_next: bool,
    latch: Option<u16>,
    status: Option<u8>,
}

/// Which bytes of a count an access transfers (control word bits 5:4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Access {
    Low,
    High,
    Both,
}

/// Counts in `nanoseconds`.
fn counts(nanoseconds: u64) -> u64 {
    (u128::from(nanoseconds) * u128::from(FREQUENCY) / u128::from(SECOND)) as u64
}

/// Nanoseconds after which `counts` have passed.
fn nanoseconds(counts: u64) -> u64 {
    let exact = (u128::from(counts) * u128::from(SECOND)).div_ceil(u128::from(FREQUENCY));
    u64::try_from(exact).unwrap_or(u64::MAX)
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl Pit {
    /// A timer at power-on: nothing counts.
    pub const fn new() -> Self {
        Self { state: Mutex::new(State::new()) }
    }

    /// The same for a copy of the virtual machine.
    pub fn fork(&self) -> Self {
        Self { state: Mutex::new(self.state.lock().clone()) }
    }

    /// Back to power-on.
    pub fn reset(&self) {
        *self.state.lock() = State::new();
    }

    /// Its registers at `now`.
    pub fn save(&self, now: u64) -> Saved {
        let mut state = self.state.lock().clone();
        state.shift(|time| now.saturating_sub(time));
        Saved(state)
    }

    /// Takes over registers that were saved; they go on at `now`.
    ///
    /// # Errors
    ///
    /// [`BadState`].
    pub fn load(&self, saved: Saved, now: u64) -> Result<(), BadState> {
        let mut state = saved.0;
        let right = |counter: &Counter| counter.mode <= 5 && counter.reload <= 0x1_0000;
        check(state.counters.iter().all(right), "pit.counters", "must have modes up to 5 and counts of 16 bits")?;
        check(state.gate & !(gate::GATE | gate::SPEAKER) == 0, "pit.gate", "must have two bits")?;
        state.shift(|time| now.saturating_sub(time));
        *self.state.lock() = state;
        Ok(())
    }

    /// A load of one byte from the counters' ports at `now`. The control word cannot be read.
    pub fn read(&self, offset: u64, now: u64) -> u8 {
        let mut state = self.state.lock();
        match state.counters.get_mut(offset as usize) {
            Some(counter) if offset < CONTROL => counter.load(now),
            _ => 0xff,
        }
    }

    /// A store of one byte to the counters' ports at `now`. [`Self::next_tick`] may have changed.
    pub fn write(&self, offset: u64, value: u8, now: u64) {
        let mut state = self.state.lock();
        if offset == CONTROL {
            state.control(value, now);
        } else if offset < CONTROL
            && let Some(counter) = state.counters.get_mut(offset as usize)
        {
            counter.store(value, now);
            if offset == 0 {
                state.ticked = now;
            }
        }
    }

    /// A load from port 61h at `now`.
    pub fn read_gate(&self, now: u64) -> u8 {
        let state = self.state.lock();
        let refresh = if (now / REFRESH_HALF).is_multiple_of(2) { 0 } else { gate::REFRESH };
        let output = if state.counters[GATED].output(now) { gate::OUTPUT } else { 0 };
        state.gate | refresh | output
    }

    /// A store to port 61h at `now`.
    pub fn write_gate(&self, value: u8, now: u64) {
        let mut state = self.state.lock();
        let (before, after) = (state.gate & gate::GATE != 0, value & gate::GATE != 0);
        state.gate = value & (gate::GATE | gate::SPEAKER);
        match (before, after) {
            (false, true) => state.counters[GATED].gate_rises(now),
            (true, false) => state.counters[GATED].stopped = Some(now),
            _ => {}
        }
    }

    /// When counter 0's output rises next, in nanoseconds; `None` if it does not by itself.
    pub fn next_tick(&self) -> Option<u64> {
        let state = self.state.lock();
        let next = state.counters[0].rises_after(state.ticked)?;
        let least = if state.counters[0].repeats() { state.ticked.saturating_add(LEAST_PERIOD) } else { 0 };
        Some(next.max(least))
    }

    /// Whether counter 0's output has risen since the last call: then there is one edge to be made.
    pub fn expire(&self, now: u64) -> bool {
        let due = self.next_tick().is_some_and(|tick| tick <= now);
        if due {
            self.state.lock().ticked = now;
        }
        due
    }
}

impl State {
    const fn new() -> Self {
        Self { counters: [Counter::NEW; 3], gate: 0, ticked: 0 }
    }

    /// A control word (8254, "Control word format" and "Read-back command").
    fn control(&mut self, value: u8, now: u64) {
        let which = usize::from(value >> 6);
        if which == 3 {
            for (index, counter) in self.counters.iter_mut().enumerate() {
                if value >> (index + 1) & 1 != 0 {
                    counter.read_back(value, now);
                }
            }
            return;
        }
        let counter = &mut self.counters[which];
        let access = match value >> 4 & 3 {
            0 => {
                counter.hold(now);
                return;
            }
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        // Modes 2 and 3 have a second encoding.
        let mode = match value >> 1 & 7 {
            mode @ 0..6 => mode,
            mode => mode - 4,
        };
        let closed = which == GATED && self.gate & gate::GATE == 0;
        *counter = Counter { mode, access, stopped: closed.then_some(now), ..Counter::NEW };
    }

    /// Every time by `to`.
    fn shift(&mut self, to: impl Fn(u64) -> u64) {
        self.ticked = to(self.ticked);
        for counter in &mut self.counters {
            counter.loaded = to(counter.loaded);
            counter.stopped = counter.stopped.map(&to);
        }
    }
}

impl Counter {
    const NEW: Self = Self {
        mode: 0,
        access: Access::Both,
        reload: 0,
        loaded: 0,
        stopped: None,
        low: None,
        high_next: false,
        latch: None,
        status: None,
    };

    /// Modes 2 and 3 begin again by themselves.
    const fn repeats(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Modes 1 and 5 begin when the gate rises.
    const fn is_triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Counts since it was loaded. A low gate stops the clock in modes 0, 2, 3 and 4.
    fn elapsed(&self, now: u64) -> u64 {
        let until = self.stopped.filter(|_| !self.is_triggered()).unwrap_or(now);
        counts(until.saturating_sub(self.loaded))
    }

    fn count(&self, now: u64) -> u16 {
        let reload = u64::from(self.reload);
        if reload == 0 {
            return 0;
        }
        let elapsed = self.elapsed(now);
        match self.mode {
            2 => (reload - elapsed % reload) as u16,
            // By twos, twice in a period.
            3 => ((reload - elapsed * 2 % reload) & !1) as u16,
            _ => reload.wrapping_sub(elapsed) as u16,
        }
    }

    fn output(&self, now: u64) -> bool {
        let reload = u64::from(self.reload);
        if reload == 0 {
            return self.mode != 0;
        }
        let elapsed = self.elapsed(now);
        match self.mode {
            0 | 1 => elapsed >= reload,
            2 => elapsed % reload != reload - 1,
            3 => elapsed % reload < reload.div_ceil(2),
            _ => elapsed != reload,
        }
    }

    /// When the output rises next after `since`.
    fn rises_after(&self, since: u64) -> Option<u64> {
        let reload = u64::from(self.reload);
        if reload == 0 || self.is_triggered() || self.stopped.is_some() {
            return None;
        }
        let periods = if self.repeats() { counts(since.saturating_sub(self.loaded)) / reload + 1 } else { 1 };
        let strobe = u64::from(self.mode == 4);
        let at = self.loaded.saturating_add(nanoseconds(periods.saturating_mul(reload).saturating_add(strobe)));
        (at > since).then_some(at)
    }

    fn gate_rises(&mut self, now: u64) {
        match self.mode {
            // The count goes on where it was.
            0 | 4 => {
                let pause = self.stopped.map_or(0, |stopped| now.saturating_sub(stopped));
                self.loaded = self.loaded.saturating_add(pause);
            }
            _ => self.loaded = now,
        }
        self.stopped = None;
    }

    fn load(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let value = self.latch.unwrap_or_else(|| self.count(now));
        let high = match self.access {
            Access::Low => false,
            Access::High => true,
            Access::Both => {
                self.high_next = !self.high_next;
                !self.high_next
            }
        };
        if self.access != Access::Both || high {
            self.latch = None;
        }
        if high { (value >> 8) as u8 } else { value as u8 }
    }

    fn store(&mut self, value: u8, now: u64) {
        let count = match (self.access, self.low) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, Some(low)) => u16::from(value) << 8 | u16::from(low),
            (Access::Both, None) => {
                self.low = Some(value);
                return;
            }
        };
        self.low = None;
        self.reload = if count == 0 { 0x1_0000 } else { u32::from(count) };
        self.loaded = now;
        self.stopped = self.stopped.map(|_| now);
    }

    /// Holds the count for the next loads.
    fn hold(&mut self, now: u64) {
        self.latch = self.latch.or_else(|| Some(self.count(now)));
    }

    /// A read-back command that names this counter.
    fn read_back(&mut self, command: u8, now: u64) {
        const NO_COUNT: u8 = 1 << 5;
        const NO_STATUS: u8 = 1 << 4;
        if command & NO_COUNT == 0 {
            self.hold(now);
        }
        if command & NO_STATUS == 0 && self.status.is_none() {
            let access = match self.access {
                Access::Low => 1,
                Access::High => 2,
                Access::Both => 3,
            };
            let (output, null) = (u8::from(self.output(now)) << 7, u8::from(self.reload == 0) << 6);
            self.status = Some(output | null | access << 4 | self.mode << 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn load(pit: &Pit, counter: u64, control: u8, count: u16, now: u64) {
        pit.write(3, control, now);
        for byte in count.to_le_bytes() {
            pit.write(counter, byte, now);
        }
    }

    /// Counter 2 in mode 0 as a stopwatch: gate on, count down, output at the end.
    #[test]
    fn a_kernel_measures_its_clock() {
        let pit = Pit::new();
        pit.write_gate(pit.read_gate(0) & !2 | 1, 0);
        load(&pit, 2, 0xb0, 0xffff, 1000);
        let read = |now| u16::from_le_bytes([pit.read(2, now), pit.read(2, now)]);
        assert_eq!(read(1000), 0xffff);
        let later = 1000 + nanoseconds(0x1234);
        assert_eq!(read(later), 0xffff - 0x1234);
        assert_eq!(pit.read_gate(later) & 0x20, 0);
        let end = 1000 + nanoseconds(0xffff);
        assert_eq!(pit.read_gate(end - 1) & 0x20, 0);
        assert_eq!(pit.read_gate(end) & 0x20, 0x20);
        let halves: std::vec::Vec<u8> = (0..4).map(|half| pit.read_gate(end + half * REFRESH_HALF) & 0x10).collect();
        assert!(halves[0] != halves[1] && halves[0] == halves[2] && halves[1] == halves[3]);
    }

    extern crate std;

    #[test]
    fn a_closed_gate_stops_the_count() {
        let pit = Pit::new();
        load(&pit, 2, 0xb0, 1000, 0);
        assert_eq!(pit.read_gate(SECOND) & 0x20, 0, "it never began");
        pit.write_gate(1, SECOND);
        pit.write_gate(0, SECOND + nanoseconds(400));
        pit.write_gate(1, 3 * SECOND);
        assert_eq!(pit.read_gate(3 * SECOND + nanoseconds(599)) & 0x20, 0);
        assert_eq!(pit.read_gate(3 * SECOND + nanoseconds(601)) & 0x20, 0x20);
    }

    #[test]
    fn counter_0_ticks() {
        let pit = Pit::new();
        assert_eq!(pit.next_tick(), None);
        load(&pit, 0, 0x34, 11_932, 50);
        let period = nanoseconds(11_932);
        assert_eq!(pit.next_tick(), Some(50 + period));
        assert!(!pit.expire(49 + period) && pit.expire(50 + period) && !pit.expire(50 + period));
        assert!(pit.expire(50 + 10 * period + 1), "late ticks are one");
        assert_eq!(pit.next_tick().unwrap(), 50 + nanoseconds(11 * 11_932));
        load(&pit, 0, 0x30, 11_932, 7 * SECOND);
        assert!(pit.expire(8 * SECOND) && !pit.expire(9 * SECOND), "mode 0 rises once");
        assert_eq!(pit.next_tick(), None);
        load(&pit, 0, 0x34, 2, 10 * SECOND);
        assert_eq!(pit.next_tick(), Some(10 * SECOND + LEAST_PERIOD), "no storm");
    }

    #[test]
    fn a_latch_holds_both_bytes() {
        let pit = Pit::new();
        load(&pit, 0, 0x34, 0, 0);
        pit.write(3, 0x00, nanoseconds(0x0102));
        let held = 0x1_0000 - 0x0102_u32;
        assert_eq!([pit.read(0, SECOND), pit.read(0, 2 * SECOND)], (held as u16).to_le_bytes());
        pit.write(3, 0b1110_0010, SECOND);
        assert_eq!(pit.read(0, SECOND) & 0x3f, 0x34, "status: both bytes, mode 2");
    }

    #[test]
    fn a_saved_timer_goes_on() {
        let pit = Pit::new();
        load(&pit, 0, 0x34, 11_932, 5 * SECOND);
        let next = pit.next_tick().unwrap();
        let saved = pit.save(6 * SECOND);
        let other = Pit::new();
        other.load(saved.clone(), 106 * SECOND).unwrap();
        assert_eq!(other.next_tick(), Some(next + 100 * SECOND));
        let mut bad = serde_json::to_value(saved).unwrap();
        bad["counters"][1]["mode"] = 6.into();
        assert!(other.load(serde_json::from_value(bad).unwrap(), 0).is_err());
    }

    proptest! {
        #[test]
        fn any_guest(accesses in prop::collection::vec((0u64..7, any::<u8>(), any::<u64>()), 0..200)) {
            let pit = Pit::new();
            for (offset, value, now) in accesses {
                match offset {
                    5 => pit.write_gate(value, now),
                    6 => { let _ = (pit.read_gate(now), pit.expire(now)); }
                    _ => pit.write(offset, value, now),
                }
                let _ = (pit.read(u64::from(value) % 5, now), pit.next_tick());
            }
        }
    }
}
