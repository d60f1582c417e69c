//! What a machine has printed, and how long to wait for more.
//!
//! A deadline is a statement about the machine, not about the clock of a host that may be busy with other things: a
//! machine that prints makes progress; one that has computed for [`Patience::computing`] of its own CPU time in silence
//! does not, and neither does one that was idle for [`Patience::idle`] of ours. The overall limit only ends a machine
//! that prints for ever.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a machine may be silent.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// CPU time of QEMU since the last byte.
    pub computing: Duration,
    /// Wall-clock time since the last byte.
    pub idle: Duration,
    /// Wall-clock time of one wait.
    pub overall: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { computing: Duration::from_secs(180), idle: Duration::from_secs(300), overall: Duration::from_secs(1200) }
    }
}

/// How often the CPU time is looked at; a byte wakes the waiter at once.
const LOOK: Duration = Duration::from_secs(1);
/// How much of the log a failure shows.
const TAIL_LINES: usize = 30;

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A machine's output, read by a thread into memory and a log file.
pub struct Transcript {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<Result<()>>>,
    log: PathBuf,
    /// Everything before it was expected already.
    cursor: usize,
    pid: u32,
    /// Limits of every wait.
    pub patience: Patience,
}

impl Transcript {
    /// Starts reading `from`, the output of process `pid`, into the file `log` too.
    ///
    /// # Errors
    /// When the log cannot be made.
    pub fn start(mut from: impl Read + Send + 'static, pid: u32, log: &Path) -> Result<Self> {
        let mut file = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            let result = loop {
                match from.read(&mut buffer) {
                    Ok(0) => break Ok(()),
                    Ok(count) => {
                        writer.lock().bytes.extend_from_slice(&buffer[..count]);
                        writer.changed.notify_all();
                        if let Err(error) = file.write_all(&buffer[..count]) {
                            break Err(error).context("cannot write the log");
                        }
                    }
                    Err(error) => break Err(error).context("cannot read the machine's output"),
                }
            };
            writer.lock().ended = true;
            writer.changed.notify_all();
            result
        });
        let log = log.to_owned();
        Ok(Self { shared, reader: Some(reader), log, cursor: 0, pid, patience: Patience::default() })
    }

    /// Waits until `text` was printed after everything expected before; returns what was printed up to it.
    ///
    /// # Errors
    /// When the machine ends or makes no more progress first: the error shows the end of the log.
    pub fn expect(&mut self, text: &str) -> Result<String> {
        let from = self.cursor;
        let found = self.wait(&format!("{text:?}"), |bytes, _| find(&bytes[from..], text.as_bytes()))?;
        let Some(at) = found else {
            return Err(self.failure(&format!("the machine ended before it printed {text:?}")));
        };
        self.cursor = from + at + text.len();
        Ok(String::from_utf8_lossy(&self.shared.lock().bytes[from..from + at]).into_owned())
    }

    /// Waits until something new was printed, whatever it is.
    ///
    /// # Errors
    /// As [`Transcript::expect`].
    pub fn expect_anything(&mut self) -> Result<()> {
        let from = self.cursor;
        match self.wait("anything", |bytes, _| (bytes.len() > from).then_some(()))? {
            Some(()) => Ok(()),
            None => Err(self.failure("the machine ended before it printed anything")),
        }
    }

    /// Waits until the output ends.
    ///
    /// # Errors
    /// When the machine makes no more progress, or the log could not be kept.
    pub fn expect_end(&mut self) -> Result<()> {
        self.wait("the machine's end", |_, ended| ended.then_some(()))?;
        match self.reader.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => bail!("the reader panicked"),
            None => Ok(()),
        }
    }

    /// Everything printed until now.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().bytes).into_owned()
    }

    /// An error that says where the machine stood.
    pub fn failure(&self, what: &str) -> anyhow::Error {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n    | ");
        anyhow::anyhow!("{what}\n    | {tail}\n    whole log: {}", self.log.display())
    }

    /// Waits until `look` finds something; `None` when the output ended without it.
    fn wait<T>(&self, what: &str, look: impl Fn(&[u8], bool) -> Option<T>) -> Result<Option<T>> {
        let started = Instant::now();
        let mut silence = Silence::start(self.pid, 0);
        let mut state = self.shared.lock();
        loop {
            if let Some(found) = look(&state.bytes, state.ended) {
                return Ok(Some(found));
            }
            if state.ended {
                return Ok(None);
            }
            if state.bytes.len() != silence.length {
                silence = Silence::start(self.pid, state.bytes.len());
            }
            let reason = silence.too_long(self.pid, &self.patience).or_else(|| {
                (started.elapsed() > self.patience.overall)
                    .then(|| format!("waited {:?} in all", self.patience.overall))
            });
            if let Some(reason) = reason {
                drop(state);
                return Err(self.failure(&format!("expected {what}: {reason}")));
            }
            state = self.shared.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Since when a machine has printed nothing.
struct Silence {
    length: usize,
    since: Instant,
    cpu: Option<Duration>,
}

impl Silence {
    fn start(pid: u32, length: usize) -> Self {
        Self { length, since: Instant::now(), cpu: cpu_time(pid) }
    }

    fn too_long(&self, pid: u32, patience: &Patience) -> Option<String> {
        let idle = self.since.elapsed();
        if idle > patience.idle {
            return Some(format!("silent for {} s", idle.as_secs()));
        }
        // A process that is gone has no time; its output then ends, which the caller sees.
        let computed = cpu_time(pid)?.saturating_sub(self.cpu?);
        (computed > patience.computing).then(|| format!("silent while it computed for {} s", computed.as_secs()))
    }
}

/// User and system time of a process: fields 14 and 15 of proc_pid_stat(5), in clock ticks.
fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses and may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()))
}

fn find(bytes: &[u8], text: &[u8]) -> Option<usize> {
    bytes.windows(text.len()).position(|window| window == text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn transcript(from: impl Read + Send + 'static) -> (Transcript, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let transcript = Transcript::start(from, std::process::id(), &dir.path().join("log")).unwrap();
        (transcript, dir)
    }

    #[test]
    fn what_is_expected_is_consumed_in_order() {
        let (mut transcript, dir) = transcript(&b"boot\nlogin: one two\nlogin: three"[..]);
        assert_eq!(transcript.expect("login: ").unwrap(), "boot\n");
        assert_eq!(transcript.expect("login: ").unwrap(), "one two\n");
        let error = transcript.expect("login: ").unwrap_err().to_string();
        assert!(error.contains("ended before") && error.contains("three"), "{error}");
        transcript.expect_end().unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("log")).unwrap(), transcript.text());
    }

    #[test]
    fn a_silent_machine_is_not_waited_for_forever() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let (mut transcript, _dir) = transcript(ours);
        transcript.patience.idle = Duration::ZERO;
        let error = transcript.expect("never").unwrap_err().to_string();
        assert!(error.contains("silent for"), "{error}");
    }

    #[test]
    fn a_machine_that_prints_for_ever_is_ended_too() {
        let (mut transcript, _dir) = transcript(std::io::repeat(b'x').take(1 << 20));
        transcript.patience.overall = Duration::ZERO;
        assert!(transcript.expect("y").is_err());
    }

    #[test]
    fn a_process_has_cpu_time_and_no_process_has_none() {
        assert!(cpu_time(std::process::id()).is_some());
        assert!(cpu_time(u32::MAX).is_none());
    }
}
