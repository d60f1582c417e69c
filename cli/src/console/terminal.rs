//! A terminal without line editing, echo and signal keys, for as long as a value lives.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// A raw terminal. It gets its modes back when this is dropped.
#[derive(Debug)]
pub struct Raw<'a> {
    terminal: BorrowedFd<'a>,
    before: Termios,
}

impl<'a> Raw<'a> {
    /// Makes the terminal raw.
    ///
    /// # Errors
    /// It is none.
    pub fn enter(terminal: BorrowedFd<'a>) -> io::Result<Self> {
        let before = tcgetattr(terminal)?;
        let raw = Self { terminal, before };
        raw.set_raw()?;
        Ok(raw)
    }

    fn set_raw(&self) -> io::Result<()> {
        let mut modes = self.before.clone();
        modes.make_raw();
        Ok(tcsetattr(self.terminal, OptionalActions::Drain, &modes)?)
    }

    fn restore(&self) -> io::Result<()> {
        Ok(tcsetattr(self.terminal, OptionalActions::Drain, &self.before)?)
    }
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.restore() {
            // A terminal that went away needs nothing back; of any other, its user should know.
            eprintln!("\r\n[the terminal's modes could not be restored: {error}; type `stty sane`]\r");
        }
    }
}

/// Runs `body`, which suspends the program, with the terminal as it was before it was made raw.
///
/// # Errors
/// The terminal's, or those of `body`.
pub fn suspended(raw: Option<&Raw<'_>>, body: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    raw.map_or(Ok(()), Raw::restore)?;
    body()?;
    raw.map_or(Ok(()), Raw::set_raw)
}
