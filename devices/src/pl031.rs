//! PL031 real-time clock (Arm DDI 0224C).
//!
//! Purpose: the time of day for guests that have no other source of it.
//!
//! Protocol: the counter is the host's Unix time in seconds plus an offset that a store to RTCLR sets, modulo 2³². It
//! counts from power-on: like QEMU's, and unlike the bare peripheral, RTCCR reads as one, because guests read the time
//! without starting the clock. The alarm is looked at on every access and by [`Pl031::check`]; the program that owns
//! the VM calls that at [`Pl031::next_alarm`], which it asks for again after each store.
//!
//! Invariants: the line is high exactly if RTCMIS is one. A match is seen even if the second in which the counter
//! equals RTCMR was never observed.
//!
//! Lock order: the clock's lock, then the host's time or the line.
//!
//! Known holes: if the host's time is set back, a match that has been seen is not taken back, and the next comes later
//! by as much.

use entresol_sync::Mutex;
use serde::{Deserialize, Serialize};

use crate::bus::{Device, Interrupt, Work};
use crate::primecell;

/// Bytes of guest address space that it takes.
pub const SIZE: u64 = 0x1000;

/// RTCPeriphID0–3 as QEMU's `virt` shows them: part 0x031, designer Arm (0x41), revision 1.
const PERIPH_ID: [u8; 4] = [0x31, 0x10, 0x14, 0x00];

/// Data: the counter.
const DR: u64 = 0x000;
/// Match.
const MR: u64 = 0x004;
/// Load: sets the counter.
const LR: u64 = 0x008;
/// Control.
const CR: u64 = 0x00c;
/// Interrupt mask: one lets the interrupt through.
const IMSC: u64 = 0x010;
/// Raw interrupt status.
const RIS: u64 = 0x014;
/// Masked interrupt status.
const MIS: u64 = 0x018;
/// Interrupt clear.
const ICR: u64 = 0x01c;

/// The counter's period in seconds.
const PERIOD: u64 = 1 << 32;

/// The host's time of day.
pub trait Clock: Send + Sync {
    /// Seconds since 1970-01-01 00:00:00 UTC.
    fn unix_seconds(&self) -> u64;
}

impl<T: Clock + ?Sized> Clock for alloc::sync::Arc<T> {
    fn unix_seconds(&self) -> u64 {
        (**self).unix_seconds()
    }
}

/// A PL031 with its source of time and its interrupt line.
pub struct Pl031<C, L> {
    state: Mutex<State>,
    clock: C,
    line: L,
}

/// The registers of a clock, outside of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// The counter.
    counter: u32,
    load: u32,
    compare: u32,
    raw: bool,
    mask: bool,
    high: bool,
}

/// The register file. All times are the host's, in seconds.
#[derive(Clone)]
struct State {
    /// The counter minus the host's time.
    offset: u32,
    load: u32,
    compare: u32,
    /// When the counter next equals `compare`.
    deadline: u64,
    raw: bool,
    mask: bool,
    /// Level of the line as last driven.
    high: bool,
}

impl<C: Clock, L: Interrupt> Pl031<C, L> {
    /// A clock at power-on, showing the host's time.
    pub fn new(clock: C, line: L) -> Self {
        let state = State::new(clock.unix_seconds());
        Self { state: Mutex::new(state), clock, line }
    }

    /// A clock in the same state for a copy of the virtual machine. `line` is as high as this one's.
    pub fn fork(&self, clock: C, line: L) -> Self {
        Self { state: Mutex::new(self.state.lock().clone()), clock, line }
    }

    /// Its registers at this moment.
    pub fn save(&self) -> Saved {
        let state = self.state.lock();
        let counter = state.counter(self.clock.unix_seconds());
        let State { load, compare, raw, mask, high, .. } = *state;
        Saved { counter, load, compare, raw, mask, high }
    }

    /// Takes over registers that were saved: the counter goes on from where it was, whatever the host's time is by now.
    pub fn load(&self, saved: &Saved) {
        let now = self.clock.unix_seconds();
        let Saved { counter, load, compare, raw, mask, high } = *saved;
        let offset = counter.wrapping_sub(now as u32);
        let mut state = State { offset, load, compare, deadline: 0, raw, mask, high };
        state.deadline = state.next_match(now);
        // A match of this very second was seen before.
        if state.deadline == now {
            state.deadline = now.saturating_add(PERIOD);
        }
        *self.state.lock() = state;
    }

    /// The host's time, in Unix seconds, at which [`Self::check`] must be called; `None` while no interrupt can come of
    /// itself.
    pub fn next_alarm(&self) -> Option<u64> {
        let state = self.state.lock();
        (state.mask && !state.raw).then_some(state.deadline)
    }

    /// Raises the alarm if the host's time `now`, in Unix seconds, has reached it.
    pub fn check(&self, now: u64) {
        let mut state = self.state.lock();
        state.pass(now);
        state.drive(&self.line);
    }

    fn access<R>(&self, act: impl FnOnce(&mut State, u64) -> R) -> R {
        let mut state = self.state.lock();
        let now = self.clock.unix_seconds();
        state.pass(now);
        let result = act(&mut state, now);
        state.drive(&self.line);
        result
    }
}

impl<C: Clock, L: Interrupt> Device for Pl031<C, L> {
    fn read(&self, offset: u64, size: u8) -> u64 {
        let Some((register, shift)) = primecell::lane(offset, size) else { return 0 };
        let value = self.access(|state, now| state.load(register, now));
        primecell::extract(value, shift, size)
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Work {
        if let Some((register, value)) = primecell::stored(offset, size, value) {
            self.access(|state, now| state.store(register, value, now));
        }
        Work::Idle
    }

    fn reset(&self) {
        self.access(|state, now| *state = State { high: state.high, ..State::new(now) });
    }
}

impl State {
    fn new(now: u64) -> Self {
        let mut state = Self { offset: 0, load: 0, compare: 0, deadline: 0, raw: false, mask: false, high: false };
        state.deadline = state.next_match(now);
        state
    }

    /// The counter at the host's time `now`.
    fn counter(&self, now: u64) -> u32 {
        (now as u32).wrapping_add(self.offset)
    }

    /// The first time from `now` on at which the counter equals the match register.
    fn next_match(&self, now: u64) -> u64 {
        now.saturating_add(u64::from(self.compare.wrapping_sub(self.counter(now))))
    }

    /// Takes note that the host's time is `now`.
    fn pass(&mut self, now: u64) {
        if now >= self.deadline {
            self.raw = true;
            let periods = (now - self.deadline) / PERIOD + 1;
            self.deadline = self.deadline.saturating_add(periods.saturating_mul(PERIOD));
        }
    }

    /// Computes the next match after a change of counter or match register; one that holds already counts.
    fn rearm(&mut self, now: u64) {
        self.deadline = self.next_match(now);
        self.pass(now);
    }

    fn load(&self, register: u64, now: u64) -> u32 {
        match register {
            DR => self.counter(now),
            MR => self.compare,
            LR => self.load,
            CR => 1,
            IMSC => self.mask.into(),
            RIS => self.raw.into(),
            MIS => (self.raw && self.mask).into(),
            _ => primecell::identification(PERIPH_ID, register).unwrap_or(0),
        }
    }

    fn store(&mut self, register: u64, value: u32, now: u64) {
        match register {
            MR => {
                self.compare = value;
                self.rearm(now);
            }
            LR => {
                self.load = value;
                self.offset = value.wrapping_sub(now as u32);
                self.rearm(now);
            }
            IMSC => self.mask = value & 1 != 0,
            ICR => self.raw = self.raw && value & 1 == 0,
            _ => {}
        }
    }

    fn drive(&mut self, line: &impl Interrupt) {
        let high = self.raw && self.mask;
        if high != self.high {
            self.high = high;
            line.set_level(high);
        }
    }
}

#[cfg(test)]
mod tests {
    use alloc::sync::Arc;

    use entresol_sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use proptest::prelude::*;

    use super::*;

    struct Host {
        now: AtomicU64,
        line: AtomicBool,
    }

    impl Clock for Host {
        fn unix_seconds(&self) -> u64 {
            self.now.load(Ordering::Relaxed)
        }
    }

    impl Interrupt for Host {
        fn set_level(&self, high: bool) {
            assert_ne!(self.line.swap(high, Ordering::Relaxed), high, "each call is a change");
        }
    }

    fn bench(now: u64) -> (Pl031<Arc<Host>, Arc<Host>>, Arc<Host>) {
        let host = Arc::new(Host { now: AtomicU64::new(now), line: AtomicBool::new(false) });
        (Pl031::new(host.clone(), host.clone()), host)
    }

    fn store(rtc: &impl Device, register: u64, value: u32) {
        assert_eq!(rtc.write(register, 4, value.into()), Work::Idle);
    }

    #[test]
    fn it_shows_the_hosts_time_from_the_start() {
        let (rtc, host) = bench(1_700_000_000);
        assert_eq!(rtc.read(DR, 4), 1_700_000_000);
        assert_eq!(rtc.read(CR, 4), 1);
        host.now.fetch_add(5, Ordering::Relaxed);
        assert_eq!(rtc.read(DR, 4), 1_700_000_005);
        assert_eq!([0xfe0, 0xfe4, 0xfe8, 0xfec, 0xff0].map(|id| rtc.read(id, 4)), [0x31, 0x10, 0x14, 0, 0x0d]);
    }

    #[test]
    fn a_load_moves_it_and_it_goes_on_from_there() {
        let (rtc, host) = bench(1_700_000_000);
        store(&rtc, LR, 0xffff_fffe);
        assert_eq!((rtc.read(LR, 4), rtc.read(DR, 4)), (0xffff_fffe, 0xffff_fffe));
        host.now.fetch_add(3, Ordering::Relaxed);
        assert_eq!(rtc.read(DR, 4), 1);
        rtc.reset();
        assert_eq!(rtc.read(DR, 4), 1_700_000_003);
    }

    #[test]
    fn the_alarm_comes_at_its_second_and_stays_until_cleared() {
        let (rtc, host) = bench(1_000);
        store(&rtc, IMSC, 1);
        store(&rtc, MR, 1_010);
        assert_eq!(rtc.next_alarm(), Some(1_010));
        rtc.check(1_009);
        assert!(!host.line.load(Ordering::Relaxed));
        host.now.store(1_012, Ordering::Relaxed);
        rtc.check(1_012);
        assert!(host.line.load(Ordering::Relaxed));
        assert_eq!((rtc.read(RIS, 4), rtc.read(MIS, 4), rtc.next_alarm()), (1, 1, None));
        store(&rtc, ICR, 0);
        assert_eq!(rtc.read(RIS, 4), 1);
        store(&rtc, ICR, 1);
        assert!(!host.line.load(Ordering::Relaxed));
        assert_eq!(rtc.next_alarm(), Some(1_010 + PERIOD));
    }

    #[test]
    fn a_masked_alarm_is_remembered() {
        let (rtc, host) = bench(1_000);
        store(&rtc, MR, 1_001);
        assert_eq!(rtc.next_alarm(), None);
        host.now.store(2_000, Ordering::Relaxed);
        assert_eq!((rtc.read(RIS, 4), rtc.read(MIS, 4)), (1, 0));
        store(&rtc, IMSC, 1);
        assert!(host.line.load(Ordering::Relaxed));
        rtc.reset();
        assert!(!host.line.load(Ordering::Relaxed));
    }

    #[test]
    fn a_match_with_the_present_second_counts() {
        let (rtc, _host) = bench(1_000);
        store(&rtc, MR, 1_000);
        assert_eq!(rtc.read(RIS, 4), 1);
        store(&rtc, ICR, 1);
        store(&rtc, MR, 50);
        assert_eq!(rtc.read(RIS, 4), 0);
        store(&rtc, LR, 50);
        assert_eq!(rtc.read(RIS, 4), 1);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Load(u64, u8),
        Store(u64, u8, u64),
        Pass(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let offset = || prop_oneof![8 => (0u64..9).prop_map(|n| n * 4), 1 => any::<u64>()];
        let size = || prop_oneof![6 => Just(4u8), 1 => any::<u8>()];
        prop_oneof![
            (offset(), size()).prop_map(|(offset, size)| Step::Load(offset, size)),
            (offset(), size(), any::<u64>()).prop_map(|(offset, size, value)| Step::Store(offset, size, value)),
            any::<u64>().prop_map(Step::Pass),
        ]
    }

    proptest! {
        #[test]
        fn the_line_is_what_mis_says_after_any_sequence(steps in prop::collection::vec(step(), 0..100)) {
            let (rtc, host) = bench(7);
            for step in steps {
                match step {
                    Step::Load(offset, size) => drop(rtc.read(offset, size)),
                    Step::Store(offset, size, value) => prop_assert_eq!(rtc.write(offset, size, value), Work::Idle),
                    Step::Pass(now) => {
                        host.now.store(now, Ordering::Relaxed);
                        rtc.check(now);
                    }
                }
                let masked = rtc.read(MIS, 4) != 0;
                prop_assert_eq!(host.line.load(Ordering::Relaxed), masked);
            }
        }

        #[test]
        fn the_alarm_is_never_in_the_past_nor_a_period_away(now in 0..1u64 << 40, load: u32, compare: u32) {
            let (rtc, _host) = bench(now);
            store(&rtc, IMSC, 1);
            store(&rtc, LR, load);
            store(&rtc, MR, compare);
            store(&rtc, ICR, 1);
            let alarm = rtc.next_alarm().unwrap();
            prop_assert!(alarm > now && alarm - now <= PERIOD);
            prop_assert_eq!((alarm - now) as u32, compare.wrapping_sub(load));
        }
    }
}
