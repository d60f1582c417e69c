//! `entresol ctl console` against a fake guest: through pipes, and on a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::fake::{Fake, Manner};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

fn console(fake: &Fake, stdin: Stdio) -> Child {
    let mut program = Command::new(env!("CARGO_BIN_EXE_entresol"));
    program.args(["ctl", "--timeout", "60", "console", "web"]).env("ENTRESOL_SOCKET", fake.socket());
    program.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts")
}

/// Gives the console `input`, and its end; what it prints, says and ends with.
fn piped(input: &[u8]) -> (String, String, ExitStatus) {
    let fake = Fake::start(Manner::Good);
    let mut child = console(&fake, Stdio::piped());
    child.stdin.take().expect("piped").write_all(input).expect("read by the console");
    let output = child.wait_with_output().expect("it ends");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (text(output.stdout), text(output.stderr), output.status)
}

#[test]
fn a_pipe_is_given_to_the_guest_until_it_stops() {
    let (printed, said, status) = piped(b"uname -a\n\x1dq all bytes, then\npoweroff\n");
    assert_eq!(printed, "kept\nuname -a\n\x1dq all bytes, then\npoweroff\n");
    assert!(said.ends_with("[web: stopped: SystemOff]\n"), "{said}");
    assert_eq!(status.code(), Some(0));
}

#[test]
fn more_than_a_request_holds_goes_through_in_order() {
    let mut input: Vec<u8> = (0..30_000_u32).flat_map(|n| format!("{n}\n").into_bytes()).take(40_000).collect();
    input.extend(b"\npoweroff\n");
    let (printed, _, status) = piped(&input);
    assert_eq!(printed.as_bytes().strip_prefix(b"kept\n"), Some(&input[..]));
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_crash_ends_with_status_1() {
    let (_, said, status) = piped(b"crash\n");
    assert!(said.ends_with("[web: crashed]\n"), "{said}");
    assert_eq!(status.code(), Some(1));
}

#[test]
fn a_closed_output_ends_it() {
    let fake = Fake::start(Manner::Good);
    let mut child = console(&fake, Stdio::piped());
    drop(child.stdout.take());
    // What was kept is printed at once, to nobody.
    fake.until("detach");
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
}

#[test]
fn a_signal_detaches_and_ends_it() {
    let fake = Fake::start(Manner::Good);
    let mut child = console(&fake, Stdio::piped());
    attached(&mut child);
    kill_process(pid(&child), Signal::INT).expect("sent");
    fake.until("detach");
    assert_eq!(child.wait().expect("it ends").signal(), Some(Signal::INT.as_raw()));
}

/// A terminal and the program on it.
struct Terminal {
    keyboard: File,
    line: OwnedFd,
    before: Termios,
    child: Child,
    fake: Fake,
}

impl Terminal {
    fn attach() -> Self {
        let keyboard = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&keyboard).expect("granted");
        unlockpt(&keyboard).expect("unlocked");
        let name = ptsname(&keyboard, Vec::new()).expect("a name");
        let line = open(&name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).expect("its other end");
        let before = tcgetattr(&line).expect("modes");
        assert!(before.local_modes.contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        let fake = Fake::start(Manner::Good);
        let mut child = console(&fake, line.try_clone().expect("copied").into());
        attached(&mut child);
        let terminal = Self { keyboard: keyboard.into(), line, before, child, fake };
        assert!(!terminal.modes().intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
        terminal
    }

    fn modes(&self) -> LocalModes {
        tcgetattr(&self.line).expect("modes").local_modes
    }

    fn type_keys(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).expect("typed");
    }

    /// Waits for the end, and finds the terminal as it was.
    fn ended(mut self) -> ExitStatus {
        let status = self.child.wait().expect("it ends");
        let after = tcgetattr(&self.line).expect("modes");
        let modes = |it: &Termios| (it.input_modes, it.output_modes, it.control_modes, it.local_modes);
        assert_eq!(modes(&after), modes(&self.before));
        status
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Reads what the program says until it says that it is attached.
fn attached(child: &mut Child) {
    let said = child.stderr.as_mut().expect("piped");
    let mut text = Vec::new();
    let mut byte = [0];
    while !text.ends_with(b"]") {
        assert_eq!(said.read(&mut byte).expect("it says something"), 1, "{}", String::from_utf8_lossy(&text));
        text.push(byte[0]);
    }
    assert!(String::from_utf8_lossy(&text).contains("console of web"));
}

#[test]
fn keys_reach_the_guest_and_the_escape_leaves() {
    let mut terminal = Terminal::attach();
    // Without a return, and with keys that a cooked terminal would act on.
    terminal.type_keys(b"\x03\x1a");
    terminal.fake.until("input \x03\x1a");
    terminal.type_keys(b"\x1d\x1d");
    terminal.fake.until("input \x1d");
    terminal.type_keys(b"\x1dq");
    terminal.fake.until("detach");
    assert_eq!(terminal.ended().code(), Some(0));
}

#[test]
fn a_guest_that_stops_gives_the_terminal_back() {
    let mut terminal = Terminal::attach();
    terminal.type_keys(b"poweroff\n");
    assert_eq!(terminal.ended().code(), Some(0));
}

#[test]
fn signals_give_the_terminal_back() {
    for signal in [Signal::TERM, Signal::HUP, Signal::INT, Signal::QUIT] {
        let terminal = Terminal::attach();
        kill_process(pid(&terminal.child), signal).expect("sent");
        terminal.fake.until("detach");
        assert_eq!(terminal.ended().signal(), Some(signal.as_raw()));
    }
}

#[test]
fn a_suspended_console_leaves_the_terminal_as_it_was() {
    let mut terminal = Terminal::attach();
    kill_process(pid(&terminal.child), Signal::TSTP).expect("sent");
    let (_, status) = waitpid(Some(pid(&terminal.child)), WaitOptions::UNTRACED).expect("waited").expect("it stops");
    assert!(status.stopped());
    assert_eq!(terminal.modes(), terminal.before.local_modes);
    kill_process(pid(&terminal.child), Signal::CONT).expect("sent");
    // The terminal is raw again: the return is not made a newline. Typed after the modes changed, for a cooked
    // terminal would keep it.
    let deadline = Instant::now() + Duration::from_secs(60);
    while terminal.modes().contains(LocalModes::ICANON) {
        assert!(Instant::now() < deadline, "the terminal stays cooked");
        thread::yield_now();
    }
    terminal.type_keys(b"\r");
    terminal.fake.until("input \r");
    terminal.type_keys(b"\x1dq");
    assert_eq!(terminal.ended().code(), Some(0));
}
