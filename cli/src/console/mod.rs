//! This terminal, joined to a guest's console.
//!
//! Protocol: the console is attached; then one loop waits for whichever comes first of a byte typed, a message from the
//! hypervisor and a signal, and never does anything that waits for another. Guest output goes to standard output as it
//! is. What this program itself has to say goes to standard error, in brackets.
//!
//! - With a terminal as standard input: it is raw, so every key reaches the guest, and Ctrl-] is ours: see [`escape`].
//! - Otherwise standard input is given to the guest byte by byte as fast as it takes them. At its end the console stays
//!   attached: what the guest says next is what one came for. It ends when the guest stops, the reader of standard
//!   output goes away, or a signal comes.
//!
//! Invariants: the terminal has its modes back when [`attach`] returns, panics, or is ended or suspended by a signal that
//! can be caught.

pub mod escape;
pub mod input;
mod signals;
pub mod terminal;

use std::fmt;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::fd::AsFd;

use entresol_wire::control::{Answer, Event, Message, Op, Response, State};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use signal_hook::consts::SIGTSTP;

use crate::client::{Client, ClientError, unexpected};
use escape::{Command, Escape};
use input::Input;
use signals::Signals;
use terminal::Raw;

/// Why the console was left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The user typed the escape.
    Quit,
    /// The virtual machine stopped or crashed.
    Over {
        /// Which of them.
        state: State,
        /// Why.
        reason: Option<String>,
    },
    /// Nobody reads standard output any more.
    OutputClosed,
    /// A signal: the caller ends by it, when it has cleaned up.
    Signal(i32),
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quit => f.write_str("detached"),
            Self::Over { state, reason: None } => write!(f, "{state}"),
            Self::Over { state, reason: Some(reason) } => write!(f, "{state}: {reason}"),
            Self::OutputClosed => f.write_str("nobody reads the output"),
            Self::Signal(number) => write!(f, "ended by signal {number}"),
        }
    }
}

/// Attaches the console of `vm` to standard input and output until something ends that.
///
/// # Errors
/// The hypervisor refuses, or the channel or the terminal fails.
pub fn attach(client: &mut Client, vm: &str) -> Result<End, ClientError> {
    let mut signals = Signals::new()?;
    let op = Op::Console { vm: vm.into() };
    match client.call(op.clone())? {
        Answer::Done => (),
        other => return Err(unexpected(&op, &other)),
    }
    let stdin = io::stdin();
    let terminal = if stdin.is_terminal() { Some(Raw::enter(stdin.as_fd())?) } else { None };
    let escape = terminal.is_some().then(Escape::default);
    let mut session = Session { client, vm, escape, input: Input::default(), stdin_open: true };
    session.say(format_args!("console of {vm}{}", if terminal.is_some() { ": Ctrl-] q leaves it" } else { "" }));
    let end = session.run(&mut signals, terminal.as_ref());
    drop(terminal);
    if let Ok(end) = &end {
        session.say(format_args!("{vm}: {end}"));
    }
    end
}

struct Session<'a> {
    client: &'a mut Client,
    vm: &'a str,
    /// Only where keys are typed.
    escape: Option<Escape>,
    input: Input,
    stdin_open: bool,
}

/// What became ready.
struct Ready {
    stdin: bool,
    channel: bool,
    signal: bool,
}

impl Session<'_> {
    fn run(&mut self, signals: &mut Signals, terminal: Option<&Raw<'_>>) -> Result<End, ClientError> {
        loop {
            while let Some(event) = self.client.event() {
                if let Some(end) = self.happened(event)? {
                    return Ok(end);
                }
            }
            self.feed()?;
            let ready = self.wait(signals)?;
            if ready.signal {
                for signal in signals.pending() {
                    if signal != SIGTSTP {
                        return self.leave(End::Signal(signal));
                    }
                    terminal::suspended(terminal, || signals::stop_here(SIGTSTP))?;
                }
                // What was ready may have been read by others meanwhile.
                continue;
            }
            if ready.stdin && self.read_stdin()? == Some(Command::Quit) {
                return self.leave(End::Quit);
            }
            if ready.channel {
                for message in self.client.receive()? {
                    if let Some(end) = self.message(message)? {
                        return Ok(end);
                    }
                }
            }
        }
    }

    /// Waits without a limit until something is ready.
    fn wait(&self, signals: &Signals) -> io::Result<Ready> {
        let stdin = io::stdin();
        let wanted = if self.stdin_open && (self.escape.is_some() || self.input.wants_more()) {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let mut polled =
            vec![PollFd::new(&*self.client, PollFlags::IN), PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)];
        // A closed end is reported even to who asks for nothing: standard input is only polled when it is wanted.
        if !wanted.is_empty() {
            polled.push(PollFd::new(&stdin, wanted));
        }
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => (),
            Err(error) => return Err(error.into()),
        }
        let is_ready = |index: usize| polled.get(index).is_some_and(|it| !it.revents().is_empty());
        Ok(Ready { channel: is_ready(0), signal: is_ready(1), stdin: is_ready(2) })
    }

    /// Takes what was typed or piped.
    fn read_stdin(&mut self) -> io::Result<Option<Command>> {
        let mut buffer = [0; 4096];
        let count = match rustix::io::read(io::stdin(), &mut buffer) {
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(None),
            // A terminal that hung up reads as an error.
            Err(Errno::IO) if self.escape.is_some() => 0,
            Err(error) => return Err(error.into()),
        };
        if count == 0 {
            self.stdin_open = false;
            // Nobody is left at the terminal.
            return Ok(self.escape.is_some().then_some(Command::Quit));
        }
        let Some(escape) = &mut self.escape else {
            self.input.push(&buffer[..count]);
            return Ok(None);
        };
        let mut passed = Vec::with_capacity(count + 1);
        let command = escape.filter(&buffer[..count], &mut passed);
        let lost = self.input.push(&passed);
        if lost > 0 {
            self.say(format_args!("the guest takes no input: {lost} bytes were dropped"));
        }
        if command == Some(Command::Help) {
            self.say(format_args!("{}", escape::HELP));
        }
        Ok(command)
    }

    /// Sends the next bytes of input, if the guest can take them now.
    fn feed(&mut self) -> Result<(), ClientError> {
        if let Some(chunk) = self.input.ready() {
            let op = Op::Input { vm: self.vm.into(), data: chunk.into() };
            let id = self.client.send(op)?;
            self.input.sent(id);
        }
        Ok(())
    }

    fn message(&mut self, message: Message<'_>) -> Result<Option<End>, ClientError> {
        match message {
            Message::Event(event) => self.happened(event),
            Message::Response(Response { result: Err(error), .. }) => Err(ClientError::Refused(error)),
            Message::Response(Response { id: Some(id), result: Ok(Answer::Accepted(bytes)) }) => {
                self.input.accepted(id, bytes).map_err(ClientError::Protocol)?;
                Ok(None)
            }
            Message::Response(Response { result: Ok(answer), .. }) => {
                Err(ClientError::Protocol(format!("nobody asked for {answer:?}")))
            }
        }
    }

    fn happened(&mut self, event: Event<'_>) -> Result<Option<End>, ClientError> {
        match event {
            Event::Console { vm, data } if vm == self.vm => return self.print(&data.0),
            Event::Dropped { vm, bytes } if vm == self.vm => {
                self.say(format_args!("{bytes} bytes of output were lost"));
            }
            Event::InputReady { vm } if vm == self.vm => self.input.resume(),
            Event::State { vm, state, reason } if vm == self.vm => {
                let end = End::Over { state, reason: reason.map(Into::into) };
                if matches!(state, State::Stopped | State::Crashed) {
                    return Ok(Some(end));
                }
                self.say(format_args!("{vm} is {end}"));
            }
            // Of a console that was attached before, or of another VM.
            Event::Console { .. }
            | Event::Dropped { .. }
            | Event::InputReady { .. }
            | Event::Doorbell { .. }
            | Event::State { .. } => (),
        }
        Ok(None)
    }

    fn print(&mut self, data: &[u8]) -> Result<Option<End>, ClientError> {
        let mut out = io::stdout().lock();
        match out.write_all(data).and_then(|()| out.flush()) {
            Ok(()) => Ok(None),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => self.leave(End::OutputClosed).map(Some),
            Err(error) => Err(error.into()),
        }
    }

    /// Detaches. The answer is not waited for: the next session detaches as well.
    fn leave(&mut self, end: End) -> Result<End, ClientError> {
        self.client.send(Op::Detach)?;
        Ok(end)
    }

    /// A line of ours. Raw terminals do not return the carriage by themselves.
    fn say(&self, words: fmt::Arguments<'_>) {
        let end = if self.escape.is_some() { "\r\n" } else { "\n" };
        // Who closed standard error wants to hear nothing; the console goes on.
        drop(write!(io::stderr(), "{end}[{words}]{end}"));
    }
}
