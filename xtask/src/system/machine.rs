//! A machine under test: started, spoken to, waited for; gone when the test is.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use entresol_cli::client::Client;
use entresol_cli::config::Loaded;
use entresol_wire::config::{self, Arch, Written, WrittenVm, parse_size};

use super::Context;
use super::transcript::Transcript;
use crate::boot_disk;
use crate::bundle;
use crate::image;
use crate::initrd::{self, Initrd};
use crate::outer::{Model, Outer, usual_memory};
use crate::outer_bochs::OuterBochs;
use crate::outer_x86::EPYC;
use crate::workspace;

/// The hypervisor answers from an interrupt; a host that is busy may take its time.
pub const ANSWER: Duration = Duration::from_secs(180);

/// What a machine of a test is made of. `name` is its test's (and, with a suffix, a second machine's).
pub struct Builder<'a> {
    context: &'a Context,
    folder: PathBuf,
    outer_memory: String,
    outer_cpus: u32,
    store: Option<PathBuf>,
    extra: Vec<String>,
    merge_rate: Option<u64>,
    arch: Arch,
}

impl<'a> Builder<'a> {
    /// A machine with 2 CPUs and 4 GiB.
    ///
    /// # Errors
    /// When its folder cannot be made.
    pub fn new(context: &'a Context, name: &str) -> Result<Self> {
        let folder = context.work.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let outer_memory = usual_memory(Arch::Arm64).to_owned();
        Ok(Self {
            context,
            folder,
            outer_memory,
            outer_cpus: 2,
            store: None,
            extra: Vec::new(),
            merge_rate: None,
            arch: Arch::Arm64,
        })
    }

    /// The machine, and its guests, are of this architecture, with its usual memory; before files are asked for.
    pub fn on(mut self, arch: Arch) -> Self {
        self.arch = arch;
        usual_memory(arch).clone_into(&mut self.outer_memory);
        self
    }

    /// Gives the outer machine another size.
    pub fn outer(mut self, memory: &str, cpus: u32) -> Self {
        memory.clone_into(&mut self.outer_memory);
        self.outer_cpus = cpus;
        self
    }

    /// Gives the hypervisor a store.
    pub fn store(mut self, image: &Path) -> Self {
        self.store = Some(image.to_owned());
        self
    }

    /// Has the search for equal pages read so many a second while nobody asks for more.
    pub fn merge_pages_per_second(mut self, rate: u64) -> Self {
        self.merge_rate = Some(rate);
        self
    }

    /// Adds arguments of QEMU.
    pub fn qemu(mut self, arguments: &[&str]) -> Self {
        self.extra.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        self
    }

    /// A file of the machine's own folder.
    pub fn file(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        let path = self.folder.join(name);
        image::write_new(&path, bytes)?;
        Ok(path)
    }

    /// Packs an initial file system into the machine's folder.
    ///
    /// # Errors
    /// When it cannot be packed.
    pub fn initrd(&self, name: &str, initrd: &Initrd) -> Result<PathBuf> {
        self.file(name, &initrd.pack(self.context.guest(self.arch)?)?)
    }

    /// Debian's kernel with `initrd`, as [`bundle::linux`] has it.
    ///
    /// # Errors
    /// When the kernel cannot be had.
    pub fn linux(&self, name: &str, initrd: &Path) -> Result<WrittenVm> {
        let mut vm = bundle::linux(name, &self.context.guest(self.arch)?.kernel()?, initrd);
        bundle::console(self.arch).clone_into(&mut vm.cmdline);
        Ok(vm)
    }

    /// Starts the hypervisor with these virtual machines.
    ///
    /// # Errors
    /// When something does not build, the configuration is refused, or QEMU does not start.
    pub fn boot(self, vms: Vec<WrittenVm>) -> Result<Machine> {
        if self.arch == Arch::X86 {
            return self.boot_x86(EPYC, vms);
        }
        let loaded = bundle::check(self.written(vms))?;
        self.boot_loaded(&loaded)
    }

    /// A configuration of these virtual machines.
    fn written(&self, vms: Vec<WrittenVm>) -> Written {
        let mut written = bundle::written(&self.outer_memory, self.outer_cpus, vms);
        written.outer.merge_pages_per_second = self.merge_rate.map(|rate| rate as i64);
        written
    }

    /// Starts the hypervisor with a checked configuration.
    ///
    /// # Errors
    /// As [`Builder::boot`].
    pub fn boot_loaded(self, loaded: &Loaded) -> Result<Machine> {
        let packed = self.folder.join("bundle.img");
        bundle::pack(loaded, &packed)?;
        let size = loaded.config().outer;
        let kernel = &self.context.hypervisor()?.raw;
        let outer =
            Outer { cpus: size.cpus, memory: size.memory, initrd: Some(packed), ..Outer::new(Model::Virt, kernel) };
        Machine::start(self, outer)
    }

    /// Starts the hypervisor with these bytes in place of a bundle, on a machine of the size that was asked for.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub fn boot_packed(self, bundle: &[u8]) -> Result<Machine> {
        let initrd = Some(self.file("bundle.img", bundle)?);
        let Some(memory) = parse_size(&self.outer_memory) else { bail!("{:?} is no size", self.outer_memory) };
        let kernel = &self.context.hypervisor()?.raw;
        let outer = Outer { cpus: self.outer_cpus, memory, initrd, ..Outer::new(Model::Virt, kernel) };
        Machine::start(self, outer)
    }

    /// Starts the hypervisor of x86-64 with these virtual machines on a processor that QEMU calls `cpu`.
    ///
    /// # Errors
    /// As [`Builder::boot`].
    pub fn boot_x86(self, cpu: &str, vms: Vec<WrittenVm>) -> Result<Machine> {
        self.boot_x86_from(cpu, vms, false)
    }

    /// The same, from a disk by GRUB.
    ///
    /// # Errors
    /// As [`Builder::boot`].
    pub fn boot_x86_disk(self, cpu: &str, vms: Vec<WrittenVm>) -> Result<Machine> {
        self.boot_x86_from(cpu, vms, true)
    }

    fn boot_x86_from(self, cpu: &str, vms: Vec<WrittenVm>, disk: bool) -> Result<Machine> {
        let mut written = self.written(vms);
        bundle::on_x86(&mut written);
        let (size, packed) = self.pack_x86(written)?;
        let x86 = self.context.x86()?;
        let write = || boot_disk::write(self.context.bochs()?, &x86.hypervisor, &packed, &self.folder);
        let disk = disk.then(write).transpose()?;
        let (sockets, socket) = control_socket()?;
        let cpu = cpu.to_owned();
        let model = match disk {
            Some(disk) => Model::Pc { cpu, disk },
            None => Model::Microvm { cpu },
        };
        let outer = Outer {
            cpus: size.cpus,
            memory: size.memory,
            initrd: Some(packed),
            control: Some(socket.clone()),
            store: self.store,
            extra: self.extra,
            ..Outer::new(model, &x86.hypervisor)
        };
        Machine::spawn(self.folder, outer.command(&x86.qemu), socket, sockets)
    }

    /// Starts the hypervisor of x86-64 with these virtual machines under Bochs, from a disk, on a processor that Bochs calls `cpu`.
    ///
    /// # Errors
    /// As [`Builder::boot`].
    pub fn boot_bochs(self, cpu: &str, vms: Vec<WrittenVm>) -> Result<Machine> {
        let mut written = bundle::written(&self.outer_memory, 1, vms);
        written.outer.arch = Some(Arch::X86);
        let (size, bundle) = self.pack_x86(written)?;
        let (hypervisor, bochs) = (&self.context.x86()?.hypervisor, self.context.bochs()?);
        let outer = OuterBochs { cpu, memory: size.memory, hypervisor, bundle: &bundle };
        let command = outer.command(bochs, &self.folder)?;
        let sockets = tempfile::tempdir().context("cannot make a folder")?;
        let socket = sockets.path().join("ctl.sock");
        Machine::spawn(self.folder, command, socket, sockets)
    }

    /// The boot bundle of this configuration, and the outer machine that it is for.
    fn pack_x86(&self, written: Written) -> Result<(config::Outer, PathBuf)> {
        let loaded = bundle::check(written)?;
        let packed = self.folder.join("bundle.img");
        bundle::pack(&loaded, &packed)?;
        Ok((loaded.config().outer, packed))
    }

    /// Starts a kernel on the bare machine, without the hypervisor.
    ///
    /// # Errors
    /// When QEMU does not start.
    pub fn boot_bare(self, kernel: &Path, initrd: Option<&Path>, append: &str) -> Result<Machine> {
        let append = Some(append.to_owned());
        let outer = Outer { initrd: initrd.map(Path::to_owned), append, ..Outer::new(Model::Virt, kernel) };
        Machine::start(self, outer)
    }
}

/// A folder of its own for a control channel, and the channel's socket there.
fn control_socket() -> Result<(tempfile::TempDir, PathBuf)> {
    let sockets = tempfile::tempdir().context("cannot make a folder for the control channel")?;
    let socket = sockets.path().join("ctl.sock");
    Ok((sockets, socket))
}

/// A running machine.
pub struct Machine {
    child: Child,
    input: ChildStdin,
    /// What its serial line has printed.
    pub console: Transcript,
    socket: PathBuf,
    /// Sockets have short paths: the folder is in the temporary folder, and goes with the machine.
    _sockets: tempfile::TempDir,
}

impl Machine {
    fn start(builder: Builder<'_>, outer: Outer) -> Result<Self> {
        let (sockets, socket) = control_socket()?;
        let outer = Outer { control: Some(socket.clone()), store: builder.store, extra: builder.extra, ..outer };
        let command = outer.command(&builder.context.qemu);
        Self::spawn(builder.folder, command, socket, sockets)
    }

    fn spawn(folder: PathBuf, mut command: Command, socket: PathBuf, sockets: tempfile::TempDir) -> Result<Self> {
        let log = folder.join("console.log");
        fs::write(folder.join("command"), workspace::shown(&command)).context("cannot note the command")?;
        let mut child = command.spawn().context("cannot start QEMU")?;
        let pipes = (child.stdin.take(), child.stdout.take());
        let (Some(input), Some(output)) = pipes else { bail!("QEMU has no standard streams") };
        let console = Transcript::start(output, child.id(), &log)?;
        Ok(Self { child, input, console, socket, _sockets: sockets })
    }

    /// Waits for `text` on the console; returns what came before it.
    ///
    /// # Errors
    /// As [`Transcript::expect`].
    pub fn expect(&mut self, text: &str) -> Result<String> {
        self.console.expect(text)
    }

    /// Types `bytes`.
    ///
    /// # Errors
    /// When the machine is gone.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.input
            .write_all(bytes)
            .and_then(|()| self.input.flush())
            .map_err(|error| self.console.failure(&format!("cannot type: {error}")))
    }

    /// Types a line.
    ///
    /// # Errors
    /// As [`Machine::send`].
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        self.send(format!("{line}\n").as_bytes())
    }

    /// Runs a command in the shell of our initial file system; returns what it printed. The marks around it are put
    /// together by the shell, so that the echo of the command, which may be folded, is taken for neither.
    ///
    /// # Errors
    /// When the command's status is not 0, or the console does not answer.
    pub fn shell(&mut self, command: &str) -> Result<String> {
        self.expect(initrd::PROMPT)?;
        self.type_line(&format!("echo \"beg\"\"un:\"; {command}; echo \"en\"\"ded:$?:\""))?;
        self.expect("begun:")?;
        let output = self.expect("ended:")?;
        let status = self.expect(":")?;
        ensure!(status == "0", "{}", self.console.failure(&format!("`{command}` ended with status {status}")));
        Ok(output.replace('\r', "").trim().to_owned())
    }

    /// Starts a session on the control channel. One at a time is served.
    ///
    /// # Errors
    /// When the hypervisor does not answer.
    pub fn control(&mut self) -> Result<Client> {
        // QEMU makes the socket before the machine's first instruction: output means that it is there.
        if self.console.text().is_empty() {
            self.console.expect_anything()?;
        }
        Client::connect(&self.socket, ANSWER).map_err(|error| self.console.failure(&error.to_string()))
    }

    /// The control channel's socket, for who does not keep to its protocol.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Waits for the machine's end, which must be a refusal: the hypervisor says this, and nothing else.
    ///
    /// # Errors
    /// When it does not end, or for another reason.
    pub fn expect_refusal(mut self, what: &str) -> Result<()> {
        self.console.expect_end()?;
        let text = self.console.text();
        let (refusal, guest) =
            (text.contains(&format!("PANIC: refused to start: {what}")), text.contains("Booting Linux"));
        ensure!(refusal && !guest, "{}", self.console.failure(&format!("the hypervisor should refuse with {what:?}")));
        Ok(())
    }

    /// Waits for the machine's end, which turns it off whatever its emulator calls that, without a panic of the hypervisor.
    ///
    /// # Errors
    /// When it does not end, or not well.
    pub fn expect_end(mut self) -> Result<()> {
        self.console.expect_end()?;
        let panicked = self.console.text().lines().any(|line| line.starts_with("PANIC"));
        ensure!(!panicked, "{}", self.console.failure("the hypervisor panicked"));
        Ok(())
    }

    /// Waits for the machine's end, which must be a good one: status 0 and no panic of the hypervisor.
    ///
    /// # Errors
    /// When it does not end, or not well.
    pub fn expect_power_off(mut self) -> Result<String> {
        self.console.expect_end()?;
        let status = self.child.wait().context("cannot wait for QEMU")?;
        let text = self.console.text();
        ensure!(
            !text.lines().any(|line| line.starts_with("PANIC")),
            "{}",
            self.console.failure("the hypervisor panicked")
        );
        ensure!(status.success(), "{}", self.console.failure(&format!("QEMU ended with {status}")));
        Ok(text)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already; then neither does anything.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait().map(drop)) {
            eprintln!("cannot stop a machine: {error}");
        }
    }
}
