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
use entresol_wire::config::{KernelFormat, WrittenVm, parse_size};

use crate::bundle;
use crate::fetch;
use crate::image;
use crate::initrd::{self, Initrd};
use crate::outer::Outer;
use crate::workspace;

/// The machine's options; without any, Debian's kernel with a shell.
#[derive(Args, Debug)]
pub struct Options {
    /// Virtual machines as a TOML file; the options for one machine do not go with it
    #[arg(long, conflicts_with_all = ["kernel", "firmware", "initrd", "append", "vcpus", "memory", "disk", "flash", "cpus", "outer_memory"])]
    config: Option<PathBuf>,
    /// The guest's kernel: arm64 Image, the same gzip'd, ELF, or a flat binary (*.bin). Default: Debian's
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Firmware in place of a kernel: it runs from read-only memory at address 0, as EDK2's QEMU_EFI.fd does
    #[arg(long, conflicts_with_all = ["kernel", "initrd"])]
    firmware: Option<PathBuf>,
    /// The guest's initial file system. Default: a shell; none when a kernel is given
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// The guest's command line
    #[arg(long, default_value = "console=ttyAMA0")]
    append: String,
    /// The guest's CPUs, 1 to 8
    #[arg(long, default_value_t = 2)]
    vcpus: u32,
    /// The guest's memory, a multiple of 2 MiB
    #[arg(long, default_value = "512M")]
    memory: String,
    /// A disk image; may be given more than once. Writes are kept until the machine stops
    #[arg(long)]
    disk: Vec<PathBuf>,
    /// What the guest's flash holds, a power of two of bytes. Writes are kept until the machine stops
    #[arg(long)]
    flash: Option<PathBuf>,
    /// A store's image, made by `entresol store create`: where snapshots go
    #[arg(long, conflicts_with = "bare")]
    store: Option<PathBuf>,
    /// CPUs of the machine that the hypervisor runs on
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of the machine that the hypervisor runs on
    #[arg(long, default_value = "4G")]
    outer_memory: String,
    /// Architecture of the machine
    #[arg(long, value_parser = ["aarch64"], default_value = "aarch64")]
    arch: String,
    /// Without the hypervisor: the guest's kernel alone on the outer machine, to tell its faults from ours
    #[arg(long, conflicts_with_all = ["config", "firmware", "vcpus", "memory", "disk", "flash"])]
    bare: bool,
    /// When standard input is not a terminal: feed it once the console has printed this
    #[arg(long)]
    feed_after: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// When something cannot be fetched, built or started. A machine that ran and failed is an exit code.
pub fn run(options: &Options) -> Result<ExitCode> {
    let (outer, feed_after) = prepare(options)?;
    let socket = control_socket()?;
    free_socket(&socket)?;
    let qemu = fetch::qemu_only()?;
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
        (bundle::check(bundle::written(&options.outer_memory, options.cpus, vec![vm]))?, files.ready)
    };
    let image = image::build(&[])?;
    let packed = work.join("bundle.img");
    bundle::pack(&loaded, &packed)?;
    let size = loaded.config().outer;
    let outer = Outer { cpus: size.cpus, memory: size.memory, initrd: Some(packed), ..Outer::new(&image.raw) };
    Ok((outer, options.feed_after.clone().or(ready)))
}

fn bare(options: &Options, files: Files) -> Result<(Outer, Option<String>)> {
    let memory = parse_size(&options.outer_memory);
    let memory = memory
        .with_context(|| format!("--outer-memory {}: a size is a number with K, M or G", options.outer_memory))?;
    let append = Some(options.append.clone());
    let outer = Outer { cpus: options.cpus, memory, initrd: files.initrd, append, ..Outer::new(&files.kernel) };
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
        cmdline: options.append.clone(),
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
        let (_, guest) = fetch::everything()?;
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
