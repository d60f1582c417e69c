//! One line that says what is being done now: building, fetching, booting.
//!
//! On a terminal it is a spinner on standard error, cleared when its [`Step`] ends, so that nothing of it stays between
//! a user and the guest's console. Elsewhere (a pipe, CI) each step prints one plain line when it starts.

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// A step under way; its line goes when this value does.
pub struct Step {
    bar: ProgressBar,
}

impl Step {
    /// Starts a step of unknown length.
    pub fn start(what: &str) -> Self {
        if !stderr().is_terminal() {
            eprintln!("{what}");
            return Self { bar: ProgressBar::hidden() };
        }
        let bar = ProgressBar::new_spinner();
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        Self { bar }
    }

    /// From now on the step counts up to `total` things.
    pub fn counts_to(&self, total: usize) {
        let style = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {pos}/{len}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        self.bar.set_style(style);
        self.bar.set_length(total as u64);
        self.bar.set_position(0);
    }

    /// One more thing is done.
    pub fn one_done(&self) {
        self.bar.inc(1);
    }

    /// The step is now about something else.
    pub fn say(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
