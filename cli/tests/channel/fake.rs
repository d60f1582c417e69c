//! A hypervisor's side of the control channel, played over a Unix socket: it knows two virtual machines, `web` and `db`.
//!
//! Its guest echoes what it is given, takes about half of the input it is given and has room again at once, stops
//! when it reads `poweroff`, and crashes when it reads `crash`.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use entresol_wire::Refusal;
use entresol_wire::control::*;
use tempfile::TempDir;

/// Longer than anything takes; only a failure waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

pub struct Fake {
    folder: TempDir,
    said: Receiver<String>,
}

/// How the fake differs from a well-behaved hypervisor.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Manner {
    /// Not at all.
    #[default]
    Good,
    /// It accepts and says nothing.
    Silent,
    /// Before its first answer come remains of a former session.
    Remains,
    /// It says another version of the protocol.
    Newer,
    /// It closes the channel when asked for anything but `hello`.
    Closing,
}

impl Fake {
    pub fn start(manner: Manner) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let listener = UnixListener::bind(folder.path().join("ctl.sock")).expect("a socket");
        let (saying, said) = channel();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.expect("a client");
                let mut guest = Guest { stream, saying: saying.clone(), manner, vm: None, taken: Vec::new() };
                guest.serve();
            }
        });
        Self { folder, said }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("ctl.sock")
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Waits for the next request; its operation, and what input it has.
    pub fn said(&self) -> String {
        self.said.recv_timeout(PATIENCE).expect("a request")
    }

    /// Waits until a request like this came.
    pub fn until(&self, wanted: &str) {
        while self.said() != wanted {}
    }
}

struct Guest {
    stream: UnixStream,
    saying: Sender<String>,
    manner: Manner,
    vm: Option<String>,
    taken: Vec<u8>,
}

impl Guest {
    fn serve(&mut self) {
        let mut lines = Lines::new(MAX_LINE - 1).expect("heap");
        let mut buffer = [0; 4096];
        loop {
            let count = match self.stream.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(count) => count,
            };
            let mut rest = &buffer[..count];
            while let Some(line) = lines.next(&mut rest) {
                let request = Request::parse(line.expect("short lines")).expect("a request");
                let data = match &request.op {
                    Op::Input { data, .. } => format!(" {}", String::from_utf8_lossy(&data.0)),
                    Op::SetSlot { slot, .. } => format!(" {slot:?}"),
                    Op::Slots { from, .. } => format!(" {from}"),
                    Op::Balloon { size, .. } | Op::Reclaim { size, .. } => format!(" {size}"),
                    _ => String::new(),
                };
                let said = format!("{}{data}", request.op.name());
                let goes_on = self.answer(&request);
                // The test may be over.
                if self.saying.send(said).is_err() || !goes_on {
                    return;
                }
            }
        }
    }

    fn send(&mut self, message: &Message<'_>) {
        let mut buffer = vec![0; MAX_LINE];
        let line = message.encode(&mut buffer).expect("room");
        // A client that left is a client that left.
        drop(self.stream.write_all(line));
    }

    fn event(&mut self, event: Event<'_>) {
        self.send(&Message::Event(event));
    }

    fn respond(&mut self, id: u64, result: Result<Answer<'_>, Error>) {
        self.send(&Message::Response(Response { id: Some(id), result }));
    }

    /// Whether the session goes on.
    fn answer(&mut self, request: &Request<'_>) -> bool {
        let id = request.id;
        if self.manner == Manner::Silent {
            return true;
        }
        if self.manner == Manner::Closing && request.op != Op::Hello {
            return false;
        }
        if let Some(vm) = request.op.vm()
            && !["web", "db"].contains(&vm)
        {
            self.respond(id, Err(Error::no_such_vm(vm)));
            return true;
        }
        match &request.op {
            Op::Hello => self.hello(id),
            Op::Ps => self.respond(id, Ok(Answer::Ps(vec![row("web", State::Running), row("db", State::Paused)]))),
            Op::Stats { .. } => self.respond(id, Ok(Answer::Stats(Box::new(stats())))),
            Op::Slots { from, .. } => self.respond(id, Ok(Answer::Slots(page(*from)))),
            Op::Posted { .. } => self.respond(id, Ok(Answer::Posted(posted()))),
            Op::Merge { rounds } => self.respond(id, Ok(Answer::Merge(merge(*rounds)))),
            Op::Audit => {
                let audit = Audit { frames: 4096, private: 512, pages: 100, wrong: 1, ..Audit::default() };
                self.respond(id, Ok(Answer::Audit(Audit { example: Some(0x4_7e00), ..audit })));
            }
            Op::Probe { vm, .. } => {
                let fault = (vm == "web").then_some(ProbeFault { syndrome: 0x9600_0006, address: 0x47e0_0000 });
                self.respond(id, Ok(Answer::Probe(Probe { frame: 0x4_7e00, private: vm == "web", fault })));
            }
            Op::Poison { vm, gpa } if *gpa != 0 => {
                let private = vm == "web";
                self.respond(id, Ok(Answer::Poisoned(Poisoned { frame: gpa >> 12, private })));
            }
            Op::Poison { .. } => {
                let refusal = Refusal::new("gpa", "0x0", "must be memory");
                self.respond(id, Err(Error::refused(Code::BadField, refusal)));
            }
            Op::Console { vm } => {
                self.vm = Some(vm.to_string());
                self.respond(id, Ok(Answer::Done));
                self.print(b"kept\n");
            }
            Op::Input { data, .. } => self.input(id, &data.0),
            Op::Pause { vm } if vm == "db" => {
                let error = Error::new(Code::WrongState, "db is paused already");
                self.respond(id, Err(error));
            }
            Op::Fork { name, count, .. } if name != "copy" || count.is_some_and(|count| count != 3) => {
                let refusal = Refusal::text("name", name, "must be copy");
                self.respond(id, Err(Error::refused(Code::BadField, refusal)));
            }
            Op::Files => self.respond(id, Ok(Answer::Files(files()))),
            Op::ReadTags { gpa, size, .. } => {
                let pages = tagged_pages(*gpa).min(size >> 12);
                let tags: Vec<u8> = (0..pages << 8).map(|granule| ((gpa >> 12) + granule) as u8 & 0xf).collect();
                let refusal = Refusal::new("gpa", gpa, "must be memory");
                let end = || Err(Error::refused(Code::BadField, refusal));
                self.respond(id, if pages == 0 { end() } else { Ok(Answer::Tags(Bytes::from(&tags[..]))) });
            }
            Op::WriteTags { gpa, tags, .. } => {
                let pages = tagged_pages(*gpa).min(tags.0.len() as u64 >> 8);
                let refusal = Refusal::new("gpa", gpa, "must be memory");
                self.respond(
                    id,
                    if pages == 0 { Err(Error::refused(Code::BadField, refusal)) } else { Ok(Answer::Count(pages)) },
                );
            }
            Op::Reclaim { size, .. } => self.respond(id, Ok(Answer::Count(*size))),
            Op::SwapOff => self.respond(id, Ok(Answer::Count(8192))),
            Op::SwapOn => self.respond(id, Err(Error::new(Code::StoreFailed, "no disk"))),
            Op::Young { size, .. } => self.respond(id, Ok(Answer::Count(*size >> 12))),
            Op::Dirty { what: Dirty::Get(from), .. } => self.respond(id, Ok(Answer::Pages(dirty_pages(*from)))),
            Op::Dirty { what: Dirty::Clear { bits, .. }, .. } => {
                let count = bits.0.iter().map(|byte| u64::from(byte.count_ones())).sum();
                self.respond(id, Ok(Answer::Count(count)));
            }
            Op::Dirty { what: Dirty::Harvest, .. } => {
                let refusal = Refusal::text("vm", "web", "must keep a dirty log that was started with rings");
                self.respond(id, Err(Error::refused(Code::WrongState, refusal)));
            }
            Op::Dirty { .. }
            | Op::SetSlot { .. }
            | Op::Snapshot { .. }
            | Op::Restore { .. }
            | Op::RemoveFile { .. }
            | Op::Balloon { .. }
            | Op::Fork { .. }
            | Op::Pause { .. }
            | Op::Resume { .. }
            | Op::Kill { .. }
            | Op::Detach
            | Op::Shutdown => {
                self.respond(id, Ok(Answer::Done));
            }
        }
        true
    }

    fn hello(&mut self, id: u64) {
        if self.manner == Manner::Remains {
            drop(self.stream.write_all(b"half of a line\"}}\n{\"id\":1,\"ok\":\"done\"}\n"));
            self.event(Event::Console { vm: "web".into(), data: b"for somebody else".as_slice().into() });
        }
        let protocol = if self.manner == Manner::Newer { PROTOCOL + 1 } else { PROTOCOL };
        self.respond(id, Ok(Answer::Hello(Hello { protocol, ..Hello::this() })));
    }

    fn input(&mut self, id: u64, data: &[u8]) {
        let vm = self.vm.clone().expect("attached");
        let taken = data.len() / 2 + 1;
        self.taken.extend_from_slice(&data[..taken]);
        self.respond(id, Ok(Answer::Accepted(taken as u32)));
        self.print(&data[..taken]);
        let has = |taken: &[u8], word: &[u8]| taken.windows(word.len()).any(|window| window == word);
        if has(&self.taken, b"poweroff\n") {
            self.event(Event::State { vm: vm.into(), state: State::Stopped, reason: Some("SystemOff".into()) });
        } else if has(&self.taken, b"crash\n") {
            self.event(Event::State { vm: vm.into(), state: State::Crashed, reason: None });
        } else if taken < data.len() {
            self.event(Event::InputReady { vm: vm.into() });
        }
    }

    fn print(&mut self, data: &[u8]) {
        let vm = self.vm.clone().expect("attached");
        self.event(Event::Console { vm: vm.into(), data: data.into() });
    }
}

fn row(name: &'static str, state: State) -> VmRow<'static> {
    let reason = (state == State::Paused).then(|| "OutOfMemory".into());
    VmRow { name: name.into(), state, reason, vcpus: 2, memory: 512 << 20, resident: 8192 }
}

fn stats() -> Stats<'static> {
    Stats { table_pages: 5, exits: [("wfi".into(), 6)].into(), ..Stats::default() }
}

/// Asked for rounds, it has one left; asked again, none.
fn merge(rounds: Option<u32>) -> MergeStatus {
    let rounds_left = u32::from(rounds.is_some());
    MergeStatus { vms: 2, rounds: 7, rounds_left, scanned: 100, nanoseconds: 5000, ..MergeStatus::default() }
}

fn posted() -> Posted {
    let write = PostedWrite { address: 0x0c00_0000, size: 4, value: Hex(0x2a) };
    Posted { writes: vec![write], doorbells: vec![Rings { address: 0x0c00_1000, rings: 7 }] }
}

/// Three slots, two at a time.
fn page(from: u32) -> SlotPage<'static> {
    let row = |id: u32| SlotRow {
        id,
        base: u64::from(id) << 30,
        size: 2 << 20,
        object: 1,
        kind: "anonymous".into(),
        flags: Vec::new(),
    };
    let rows: Vec<_> = (from..3).take(2).map(row).collect();
    let next = (from + 2 < 3).then_some(from + 2);
    SlotPage { rows, next }
}

pub fn files() -> Files<'static> {
    let row = |name: &'static str, base: Option<&'static str>| FileRow {
        name: name.into(),
        length: 8192,
        base: base.map(Into::into),
    };
    Files { size: 1 << 30, free: 1 << 20, rows: vec![row("old", None), row("new", Some("old"))] }
}

/// Pages with tags from `gpa` on: memory ends after 100 of them.
fn tagged_pages(gpa: u64) -> u64 {
    (0x4000_0000u64 + (100 << 12)).saturating_sub(gpa) >> 12
}

/// Dirty pages in two pieces that meet.
fn dirty_pages(from: PagePlace) -> Pages {
    match from.page {
        0 => Pages { runs: vec![PageRun(0, 5, 2), PageRun(0, 60, 4)], next: Some(PagePlace { slot: 0, page: 64 }) },
        _ => Pages { runs: vec![PageRun(0, 64, 1)], next: None },
    }
}
