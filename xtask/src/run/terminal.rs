//! The user's terminal in raw mode, and given back as it was, however we end.
//!
//! Raw means that every key goes to the guest, Ctrl-C included (ISIG is off). [`Raw`] restores on drop, so a return, an
//! error and a panic are covered; signals become events of the caller's loop, which then returns.

use std::io::{IsTerminal, stdin};

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// Raw mode while it lives; nothing when standard input is not a terminal.
pub struct Raw {
    saved: Option<Termios>,
}

impl Raw {
    /// Switches the terminal.
    ///
    /// # Errors
    /// When it does not obey.
    pub fn enter() -> Result<Self> {
        if !stdin().is_terminal() {
            return Ok(Self { saved: None });
        }
        let saved = tcgetattr(stdin()).context("cannot read the terminal's mode")?;
        let mut raw = saved.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw).context("cannot set the terminal's mode")?;
        Ok(Self { saved: Some(saved) })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved
            && let Err(error) = tcsetattr(stdin(), OptionalActions::Now, saved)
        {
            eprintln!("cannot restore the terminal ({error}): type `reset`");
        }
    }
}
