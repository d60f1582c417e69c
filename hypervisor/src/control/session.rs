//! The session with whoever is connected: requests in, responses and events out.
//!
//! Protocol: as [`entresol_wire::control`] says. [`Session::serve`] does what can be done now and returns; the channel's
//! interrupt, a guest's output, or a change of a VM brings it back. A console's output is not copied when it is printed:
//! its terminal keeps the last of it, the session remembers how far it has told, and what was overwritten before it was
//! told is [`Event::Dropped`].
//!
//! `kill` and `shutdown` are answered when the VMs are taken apart, which the registry does, without the session's lock:
//! [`Session::serve`] asks for it by [`Then::Settle`], and answers when it is called again; or in [`Session::farewell`], when
//! no VM is left.
//!
//! Invariants: events take no heap. One call does a bounded amount of work, whatever guests and clients do.
//! Lock order: session → channel; session → registry → a VM's status → scheduler; session → a terminal.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;

use crate::arch::timer;
use entresol_sync::Mutex;
use entresol_sync::atomic::Ordering;
use entresol_wire::control::{Answer, Bytes, CONSOLE_CHUNK, Code, Error, Event, Malformed, Request, Response};

use super::channel::{Channel, Received};
use super::later::Later;
use super::ops::{self, Outcome};
use super::stream::{self, Reader, Writer};
use super::{PRINTED, ROOM, describe};
use crate::console::Terminal;
use crate::host_work::{self, Work};
use crate::registry;
use crate::vm::{OutOfHeap, Status};

/// Requests, and pieces of output, that one call serves at most: then guests get their turn.
const AT_ONCE: usize = 32;
/// How long the last words may take, in milliseconds.
const LAST_WORDS_MS: u64 = 500;

/// A console that is attached.
pub struct Attached {
    /// Its virtual machine's number.
    pub number: usize,
    /// Its virtual machine's name.
    pub name: String,
    terminal: Arc<Terminal>,
    /// How far its output was told.
    position: u64,
    /// The state that was told last.
    told: Status,
    /// Its owner has resumed it since: the state may be the same again, and is news.
    pub resumed: bool,
    /// The client waits for room for input.
    pub input_waits: bool,
}

impl Attached {
    /// `terminal` of virtual machine `number`, from the oldest output that it keeps.
    pub fn new(number: usize, name: String, terminal: Arc<Terminal>, told: Status) -> Self {
        let (position, _) = terminal.read_from(0, &mut []);
        Self { number, name, terminal, position, told, resumed: false, input_waits: false }
    }
}

/// What the caller of [`Session::serve`] does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing.
    Return,
    /// Has the registry take apart what has ended; then it calls again.
    Settle,
}

/// When a request is answered.
enum When {
    /// When what has ended is taken apart.
    Settled,
    /// When a task says so.
    Later(Later),
}

/// A session, whether somebody is there or not.
pub struct Session {
    reader: Reader,
    writer: Writer,
    attached: Option<Attached>,
    /// The request that is answered later, and when.
    unanswered: Option<(u64, When)>,
    output: Box<[u8]>,
}

impl Session {
    /// Nobody has said anything.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn new() -> Result<Self, OutOfHeap> {
        Ok(Self {
            reader: Reader::new()?,
            writer: Writer::new()?,
            attached: None,
            unanswered: None,
            output: stream::room(CONSOLE_CHUNK)?,
        })
    }

    /// Does what can be done now.
    pub fn serve(&mut self, channel: &Mutex<Channel>) -> Then {
        self.answer_unanswered();
        let then = self.hear(channel);
        if then == Then::Return {
            self.tell_news(channel);
            self.wait_for_room(channel);
        }
        then
    }

    /// The last chance to say something: the machine is about to turn off.
    pub fn farewell(&mut self, channel: &Mutex<Channel>) {
        self.answer_unanswered();
        let deadline = timer::now() + timer::frequency() / 1000 * LAST_WORDS_MS;
        loop {
            let all_told = self.tell_news(channel);
            channel.lock().flush(deadline);
            if timer::now() >= deadline || all_told && self.writer.is_empty() {
                return;
            }
        }
    }

    fn answer_unanswered(&mut self) {
        if !self.writer.has_room() {
            return;
        }
        let result = match &self.unanswered {
            Some((_, When::Settled)) => Some(Ok(Answer::Done)),
            Some((_, When::Later(later))) => later.take(),
            None => None,
        };
        if let Some(result) = result
            && let Some((id, _)) = self.unanswered.take()
        {
            self.writer.respond(Some(id), Response { id: Some(id), result });
        }
    }

    /// Reads requests and carries them out.
    fn hear(&mut self, channel: &Mutex<Channel>) -> Then {
        for _ in 0..AT_ONCE {
            self.writer.push(channel);
            // Answers come in the order of the requests.
            if !self.writer.has_room() || self.unanswered.is_some() {
                return Then::Return;
            }
            let Some(line) = self.reader.line() else {
                match self.reader.fill(channel) {
                    Some(Received::Bytes(_)) => continue,
                    Some(Received::Closed) => {
                        self.reset();
                        continue;
                    }
                    None => return Then::Return,
                }
            };
            let response = match line.map(Request::parse) {
                Err(error) => {
                    let error = Error::new(Code::LineTooLong, alloc::format!("{error}"));
                    Response { id: None, result: Err(error) }
                }
                Ok(Err(malformed @ Malformed { .. })) => malformed.into(),
                Ok(Ok(Request { id, op })) => match ops::carry_out(&op, &mut self.attached) {
                    Ok(Outcome::Done(answer)) => Response { id: Some(id), result: Ok(answer) },
                    Ok(Outcome::WhenSettled) => {
                        self.unanswered = Some((id, When::Settled));
                        return Then::Settle;
                    }
                    Ok(Outcome::Later(later)) => {
                        self.unanswered = Some((id, When::Later(later)));
                        continue;
                    }
                    Err(error) => Response { id: Some(id), result: Err(error) },
                },
            };
            self.writer.respond(response.id, response);
        }
        host_work::raise(Work::Control);
        Then::Return
    }

    /// Whoever was there is gone.
    fn reset(&mut self) {
        self.reader.reset();
        self.writer.reset();
        // What was asked for is done all the same; nobody is there to be told.
        self.unanswered = None;
        ops::detach(&mut self.attached);
    }

    /// Tells what happened to the attached virtual machine. True if everything is told.
    fn tell_news(&mut self, channel: &Mutex<Channel>) -> bool {
        let Some(attached) = &mut self.attached else {
            self.writer.push(channel);
            return true;
        };
        // Cleared before the output is looked at: what is printed later raises the work again.
        PRINTED.store(false, Ordering::SeqCst);
        let mut all_output = false;
        for _ in 0..AT_ONCE {
            self.writer.push(channel);
            if !self.writer.has_room() {
                // The channel's interrupt comes when there is: until then no output raises the work.
                PRINTED.store(true, Ordering::SeqCst);
                return false;
            }
            if !tell_output(attached, &mut self.output, &mut self.writer) {
                all_output = true;
                break;
            }
        }
        if !all_output {
            host_work::raise(Work::Control);
            return false;
        }
        if attached.input_waits && ROOM.swap(false, Ordering::SeqCst) {
            attached.input_waits = false;
            self.writer.tell(Event::InputReady { vm: attached.name.as_str().into() });
            self.writer.push(channel);
        }
        if self.writer.has_room() && registry::find(attached.number).is_some_and(|vm| vm.posted.heard()) {
            self.writer.tell(Event::Doorbell { vm: attached.name.as_str().into() });
            self.writer.push(channel);
        }
        // After its output: a client leaves when it hears that the virtual machine has ended.
        if self.writer.has_room() {
            tell_state(attached, &mut self.writer);
        }
        self.writer.push(channel);
        true
    }

    /// Has the channel call when there is room, if something waits for it.
    fn wait_for_room(&mut self, channel: &Mutex<Channel>) {
        let there_is_some = channel.lock().want_room(!self.writer.is_empty());
        if there_is_some {
            host_work::raise(Work::Control);
        }
    }
}

/// Tells the next piece of output; false if there is none.
fn tell_output(attached: &mut Attached, buffer: &mut [u8], writer: &mut Writer) -> bool {
    let (start, count) = attached.terminal.read_from(attached.position, buffer);
    let lost = start - attached.position;
    attached.position = start + count as u64;
    let vm = || attached.name.as_str().into();
    if lost > 0 {
        writer.tell(Event::Dropped { vm: vm(), bytes: lost });
        if !writer.has_room() {
            // The piece is told when there is room; what is overwritten until then is lost as well.
            attached.position = start;
            return true;
        }
    }
    if count > 0 {
        writer.tell(Event::Console { vm: vm(), data: Bytes::from(&buffer[..count]) });
    }
    count > 0
}

/// Tells the state, if it is another than was told, or has been another in between.
fn tell_state(attached: &mut Attached, writer: &mut Writer) {
    let Some(status) = registry::status(attached.number) else { return };
    let resumed = core::mem::take(&mut attached.resumed);
    if status == attached.told && !resumed {
        return;
    }
    attached.told = status;
    let (state, reason) = describe(status);
    let reason = reason.as_ref().map(|reason| reason.as_str().into());
    writer.tell(Event::State { vm: attached.name.as_str().into(), state, reason });
}
