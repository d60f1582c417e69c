//! The outer machine: QEMU's arm64 `virt` with EL2, GICv3 and MTE, as every command of xtask starts it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::fetch::Qemu;

/// The outer machine's first serial line is QEMU's standard input and output.
#[derive(Clone, Debug)]
pub struct Outer {
    /// CPUs.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// What starts at reset: the hypervisor's raw image, or any kernel.
    pub kernel: PathBuf,
    /// The boot bundle, or a kernel's initial file system.
    pub initrd: Option<PathBuf>,
    /// Given to the kernel in the device tree.
    pub append: Option<String>,
    /// Unix socket of the control channel.
    pub control: Option<PathBuf>,
    /// A disk image that is the hypervisor's store.
    pub store: Option<PathBuf>,
    /// Arguments of one command only.
    pub extra: Vec<String>,
}

impl Outer {
    /// A machine of the usual size for `kernel`: 2 CPUs, 4 GiB.
    pub fn new(kernel: &Path) -> Self {
        let kernel = kernel.to_owned();
        Self {
            cpus: 2,
            memory: 4 << 30,
            kernel,
            initrd: None,
            append: None,
            control: None,
            store: None,
            extra: Vec::new(),
        }
    }

    /// The command, with piped standard input and output; it is killed by whoever waits for it.
    pub fn command(&self, qemu: &Qemu) -> Command {
        let mut command = qemu.command();
        command.args(["-M", "virt,virtualization=on,gic-version=3,mte=on", "-cpu", "max,pauth-impdef=on"]);
        command.args(["-accel", "tcg,thread=multi,tb-size=256"]);
        command.args(["-smp", &self.cpus.to_string(), "-m", &format!("{}M", self.memory >> 20)]);
        command.args(["-display", "none", "-nodefaults", "-no-reboot", "-monitor", "none"]);
        command.args(["-chardev", "stdio,id=serial,mux=off,signal=off", "-serial", "chardev:serial"]);
        command.args(["-global", "virtio-mmio.force-legacy=false"]);
        command.arg("-kernel").arg(&self.kernel);
        if let Some(initrd) = &self.initrd {
            command.arg("-initrd").arg(initrd);
        }
        if let Some(append) = &self.append {
            command.args(["-append", append]);
        }
        if let Some(socket) = &self.control {
            command.args(control(socket));
        }
        if let Some(store) = &self.store {
            command.args(disk(store, "entresol-store"));
        }
        command.args(&self.extra);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command
    }
}

/// Arguments for the control channel at `socket`.
pub fn control(socket: &Path) -> [String; 6] {
    // A comma ends a value of QEMU's options; two stand for one.
    let path = socket.to_string_lossy().replace(',', ",,");
    // A port of its own and not a console's: QEMU holds back what the host does not read, where a console's output is
    // thrown away. Port 0 can only be a console's.
    let port = "virtserialport,chardev=control,nr=1,name=entresol.control";
    let channel = format!("socket,id=control,path={path},server=on,wait=off");
    ["-device", "virtio-serial-device,max_ports=2", "-chardev", &channel, "-device", port].map(str::to_owned)
}

/// Arguments for a virtio disk of its own, which is told by its serial number. Its errors are the guest's to see: else QEMU
/// would stop the machine when the host's disk is full.
pub fn disk(image: &Path, serial: &str) -> [String; 4] {
    let file = image.to_string_lossy().replace(',', ",,");
    let drive = format!("file={file},if=none,id={serial},format=raw,cache=writeback,werror=report,rerror=report");
    ["-drive".to_owned(), drive, "-device".to_owned(), format!("virtio-blk-device,drive={serial},serial={serial}")]
}
