//! The port as drivers use it: each test is one driver's sequence or one rule of the manual.

use alloc::sync::Arc;
use alloc::vec::Vec;

use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use proptest::prelude::*;

use super::*;
use crate::serial::listener::{POLLS, TICKS};

#[derive(Default)]
struct Host {
    sent: Mutex<Vec<u8>>,
    calls: AtomicUsize,
    line: AtomicBool,
    changes: AtomicUsize,
}

impl Terminal for Host {
    fn put(&self, bytes: &[u8]) {
        self.sent.lock().extend_from_slice(bytes);
    }

    fn input_wanted(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }
}

impl Interrupt for Host {
    fn set_level(&self, high: bool) {
        assert_ne!(self.line.swap(high, Ordering::Relaxed), high, "each call is a change");
        self.changes.fetch_add(1, Ordering::Relaxed);
    }
}

struct Bench {
    port: Pl011<Arc<Host>, Arc<Host>>,
    host: Arc<Host>,
}

const TX: u32 = 1 << 5;
const RX: u32 = 1 << 4;
const RT: u32 = 1 << 6;

impl Bench {
    fn new() -> Self {
        let host = Arc::new(Host::default());
        Self { port: Pl011::new(host.clone(), host.clone()), host }
    }

    fn load(&self, register: u64) -> u32 {
        self.port.read(register, 4) as u32
    }

    fn store(&self, register: u64, value: u32) {
        assert_eq!(self.port.write(register, 4, u64::from(value)), Work::Idle);
    }

    fn high(&self) -> bool {
        self.host.line.load(Ordering::Relaxed)
    }

    fn calls(&self) -> usize {
        self.host.calls.load(Ordering::Relaxed)
    }

    fn empty(&self) -> bool {
        self.load(registers::FR) & Flags::RXFE.bits() != 0
    }

    /// Linux's amba-pl011 as it opens the port, store by store, with `check` after each but the last.
    fn open_as_linux_with(&self, check: impl Fn()) {
        let stores = [
            (registers::ICR, 0x7d0),
            // With a handler that answers for nothing yet.
            (registers::IMSC, RT | RX),
            (registers::IFLS, 0x12),
            (registers::CR, 0x301),
            (registers::ICR, RT | RX),
        ];
        for (register, value) in stores {
            self.store(register, value);
            check();
        }
        for _ in 0..32 {
            if self.empty() {
                break;
            }
            self.load(registers::DR);
        }
        check();
        self.store(registers::IMSC, RT | RX);
        // The line's settings follow, with the UART off for a moment.
        self.store(registers::CR, 0);
        self.store(registers::LCR_H, 0x70);
        self.store(registers::CR, 0x301);
    }

    fn open_as_linux(&self) {
        self.open_as_linux_with(|| {});
    }

    /// Linux's receive loop.
    fn drain(&self) -> Vec<u8> {
        let mut read = Vec::new();
        while !self.empty() && read.len() < 256 {
            read.push(self.load(registers::DR) as u8);
        }
        read
    }
}

#[test]
fn registers_at_reset() {
    let bench = Bench::new();
    for (register, value) in [
        (registers::FR, 0x90),
        (registers::CR, 0x300),
        (registers::IFLS, 0x12),
        (registers::LCR_H, 0),
        (registers::IMSC, 0),
        (registers::RIS, 0),
        (0xfe0, 0x11),
        (0xfe8, 0x14),
        (0xff0, 0x0d),
        (0xffc, 0xb1),
        (0x500, 0),
    ] {
        assert_eq!(bench.load(register), value, "{register:#x}");
    }
}

#[test]
fn a_program_that_sets_nothing_up_is_heard() {
    let bench = Bench::new();
    for byte in b"hi" {
        assert_eq!(bench.port.write(registers::DR, 1, u64::from(*byte)), Work::Idle);
    }
    assert_eq!(*bench.host.sent.lock(), b"hi");
}

#[test]
fn the_transmit_interrupt_comes_after_a_byte_and_goes_when_cleared() {
    let bench = Bench::new();
    bench.store(registers::IMSC, TX);
    assert!(!bench.high(), "no passage through the trigger level yet");
    bench.store(registers::DR, b'x'.into());
    assert!(bench.high());
    assert_eq!(bench.load(registers::MIS), TX);
    bench.store(registers::ICR, TX);
    assert!(!bench.high());
    bench.store(registers::DR, b'y'.into());
    bench.store(registers::IMSC, 0);
    assert!(!bench.high());
    assert_eq!((bench.load(registers::RIS), bench.load(registers::MIS)), (TX, 0));
}

#[test]
fn input_waits_until_linux_has_opened_the_port() {
    for left_by_firmware in [0x300, 0x301] {
        let bench = Bench::new();
        bench.store(registers::CR, left_by_firmware);
        bench.open_as_linux_with(|| {
            assert_eq!(bench.port.offer(b"uname -a\n"), 0);
            assert!(!bench.port.wants_input() && !bench.high());
            bench.port.tick();
        });
        assert_eq!(bench.calls(), 1, "called once, when the mask was set for good");
        assert_eq!(bench.port.offer(b"uname -a\n"), 9);
        assert!(bench.high());
        assert_eq!(bench.drain(), b"uname -a\n");
        assert!(!bench.high());
    }
}

#[test]
fn a_terminal_that_is_full_and_drained_listens_again_at_once() {
    let bench = Bench::new();
    bench.open_as_linux();
    bench.store(registers::IMSC, TX);
    assert_eq!(bench.port.offer(b"x"), 0);
    bench.store(registers::IMSC, TX | RT | RX);
    assert_eq!((bench.port.offer(b"x"), bench.calls()), (1, 1));
}

#[test]
fn a_port_closed_and_opened_again_starts_anew() {
    let bench = Bench::new();
    bench.open_as_linux();
    bench.store(registers::IMSC, 0);
    bench.store(registers::CR, 0x101);
    bench.store(registers::LCR_H, 0x60);
    bench.open_as_linux_with(|| assert_eq!(bench.port.offer(b"x"), 0));
    assert_eq!((bench.port.offer(b"x"), bench.calls()), (1, 1));
}

#[test]
fn a_driver_that_enables_last_is_heard_after_a_while() {
    let bench = Bench::new();
    bench.store(registers::IMSC, RX);
    bench.store(registers::CR, 0x301);
    for _ in 1..TICKS {
        bench.port.tick();
        assert_eq!(bench.port.offer(b"x"), 0);
    }
    bench.store(registers::IFLS, 0);
    for _ in 0..TICKS {
        assert_eq!((bench.port.offer(b"x"), bench.calls()), (0, 0), "set-up went on");
        bench.port.tick();
    }
    assert_eq!((bench.port.offer(b"x"), bench.calls()), (1, 1));
}

#[test]
fn a_boot_loader_gets_its_line_and_not_the_systems() {
    let bench = Bench::new();
    bench.store(registers::LCR_H, 0x10);
    let script = b"booti\nuname\n";
    let poll = || (0..POLLS).all(|_| bench.empty());
    assert!(poll());
    assert_eq!(bench.port.offer(script), 6);
    assert_eq!(bench.drain(), b"booti\n");
    assert_eq!(bench.port.offer(&script[6..]), 0);
    bench.open_as_linux();
    assert_eq!(bench.port.offer(&script[6..]), 6);
}

#[test]
fn input_larger_than_the_fifo_comes_in_turns() {
    let bench = Bench::new();
    bench.open_as_linux();
    let text: Vec<u8> = (0..100).collect();
    let mut given = bench.port.offer(&text);
    assert_eq!(given, 16);
    assert_eq!(bench.port.offer(&text[given..]), 0);
    let calls = bench.calls();
    let mut read = Vec::from([bench.load(registers::DR) as u8]);
    assert_eq!(bench.calls(), calls, "one character's room is not worth a call");
    while read.len() < text.len() {
        let calls = bench.calls();
        read.extend(bench.drain());
        if given < text.len() {
            assert_eq!(bench.calls(), calls + 1, "called when the FIFO ran empty");
            given += bench.port.offer(&text[given..]);
        }
    }
    assert_eq!(read, text);
}

#[test]
fn a_polling_reader_is_given_input_and_a_polling_writer_is_not() {
    let bench = Bench::new();
    for _ in 0..1000 {
        for _ in 0..3 {
            bench.load(registers::FR);
        }
        bench.store(registers::DR, b'.'.into());
    }
    assert_eq!(bench.port.offer(b"a"), 0);
    for _ in 0..POLLS - 1 {
        assert!(bench.empty());
    }
    assert_eq!((bench.port.offer(b"a"), bench.calls()), (0, 0));
    assert!(bench.empty());
    assert_eq!((bench.port.offer(b"a"), bench.calls()), (1, 1));
    assert_eq!(bench.load(registers::DR), u32::from(b'a'));
    bench.store(registers::CR, 0);
    assert_eq!(bench.port.offer(b"b"), 0, "the next program starts from nothing");
}

#[test]
fn receive_interrupts_follow_the_trigger_level() {
    let bench = Bench::new();
    bench.open_as_linux();
    assert_eq!(bench.port.offer(b"1234567"), 7);
    assert_eq!(bench.load(registers::RIS) & (RX | RT), RT);
    assert_eq!(bench.port.offer(b"8"), 1);
    assert_eq!(bench.load(registers::RIS) & (RX | RT), RX | RT);
    bench.load(registers::DR);
    assert_eq!(bench.load(registers::RIS) & (RX | RT), RT);
    bench.store(registers::ICR, RT);
    assert!(!bench.high());
    bench.load(registers::DR);
    assert!(bench.high(), "what still waits is announced again");
    bench.drain();
    assert_eq!(bench.load(registers::RIS) & (RX | RT), 0);
}

#[test]
fn without_fifos_one_character_is_held() {
    let bench = Bench::new();
    bench.store(registers::CR, 0x301);
    assert!(bench.empty());
    bench.store(registers::IMSC, RX);
    assert_eq!(bench.port.offer(b"ab"), 1);
    assert_ne!(bench.load(registers::FR) & Flags::RXFF.bits(), 0);
    assert!(bench.high());
    assert_eq!(bench.load(registers::DR), u32::from(b'a'));
    assert!(!bench.high());
    assert_eq!((bench.port.offer(b"b"), bench.calls()), (1, 1));
}

#[test]
fn loopback_receives_what_it_sends_and_can_overrun() {
    let bench = Bench::new();
    bench.store(registers::LCR_H, 0x10);
    bench.store(registers::CR, 0x381);
    for byte in 0..17 {
        bench.store(registers::DR, byte);
    }
    assert!(bench.host.sent.lock().is_empty());
    assert_eq!(bench.load(registers::RSR_ECR), 8);
    assert_ne!(bench.load(registers::RIS) & Interrupts::OE.bits(), 0);
    assert_eq!((bench.load(registers::DR), bench.load(registers::RSR_ECR)), (0, 8), "until it is cleared");
    bench.store(registers::RSR_ECR, 0);
    for byte in 1..16 {
        assert_eq!((bench.load(registers::DR), bench.load(registers::RSR_ECR)), (byte, 0));
    }
    bench.store(registers::DR, 0x55);
    assert_eq!(bench.load(registers::DR), 0x855, "the next character tells of the loss");
    bench.store(registers::LCR_H, 0x11);
    assert_eq!(bench.load(registers::DR), 0x400);
    assert_eq!(bench.load(registers::RSR_ECR), 4);
}

#[test]
fn loopback_turns_the_modem_lines_round() {
    let bench = Bench::new();
    bench.store(registers::CR, (Control::LBE | Control::RTS | Control::OUT2).bits());
    assert_eq!(bench.load(registers::FR) & 0x107, (Flags::CTS | Flags::RI).bits());
    assert_eq!(bench.load(registers::RIS), (Interrupts::CTS | Interrupts::RI).bits());
    bench.store(registers::ICR, 0x7ff);
    bench.store(registers::CR, (Control::LBE | Control::DTR | Control::OUT2).bits());
    assert_eq!(bench.load(registers::RIS), (Interrupts::CTS | Interrupts::DSR).bits());
}

#[test]
fn reset_lowers_the_line_and_forgets_input() {
    let bench = Bench::new();
    bench.open_as_linux();
    assert_eq!(bench.port.offer(b"abc"), 3);
    assert!(bench.high());
    bench.port.reset();
    assert!(!bench.high());
    assert!(bench.empty());
    assert_eq!(bench.load(registers::CR), 0x300);
}

#[test]
fn narrow_and_crooked_accesses() {
    let bench = Bench::new();
    bench.store(registers::IBRD, 0x1234);
    assert_eq!(bench.port.read(registers::IBRD, 1), 0x34);
    assert_eq!(bench.port.read(registers::IBRD + 1, 1), 0x12);
    assert_eq!(bench.port.read(registers::IBRD, 8), 0);
    assert_eq!(bench.port.read(registers::IBRD + 3, 2), 0);
    assert_eq!(bench.port.write(registers::IBRD + 1, 1, 0xff), Work::Idle);
    assert_eq!(bench.load(registers::IBRD), 0x1234);
}

#[derive(Clone, Debug)]
enum Step {
    Load(u64, u8),
    Store(u64, u8, u64),
    Offer(Vec<u8>),
    Tick,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let offset = || prop_oneof![8 => (0u64..0x20).prop_map(|n| n * 4), 1 => 0u64..0x1100, 1 => any::<u64>()];
    let size = || prop_oneof![6 => Just(4u8), 2 => Just(1u8), 1 => any::<u8>()];
    prop_oneof![
        6 => (offset(), size()).prop_map(|(offset, size)| Step::Load(offset, size)),
        6 => (offset(), size(), any::<u64>()).prop_map(|(offset, size, value)| Step::Store(offset, size, value)),
        3 => prop::collection::vec(any::<u8>(), 0..40).prop_map(Step::Offer),
        2 => Just(Step::Tick),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #[test]
    fn the_line_is_what_mis_says_after_any_sequence(steps in prop::collection::vec(step(), 0..200)) {
        let bench = Bench::new();
        for step in steps {
            match step {
                Step::Load(offset, size) => {
                    let value = bench.port.read(offset, size);
                    prop_assert!(size >= 8 || value >> (u32::from(size) * 8) == 0);
                }
                Step::Store(offset, size, value) => prop_assert_eq!(bench.port.write(offset, size, value), Work::Idle),
                Step::Offer(bytes) => {
                    let wanted = bench.port.wants_input();
                    let taken = bench.port.offer(&bytes);
                    prop_assert!(taken <= bytes.len().min(fifo::DEPTH));
                    prop_assert_eq!(taken > 0, wanted && !bytes.is_empty());
                }
                Step::Tick => bench.port.tick(),
                Step::Reset => bench.port.reset(),
            }
            prop_assert_eq!(bench.high(), bench.load(registers::MIS) != 0);
        }
    }
}
