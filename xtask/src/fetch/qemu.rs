//! A QEMU that is new enough: the system's, else Debian's own packages, run from the cache through their own loader.
//!
//! QEMU 7.2, which Debian 12 has by default, raises MTE tag faults that the architecture does not: 10.0 is the oldest
//! that the outer machine may be.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::foreign;

const OLDEST: (u32, u32) = (10, 0);

/// One of QEMU's programs, and where it comes from.
struct Program {
    name: &'static str,
    /// Debian's package.
    package: &'static str,
    /// Below the cache. Raised when what the folder holds changes, so that an older xtask's folder is not taken for ours.
    folder: &'static str,
    /// Where the program finds its firmware, in that folder.
    data: &'static [&'static str],
}

const ARM64: Program =
    Program { name: "qemu-system-aarch64", package: "qemu-system-arm", folder: "qemu-1", data: &["usr/share/qemu"] };

const X86_64: Program = Program {
    name: "qemu-system-x86_64",
    package: "qemu-system-x86",
    folder: "qemu-x86-1",
    data: &["usr/share/qemu", "usr/share/seabios"],
};

/// How to start QEMU: a program and the arguments that come first.
#[derive(Clone, Debug)]
pub struct Qemu {
    program: PathBuf,
    first: Vec<OsString>,
    version: (u32, u32),
}

impl Qemu {
    /// A command to which the machine's arguments are added.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.first);
        command
    }

    /// Major and minor version.
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    fn ask(program: PathBuf, first: Vec<OsString>) -> Result<Self> {
        let output = Command::new(&program).args(&first).arg("--version").stdin(Stdio::null()).output();
        let output = output.with_context(|| format!("cannot start {}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let Some(version) = parse_version(&text) else {
            bail!(
                "{} --version says nothing of QEMU: {}",
                program.display(),
                String::from_utf8_lossy(&output.stderr).trim_end()
            )
        };
        Ok(Self { program, first, version })
    }
}

/// A QEMU of arm64 machines that is new enough, fetched when it has to be.
///
/// # Errors
/// When there is none and none can be fetched: the error says what to type.
pub fn ensure_qemu(cache: &Path) -> Result<Qemu> {
    ensure_program(cache, &ARM64)
}

/// The same of x86-64 machines.
///
/// # Errors
/// As [`ensure_qemu`].
pub fn ensure_qemu_x86(cache: &Path) -> Result<Qemu> {
    ensure_program(cache, &X86_64)
}

fn ensure_program(cache: &Path, program: &Program) -> Result<Qemu> {
    if let Ok(system) = Qemu::ask(PathBuf::from(program.name), Vec::new())
        && system.version >= OLDEST
    {
        return Ok(system);
    }
    let folder = cache.join(program.folder);
    if !folder.is_dir() {
        foreign::fetch(cache, &folder, &[program.package], "QEMU")?;
    }
    let qemu = unpacked(&folder, program)
        .with_context(|| format!("the fetched QEMU does not start: remove {} and try again", folder.display()))?;
    let (major, minor) = OLDEST;
    ensure!(
        qemu.version >= OLDEST,
        "Debian's mirror has QEMU {}.{}, {major}.{minor} is needed: install a newer {} by hand",
        qemu.version.0,
        qemu.version.1,
        program.name
    );
    Ok(qemu)
}

fn unpacked(folder: &Path, program: &Program) -> Result<Qemu> {
    let (loader, libraries) = foreign::loader(folder)?;
    let mut first =
        vec!["--library-path".into(), libraries, folder.join("usr/bin").join(program.name).into_os_string()];
    for data in program.data {
        first.extend(["-L".into(), folder.join(data).into_os_string()]);
    }
    Qemu::ask(loader, first)
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let rest = text.split_once("QEMU emulator version ")?.1;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next()?, numbers.next()?) {
        (Ok(major), Ok(minor)) => Some((major, minor)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_every_shape_that_qemu_prints() {
        assert_eq!(parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"), Some((10, 0)));
        assert_eq!(parse_version("QEMU emulator version 7.2.19 (Debian)"), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 11.1"), Some((11, 1)));
        assert_eq!(parse_version("qemu: not found"), None);
        assert_eq!(parse_version("QEMU emulator version x"), None);
        assert!((10, 0) > (9, 2));
    }

    #[test]
    fn a_folder_without_qemu_is_an_error_and_not_a_panic() {
        let dir = tempfile::tempdir().unwrap();
        assert!([ARM64, X86_64].iter().all(|program| unpacked(dir.path(), program).is_err()));
    }
}
