//! The control channel of a real machine: what an owner may ask, and what a bad client cannot do.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use entresol_cli::client::{Client, ClientError};
use entresol_wire::control::{Answer, Code, Event, MAX_LINE, Message, Op, Response, State, Stats, VmRow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Context;
use super::machine::{ANSWER, Builder, Machine};
use crate::bundle::linux;
use crate::initrd::{self, Initrd};

/// What the hypervisor tells of one virtual machine.
pub(super) struct Listener {
    client: Client,
    vm: &'static str,
    /// Output that was told and not yet looked for.
    output: String,
    /// Bytes that were told to be lost.
    dropped: u64,
    /// States that were told and not yet looked for.
    states: Vec<(State, Option<String>)>,
    input_ready: bool,
    /// A doorbell rang.
    pub(super) rung: bool,
}

impl Listener {
    pub(super) fn attach(mut client: Client, vm: &'static str) -> Result<Self> {
        client.call(Op::Console { vm: vm.into() })?;
        Ok(Self { client, vm, output: String::new(), dropped: 0, states: Vec::new(), input_ready: false, rung: false })
    }

    /// Asks; what happened before the answer is taken note of.
    pub(super) fn ask(&mut self, op: Op<'_>) -> Result<Answer<'static>> {
        let answer = self.client.call(op)?;
        while let Some(event) = self.client.event() {
            self.note(event)?;
        }
        Ok(answer)
    }

    /// Asks, and does not wait for the answer: it is the last request.
    pub(super) fn begin(&mut self, op: Op<'_>) -> Result<()> {
        Ok(self.client.send(op).map(drop)?)
    }

    /// Attaches to another virtual machine's console, in the same session; what was told of the one before is forgotten.
    pub(super) fn turn_to(&mut self, vm: &'static str) -> Result<()> {
        self.done_quietly(Op::Console { vm: vm.into() })?;
        self.vm = vm;
        (self.output, self.dropped, self.input_ready, self.rung) = (String::new(), 0, false, false);
        self.states.clear();
        Ok(())
    }

    /// Asks for what has no answer; what happened before is of no interest.
    fn done_quietly(&mut self, op: Op<'_>) -> Result<()> {
        let answer = self.client.call(op)?;
        while self.client.event().is_some() {}
        ensure!(answer == Answer::Done, "the answer is {answer:?}");
        Ok(())
    }

    /// Runs a command in the shell that waits on the attached console; returns what it printed. As in [`Machine::shell`] the
    /// marks are put together by the shell; `serial` tells them from those of another time.
    pub(super) fn shell(&mut self, serial: u32, command: &str) -> Result<String> {
        self.type_line(&format!("echo \"be\"\"gun:{serial}:\"; {command}; echo \"en\"\"ded:{serial}:$?:\""))?;
        self.hear(&format!("begun:{serial}:"))?;
        let ended = format!("ended:{serial}:");
        let (output, status) = self.until("answer of the shell", |told| {
            let (output, rest) = told.output.split_once(&ended)?;
            let (status, _) = rest.split_once(':')?;
            Some((output.replace('\r', "").trim().to_owned(), status.to_owned()))
        })?;
        ensure!(status == "0", "{}: `{command}` ended with status {status}: {output}", self.vm);
        Ok(output)
    }

    /// Asks for what must be refused.
    pub(super) fn refused(&mut self, op: Op<'_>, code: Code) -> Result<()> {
        match self.client.call(op.clone()) {
            Err(ClientError::Refused(error)) if error.code == code => Ok(()),
            other => bail!("{op:?} should be refused with {code:?}, but: {other:?}"),
        }
    }

    fn note(&mut self, event: Event<'_>) -> Result<()> {
        match event {
            Event::Console { vm, data } if vm == self.vm => self.output += &String::from_utf8_lossy(&data.0),
            Event::Dropped { vm, bytes } if vm == self.vm => self.dropped += bytes,
            Event::InputReady { vm } if vm == self.vm => self.input_ready = true,
            Event::Doorbell { vm } if vm == self.vm => self.rung = true,
            Event::State { vm, state, reason } if vm == self.vm => {
                self.states.push((state, reason.map(Into::into)));
            }
            other => bail!("{} is attached, and this is told: {other:?}", self.vm),
        }
        Ok(())
    }

    /// Waits until `found` finds something in what was told.
    pub(super) fn until<T>(&mut self, what: &str, mut found: impl FnMut(&mut Self) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + ANSWER;
        loop {
            while let Some(event) = self.client.event() {
                self.note(event)?;
            }
            if let Some(found) = found(self) {
                return Ok(found);
            }
            let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))?;
            let ready = poll(&mut [PollFd::new(&self.client.as_fd(), PollFlags::IN)], Some(&left))?;
            ensure!(ready > 0, "{}: no {what}; output so far: {:?}", self.vm, self.output);
            for message in self.client.receive()? {
                match message {
                    Message::Event(event) => self.note(event)?,
                    Message::Response(response) => bail!("nobody asked for {response:?}"),
                }
            }
        }
    }

    /// Whether `text` was in the output so far; forgets everything up to its end then.
    pub(super) fn has_heard(&mut self, text: &str) -> bool {
        let end = self.output.find(text).map(|start| start + text.len());
        end.inspect(|end| drop(self.output.drain(..*end))).is_some()
    }

    /// Waits for `text` in the output, and forgets everything up to its end.
    pub(super) fn hear(&mut self, text: &str) -> Result<()> {
        self.until(text, |told| told.has_heard(text).then_some(()))
    }

    /// Waits for the end of a line, and forgets it; returns what stood before.
    pub(super) fn line(&mut self) -> Result<String> {
        self.until("line", Self::take_line)
    }

    /// Waits for `text`, as [`Self::hear`] does; false if this state is told first for this reason.
    pub(super) fn text_or_state(&mut self, text: &str, state: State, reason: &str) -> Result<bool> {
        self.until("text or state", |told| {
            let heard = told.has_heard(text);
            (heard || told.was_told(state, reason)).then_some(heard)
        })
    }

    /// The same of a line, or `None` if this state is told first for this reason.
    pub(super) fn line_or_state(&mut self, state: State, reason: &str) -> Result<Option<String>> {
        self.until("line or state", |told| {
            if let Some(line) = told.take_line() {
                return Some(Some(line));
            }
            told.was_told(state, reason).then_some(None)
        })
    }

    /// Whether this state was told for this reason; forgets everything up to that then.
    fn was_told(&mut self, state: State, reason: &str) -> bool {
        let place = self.states.iter().position(|(at, why)| (*at, why.as_deref()) == (state, Some(reason)));
        place.inspect(|place| drop(self.states.drain(..=*place))).is_some()
    }

    fn take_line(&mut self) -> Option<String> {
        let end = self.output.find('\n')? + 1;
        Some(self.output.drain(..end).collect::<String>().trim().to_owned())
    }

    /// Waits for a state.
    pub(super) fn state(&mut self, state: State, reason: Option<&str>) -> Result<()> {
        self.until("change of state", |told| {
            let place = told.states.iter().position(|(at, why)| (*at, why.as_deref()) == (state, reason))?;
            told.states.drain(..=place);
            Some(())
        })
    }

    /// Types a line; waits for room as often as needed.
    pub(super) fn type_line(&mut self, line: &str) -> Result<()> {
        self.type_through(line, None).map(drop)
    }

    /// The same; whenever the virtual machine is paused for this reason it is let go on. Returns how often.
    pub(super) fn type_through(&mut self, line: &str, reason: Option<&str>) -> Result<u32> {
        let line = format!("{line}\n");
        let mut rest = line.as_bytes();
        let mut paused = 0;
        while !rest.is_empty() {
            self.input_ready = false;
            let Answer::Accepted(taken) = self.ask(Op::Input { vm: self.vm.into(), data: rest.into() })? else {
                bail!("input has another answer");
            };
            rest = rest.get(taken as usize..).context("more was taken than given")?;
            if !rest.is_empty() {
                let stopped = self.until("room for input", |told| match reason {
                    Some(reason) if told.was_told(State::Paused, reason) => Some(true),
                    _ => told.input_ready.then_some(false),
                })?;
                if stopped {
                    paused += 1;
                    self.done(Op::Resume { vm: self.vm.into() })?;
                }
            }
        }
        Ok(paused)
    }

    /// It must be running.
    pub(super) fn expect_running(&mut self, vm: &str) -> Result<()> {
        let row = self.row(vm)?;
        ensure!(row.state == State::Running, "ps says {row:?}");
        Ok(())
    }

    pub(super) fn row(&mut self, vm: &str) -> Result<VmRow<'static>> {
        let Answer::Ps(rows) = self.ask(Op::Ps)? else { bail!("ps has no rows") };
        rows.into_iter().find(|row| row.name == vm).with_context(|| format!("ps has no {vm}"))
    }

    pub(super) fn stats(&mut self, vm: &str) -> Result<Stats<'static>> {
        let Answer::Stats(stats) = self.ask(Op::Stats { vm: vm.to_owned().into() })? else { bail!("no counters") };
        Ok(*stats)
    }

    pub(super) fn done(&mut self, op: Op<'_>) -> Result<()> {
        let answer = self.ask(op)?;
        ensure!(answer == Answer::Done, "the answer is {answer:?}");
        Ok(())
    }
}

/// How far a guest counts before it is paused, at least.
const COUNTED: u64 = 50;

/// Two guests; one is typed at, counted with, paused, resumed and killed, and the other does not notice.
pub fn owner_pauses_resumes_and_kills(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "owner_pauses_resumes_and_kills")?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let kernel = context.guest.kernel()?;
    let mut machine = builder.boot(vec![linux("one", &kernel, &initrd), linux("two", &kernel, &initrd)])?;
    machine.expect(initrd::READY)?;
    let mut two = Listener::attach(machine.control()?, "two")?;
    two.hear(initrd::PROMPT)?;
    two.type_line("echo $((6 * 7))nd")?;
    two.hear("42nd")?;
    two.type_line("while :; do i=$((i + 1)); echo count:$i:; done")?;
    two.hear(&format!("count:{COUNTED}:"))?;
    let last = pause_while_it_counts(&mut machine, &mut two)?;
    two.refused(Op::Pause { vm: "two".into() }, Code::WrongState)?;
    two.done(Op::Resume { vm: "two".into() })?;
    two.state(State::Running, None)?;
    two.hear(&format!("count:{}:", last + COUNTED))?;
    two.refused(Op::Resume { vm: "two".into() }, Code::WrongState)?;
    two.refused(Op::Stats { vm: "three".into() }, Code::NoSuchVm)?;
    two.refused(Op::Input { vm: "one".into(), data: (&b"x"[..]).into() }, Code::NotAttached)?;
    kill(&mut two)?;
    let uname = machine.shell("uname -s")?;
    ensure!(uname == "Linux", "uname says {uname:?}");
    two.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

/// A paused guest makes no exit and prints nothing. Returns how far it had counted.
fn pause_while_it_counts(machine: &mut Machine, two: &mut Listener) -> Result<u64> {
    two.done(Op::Pause { vm: "two".into() })?;
    two.state(State::Paused, Some("Owner"))?;
    let row = two.row("two")?;
    ensure!(row.state == State::Paused && row.reason.as_deref() == Some("Owner"), "ps says {row:?}");
    ensure!(two.row("one")?.state == State::Running, "the other is paused as well");
    let printed = std::mem::take(&mut two.output);
    let counts = printed.split("count:").filter_map(|rest| rest.split_once(':')?.0.parse::<u64>().ok());
    let last = counts.last().unwrap_or(COUNTED);
    let before = two.stats("two")?;
    // Time passes: the other guest works.
    machine.shell("seq 1 20000 | tail -n 1")?;
    let after = two.stats("two")?;
    ensure!(before.exits == after.exits && before.faults == after.faults, "it ran: {before:?}, then {after:?}");
    ensure!(two.output.is_empty(), "it printed {:?}", two.output);
    Ok(last)
}

/// Its memory is back when the answer comes.
fn kill(two: &mut Listener) -> Result<()> {
    let Answer::Slots(page) = two.ask(Op::Slots { vm: "two".into(), from: 0 })? else { bail!("no slots") };
    // Its memory, and the page of stolen time.
    let sizes: Vec<_> = page.rows.iter().map(|row| row.size).collect();
    ensure!(sizes == [two.row("two")?.memory, 4096], "its slots are {page:?}");
    let (held, free) = (two.stats("two")?.resident_frames, two.stats("one")?.free_frames);
    ensure!(held > 0, "a running guest has memory");
    two.done(Op::Kill { vm: "two".into() })?;
    let now_free = two.stats("one")?.free_frames;
    // The other one runs, and may have taken some.
    ensure!(now_free >= free + held / 10 * 9, "{free} frames were free, {held} were killed, {now_free} are free");
    two.state(State::Stopped, Some("Killed"))?;
    let row = two.row("two")?;
    ensure!((row.state, row.resident) == (State::Stopped, 0), "ps says {row:?}");
    two.refused(Op::Kill { vm: "two".into() }, Code::WrongState)
}

/// Clients that do not read, that say nonsense, that leave in the middle: the guest runs on, the next one is served.
pub fn client_that_does_not_read_stops_nobody(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "client_that_does_not_read_stops_nobody")?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let mut machine = builder.boot(vec![linux("guest", &context.guest.kernel()?, &initrd)])?;
    machine.expect(initrd::READY)?;
    let mut deaf = Listener::attach(machine.control()?, "guest")?;
    // Far more than what everybody between the guest and the client can keep.
    machine.shell("seq 1 150000")?;
    deaf.hear("150000\r\n")?;
    ensure!(deaf.dropped > 0, "nobody can have kept all of it");
    drop(deaf);
    requests_without_reading(&mut machine)?;
    nonsense(&mut machine)?;
    let mut guest = Listener::attach(machine.control()?, "guest")?;
    machine.type_line("exit")?;
    guest.hear("reboot: Power down")?;
    guest.state(State::Stopped, Some("PowerOff"))?;
    machine.expect_power_off().map(drop)
}

/// Every request is answered once and in order, however late the answers are read.
fn requests_without_reading(machine: &mut Machine) -> Result<()> {
    const REQUESTS: u64 = 5000;
    let (mut stream, mut lines) = connect(machine)?;
    let requests: String = (0..REQUESTS).map(|id| format!("{{\"id\":{id},\"op\":\"ps\"}}\n")).collect();
    stream.write_all(requests.as_bytes()).context("cannot send requests")?;
    machine.shell("uname -s")?;
    for wanted in 0..REQUESTS {
        let response = answer(&mut lines)?;
        ensure!(response.id == Some(wanted) && response.result.is_ok(), "request {wanted} has {response:?}");
    }
    Ok(())
}

/// Lines that are no requests are refused; a line that is not finished is not the next client's.
fn nonsense(machine: &mut Machine) -> Result<()> {
    let (mut stream, mut lines) = connect(machine)?;
    let mut refused = |line: &[u8], code| {
        stream.write_all(line).context("cannot send nonsense")?;
        let response = answer(&mut lines)?;
        match response.result {
            Err(error) if error.code == code => Ok(()),
            other => bail!("this should be refused with {code:?}, but: {other:?}"),
        }
    };
    refused(&[&[b'x'; MAX_LINE + 1][..], b"\n"].concat(), Code::LineTooLong)?;
    refused(b"{\n", Code::Malformed)?;
    refused(b"\0\xff\xfe\n", Code::Malformed)?;
    refused(b"{\"id\":1,\"op\":\"fly\"}\n", Code::UnknownOp)?;
    refused(b"{\"id\":1,\"op\":\"ps\",\"vm\":\"guest\"}\n", Code::BadField)?;
    stream.write_all(b"{\"id\":2,\"op\":\"shutdown\"").context("cannot send half a request")
}

/// A session that leaves the protocol to its user. What comes before its first answer was another's.
fn connect(machine: &Machine) -> Result<(UnixStream, BufReader<UnixStream>)> {
    const FIRST: u64 = 1 << 52;
    let mut stream = UnixStream::connect(machine.socket()).context("cannot connect")?;
    stream.set_read_timeout(Some(ANSWER)).context("cannot set a time limit")?;
    let mut lines = BufReader::new(stream.try_clone().context("cannot share the stream")?);
    let hello = format!("\n{{\"id\":{FIRST},\"op\":\"hello\"}}\n");
    stream.write_all(hello.as_bytes()).context("cannot say hello")?;
    let first = format!("{{\"id\":{FIRST},");
    let mut line = String::new();
    while !line.starts_with(&first) {
        line.clear();
        let count = lines.read_line(&mut line).context("no answer to hello")?;
        ensure!(count > 0, "the channel was closed");
    }
    Ok((stream, lines))
}

/// The next response; events are passed over.
fn answer(lines: &mut BufReader<UnixStream>) -> Result<Response<'static>> {
    loop {
        let mut line = String::new();
        let count = lines.read_line(&mut line).context("no answer")?;
        ensure!(count > 0, "the channel was closed");
        match Message::parse(line.trim_end().as_bytes()) {
            Ok(Message::Response(response)) => return Ok(response.into_owned()),
            Ok(Message::Event(_)) => {}
            Err(error) => bail!("{line:?} is no message: {error}"),
        }
    }
}
