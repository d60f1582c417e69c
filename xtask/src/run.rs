//! `cargo xtask run`: everything from a clean clone to a guest's shell.
//!
//! Protocol: options become a configuration, the configuration a bundle, hypervisor and bundle a machine; then this
//! process only carries bytes between the user and the machine's serial line ([`console`]) until QEMU ends. Its exit
//! status is QEMU's: 0 when the last guest has powered off; 1 when the hypervisor panicked; 128 + the signal's number
//! when we were told to stop.

mod console;
mod terminal;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::bundle::{self, VmRequest};
use crate::fetch;
use crate::image;
use crate::initrd::{self, Initrd};
use crate::outer::Outer;
use crate::workspace;

/// The machine's options; without any, Debian's kernel with a shell.
#[derive(Args, Debug)]
pub struct Options {
    /// Virtual machines as a TOML file; the options for one machine do not go with it
    #[arg(long, conflicts_with_all = ["kernel", "initrd", "append", "vcpus", "memory", "disk", "cpus", "outer_memory"])]
    config: Option<PathBuf>,
    /// The guest's kernel: arm64 Image, the same gzip'd, ELF, or a flat binary (*.bin). Default: Debian's
    #[arg(long)]
    kernel: Option<PathBuf>,
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
    /// CPUs of the machine that the hypervisor runs on
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Memory of the machine that the hypervisor runs on
    #[arg(long, default_value = "4G")]
    outer_memory: String,
    /// Architecture of the machine
    #[arg(long, value_parser = ["aarch64"], default_value = "aarch64")]
    arch: String,
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
    let outer = Outer { control: Some(socket.clone()), ..outer };
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
    let (config, feed_after) = match &options.config {
        Some(config) => (config.clone(), None),
        None => written_config(options, &work)?,
    };
    let size = bundle::outer_of(&config)?;
    let image = image::build(&[])?;
    let bundle = work.join("bundle.img");
    bundle::pack(&config, &bundle)?;
    let outer = Outer { cpus: size.cpus, memory: size.memory, initrd: Some(bundle), ..Outer::new(&image.raw) };
    Ok((outer, options.feed_after.clone().or(feed_after)))
}

/// The options for one machine, as a configuration file; and what its console prints when it takes input, if we know.
fn written_config(options: &Options, work: &Path) -> Result<(PathBuf, Option<String>)> {
    let absolute = |path: &PathBuf| path.canonicalize().with_context(|| format!("cannot find {}", path.display()));
    let mut ready = None;
    let (kernel, initrd) = match (&options.kernel, &options.initrd) {
        (Some(kernel), initrd) => (absolute(kernel)?, initrd.as_ref().map(absolute).transpose()?),
        (None, given) => {
            let (_, guest) = fetch::everything()?;
            let initrd = if let Some(given) = given {
                absolute(given)?
            } else {
                let path = work.join("initrd.cpio");
                image::write_new(&path, &Initrd::interactive().pack(&guest)?)?;
                ready = Some(initrd::READY.to_owned());
                path
            };
            (guest.kernel()?, Some(initrd))
        }
    };
    let disks = options.disk.iter().map(|disk| Ok((absolute(disk)?, false))).collect::<Result<Vec<_>>>()?;
    let vm = VmRequest {
        name: "guest".to_owned(),
        memory: options.memory.clone(),
        vcpus: options.vcpus,
        kernel,
        initrd,
        cmdline: options.append.clone(),
        disks,
        policies: Vec::new(),
    };
    let path = work.join("vms.toml");
    image::write_new(&path, bundle::to_toml(&options.outer_memory, options.cpus, &[vm]).as_bytes())?;
    Ok((path, ready))
}

/// Where `entresol ctl` looks: `$ENTRESOL_SOCKET`, else in `$XDG_RUNTIME_DIR`, else in a folder of the user's own below
/// the folder for temporary files.
fn control_socket() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("ENTRESOL_SOCKET").filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let folder = match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute()) {
        Some(runtime) => runtime.join("entresol"),
        None => std::env::temp_dir().join(format!("entresol-{}", rustix::process::getuid().as_raw())),
    };
    if !folder.is_dir() {
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        // Whoever can connect owns the machine.
        let private = fs::Permissions::from_mode(0o700);
        fs::set_permissions(&folder, private).with_context(|| format!("cannot make {} private", folder.display()))?;
    }
    Ok(folder.join("ctl.sock"))
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
