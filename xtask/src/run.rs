//! `cargo xtask run`: everything from a clean clone to a guest's shell.
//!
//! Protocol: options become a configuration, the configuration a bundle, hypervisor and bundle a machine; then this
//! process only carries bytes between the user and the machine's serial line ([`console`]) until QEMU ends. Its exit
//! status is QEMU's: 0 when the last guest has powered off; 1 when the hypervisor panicked; 128 + the signal's number
//! when we were told to stop.

mod console;
mod terminal;

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use entresol_wire::config::{Arch, KernelFormat, WrittenVm, parse_size};

use crate::arch::Named;
use crate::bundle;
use crate::fetch;
use crate::image;
use crate::initrd::{self, Initrd};
use crate::outer::{Model, Outer, usual_memory};
use crate::workspace;

/// The machine's options; without any, Debian's kernel with a shell.
#[derive(Args, Debug)]
pub struct Options {
    /// Virtual machines as a TOML file; the options for one machine do not go with it
    #[arg(long, conflicts_with_all = ["arch", "kernel", "firmware", "initrd", "append", "vcpus", "memory", "disk", "flash", "cpus", "outer_memory"])]
    config: Option<PathBuf>,
    /// The guest's kernel. For aarch64 an Image, the same gzip'd, ELF, or a flat binary (*.bin); for x86_64 a bzImage, or ELF with a PVH
    /// entry. Default: Debian's
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Firmware in place of a kernel: it runs from read-only memory at address 0, as EDK2's QEMU_EFI.fd does; aarch64 only
    #[arg(long, conflicts_with_all = ["kernel", "initrd"])]
    firmware: Option<PathBuf>,
    /// The guest's initial file system. Default: a shell; none when a kernel is given
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// The guest's command line. Default: console=ttyAMA0, and console=ttyS0 reboot=acpi for x86_64
    #[arg(long)]
    append: Option<String>,
    /// The guest's CPUs, 1 to 8
    #[arg(long, default_value_t = 2)]
    vcpus: u32,
    /// The guest's memory, a multiple of 2 MiB
    #[arg(long, default_value = "512M")]
    memory: String,
    /// A disk image; may be given more than once. Writes are kept until the machine stops
    #[arg(long)]
    disk: Vec<PathBuf>,
    /// What the guest's flash holds, a power of two of bytes. Writes are kept until the machine stops; aarch64 only
    #[arg(long)]
    flash: Option<PathBuf>,
    /// A store's image, made by `entresol store create`: where snapshots go
    #[arg(long, conflicts_with = "bare")]
    store: Option<PathBuf>,
    /// CPUs of the machine that the hypervisor runs on
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of the machine that the hypervisor runs on. Default: 4G, and 2G for x86_64
    #[arg(long)]
    outer_memory: Option<String>,
    /// Architecture of the machine and its guest; a configuration says `outer.arch`
    #[arg(long, value_enum, default_value = "aarch64")]
    arch: Named,
    /// Without the hypervisor: the guest's kernel alone on the outer machine, to tell its faults from ours; aarch64 only
    #[arg(long, conflicts_with_all = ["config", "firmware", "vcpus", "memory", "disk", "flash"])]
    bare: bool,
    /// When standard input is not a terminal: feed it once the console has printed this
    #[arg(long)]
    feed_after: Option<String>,
}

impl Options {
    fn arch(&self) -> Arch {
        self.arch.into()
    }

    fn append(&self) -> &str {
        self.append.as_deref().unwrap_or(bundle::console(self.arch()))
    }

    fn outer_memory(&self) -> &str {
        self.outer_memory.as_deref().unwrap_or(usual_memory(self.arch()))
    }

    /// What the machine does not have is refused by the option's name; a configuration's fields by theirs, where it is checked.
    fn check(&self) -> Result<()> {
        let arm64_only = [
            (self.firmware.is_some(), "firmware", "a guest starts by its kernel there"),
            (self.flash.is_some(), "flash", "there is memory at its address there"),
            (self.bare, "bare", "Linux alone finds no clock on that machine"),
        ];
        match arm64_only.iter().find(|(given, ..)| *given && self.arch() == Arch::X86) {
            Some((_, name, reason)) => bail!("--{name}: must be absent with --arch x86_64: {reason}"),
            None => Ok(()),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// When something cannot be fetched, built or started. A machine that ran and failed is an exit code.
pub fn run(options: &Options) -> Result<ExitCode> {
    options.check()?;
    let (outer, feed_after) = prepare(options)?;
    let socket = control_socket()?;
    free_socket(&socket)?;
    let qemu = fetch::qemu_of(outer.model.arch())?;
    let store = options.store.as_deref().map(found).transpose()?;
    let outer = Outer { control: Some(socket.clone()), store, ..outer };
    let ended = console::attend(outer.command(&qemu), feed_after);
    // Nobody answers there any more; a socket that is left behind is only in the next user's way.
    if let Err(error) = fs::remove_file(&socket)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        eprintln!("cannot remove {}: {error}", socket.display());
    }
    ended
}

fn prepare(options: &Options) -> Result<(Outer, Option<String>)> {
    let work = workspace::output_dir()?;
    // An owner's mistakes are told before anything is built.
    let (loaded, ready) = if let Some(config) = &options.config {
        (bundle::load(config)?, None)
    } else {
        let files = Files::choose(options, &work)?;
        if options.bare {
            return bare(options, files);
        }
        let vm = request(options, &files)?;
        let mut written = bundle::written(options.outer_memory(), options.cpus, vec![vm]);
        if options.arch() == Arch::X86 {
            bundle::on_x86(&mut written);
        }
        (bundle::check(written)?, files.ready)
    };
    let size = loaded.config().outer;
    let image = match size.arch {
        Arch::Arm64 => image::build(&[])?.raw,
        Arch::X86 => image::build_x86()?,
    };
    let packed = work.join("bundle.img");
    bundle::pack(&loaded, &packed)?;
    let (initrd, model) = (Some(packed), Model::of(size.arch));
    let outer = Outer { cpus: size.cpus, memory: size.memory, initrd, ..Outer::new(model, &image) };
    Ok((outer, options.feed_after.clone().or(ready)))
}

fn bare(options: &Options, files: Files) -> Result<(Outer, Option<String>)> {
    let memory = parse_size(options.outer_memory());
    let memory = memory
        .with_context(|| format!("--outer-memory {}: a size is a number with K, M or G", options.outer_memory()))?;
    let (append, model) = (Some(options.append().to_owned()), Model::of(options.arch()));
    let outer = Outer { cpus: options.cpus, memory, initrd: files.initrd, append, ..Outer::new(model, &files.kernel) };
    Ok((outer, options.feed_after.clone().or(files.ready)))
}

fn request(options: &Options, files: &Files) -> Result<WrittenVm> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    Ok(WrittenVm {
        name: "guest".to_owned(),
        memory: options.memory.clone().into(),
        vcpus: Some(options.vcpus.into()),
        kernel: text(&files.kernel),
        kernel_format: options.firmware.as_ref().map(|_| KernelFormat::Firmware),
        initrd: files.initrd.as_deref().map(text),
        cmdline: options.append().to_owned(),
        disks: options.disk.iter().map(|disk| Ok(bundle::disk(&found(disk)?))).collect::<Result<_>>()?,
        flash: options.flash.as_deref().map(|flash| found(flash).map(|flash| text(&flash))).transpose()?,
        ..WrittenVm::default()
    })
}

/// The guest's files, fetched and packed where the user gave none.
struct Files {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    /// What the console prints when it takes input, where we know.
    ready: Option<String>,
}

impl Files {
    fn choose(options: &Options, work: &Path) -> Result<Self> {
        if let Some(kernel) = options.kernel.as_ref().or(options.firmware.as_ref()) {
            return Ok(Self {
                kernel: found(kernel)?,
                initrd: options.initrd.as_deref().map(found).transpose()?,
                ready: None,
            });
        }
        let guest = fetch::guest_of(options.arch())?;
        let kernel = guest.kernel()?;
        if let Some(initrd) = &options.initrd {
            return Ok(Self { kernel, initrd: Some(found(initrd)?), ready: None });
        }
        let initrd = work.join("initrd.cpio");
        image::write_new(&initrd, &Initrd::interactive().pack(&guest)?)?;
        Ok(Self { kernel, initrd: Some(initrd), ready: Some(initrd::READY.to_owned()) })
    }
}

fn found(path: &Path) -> Result<PathBuf> {
    path.canonicalize().with_context(|| format!("cannot find {}", path.display()))
}

/// Where `entresol ctl` looks, in a folder that is the user's alone.
fn control_socket() -> Result<PathBuf> {
    let socket = entresol_cli::socket::default_path()?;
    let folder = socket.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        // Whoever can connect owns the machine.
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.with_context(|| format!("cannot make {}", folder.display()))?;
    }
    Ok(socket)
}

/// QEMU would take the socket away from a machine that is still running.
fn free_socket(socket: &Path) -> Result<()> {
    // sun_path of unix(7), with its terminating zero.
    ensure!(
        socket.as_os_str().len() < 108,
        "{} is too long for a socket: set ENTRESOL_SOCKET to a shorter path",
        socket.display()
    );
    if UnixStream::connect(socket).is_ok() {
        bail!("a machine is already running at {}: stop it, or set ENTRESOL_SOCKET to another path", socket.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(words: &str) -> Options {
        Line::try_parse_from(std::iter::once("run").chain(words.split_whitespace())).unwrap().options
    }

    #[test]
    fn what_is_not_said_follows_the_architecture() {
        let (arm64, x86) = (options(""), options("--arch x86_64"));
        assert_eq!((arm64.append(), arm64.outer_memory()), ("console=ttyAMA0", "4G"));
        assert_eq!((x86.append(), x86.outer_memory()), ("console=ttyS0 reboot=acpi", "2G"));
        let said = options("--arch x86_64 --append quiet --outer-memory 1G");
        assert_eq!((said.append(), said.outer_memory()), ("quiet", "1G"));
    }

    #[test]
    fn what_x86_64_does_not_have_is_refused_by_name() {
        for (name, value) in [("firmware", "some.img"), ("flash", "some.img"), ("bare", "")] {
            let words = format!("--{name} {value}");
            options(&words).check().unwrap();
            let error = options(&format!("{words} --arch x86_64")).check().unwrap_err().to_string();
            let rule = format!("--{name}: must be absent with --arch x86_64: ");
            assert!(error.starts_with(&rule), "{error}");
        }
        options("--arch x86_64 --disk some.img --vcpus 4 --memory 1G").check().unwrap();
    }

    #[test]
    fn a_running_machine_keeps_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ctl.sock");
        free_socket(&path).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(free_socket(&path).unwrap_err().to_string().contains("already running"));
        drop(listener);
        free_socket(&path).unwrap();
        assert!(free_socket(&dir.path().join("x".repeat(120))).is_err());
    }
}
