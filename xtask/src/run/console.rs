//! Between the user and the machine's serial line.
//!
//! Four threads and one channel. A reader copies the serial line to standard output and watches it; a writer copies
//! standard input to the serial line; a third turns signals into events; the caller owns QEMU and is the only one that
//! kills it or waits for it, so no signal ever goes to a process that is no longer ours.
//!
//! Escapes: Ctrl-] then `x` stops the machine. Every other escape is the hypervisor's, and passes through.
//!
//! When standard input is not a terminal its bytes wait until the guest's console takes input ([`attend`]'s
//! `feed_after`): a serial driver drains its FIFO when it starts, and would lose what was there before. Its end is not
//! the machine's end: that comes with the guest's power-off.

use std::io::{IsTerminal, Read, Write, stdin, stdout};
use std::process::{ChildStdin, ChildStdout, Command, ExitCode};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::terminal::Raw;
use crate::progress::Step;

/// Ctrl-].
const ESCAPE: u8 = 0x1d;
/// What the hypervisor prints, alone or at a line's start, when it gives up.
pub const PANIC: &[u8] = b"PANIC";

enum Event {
    /// QEMU closed the serial line. Whether the hypervisor panicked before.
    Ended {
        panicked: bool,
    },
    /// The user's Ctrl-] x.
    Stop,
    Signal(i32),
}

/// Starts the machine and stays with it to its end.
///
/// # Errors
/// When QEMU cannot be started, or the terminal does not obey.
pub fn attend(mut qemu: Command, feed_after: Option<String>) -> Result<ExitCode> {
    let booting = Step::start("booting");
    let interactive = stdin().is_terminal();
    let (send, events) = channel();
    watch_signals(send.clone())?;
    let mut child = qemu.spawn().context("cannot start QEMU")?;
    let (input, output) = (child.stdin.take(), child.stdout.take());
    let (input, output) =
        (input.context("QEMU has no standard input")?, output.context("QEMU has no standard output")?);
    let raw = Raw::enter()?;
    let (feed, fed) = channel();
    if interactive || feed_after.is_none() {
        feed.send(()).context("the writer is not there yet")?;
    }
    let watch = Watch::new(feed_after.filter(|_| !interactive), feed);
    let ended = send.clone();
    thread::spawn(move || carry_output(output, watch, booting, &ended));
    thread::spawn(move || carry_input(input, &fed, interactive, &send));
    let (panicked, signal) = wait_for_end(&events, &mut child)?;
    let status = child.wait().context("cannot wait for QEMU")?;
    drop(raw);
    if let Some(signal) = signal {
        return Ok(ExitCode::from(128 + u8::try_from(signal).unwrap_or(0)));
    }
    if panicked {
        eprintln!("the hypervisor panicked");
        return Ok(ExitCode::FAILURE);
    }
    Ok(status.code().map_or(ExitCode::FAILURE, |code| ExitCode::from(u8::try_from(code).unwrap_or(1))))
}

/// Whether the hypervisor panicked, and the signal that made us stop (Ctrl-] x counts as SIGINT).
fn wait_for_end(events: &Receiver<Event>, child: &mut std::process::Child) -> Result<(bool, Option<i32>)> {
    let mut signal = None;
    loop {
        match events.recv().context("every thread is gone")? {
            Event::Ended { panicked } => return Ok((panicked, signal)),
            Event::Stop => signal = Some(SIGINT),
            Event::Signal(number) => signal = Some(number),
        }
        child.kill().context("cannot stop QEMU")?;
    }
}

fn watch_signals(events: Sender<Event>) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot watch signals")?;
    thread::spawn(move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    });
    Ok(())
}

fn carry_output(mut serial: ChildStdout, mut watch: Watch, booting: Step, events: &Sender<Event>) {
    let mut booting = Some(booting);
    let mut buffer = [0; 4096];
    let mut user = Some(stdout());
    // A read that fails is an end like any other: QEMU's status tells why.
    while let Ok(count @ 1..) = serial.read(&mut buffer) {
        drop(booting.take());
        watch.see(&buffer[..count]);
        // A user who closed the output may still want the machine to end well.
        if let Some(out) = &mut user
            && out.write_all(&buffer[..count]).and_then(|()| out.flush()).is_err()
        {
            user = None;
        }
    }
    drop(booting);
    // The receiver is gone only when the process ends anyway.
    let _gone = events.send(Event::Ended { panicked: watch.panicked });
}

fn carry_input(mut serial: ChildStdin, fed: &Receiver<()>, interactive: bool, events: &Sender<Event>) {
    if fed.recv().is_err() {
        return;
    }
    let mut keys = Keys::default();
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = stdin().read(&mut buffer) {
        let (bytes, stop) = if interactive { keys.filter(&buffer[..count]) } else { (buffer[..count].to_vec(), false) };
        if serial.write_all(&bytes).and_then(|()| serial.flush()).is_err() {
            return;
        }
        if stop {
            // As above.
            let _gone = events.send(Event::Stop);
        }
    }
    // QEMU's end of the pipe stays open: an end of input is not the machine's end.
    std::mem::forget(serial);
}

/// Looks for what the machine prints that concerns us.
struct Watch {
    ready: Option<(Vec<u8>, Sender<()>)>,
    panicked: bool,
    line: Vec<u8>,
}

impl Watch {
    fn new(ready: Option<String>, feed: Sender<()>) -> Self {
        Self { ready: ready.map(|text| (text.into_bytes(), feed)), panicked: false, line: Vec::new() }
    }

    fn see(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\n' | b'\r' => self.line.clear(),
                // Nothing that concerns us is longer; a line without an end must not grow.
                _ if self.line.len() < 4096 => self.line.push(*byte),
                _ => {}
            }
            if self.line == PANIC {
                self.panicked = true;
            }
            if let Some((text, feed)) = self.ready.take_if(|(text, _)| self.line.ends_with(text)) {
                drop(text);
                // The writer is gone only when its input is.
                let _gone = feed.send(());
            }
        }
    }
}

/// Tells our escape from the hypervisor's.
#[derive(Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    /// The bytes for the machine, and whether the user wants it stopped.
    fn filter(&mut self, bytes: &[u8]) -> (Vec<u8>, bool) {
        let mut passed = Vec::with_capacity(bytes.len() + 1);
        let mut stop = false;
        for byte in bytes {
            match (std::mem::take(&mut self.escaped), *byte) {
                (false, ESCAPE) => self.escaped = true,
                (false, other) => passed.push(other),
                (true, b'x') => stop = true,
                (true, other) => passed.extend([ESCAPE, other]),
            }
        }
        (passed, stop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_escape_is_kept_from_the_machine() {
        let mut keys = Keys::default();
        assert_eq!(keys.filter(b"a\x1d2b\x1d\x1dc"), (b"a\x1d2b\x1d\x1dc".to_vec(), false));
        assert_eq!(keys.filter(b"x\x1d"), (b"x".to_vec(), false));
        assert_eq!(keys.filter(b"xy"), (b"y".to_vec(), true));
    }

    #[test]
    fn a_panic_is_seen_across_reads_and_only_at_a_lines_start() {
        let (feed, _fed) = channel();
        let mut watch = Watch::new(None, feed);
        watch.see(b"guest says PANIC\nKernel PANIC\nPAN");
        assert!(!watch.panicked);
        watch.see(b"IC cpu 1\n");
        assert!(watch.panicked);
    }

    #[test]
    fn input_is_fed_once_when_the_console_is_ready() {
        let (feed, fed) = channel();
        let mut watch = Watch::new(Some("console ready".into()), feed);
        watch.see(b"booting\r\nguest: console re");
        assert!(fed.try_recv().is_err());
        watch.see(b"ady\r\n$ console ready\n");
        assert!(fed.try_recv().is_ok());
        assert!(fed.try_recv().is_err());
    }

    #[test]
    fn a_line_without_an_end_is_bounded() {
        let (feed, _fed) = channel();
        let mut watch = Watch::new(None, feed);
        watch.see(&vec![b'x'; 1 << 20]);
        assert!(watch.line.len() <= 4096);
    }
}
