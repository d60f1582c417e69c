//! The commands of `entresol ctl`: ask, show.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use entresol_wire::config::{format_size, parse_size};
use entresol_wire::control::{Alias, Answer, Bytes, MergeStatus, Op, State};
use serde::Serialize;

use crate::client::{Client, ClientError, unexpected};
use crate::console::{self, End};
use crate::dirty::{self, DirtyError, Shown};
use crate::tags::{self, TagsError};
use crate::{Exit, socket, table};

/// Seconds that a snapshot or a restore may take at least.
const SLOW_SECONDS: u64 = 3600;

/// Options of `entresol ctl`.
#[derive(Clone, Debug, Args)]
pub struct Ctl {
    /// The control channel's socket [default: $ENTRESOL_SOCKET, else $XDG_RUNTIME_DIR/entresol/ctl.sock, else
    /// entresol-UID/ctl.sock in the folder for temporary files]
    #[arg(long, value_name = "PATH", global = true)]
    pub socket: Option<PathBuf>,
    /// Print answers, and refusals on standard error, as one line of JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// Seconds to wait for an answer
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400),
          global = true)]
    pub timeout: u64,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What `entresol ctl swap` can do.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum Swap {
    /// Bring back all that is on it, for all who share it, and use it no more; says how much was read
    Off,
    /// Use it again; says how much it has room for
    On,
}

/// What `entresol ctl` can do.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// List virtual machines: state, vCPUs, memory
    Ps,
    /// Show what was counted for a virtual machine: faults, entries, TLB operations, exits
    Stats {
        /// Its name
        vm: String,
    },
    /// Show a virtual machine's memory slots
    Slots {
        /// Its name
        vm: String,
    },
    /// Show a virtual machine's memory at another address, too; or move such a slot, or delete it
    SetSlot {
        /// Its name
        vm: String,
        /// The slot's number, 16 to 59
        slot: u32,
        /// First guest physical address
        #[arg(long, value_name = "ADDRESS", value_parser = number)]
        base: u64,
        /// Bytes; 0 deletes the slot
        #[arg(long, value_name = "BYTES", value_parser = number)]
        size: u64,
        /// The memory's byte behind the first
        #[arg(long, value_name = "BYTES", default_value = "0", value_parser = number)]
        offset: u64,
        /// The guest's stores do not go through it
        #[arg(long)]
        read_only: bool,
    },
    /// Take what a virtual machine stored in its zones of coalesced MMIO, and how often its doorbells rang
    Posted {
        /// Its name
        vm: String,
    },
    /// Ask a virtual machine to put so much of its memory into its balloon; what is in it, `stats` shows
    Balloon {
        /// Its name
        vm: String,
        /// Bytes, or a size like 64M; 0 gives it all back
        #[arg(value_name = "SIZE", value_parser = number)]
        size: u64,
    },
    /// Prove that no private frame is in the hypervisor's own mapping but what it uses, and that all others are
    Audit,
    /// Read a page as a stray access of the hypervisor would: of private memory it faults
    Probe {
        /// The virtual machine's name
        vm: String,
        /// A guest physical address
        #[arg(value_parser = number)]
        address: u64,
    },
    /// Say that the memory behind a page is bad: nobody uses it again, and the guest's next access there is an external abort
    Poison {
        /// The virtual machine's name
        vm: String,
        /// A guest physical address in the page
        #[arg(value_parser = number)]
        gpa: u64,
    },
    /// Put so much of a virtual machine's memory, what it used least lately, on the swap device; says how much left when no more does
    Reclaim {
        /// Its name
        vm: String,
        /// Bytes, or a size like 64M
        #[arg(value_name = "SIZE", value_parser = number)]
        size: u64,
    },
    /// Stop or begin to use the swap device
    Swap {
        /// What to do
        #[command(subcommand)]
        what: Swap,
    },
    /// Read or write allocation tags of a virtual machine with `mte = true`
    Tags {
        /// What to do
        #[command(subcommand)]
        what: tags::What,
    },
    /// Stop a virtual machine's vCPUs until `resume`
    Pause {
        /// Its name
        vm: String,
    },
    /// Let a paused virtual machine run, or start one that was not started
    Resume {
        /// Its name
        vm: String,
    },
    /// End a virtual machine and give its memory back
    Kill {
        /// Its name
        vm: String,
    },
    /// Make a copy of a virtual machine that goes on where it is; both run, or are paused
    Fork {
        /// Its name
        vm: String,
        /// The copy's name
        name: String,
        /// Make N copies, called NAME-1 to NAME-N
        #[arg(long, value_name = "N")]
        count: Option<u32>,
    },
    /// Find out which pages a virtual machine writes: by a log, by rings, or since a mark
    Dirty {
        /// Its name
        vm: String,
        /// What to do
        #[command(subcommand)]
        what: dirty::What,
    },
    /// Show how many second-stage entries were used since this was asked last, by slot or for a range
    Young {
        /// Its name
        vm: String,
        /// First guest physical address of a range
        #[arg(long, value_name = "ADDRESS", value_parser = number, requires = "size")]
        base: Option<u64>,
        /// Bytes of the range
        #[arg(long, value_name = "BYTES", value_parser = number, requires = "base")]
        size: Option<u64>,
    },
    /// Show how far the search for equal pages is and what it took
    Merge {
        /// Go N times over all memory that takes part, at once, and wait for that: two make equal pages one that stay as they are
        #[arg(long, value_name = "N")]
        rounds: Option<u32>,
    },
    /// Join this terminal to a virtual machine's console; Ctrl-] q leaves it
    Console {
        /// Its name
        vm: String,
    },
    /// Write a virtual machine, as it is at one moment, into a file of the machine's store; it goes on meanwhile
    Snapshot {
        /// Its name
        vm: String,
        /// The file's name
        file: String,
        /// Write only what differs from this file: the machine's last snapshot, or the one that it was made from
        #[arg(long, value_name = "FILE")]
        base: Option<String>,
    },
    /// Make a virtual machine from a file of the machine's store; it goes on where it was
    Restore {
        /// The file's name
        file: String,
        /// The machine's name, if not as it was called
        name: Option<String>,
    },
    /// List the files of the machine's store
    Files,
    /// Take a file out of the machine's store
    RemoveFile {
        /// Its name
        file: String,
    },
    /// End everything and power the outer machine off
    Shutdown,
}

/// Carries a command out. Answers go to standard output, everything else to standard error.
pub fn run(ctl: Ctl) -> Exit {
    let json = ctl.json;
    match carry_out(ctl) {
        Ok(exit) => exit,
        Err(Failure::Client(ClientError::Refused(error))) if json => {
            eprintln!("{}", to_json(&error));
            Exit::Refused
        }
        Err(failure) => {
            eprintln!("entresol: {failure}");
            failure.exit()
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Socket(#[from] socket::Foreign),
    #[error("{0}")]
    File(DirtyError),
    #[error(transparent)]
    Tags(TagsError),
    #[error("cannot write the answer: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    fn exit(&self) -> Exit {
        match self {
            Self::Client(error) => error.exit(),
            Self::Tags(TagsError::After { error, .. }) => error.exit(),
            Self::Socket(_) => Exit::NoConnection,
            Self::File(_) | Self::Tags(_) | Self::Output(_) => Exit::Usage,
        }
    }
}

impl From<DirtyError> for Failure {
    fn from(error: DirtyError) -> Self {
        match error {
            DirtyError::Client(error) => Self::Client(error),
            error @ DirtyError::File { .. } => Self::File(error),
        }
    }
}

impl From<TagsError> for Failure {
    fn from(error: TagsError) -> Self {
        match error {
            TagsError::Client(error) => Self::Client(error),
            error @ (TagsError::After { .. } | TagsError::Input(_)) => Self::Tags(error),
        }
    }
}

fn carry_out(ctl: Ctl) -> Result<Exit, Failure> {
    let socket = ctl.socket.map_or_else(socket::default_path, Ok)?;
    // A whole memory goes to the disk, or comes from there.
    let slow = matches!(
        ctl.command,
        Command::Snapshot { .. } | Command::Restore { .. } | Command::Reclaim { .. } | Command::Swap { .. }
    );
    let seconds = if slow { ctl.timeout.max(SLOW_SECONDS) } else { ctl.timeout };
    let mut client = Client::connect(&socket, Duration::from_secs(seconds))?;
    let out = Out { json: ctl.json };
    match ctl.command {
        Command::Ps => match client.call(Op::Ps)? {
            Answer::Ps(rows) => out.answer(&rows, || table::ps(&rows))?,
            other => return Err(unexpected(&Op::Ps, &other).into()),
        },
        Command::Stats { vm } => {
            let op = Op::Stats { vm: vm.into() };
            match client.call(op.clone())? {
                Answer::Stats(stats) => out.answer(&stats, || table::stats(&stats))?,
                other => return Err(unexpected(&op, &other).into()),
            }
        }
        Command::Slots { vm } => {
            let rows = client.slots(&vm)?;
            out.answer(&rows, || table::slots(&rows))?;
        }
        Command::SetSlot { vm, slot, base, size, offset, read_only } => {
            let slot = Alias { number: slot, base, size, offset, read_only };
            done(&mut client, Op::SetSlot { vm: vm.into(), slot }, &out)?;
        }
        Command::Posted { vm } => {
            let op = Op::Posted { vm: vm.into() };
            match client.call(op.clone())? {
                Answer::Posted(posted) => out.answer(&posted, || table::posted(&posted))?,
                other => return Err(unexpected(&op, &other).into()),
            }
        }
        Command::Balloon { vm, size } => done(&mut client, Op::Balloon { vm: vm.into(), size }, &out)?,
        Command::Audit => match client.call(Op::Audit)? {
            Answer::Audit(audit) => {
                out.answer(&audit, || table::audit(&audit))?;
                return Ok(if audit.wrong == 0 { Exit::Done } else { Exit::Refused });
            }
            other => return Err(unexpected(&Op::Audit, &other).into()),
        },
        Command::Probe { vm, address } => {
            let op = Op::Probe { vm: vm.into(), address };
            match client.call(op.clone())? {
                Answer::Probe(probe) => out.answer(&probe, || table::probe(&probe))?,
                other => return Err(unexpected(&op, &other).into()),
            }
        }
        Command::Poison { vm, gpa } => {
            let op = Op::Poison { vm: vm.into(), gpa };
            match client.call(op.clone())? {
                Answer::Poisoned(poisoned) => out.answer(&poisoned, || table::poisoned(&poisoned))?,
                other => return Err(unexpected(&op, &other).into()),
            }
        }
        Command::Reclaim { vm, size } => {
            let op = Op::Reclaim { vm: vm.into(), size };
            match client.call(op.clone())? {
                Answer::Count(left) => out.answer(&Answer::Count(left), || format!("{} left\n", format_size(left)))?,
                other => return Err(unexpected(&op, &other).into()),
            }
        }
        Command::Swap { what } => {
            let (op, means) = match what {
                Swap::Off => (Op::SwapOff, "came back"),
                Swap::On => (Op::SwapOn, "of room"),
            };
            match client.call(op.clone())? {
                Answer::Count(bytes) => {
                    out.answer(&Answer::Count(bytes), || format!("{} {means}\n", format_size(bytes)))?;
                }
                other => return Err(unexpected(&op, &other).into()),
            }
        }
        Command::Tags { what: tags::What::Read { vm, gpa, size } } => {
            let (read, whole) = tags::read(&mut client, &vm, gpa, size);
            if !read.is_empty() {
                out.answer(&Answer::Tags(Bytes::from(&read[..])), || tags::text(&read))?;
            }
            whole?;
        }
        Command::Tags { what: tags::What::Write { vm, gpa, size } } => {
            let given = tags::parse(io::stdin().lock(), size)?;
            let pages = tags::write(&mut client, &vm, gpa, &given)?;
            out.answer(&Answer::Count(pages), || format!("{pages} pages\n"))?;
        }
        Command::Pause { vm } => done(&mut client, Op::Pause { vm: vm.into() }, &out)?,
        Command::Resume { vm } => done(&mut client, Op::Resume { vm: vm.into() }, &out)?,
        Command::Kill { vm } => done(&mut client, Op::Kill { vm: vm.into() }, &out)?,
        Command::Fork { vm, name, count } => {
            done(&mut client, Op::Fork { vm: vm.into(), name: name.into(), count }, &out)?
        }
        Command::Dirty { vm, what } => match dirty::run(&mut client, &vm, what)? {
            Shown::Done => out.answer(&Answer::Done, String::new)?,
            Shown::Pages(runs, slots) => out.answer(&runs, || table::pages(&runs, &slots))?,
            Shown::Count(count) => out.answer(&count, || format!("{count} pages\n"))?,
        },
        Command::Young { vm, base, size } => {
            let ranges = match (base, size) {
                (Some(base), Some(size)) => vec![(base, size)],
                _ => client.slots(&vm)?.iter().map(|row| (row.base, row.size)).collect(),
            };
            let mut young = Vec::new();
            for (base, size) in ranges {
                let op = Op::Young { vm: vm.as_str().into(), base, size };
                match client.call(op.clone())? {
                    Answer::Count(count) => young.push((base, size, count)),
                    other => return Err(unexpected(&op, &other).into()),
                }
            }
            out.answer(&young, || table::young(&young))?;
        }
        Command::Merge { rounds } => {
            let status = merge(&mut client, rounds)?;
            out.answer(&status, || table::merge(&status))?;
        }
        Command::Console { vm } => return Ok(left(console::attach(&mut client, &vm)?)),
        Command::Snapshot { vm, file, base } => {
            let base = base.map(Into::into);
            done(&mut client, Op::Snapshot { vm: vm.into(), file: file.into(), base }, &out)?
        }
        Command::Restore { file, name } => {
            done(&mut client, Op::Restore { file: file.into(), name: name.map(Into::into) }, &out)?
        }
        Command::Files => match client.call(Op::Files)? {
            Answer::Files(files) => out.answer(&files, || table::files(&files))?,
            other => return Err(unexpected(&Op::Files, &other).into()),
        },
        Command::RemoveFile { file } => done(&mut client, Op::RemoveFile { file: file.into() }, &out)?,
        Command::Shutdown => match done(&mut client, Op::Shutdown, &out) {
            // The machine may be gone before its answer is out.
            Err(Failure::Client(ClientError::Closed)) => out.answer(&Answer::Done, String::new)?,
            other => other?,
        },
    }
    Ok(Exit::Done)
}

/// Asks for rounds and waits for the last, or only asks how far it is.
fn merge(client: &mut Client, rounds: Option<u32>) -> Result<MergeStatus, ClientError> {
    let mut op = Op::Merge { rounds };
    loop {
        match client.call(op.clone())? {
            Answer::Merge(status) if rounds.is_none() || status.rounds_left == 0 => return Ok(status),
            // The hypervisor answers between two steps; asking more often would only make it slower.
            Answer::Merge(_) => std::thread::sleep(MERGE_POLL),
            other => return Err(unexpected(&op, &other)),
        }
        op = Op::Merge { rounds: None };
    }
}

/// How long `merge` waits before it asks again.
const MERGE_POLL: Duration = Duration::from_millis(100);

/// A number, decimal or after `0x`, or a size like `64K`.
pub(crate) fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok().or_else(|| parse_size(text)),
    };
    parsed.ok_or_else(|| "must be a whole number, decimal or after 0x, or one followed by K, M, G or T".to_owned())
}

/// A request whose answer is only that it is done.
fn done(client: &mut Client, op: Op<'_>, out: &Out) -> Result<(), Failure> {
    match client.call(op.clone())? {
        Answer::Done => Ok(out.answer(&Answer::Done, String::new)?),
        other => Err(unexpected(&op, &other).into()),
    }
}

/// The exit status after a console; a signal ends the program by itself.
fn left(end: End) -> Exit {
    match end {
        End::Over { state: State::Crashed, .. } => Exit::Refused,
        End::Signal(signal) => {
            if let Err(error) = signal_hook::low_level::emulate_default_handler(signal) {
                eprintln!("entresol: signal {signal} does not end this program: {error}");
            }
            Exit::NoConnection
        }
        End::Quit | End::Over { .. } | End::OutputClosed => Exit::Done,
    }
}

struct Out {
    json: bool,
}

impl Out {
    fn answer(&self, answer: &impl Serialize, table: impl FnOnce() -> String) -> io::Result<()> {
        crate::print(&if self.json { to_json(answer) + "\n" } else { table() })
    }
}

fn to_json(answer: &impl Serialize) -> String {
    serde_json::to_string(answer).expect("every key of an answer is a text")
}
