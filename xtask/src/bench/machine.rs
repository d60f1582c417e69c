//! The machine that is measured: the outer machine of every other command, made deterministic.
//!
//! One CPU unless a run wants more, which then take turns; one instruction a nanosecond, idle time skipped, a clock that starts at a fixed date and runs on virtual time,
//! fixed seeds. Two runs of the same files execute the same instructions.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use entresol_wire::config::WrittenVm;

use super::Bench;
use super::plugin::Counts;
use crate::bundle;
use crate::progress::Step;

/// Memory of the machine, in bytes and as an owner writes it.
const OUTER: (u64, &str) = (4 << 30, "4G");
/// The longest run takes a tenth of it on two busy cores; a machine that is stuck under `-icount` never idles.
const LONGEST: Duration = Duration::from_secs(1800);

/// What is run. `name` is the run's, of its files in the work folder.
pub struct Run<'a> {
    pub name: &'a str,
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    pub append: &'a str,
    /// EL2, with the hypervisor's usual machine; without, a machine of one guest's size.
    pub el2: bool,
    /// For the machine without EL2.
    pub device_tree: Option<&'a Path>,
    /// CPUs, which the emulator runs one at a time.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
    /// Encoding of the instruction that begins the boot's interval.
    pub start: Option<u32>,
    /// An image, and the serial number of the disk that it is.
    pub disk: Option<(&'a Path, &'a str)>,
    /// A line of the console that says that the run is complete.
    pub done: &'a str,
}

/// What a run gave.
pub struct Outcome {
    pub counts: Counts,
    /// The first serial line.
    pub console: String,
}

impl<'a> Run<'a> {
    /// The usual machine for a hypervisor, of one CPU.
    pub fn new(name: &'a str, kernel: &'a Path, initrd: &'a Path, done: &'a str) -> Self {
        let (append, device_tree, start, disk) = ("", None, None, None);
        Self { name, kernel, initrd, append, el2: true, device_tree, cpus: 1, memory: OUTER.0, start, disk, done }
    }
}

impl Run<'_> {
    /// Runs the machine to its end.
    ///
    /// # Errors
    /// When it does not start, end by itself with status 0, or print its last line.
    pub fn to_end(&self, bench: &Bench) -> Result<Outcome> {
        execute(&bench.work, self.name, self.done, |counts| self.command(bench, counts))
    }

    fn command(&self, bench: &Bench, counts: &Path) -> Command {
        let mut command = bench.qemu.command();
        let machine = if self.el2 {
            "virt,gic-version=3,dtb-randomness=off,virtualization=on,mte=on"
        } else {
            "virt,gic-version=3,dtb-randomness=off"
        };
        command.args(["-M", machine, "-cpu", "max,pauth-impdef=on", "-smp", &self.cpus.to_string()]);
        command.args(["-m", &format!("{}M", self.memory >> 20)]);
        command.args(["-display", "none", "-nodefaults", "-no-reboot", "-monitor", "none", "-serial", "stdio"]);
        command.args(["-global", "virtio-mmio.force-legacy=false"]);
        let mut counted = counted(&bench.plugin, counts);
        if let (Some(opcode), [.., plugin]) = (self.start, &mut counted) {
            *plugin += &format!(",start={opcode:#x}");
        }
        command.args(counted);
        command.arg("-kernel").arg(self.kernel).arg("-initrd").arg(self.initrd);
        if !self.append.is_empty() {
            command.args(["-append", self.append]);
        }
        if let Some((image, serial)) = self.disk {
            command.args(["-drive", &format!("file={},if=none,id={serial},format=raw", commas(image))]);
            command.args(["-device", &format!("virtio-blk-device,drive={serial},serial={serial}")]);
        }
        if let Some(tree) = self.device_tree {
            command.arg("-dtb").arg(tree);
        }
        command
    }
}

/// Arguments that make QEMU deterministic, with the plugin writing to `counts`.
pub fn counted(plugin: &Path, counts: &Path) -> [String; 8] {
    let plugin = format!("{},out={}", commas(plugin), commas(counts));
    ["-icount", "shift=0,sleep=off", "-seed", "1", "-rtc", "base=2024-01-01,clock=vm", "-plugin", &plugin]
        .map(str::to_owned)
}

/// Runs the machine that `command` starts, given where the plugin writes, to its end. `name` is the run's, of its files in `work`.
///
/// # Errors
/// As [`Run::to_end`].
pub fn execute(work: &Path, name: &str, done: &str, command: impl FnOnce(&Path) -> Command) -> Result<Outcome> {
    let step = Step::start(&format!("measuring: {name}"));
    let log = work.join(format!("{name}.log"));
    let counts = work.join(format!("{name}.json"));
    if counts.exists() {
        fs::remove_file(&counts).with_context(|| format!("cannot remove {}", counts.display()))?;
    }
    let mut command = command(&counts);
    let output = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
    let errors = output.try_clone().context("cannot use the log twice")?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
    wait(command, output).with_context(|| format!("the machine's log is {}", log.display()))?;
    drop(step);
    let console = read(&log)?;
    ensure!(
        console.lines().any(|line| line.trim_end() == done),
        "{name} did not print {done:?}; it ended with:\n{}\nthe whole log is {}",
        tail(&console),
        log.display()
    );
    Ok(Outcome { counts: Counts::read(&counts)?, console })
}

/// The boot bundle of a machine with `vm` on one CPU, in the work folder.
///
/// # Errors
/// When its configuration is refused, or it cannot be packed.
pub fn pack(bench: &Bench, name: &str, vm: WrittenVm) -> Result<PathBuf> {
    let packed = file(bench, &format!("{name}.bundle"));
    bundle::pack(&bundle::check(bundle::written(OUTER.1, 1, vec![vm]))?, &packed)?;
    Ok(packed)
}

/// A comma ends a value of QEMU's options; two stand for one.
fn commas(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// The machine's end is the end of its serial line, which goes to `log`.
fn wait(mut command: Command, mut log: File) -> Result<()> {
    let mut child = command.spawn().context("cannot start QEMU")?;
    let mut serial = child.stdout.take().context("QEMU has no standard output")?;
    let (ended, end) = channel();
    thread::spawn(move || {
        // Nobody listens any more only when the machine has been stopped for its time.
        let _gone = ended.send(io::copy(&mut serial, &mut log));
    });
    let in_time = end.recv_timeout(LONGEST);
    if in_time.is_err() {
        child.kill().context("cannot stop QEMU")?;
    }
    let status = child.wait().context("cannot wait for QEMU")?;
    let Ok(copied) = in_time else { bail!("the machine did not end within {} s", LONGEST.as_secs()) };
    copied.context("cannot write the log")?;
    ensure!(status.success(), "QEMU ended with {status}");
    Ok(())
}

fn read(log: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let mut file = File::open(log).with_context(|| format!("cannot open {}", log.display()))?;
    file.read_to_end(&mut bytes).with_context(|| format!("cannot read {}", log.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn tail(console: &str) -> String {
    let lines: Vec<&str> = console.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// The file of a run in the work folder.
pub fn file(bench: &Bench, name: &str) -> PathBuf {
    bench.work.join(name)
}
