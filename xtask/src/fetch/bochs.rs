//! Bochs, an emulator of PCs whose processors have Intel's VMX, and GRUB, which starts a PC from its disk: Debian's packages, run from the
//! cache through their own loader.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::foreign;
use crate::workspace;

/// The emulator, a display that needs none, GRUB's tool, and what GRUB has for PCs.
const PACKAGES: [&str; 4] = ["bochs", "bochs-sdl", "grub-common", "grub-pc-bin:amd64"];
/// As in [`super::qemu`].
const FOLDER: &str = "bochs-1";

/// Where Debian puts what is started and read.
const PROGRAM: &str = "usr/bin/bochs-bin";
const BIOS: &str = "usr/share/bochs/BIOS-bochs-latest";
const VGA_BIOS: &str = "usr/share/vgabios/vgabios.bin";
const MAKE_IMAGE: &str = "usr/bin/grub-mkimage";
const GRUB: &str = "usr/lib/grub/i386-pc";

/// The fetched files.
#[derive(Clone, Debug)]
pub struct Bochs {
    folder: PathBuf,
    loader: PathBuf,
    libraries: OsString,
}

impl Bochs {
    /// The emulator, to which its configuration is added.
    pub fn command(&self) -> Command {
        let mut command = self.program(PROGRAM);
        // Its devices are libraries that it looks for by name; its display draws nothing.
        let triple = if cfg!(target_arch = "aarch64") { "aarch64-linux-gnu" } else { "x86_64-linux-gnu" };
        command.env("LTDL_LIBRARY_PATH", self.folder.join("usr/lib").join(triple).join("bochs/plugins"));
        command.env("SDL_VIDEODRIVER", "dummy").env("SDL_AUDIODRIVER", "dummy");
        command
    }

    /// The PC's BIOS, and its display's.
    pub fn firmware(&self) -> [PathBuf; 2] {
        [BIOS, VGA_BIOS].map(|file| self.folder.join(file))
    }

    /// GRUB's first sector of a disk.
    pub fn first_sector(&self) -> PathBuf {
        self.folder.join(GRUB).join("boot.img")
    }

    /// GRUB itself for the sectors behind that one: it has `modules`, and carries out `script`.
    ///
    /// # Errors
    /// When GRUB's tool refuses.
    pub fn grub(&self, script: &Path, modules: &[&str], output: &Path) -> Result<()> {
        let mut make = self.program(MAKE_IMAGE);
        make.args(["-O", "i386-pc", "-p", "/", "-d"]).arg(self.folder.join(GRUB));
        make.arg("-c").arg(script).arg("-o").arg(output).args(modules);
        workspace::output(&mut make).map(drop)
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(&self.loader);
        command.arg("--library-path").arg(&self.libraries).arg(self.folder.join(name));
        command
    }
}

/// Bochs and GRUB, fetched when they have to be.
///
/// # Errors
/// When they cannot be fetched: the error says what to type.
pub fn ensure_bochs(cache: &Path) -> Result<Bochs> {
    let folder = cache.join(FOLDER);
    if !folder.is_dir() {
        foreign::fetch(cache, &folder, &PACKAGES, "Bochs and GRUB")?;
    }
    let found = foreign::loader(&folder);
    let (loader, libraries) = found.with_context(|| format!("remove {} and try again", folder.display()))?;
    Ok(Bochs { folder, loader, libraries })
}
