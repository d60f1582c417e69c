//! The initial file system of Entresol's own guest: busybox, an init script, the virtio drivers.
//!
//! With a script it runs that and powers off (what the system tests do); without, it is a shell with job control on the
//! console that powers the machine off when it ends. [`READY`] is printed when the console takes input: whatever is
//! typed before may be lost, because a serial driver drains its FIFO when it starts.

mod modules;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::fetch::Guest;
use modules::Modules;

/// The line that init prints before it starts the shell.
pub const READY: &str = "entresol-guest: console ready";
/// What the shell prints when it takes a command.
pub const PROMPT: &str = "guest:/root# ";
/// What precedes a script's exit status.
pub const SCRIPT_EXIT: &str = "entresol-script: exit ";

const INIT: &str = include_str!("initrd/init.sh");
/// Everything a guest of ours may be given; all are in Debian's kernel as modules.
const MODULES: [&str; 5] = ["virtio_mmio", "virtio_blk", "virtio_console", "virtio_rng", "virtio_balloon"];

/// What goes into an initial file system.
#[derive(Default)]
pub struct Initrd {
    script: Option<String>,
    console: Option<String>,
    /// Further programs and libraries: where, and their bytes.
    files: Vec<(String, Vec<u8>)>,
}

impl Initrd {
    /// A shell on the console.
    pub fn interactive() -> Self {
        Self::default()
    }

    /// Runs a shell script, prints [`SCRIPT_EXIT`] and its status, and powers off.
    pub fn scripted(script: &str) -> Self {
        Self { script: Some(script.to_owned()), ..Self::default() }
    }

    /// Lives on this device once the drivers are loaded, and leaves the kernel's console alone.
    pub fn on_console(mut self, device: &str) -> Self {
        self.console = Some(device.to_owned());
        self
    }

    /// Has these programs and libraries too, in folders that are there.
    pub fn with(mut self, files: Vec<(String, Vec<u8>)>) -> Self {
        self.files.extend(files);
        self
    }

    /// Writes the archive.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn pack(&self, guest: &Guest) -> Result<Vec<u8>> {
        let read = |path: &PathBuf| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let mut archive = Archive::default();
        for name in ["bin", "dev", "etc", "etc/entresol", "lib", "lib/modules", "proc", "root", "run", "sys", "tmp"] {
            archive.directory(name);
        }
        archive.character_device("dev/console", 5, 1);
        archive.file("bin/busybox", 0o755, &read(&guest.busybox())?);
        archive.symlink("bin/sh", "busybox");
        // Where amd64's programs look for their loader.
        archive.symlink("lib64", "lib");
        archive.file("init", 0o755, INIT.as_bytes());
        let mut list = String::new();
        for file in Modules::list(&guest.modules()?)?.load_order(&MODULES)? {
            let name = file.file_name().context("a module without a name")?.to_string_lossy().into_owned();
            archive.file(&format!("lib/modules/{name}"), 0o644, &read(&file)?);
            list += &format!("{name}\n");
        }
        archive.file("etc/entresol/modules", 0o644, list.as_bytes());
        for (path, bytes) in &self.files {
            archive.file(path, 0o755, bytes);
        }
        if let Some(console) = &self.console {
            archive.file("etc/entresol/console", 0o644, console.as_bytes());
        }
        if let Some(script) = &self.script {
            archive.file("etc/entresol/script", 0o644, script.as_bytes());
        }
        Ok(archive.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_says_what_the_harness_waits_for() {
        assert!(INIT.contains(READY));
        assert!(INIT.contains(SCRIPT_EXIT.trim_end()));
        assert!(INIT.trim_end().ends_with("poweroff -f"));
    }
}
