//! What the outer machine needs and a clone does not hold: QEMU, Bochs, a guest's kernel and tools, Rust targets.
//!
//! Protocol: everything lives in the user's cache. One lock file serialises concurrent xtasks. A folder is made under
//! another name and renamed when it is complete, so a folder that exists is whole, and a run that was cut off leaves
//! only a work folder that the next one removes.

pub mod apt;
pub mod bochs;
pub mod browser;
pub mod foreign;
pub mod guest;
pub mod host;
pub mod programs;
pub mod qemu;
pub mod sources;
pub mod toolchain;

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use entresol_wire::config::Arch;

pub use bochs::Bochs;
pub use browser::Browser;
pub use guest::Guest;
pub use programs::Programs;
pub use qemu::Qemu;

use crate::progress::Step;
use crate::workspace;

/// QEMU and Debian's guest files, from the cache or the network.
///
/// # Errors
/// When something is missing and cannot be fetched: the error says what to type.
pub fn everything() -> Result<(Qemu, Guest)> {
    let cache = workspace::cache_dir()?;
    let _lock = lock(&cache)?;
    Ok((qemu::ensure_qemu(&cache)?, guest::ensure_guest(&cache)?))
}

/// QEMU alone: enough when the user brings a kernel.
///
/// # Errors
/// As [`everything`].
pub fn qemu_only() -> Result<Qemu> {
    let cache = workspace::cache_dir()?;
    let _lock = lock(&cache)?;
    qemu::ensure_qemu(&cache)
}

/// QEMU of x86-64 machines alone.
///
/// # Errors
/// As [`everything`].
pub fn qemu_x86() -> Result<Qemu> {
    let cache = workspace::cache_dir()?;
    let _lock = lock(&cache)?;
    qemu::ensure_qemu_x86(&cache)
}

/// Debian's amd64 guest files.
///
/// # Errors
/// As [`everything`].
pub fn guest_x86() -> Result<Guest> {
    let cache = workspace::cache_dir()?;
    let _lock = lock(&cache)?;
    guest::ensure_guest_x86(&cache)
}

/// QEMU of machines of `arch`: enough when the user brings a kernel.
///
/// # Errors
/// As [`everything`].
pub fn qemu_of(arch: Arch) -> Result<Qemu> {
    match arch {
        Arch::Arm64 => qemu_only(),
        Arch::X86 => qemu_x86(),
    }
}

/// Debian's guest files for `arch`.
///
/// # Errors
/// As [`everything`].
pub fn guest_of(arch: Arch) -> Result<Guest> {
    match arch {
        Arch::Arm64 => everything().map(|(_, guest)| guest),
        Arch::X86 => guest_x86(),
    }
}

/// Bochs, and GRUB for what it boots.
///
/// # Errors
/// As [`everything`].
pub fn bochs() -> Result<Bochs> {
    let cache = workspace::cache_dir()?;
    let _lock = lock(&cache)?;
    bochs::ensure_bochs(&cache)
}

/// A browser without a window, for the test of the lab's pages.
///
/// # Errors
/// As [`everything`].
pub fn browser() -> Result<Browser> {
    let cache = workspace::cache_dir()?;
    let _lock = lock(&cache)?;
    browser::ensure_browser(&cache)
}

/// Programs of Debian's for a guest of `arch`.
///
/// # Errors
/// As [`everything`].
pub fn programs(package: programs::Package, arch: Arch) -> Result<Programs> {
    let cache = workspace::cache_dir()?;
    let _lock = lock(&cache)?;
    programs::ensure(&cache, package, arch)
}

/// Held while the cache is read or changed; the operating system lets go of it however we end.
fn lock(cache: &Path) -> Result<File> {
    let path = cache.join("lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(fs::TryLockError::WouldBlock) => {
            let _step = Step::start("waiting for another xtask that is fetching");
            file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        }
        Err(fs::TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
    }
    remove_leftovers(cache)?;
    Ok(file)
}

/// Work folders (`.tmp…`) of runs that were cut off; the lock is held, so none is in use.
fn remove_leftovers(cache: &Path) -> Result<()> {
    for entry in fs::read_dir(cache).with_context(|| format!("cannot read {}", cache.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(".tmp") {
            fs::remove_dir_all(entry.path()).with_context(|| format!("cannot remove {}", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Gives a complete folder its name.
///
/// # Errors
/// When the rename fails.
fn publish(complete: &Path, name: &Path) -> Result<()> {
    fs::rename(complete, name).with_context(|| format!("cannot rename {} to {}", complete.display(), name.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_was_cut_off_leaves_nothing_that_counts() {
        let cache = tempfile::tempdir().unwrap();
        fs::create_dir_all(cache.path().join(".tmpab12/tree")).unwrap();
        fs::create_dir_all(cache.path().join("guest-1")).unwrap();
        let held = lock(cache.path()).unwrap();
        assert!(!cache.path().join(".tmpab12").exists());
        assert!(cache.path().join("guest-1").exists());
        let second = File::options().write(true).open(cache.path().join("lock")).unwrap();
        assert!(matches!(second.try_lock(), Err(fs::TryLockError::WouldBlock)));
        drop(held);
        second.try_lock().unwrap();
    }
}
