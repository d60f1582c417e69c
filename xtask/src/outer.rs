//! The outer machine, as every command of xtask starts it in QEMU: arm64's `virt` with EL2, GICv3 and MTE, x86-64's `microvm` with SVM, or
//! a PC. What a machine of x86-64 is made of is in [`crate::outer_x86`].

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use entresol_wire::config::Arch;

use crate::fetch::Qemu;
use crate::outer_x86::{EPYC, MICROVM, slots};

const VIRT: [&str; 6] = [
    "-M",
    "virt,virtualization=on,gic-version=3,mte=on",
    "-cpu",
    "max,pauth-impdef=on",
    "-accel",
    "tcg,thread=multi,tb-size=256",
];

/// Which of QEMU's machines.
#[derive(Clone, Debug)]
pub enum Model {
    /// arm64's `virt`.
    Virt,
    /// x86-64's `microvm` with a processor that QEMU calls `cpu`, with its properties.
    Microvm { cpu: String },
    /// x86-64's `q35` that starts from `disk` ([`crate::boot_disk`]) in place of a kernel; it has no virtio-mmio slots, and so neither control
    /// channel nor store.
    Pc { cpu: String, disk: PathBuf },
}

impl Model {
    /// The machine that guests of `arch` run on.
    pub fn of(arch: Arch) -> Self {
        match arch {
            Arch::Arm64 => Self::Virt,
            Arch::X86 => Self::Microvm { cpu: EPYC.to_owned() },
        }
    }

    /// Its architecture.
    pub const fn arch(&self) -> Arch {
        match self {
            Self::Virt => Arch::Arm64,
            Self::Microvm { .. } | Self::Pc { .. } => Arch::X86,
        }
    }
}

/// The memory of an outer machine whose user does not say: x86-64's ends below its devices then.
pub const fn usual_memory(arch: Arch) -> &'static str {
    match arch {
        Arch::Arm64 => "4G",
        Arch::X86 => "2G",
    }
}

/// The outer machine's first serial line is QEMU's standard input and output.
#[derive(Clone, Debug)]
pub struct Outer {
    /// Which machine.
    pub model: Model,
    /// CPUs.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// What starts at reset: the hypervisor's image, or any kernel.
    pub kernel: PathBuf,
    /// The boot bundle, or a kernel's initial file system.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line. `microvm` has there what the hypervisor looks for, its virtio-mmio slots, if nothing else is given.
    pub append: Option<String>,
    /// Unix socket of the control channel.
    pub control: Option<PathBuf>,
    /// A disk image that is the hypervisor's store.
    pub store: Option<PathBuf>,
    /// Arguments of one command only.
    pub extra: Vec<String>,
}

impl Outer {
    /// A machine for `kernel`: 2 CPUs, 4 GiB.
    pub fn new(model: Model, kernel: &Path) -> Self {
        Self {
            model,
            cpus: 2,
            memory: 4 << 30,
            kernel: kernel.to_owned(),
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
        match &self.model {
            Model::Virt => command.args(VIRT),
            Model::Microvm { cpu } => command.args(MICROVM).args(["-cpu", cpu]),
            Model::Pc { cpu, .. } => command.args(["-M", "q35", "-cpu", cpu]),
        };
        command.args(["-smp", &self.cpus.to_string(), "-m", &format!("{}M", self.memory >> 20)]);
        command.args(["-display", "none", "-nodefaults", "-no-reboot", "-monitor", "none"]);
        command.args(["-chardev", "stdio,id=serial,mux=off,signal=off", "-serial", "chardev:serial"]);
        match &self.model {
            Model::Virt => self.start(&mut command, self.append.clone()),
            Model::Microvm { .. } => self.start(&mut command, Some(self.append.clone().unwrap_or_else(slots))),
            Model::Pc { disk, .. } => {
                command.args(["-drive".to_owned(), format!("{},format=raw", file(disk))]);
            }
        }
        command.args(&self.extra);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command
    }

    /// What a machine with virtio-mmio slots starts, and what is in them.
    fn start(&self, command: &mut Command, append: Option<String>) {
        command.args(["-global", "virtio-mmio.force-legacy=false"]);
        command.arg("-kernel").arg(&self.kernel);
        if let Some(initrd) = &self.initrd {
            command.arg("-initrd").arg(initrd);
        }
        if let Some(append) = &append {
            command.args(["-append", append]);
        }
        if let Some(socket) = &self.control {
            command.args(control(socket));
        }
        if let Some(store) = &self.store {
            command.args(disk(store, "entresol-store"));
        }
    }
}

/// A file in QEMU's options: a comma ends a value there; two stand for one.
fn file(path: &Path) -> String {
    format!("file={}", path.to_string_lossy().replace(',', ",,"))
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
    let file = file(image);
    let drive = format!("{file},if=none,id={serial},format=raw,cache=writeback,werror=report,rerror=report");
    ["-drive".to_owned(), drive, "-device".to_owned(), format!("virtio-blk-device,drive={serial},serial={serial}")]
}
