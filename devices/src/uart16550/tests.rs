//! The port as its driver sees it: probing, opening, sending, receiving, and a guest that does anything.

use super::*;
use alloc::sync::Arc;
use entresol_sync::Mutex;
use proptest::prelude::*;
use std::vec::Vec;

extern crate std;

#[derive(Default)]
struct Screen {
    text: Mutex<Vec<u8>>,
    wanted: Mutex<u32>,
}

impl Terminal for Screen {
    fn put(&self, bytes: &[u8]) {
        self.text.lock().extend_from_slice(bytes);
    }

    fn input_wanted(&self) {
        *self.wanted.lock() += 1;
    }
}

#[derive(Default)]
struct Line(Mutex<bool>);

impl Interrupt for Line {
    fn set_level(&self, high: bool) {
        let mut level = self.0.lock();
        assert_ne!(*level, high, "each call is a change");
        *level = high;
    }
}

type Port = Uart16550<Arc<Screen>, Arc<Line>>;

fn port() -> (Port, Arc<Screen>, Arc<Line>) {
    let (screen, line) = (Arc::new(Screen::default()), Arc::new(Line::default()));
    (Uart16550::new(screen.clone(), line.clone()), screen, line)
}

fn out(port: &Port, register: u64, value: u8) {
    assert_eq!(port.write(register, 1, value.into()), Work::Idle);
}

fn inb(port: &Port, register: u64) -> u8 {
    port.read(register, 1) as u8
}

/// What a driver for 16550s does that opens the port: FIFOs emptied, registers read, interrupt on, FIFOs on.
fn open(port: &Port) {
    for (register, value) in [(2, 1), (2, 7), (2, 0)] {
        out(port, register, value);
    }
    let _ = [5, 0, 2, 6].map(|register| inb(port, register));
    out(port, 3, 3);
    out(port, 4, 0x0b);
    let _ = [5, 0, 2, 6].map(|register| inb(port, register));
    out(port, 1, 5);
    out(port, 2, 1);
    out(port, 2, 0x81);
}

#[test]
fn it_is_probed_as_a_16550a() {
    let (port, ..) = port();
    out(&port, 1, 0xff);
    assert_eq!(inb(&port, 1), 0x0f, "no enable bits that later chips have");
    out(&port, 1, 0);
    out(&port, 7, 0x5a);
    assert_eq!(inb(&port, 7), 0x5a);
    out(&port, 4, 0x1a);
    assert_eq!(inb(&port, 6) & 0xf0, 0x90, "RTS and OUT2 come back in loopback");
    out(&port, 4, 0);
    assert_eq!(inb(&port, 2), 1);
    for fcr in [0x01, 0x21] {
        out(&port, 2, fcr);
        assert_eq!(inb(&port, 2) >> 5, 6, "FIFOs that work, of 16");
    }
    out(&port, 3, 0x83);
    out(&port, 0, 0x34);
    out(&port, 1, 0x12);
    assert_eq!([inb(&port, 0), inb(&port, 1)], [0x34, 0x12]);
    out(&port, 3, 3);
    assert_eq!(inb(&port, 1), 0, "the divisor is not the mask");
}

#[test]
fn what_is_sent_arrives_and_interrupts() {
    let (port, screen, line) = port();
    open(&port);
    assert!(!*line.0.lock());
    out(&port, 1, 7);
    assert!(*line.0.lock(), "the transmitter is empty when it is asked");
    assert_eq!(inb(&port, 2) & 0xf, 2);
    assert!(!*line.0.lock(), "reading IIR took it back");
    for byte in b"hello" {
        assert_eq!(inb(&port, 5) & 0x60, 0x60);
        out(&port, 0, *byte);
    }
    assert!(*line.0.lock());
    assert_eq!(*screen.text.lock(), b"hello");
}

#[test]
fn input_waits_for_a_guest_that_listens() {
    let (port, screen, line) = port();
    assert_eq!(port.offer(b"lost?"), 0);
    open(&port);
    assert_eq!(*screen.wanted.lock(), 1);
    assert_eq!(port.offer(b"0123456789abcdefXYZ"), 16);
    assert!(*line.0.lock());
    assert_eq!(inb(&port, 2) & 0xf, 4);
    let mut read = Vec::new();
    while inb(&port, 5) & 1 != 0 {
        if read.len() == 9 {
            assert_eq!(inb(&port, 2) & 0xf, 0xc, "below the trigger it is the timeout");
        }
        read.push(inb(&port, 0));
    }
    assert_eq!(read, b"0123456789abcdef");
    assert!(!*line.0.lock());
    assert_eq!(*screen.wanted.lock(), 2, "there was more");
    assert_eq!(port.offer(b"XYZ"), 3);
    out(&port, 2, 0x83);
    assert!(!*line.0.lock(), "the receiver was emptied");
}

#[test]
fn what_comes_while_the_fifos_are_switched_on_is_not_lost() {
    let (port, ..) = port();
    open(&port);
    out(&port, 2, 0);
    assert_eq!(port.offer(b"ab"), 1);
    out(&port, 2, 1);
    assert_eq!(inb(&port, 0), b'a');
}

#[test]
fn a_program_that_polls_gets_a_line() {
    let (port, screen, _) = port();
    assert_eq!(port.offer(b"boot\nnow\n"), 0);
    for _ in 0..16 {
        assert_eq!(inb(&port, 5), 0x60);
    }
    assert_eq!(*screen.wanted.lock(), 1);
    let mut command = Vec::new();
    let mut rest = &b"boot\nnow\n"[..];
    while command.len() < 5 {
        rest = &rest[port.offer(rest)..];
        command.push(inb(&port, 0));
    }
    assert_eq!(command, b"boot\n");
    assert_eq!(port.offer(rest), 0, "what follows the line may be for whoever it starts");
}

#[test]
fn loopback_carries_data_breaks_and_modem_lines() {
    let (port, screen, line) = port();
    open(&port);
    out(&port, 1, 0x0d);
    out(&port, 4, 0x1b);
    assert!(!*line.0.lock(), "OUT2 is off in loopback");
    out(&port, 0, b'x');
    out(&port, 3, 0x43);
    assert!(screen.text.lock().is_empty());
    assert_eq!(inb(&port, 5), 0x61);
    assert_eq!(inb(&port, 0), b'x');
    assert_eq!(inb(&port, 5), 0x71, "the break is at the front");
    assert_eq!([inb(&port, 5), inb(&port, 0), inb(&port, 5)], [0x61, 0, 0x60]);
    let _ = inb(&port, 6);
    out(&port, 4, 0x1f);
    assert_eq!(inb(&port, 6), 0xf0, "RI leaves its mark when it falls");
    out(&port, 4, 0x13);
    assert_eq!(inb(&port, 6), 0x3c);
    assert_eq!(inb(&port, 6), 0x30);
    out(&port, 2, 0);
    for byte in [1, 2] {
        out(&port, 0, byte);
    }
    assert_eq!([inb(&port, 5), inb(&port, 0)], [0x63, 1], "an overrun without FIFOs");
    assert_eq!(port.offer(b"z"), 0, "the receiver is not on the line");
}

#[test]
fn a_saved_port_goes_on_and_a_strangers_is_checked() {
    let (port, ..) = port();
    open(&port);
    assert_eq!(port.offer(b"ab"), 2);
    let saved = serde_json::to_value(port.save()).unwrap();
    let (other, _, line) = self::port();
    *line.0.lock() = true;
    other.load(serde_json::from_value(saved.clone()).unwrap()).unwrap();
    assert_eq!([inb(&other, 0), inb(&other, 0)], *b"ab");
    let mut bad = saved;
    bad["receiver"]["fifo"]["head"] = 16.into();
    assert!(other.load(serde_json::from_value(bad).unwrap()).is_err());
}

proptest! {
    /// No access does harm, and the line is what the registers say.
    #[test]
    fn any_guest(accesses in prop::collection::vec((any::<bool>(), 0u64..10, 0u8..10, any::<u8>()), 0..300)) {
        let (port, _, line) = port();
        for (write, offset, size, value) in accesses {
            if write {
                let _ = port.write(offset, size, u64::from(value) * 0x0101_0101);
            } else {
                let _ = port.read(offset, size);
            }
            port.offer(&[value]);
            port.tick();
            let state = port.registers.lock();
            prop_assert_eq!(*line.0.lock(), state.gated() && state.source().is_some());
            prop_assert!(state.receiver.fifo.len() <= 16);
        }
    }
}
