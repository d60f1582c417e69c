//! Programs of Debian's that run from a folder, with the loader and the libraries that they were packaged with: the
//! machine's own may be older or newer.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::apt::{self, Root};
use super::host::{self, Os};
use crate::progress::Step;

/// Unpacks `packages` and everything that they need into `folder`. `what` is what the user is told.
///
/// # Errors
/// When it cannot be fetched: the error says what to type.
pub fn fetch(cache: &Path, folder: &Path, packages: &[&str], what: &str) -> Result<()> {
    let fetching = format!("fetching {what} from Debian");
    let step = Step::start(&fetching);
    let os = Os::here();
    let debian = host::debian(&os, cache)?;
    let root = Root::open(cache, os.tools_suite(), &debian.architecture, &debian.mirrors, &debian.keyring, &step)?;
    step.say(&fetching);
    let packages = root.closure(packages)?;
    let work = tempfile::tempdir_in(cache).context("cannot make a work folder")?;
    let (packed, tree) = (work.path().join("packed"), work.path().join("tree"));
    fs::create_dir(&packed).and_then(|()| fs::create_dir(&tree)).context("cannot make a work folder")?;
    let listed = root.download(&packages, &packed, &step)?;
    step.say(&format!("unpacking {what}"));
    step.counts_to(listed.len());
    for package in &listed {
        apt::unpack(&packed.join(&package.file), &tree)?;
        step.one_done();
    }
    super::publish(&tree, folder)
}

/// The loader in an unpacked folder, and its `--library-path`.
///
/// # Errors
/// When the folder holds no loader.
pub fn loader(folder: &Path) -> Result<(PathBuf, OsString)> {
    let loaders = [
        "lib64/ld-linux-x86-64.so.2",
        "usr/lib64/ld-linux-x86-64.so.2",
        "lib/ld-linux-aarch64.so.1",
        "usr/lib/ld-linux-aarch64.so.1",
    ];
    let loader =
        loaders.iter().map(|name| folder.join(name)).find(|path| path.is_file()).context("there is no loader in it")?;
    let triple = if loader.to_string_lossy().contains("x86-64") { "x86_64-linux-gnu" } else { "aarch64-linux-gnu" };
    let dirs = ["lib", "usr/lib"].map(|lib| folder.join(lib).join(triple));
    let mut libraries: Vec<PathBuf> = dirs.into_iter().filter(|dir| dir.is_dir()).collect();
    // A few packages keep libraries of their own in a folder below, which they look for where they would be installed.
    let below = libraries.last().map(|dir| dir.join("pulseaudio")).filter(|dir| dir.is_dir());
    libraries.extend(below);
    let libraries = std::env::join_paths(libraries).context("a folder's name has a colon in it")?;
    Ok((loader, libraries))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_a_loader_is_an_error_and_libraries_follow_the_loader() {
        let dir = tempfile::tempdir().unwrap();
        assert!(loader(dir.path()).is_err());
        for made in ["usr/lib64", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/aarch64-linux-gnu"] {
            fs::create_dir_all(dir.path().join(made)).unwrap();
        }
        fs::write(dir.path().join("usr/lib64/ld-linux-x86-64.so.2"), "").unwrap();
        let (program, libraries) = loader(dir.path()).unwrap();
        assert!(program.ends_with("usr/lib64/ld-linux-x86-64.so.2"));
        let libraries = libraries.to_string_lossy().into_owned();
        assert_eq!(libraries.split(':').count(), 2);
        assert!(!libraries.contains("aarch64"));
    }
}
