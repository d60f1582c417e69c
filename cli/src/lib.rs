//! The host's side of Entresol: everything that the program `entresol` does, as functions.
//!
//! | room | what it does |
//! |---|---|
//! | [`config`] | reads and checks a configuration file and the files it names |
//! | [`bundle`] | packs them into the boot bundle |
//! | [`socket`] | knows where the hypervisor's control channel is |
//! | [`client`] | speaks with a running hypervisor |
//! | [`console`] | joins this terminal to a guest's console |
//! | [`table`] | shows answers to people |
//! | [`ctl`] | the commands of `entresol ctl` |
//! | [`lab`] | the commands of `entresol lab` |
//!
//! Exit status of the program, which [`Exit`] names: 0 done; 1 the hypervisor refused, or the guest whose console was
//! attached crashed; 2 the command line or the configuration is wrong, or a file cannot be written; 3 nobody answers on the control channel.
#![forbid(unsafe_code)]

pub mod bundle;
pub mod client;
pub mod config;
pub mod console;
pub mod ctl;
pub mod dirty;
pub mod lab;
pub mod socket;
pub mod store;
pub mod table;
pub mod tags;

use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Everything asked for was done.
    Done = 0,
    /// The hypervisor refused, or the attached guest crashed.
    Refused = 1,
    /// The command line, the configuration or a file it names is wrong. What clap itself refuses ends so, too.
    Usage = 2,
    /// No connection to a hypervisor, or it was lost.
    NoConnection = 3,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Prints to standard output. A reader that went away has read what it wanted.
///
/// # Errors
/// Those of standard output.
pub fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}
