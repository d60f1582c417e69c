//! One session on the control channel.
//!
//! QEMU serves one client at a time and lets a second one wait without a word. So that this is told and not waited for, a
//! client of ours holds a lock on a file beside the socket (`PATH.lock`); against clients of other kinds there is
//! only the time limit. The session starts as [`entresol_wire::control`] says: a newline, then `hello` with an id that no
//! other client would choose; whatever arrives before its response was meant for somebody else.

use std::collections::VecDeque;
use std::collections::hash_map::RandomState;
use std::fs::{File, TryLockError};
use std::hash::BuildHasher;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use entresol_wire::control::{
    Answer, Dirty, Error, Event, Hello, ID_LIMIT, Lines, MAX_LINE, Message, Op, PROTOCOL, PagePlace, PageRun, Request,
    Response, SlotRow,
};

use crate::{Exit, dirty};

/// Why a request has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens at the socket.
    #[error(
        "no hypervisor listens at {}: {error} (is it running? --socket or {} names another socket)",
        path.display(), crate::socket::VARIABLE
    )]
    NoHypervisor {
        /// The socket.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Another `entresol ctl` has the channel.
    #[error("busy: another `entresol ctl` is connected to {}, and one client at a time is served", path.display())]
    Busy {
        /// The socket.
        path: PathBuf,
    },
    /// The lock beside the socket cannot be used.
    #[error("cannot lock {}: {error}", path.display())]
    Lock {
        /// The lock's file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Nothing came in time.
    #[error(
        "no answer within {limit:?}: the hypervisor is not up yet or hangs, or another client is connected to {} (one at a \
         time is served)",
        path.display()
    )]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// The channel was closed.
    #[error("the hypervisor closed the control channel")]
    Closed,
    /// The channel failed.
    #[error("the control channel failed: {0}")]
    Failed(#[from] io::Error),
    /// What came is not this protocol.
    #[error("the hypervisor does not speak this protocol: {0}")]
    Protocol(String),
    /// The request was refused.
    #[error("refused: {0}")]
    Refused(Error),
}

impl ClientError {
    /// The program's exit status for it.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Refused(_) => Exit::Refused,
            _ => Exit::NoConnection,
        }
    }
}

/// A session.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: UnixStream,
    lines: Lines,
    /// Events that arrived while a response was waited for.
    events: VecDeque<Event<'static>>,
    /// Whether the session has begun: before that, lines may be remains of another.
    begun: bool,
    next_id: u64,
    limit: Duration,
    hello: Option<Hello<'static>>,
    /// Held until the session ends.
    _lock: Lock,
}

impl Client {
    /// Connects to the socket at `path`; nothing may take longer than `limit`.
    ///
    /// # Errors
    /// Nobody listens, somebody else is connected, or who answers is not our hypervisor.
    pub fn connect(path: &Path, limit: Duration) -> Result<Self, ClientError> {
        let nobody = |error| ClientError::NoHypervisor { path: path.to_owned(), error };
        path.metadata().map_err(nobody)?;
        let lock = Lock::take(path)?;
        let stream = UnixStream::connect(path).map_err(nobody)?;
        stream.set_write_timeout(Some(limit))?;
        let lines = Lines::new(MAX_LINE - 1).map_err(|error| io::Error::new(io::ErrorKind::OutOfMemory, error))?;
        let mut client = Self {
            path: path.to_owned(),
            stream,
            lines,
            events: VecDeque::new(),
            begun: false,
            next_id: RandomState::new().hash_one(std::process::id()) % (ID_LIMIT / 2),
            limit,
            hello: None,
            _lock: lock,
        };
        client.stream.write_all(b"\n")?;
        match client.call(Op::Hello)? {
            Answer::Hello(hello) if hello.protocol == PROTOCOL => client.hello = Some(hello),
            Answer::Hello(hello) => {
                let it = format!("{} {} has version {}, not {PROTOCOL}", hello.name, hello.version, hello.protocol);
                return Err(ClientError::Protocol(it));
            }
            other => return Err(unexpected(&Op::Hello, &other)),
        }
        Ok(client)
    }

    /// Who answered.
    pub fn hello(&self) -> Option<&Hello<'static>> {
        self.hello.as_ref()
    }

    /// Asks and waits for the answer. Events that come meanwhile are kept for [`Self::event`].
    ///
    /// # Errors
    /// The hypervisor refuses or does not answer.
    pub fn call(&mut self, op: Op<'_>) -> Result<Answer<'static>, ClientError> {
        let id = self.send(op)?;
        let deadline = Instant::now() + self.limit;
        let mut arrived = VecDeque::new();
        loop {
            while let Some(message) = arrived.pop_front() {
                match message {
                    Message::Event(event) => self.events.push_back(event),
                    Message::Response(response) if response.id == Some(id) => {
                        self.keep(arrived);
                        return response.result.map_err(ClientError::Refused);
                    }
                    Message::Response(response) => self.stray(response)?,
                }
            }
            self.wait(deadline)?;
            arrived.extend(self.receive()?);
        }
    }

    /// Every memory slot of a virtual machine, however many answers that takes.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn slots(&mut self, vm: &str) -> Result<Vec<SlotRow<'static>>, ClientError> {
        let mut rows = Vec::new();
        let mut from = 0;
        loop {
            let op = Op::Slots { vm: vm.into(), from };
            let page = match self.call(op.clone())? {
                Answer::Slots(page) => page,
                other => return Err(unexpected(&op, &other)),
            };
            rows.extend(page.rows);
            match page.next {
                None => return Ok(rows),
                Some(next) if next > from => from = next,
                Some(next) => return Err(ClientError::Protocol(format!("slots from {from} go on at {next}"))),
            }
        }
    }

    /// Runs of pages of `vm`, all that `what` gives piece by piece.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn pages(&mut self, vm: &str, what: impl Fn(PagePlace) -> Dirty<'static>) -> Result<Vec<PageRun>, ClientError> {
        let (mut runs, mut from) = (Vec::new(), PagePlace::default());
        loop {
            let op = Op::Dirty { vm: vm.into(), what: what(from) };
            let pages = match self.call(op.clone())? {
                Answer::Pages(pages) => pages,
                other => return Err(unexpected(&op, &other)),
            };
            runs.extend(pages.runs);
            match pages.next {
                None => return Ok(dirty::joined(runs)),
                Some(next) => from = next,
            }
        }
    }

    /// Sends a request without waiting; gives its id. For who reads messages with [`Self::receive`].
    ///
    /// # Errors
    /// It is too long, or the channel failed.
    pub fn send(&mut self, op: Op<'_>) -> Result<u64, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut buffer = vec![0; MAX_LINE];
        let request = Request { id, op };
        let line = request.encode(&mut buffer).map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        self.stream.write_all(line)?;
        Ok(id)
    }

    /// An event that arrived while an answer was waited for.
    pub fn event(&mut self) -> Option<Event<'static>> {
        self.events.pop_front()
    }

    /// Reads what has arrived, once: waits if nothing has. Gives the whole messages in it, perhaps none.
    ///
    /// # Errors
    /// The channel was closed or failed, or what came is no message.
    pub fn receive(&mut self) -> Result<Vec<Message<'static>>, ClientError> {
        let mut buffer = [0; 16 << 10];
        let count = match self.stream.read(&mut buffer) {
            Ok(0) => return Err(ClientError::Closed),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(ClientError::Closed),
            Err(error) => return Err(error.into()),
        };
        let mut rest = &buffer[..count];
        let mut messages = Vec::new();
        while let Some(line) = self.lines.next(&mut rest) {
            let message = line.map_err(|error| error.to_string()).and_then(Message::parse);
            match message {
                Ok(message) => messages.push(message.into_owned()),
                Err(_) if !self.begun => (),
                Err(error) => return Err(ClientError::Protocol(error)),
            }
        }
        if !self.begun {
            messages = self.after_hello(messages);
        }
        Ok(messages)
    }

    /// Drops what was meant for another session: everything before the response to our first request.
    fn after_hello(&mut self, messages: Vec<Message<'static>>) -> Vec<Message<'static>> {
        let first = self.next_id - 1;
        let ours = |message: &Message<'_>| matches!(message, Message::Response(it) if it.id == Some(first));
        let messages: Vec<_> = messages.into_iter().skip_while(|message| !ours(message)).collect();
        self.begun = !messages.is_empty();
        messages
    }

    /// Puts messages behind an answer where they will be found.
    fn keep(&mut self, messages: VecDeque<Message<'static>>) {
        self.events.extend(messages.into_iter().filter_map(|message| match message {
            Message::Event(event) => Some(event),
            Message::Response(_) => None,
        }));
    }

    /// A response that nobody waits for: a refusal without an id is about a line that could not be read, ours.
    fn stray(&self, response: Response<'_>) -> Result<(), ClientError> {
        match (response.id, response.result) {
            (None, Err(error)) => Err(ClientError::Refused(error)),
            _ => Ok(()),
        }
    }

    /// Waits until something can be read.
    fn wait(&self, deadline: Instant) -> Result<(), ClientError> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.stream, PollFlags::IN)], Some(&left)) {
            Ok(0) => Err(ClientError::NoAnswer { path: self.path.clone(), limit: self.limit }),
            // An interrupted wait goes round again with the time that is left.
            Ok(_) => Ok(()),
            Err(rustix::io::Errno::INTR) => self.wait(deadline),
            Err(error) => Err(ClientError::Failed(error.into())),
        }
    }
}

impl AsFd for Client {
    /// Readable when [`Client::receive`] will not wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// An answer of the wrong kind.
pub(crate) fn unexpected(op: &Op<'_>, answer: &Answer<'_>) -> ClientError {
    ClientError::Protocol(format!("it answers {:?} with {answer:?}", op.name()))
}

/// The lock beside a socket.
#[derive(Debug)]
struct Lock(File);

impl Lock {
    /// Takes it, or says who is in the way.
    fn take(socket: &Path) -> Result<Self, ClientError> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        let failed = |error| ClientError::Lock { path: path.clone(), error };
        let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => Ok(Self(file)),
            Err(TryLockError::WouldBlock) => Err(ClientError::Busy { path: socket.to_owned() }),
            Err(TryLockError::Error(error)) => Err(failed(error)),
        }
    }
}

impl Drop for Lock {
    /// Closing the file would not do: the lock belongs to the open file, and a program that another thread is just
    /// starting has that open as well until it runs (fork, then exec).
    fn drop(&mut self) {
        if let Err(error) = self.0.unlock() {
            eprintln!("entresol: the control channel's lock is not released before this program ends: {error}");
        }
    }
}
