//! Debian's arm64 kernel, its modules, a static busybox, U-Boot and EDK2: what guests are made of.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::apt::{self, Root, Suite};
use super::host::{self, Os};
use crate::progress::Step;

/// As in [`super::qemu`].
const FOLDER: &str = "guest-1";
const FOLDER_X86: &str = "guest-x86-2";

/// The fetched files.
#[derive(Clone, Debug)]
pub struct Guest {
    folder: PathBuf,
}

impl Guest {
    /// Debian's kernel, unmodified: an `Image`, or a `bzImage`.
    ///
    /// # Errors
    /// When the folder holds none.
    pub fn kernel(&self) -> Result<PathBuf> {
        only(&self.folder.join("boot"), "vmlinuz-")
    }

    /// The folder of the kernel's modules: `lib/modules/RELEASE`, wherever the package puts `lib`.
    ///
    /// # Errors
    /// When the folder holds none.
    pub fn modules(&self) -> Result<PathBuf> {
        let places = [self.folder.join("lib/modules"), self.folder.join("usr/lib/modules")];
        only(places.iter().find(|place| place.is_dir()).unwrap_or(&places[0]), "")
    }

    /// A static busybox.
    pub fn busybox(&self) -> PathBuf {
        let places = [self.folder.join("bin/busybox"), self.folder.join("usr/bin/busybox")];
        places.iter().find(|place| place.is_file()).unwrap_or(&places[0]).clone()
    }

    /// U-Boot for QEMU's arm64 `virt` machine, a flat binary.
    pub fn u_boot(&self) -> PathBuf {
        self.folder.join("usr/lib/u-boot/qemu_arm64/u-boot.bin")
    }

    /// EDK2 for QEMU's arm64 `virt` machine.
    pub fn edk2(&self) -> PathBuf {
        self.folder.join("usr/share/qemu-efi-aarch64/QEMU_EFI.fd")
    }
}

/// The guest's files, fetched when they have to be.
///
/// # Errors
/// When they cannot be fetched: the error says what to type.
pub fn ensure_guest(cache: &Path) -> Result<Guest> {
    let folder = cache.join(FOLDER);
    if !folder.is_dir() {
        fetch(cache, &folder)?;
    }
    let guest = Guest { folder };
    guest.kernel().with_context(|| format!("remove {} and try again", guest.folder.display()))?;
    Ok(guest)
}

/// The same of amd64, as far as there is something: the kernel for virtual machines, an unmodified `bzImage`, its modules, a static busybox.
///
/// # Errors
/// As [`ensure_guest`].
pub fn ensure_guest_x86(cache: &Path) -> Result<Guest> {
    let folder = cache.join(FOLDER_X86);
    if !folder.is_dir() {
        let what = "fetching Debian's amd64 kernel and tools";
        let step = Step::start(what);
        let debian = host::debian(&Os::here(), cache)?;
        let root = Root::open(cache, Suite::Bookworm, &debian.architecture, &debian.mirrors, &debian.keyring, &step)?;
        step.say(what);
        let kernel = root.behind("linux-image-cloud-amd64:amd64", "linux-image-6")?;
        let kernel = format!("{}:amd64", kernel.trim_end_matches(":amd64"));
        unpack(cache, &folder, &root, &[kernel, "busybox-static:amd64".into()], &step)?;
    }
    let guest = Guest { folder };
    guest.kernel().with_context(|| format!("remove {} and try again", guest.folder.display()))?;
    Ok(guest)
}

fn fetch(cache: &Path, folder: &Path) -> Result<()> {
    let step = Step::start("fetching Debian's arm64 kernel and tools");
    let debian = host::debian(&Os::here(), cache)?;
    let root = Root::open(cache, Suite::Bookworm, &debian.architecture, &debian.mirrors, &debian.keyring, &step)?;
    step.say("fetching Debian's arm64 kernel and tools");
    let kernel = root.behind("linux-image-arm64:arm64", "linux-image-6")?;
    let kernel = format!("{}:arm64", kernel.trim_end_matches(":arm64"));
    let packages = [kernel, "busybox-static:arm64".into(), "u-boot-qemu".into(), "qemu-efi-aarch64".into()];
    unpack(cache, folder, &root, &packages, &step)
}

/// Downloads packages and unpacks them into `folder`.
fn unpack(cache: &Path, folder: &Path, root: &Root, packages: &[String], step: &Step) -> Result<()> {
    let work = tempfile::tempdir_in(cache).context("cannot make a work folder")?;
    let (packed, tree) = (work.path().join("packed"), work.path().join("tree"));
    fs::create_dir(&packed).and_then(|()| fs::create_dir(&tree)).context("cannot make a work folder")?;
    for package in root.download(packages, &packed, step)? {
        apt::unpack(&packed.join(&package.file), &tree)?;
    }
    super::publish(&tree, folder)
}

fn only(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut found: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    found.pop().with_context(|| format!("{} holds nothing named {prefix}…", dir.display()))
}
