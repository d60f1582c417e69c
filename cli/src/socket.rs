//! Where the control channel is on the host.
//!
//! Whoever can connect owns every guest, so the socket lies in a folder that only its user can enter: `entresol` in
//! `$XDG_RUNTIME_DIR`, which the system makes so; else `entresol-UID` in the folder for temporary files, which must
//! belong to the user, since anybody can make a folder there first.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::{env, fs, io};

/// Names another socket.
pub const VARIABLE: &str = "ENTRESOL_SOCKET";

/// The fallback folder belongs to somebody else.
#[derive(Debug, thiserror::Error)]
#[error("{} belongs to user {owner}, not to you: set {VARIABLE} to another path", folder.display())]
pub struct Foreign {
    /// The folder.
    pub folder: PathBuf,
    /// Whose it is.
    pub owner: u32,
}

/// The control channel's socket: what `$ENTRESOL_SOCKET` says, or the user's own. It need not exist.
///
/// # Errors
/// The folder it would lie in belongs to another user.
pub fn default_path() -> Result<PathBuf, Foreign> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let user = rustix::process::getuid().as_raw();
    choose(set(VARIABLE), set("XDG_RUNTIME_DIR"), env::temp_dir(), user, |folder| {
        fs::symlink_metadata(folder).map(|metadata| metadata.uid())
    })
}

fn choose(
    named: Option<PathBuf>,
    runtime: Option<PathBuf>,
    temporary: PathBuf,
    user: u32,
    owner: impl Fn(&PathBuf) -> io::Result<u32>,
) -> Result<PathBuf, Foreign> {
    if let Some(path) = named {
        return Ok(path);
    }
    // The XDG base directory specification: a path that is not absolute is ignored.
    if let Some(runtime) = runtime.filter(|path| path.is_absolute()) {
        return Ok(runtime.join("entresol").join("ctl.sock"));
    }
    let folder = temporary.join(format!("entresol-{user}"));
    match owner(&folder) {
        Ok(owner) if owner != user => Err(Foreign { folder, owner }),
        // A folder that is not there, or cannot be looked at, is told when the socket is opened.
        _ => Ok(folder.join("ctl.sock")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(named: Option<&str>, runtime: Option<&str>, owner: io::Result<u32>) -> Result<String, Foreign> {
        let owner = owner.map_err(|error| error.kind());
        choose(named.map(Into::into), runtime.map(Into::into), "/t".into(), 7, |_| owner.map_err(Into::into))
            .map(|path| path.to_str().expect("UTF-8").to_owned())
    }

    #[test]
    fn the_first_place_that_is_known_wins() {
        let none = || Err(io::ErrorKind::NotFound.into());
        assert_eq!(chosen(Some("s"), Some("/run/u"), none()).expect("a path"), "s");
        assert_eq!(chosen(None, Some("/run/u"), none()).expect("a path"), "/run/u/entresol/ctl.sock");
        assert_eq!(chosen(None, Some("run"), none()).expect("a path"), "/t/entresol-7/ctl.sock");
        assert_eq!(chosen(None, None, Ok(7)).expect("a path"), "/t/entresol-7/ctl.sock");
    }

    #[test]
    fn a_folder_of_somebody_else_is_not_used() {
        let error = chosen(None, None, Ok(8)).expect_err("foreign").to_string();
        assert_eq!(error, "/t/entresol-7 belongs to user 8, not to you: set ENTRESOL_SOCKET to another path");
    }
}
