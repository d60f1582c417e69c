//! A configuration file, read and checked with the files that it names.
//!
//! Paths in the file are relative to the folder that it lies in. Every kernel is looked at with the hypervisor's own
//! loader, so that what it would refuse at boot is refused before anything is started.

use std::collections::btree_map::{BTreeMap, Entry};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use entresol_addr::Gpa;
use entresol_loader::kernel::{self, Hint};
use entresol_loader::{Ram, layout, virt, x86};
use entresol_wire::Refusal;
use entresol_wire::bundle::BundleError;
use entresol_wire::config::{Arch, Config, KernelFormat, Role, Vm, Written, format_size};

/// Why there is no configuration, or no bundle.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file could not be read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The file is not TOML, or not of a configuration's shape.
    #[error("{}: {error}", path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// Where and why.
        error: Box<toml::de::Error>,
    },
    /// A value breaks a rule.
    #[error("{}: {refusal}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// The field, its value and the rule.
        refusal: Refusal,
    },
    /// The files do not make a bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The bundle could not be written.
    #[error("cannot write {}: {error}", path.display())]
    Write {
        /// Where to.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// A checked configuration and the contents of every file that it names.
#[derive(Debug)]
pub struct Loaded {
    path: PathBuf,
    config: Config<String>,
    /// By absolute path, so that a file that two VMs name is read once.
    contents: BTreeMap<PathBuf, Vec<u8>>,
}

impl Loaded {
    /// The configuration; files are as they were written.
    pub fn config(&self) -> &Config<String> {
        &self.config
    }

    /// The absolute path and the contents of a file that the configuration names.
    pub fn file(&self, name: &str) -> Option<(&Path, &[u8])> {
        let path = absolute(&self.path, name).ok()?;
        self.contents.get_key_value(&path).map(|(path, contents)| (path.as_path(), contents.as_slice()))
    }

    /// The configuration file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn refused(&self, refusal: Refusal) -> ConfigError {
        ConfigError::Refused { path: self.path.clone(), refusal }
    }
}

/// Reads the file at `path`, checks it and reads the files that it names.
///
/// # Errors
/// The first thing that is wrong. Nothing was started or written.
pub fn load(path: &Path) -> Result<Loaded, ConfigError> {
    let read = |error| ConfigError::Read { path: path.to_owned(), error };
    let text = fs::read_to_string(path).map_err(read)?;
    let written: Written =
        toml::from_str(&text).map_err(|error| ConfigError::Toml { path: path.to_owned(), error: Box::new(error) })?;
    check(path, written)
}

/// The same for a configuration that is not, or not only, from a file; paths are relative to the folder of `path`.
///
/// # Errors
/// The first thing that is wrong.
pub fn check(path: &Path, written: Written) -> Result<Loaded, ConfigError> {
    let refused = |refusal| ConfigError::Refused { path: path.to_owned(), refusal };
    let config = written.check(&mut |name| length(path, name)).map_err(refused)?;
    let mut contents = BTreeMap::new();
    for (role, name) in config.files() {
        let unreadable = |error: io::Error| {
            refused(Refusal::text(role.to_string(), name, format!("must be a file that can be read: {error}")))
        };
        let file = absolute(path, name).map_err(unreadable)?;
        if let Entry::Vacant(entry) = contents.entry(file) {
            let bytes = fs::read(entry.key()).map_err(unreadable)?;
            entry.insert(bytes);
        }
    }
    let loaded = Loaded { path: path.to_owned(), config, contents };
    loaded.config.vms.iter().enumerate().try_for_each(|(index, vm)| bootable(&loaded, index, vm))?;
    Ok(loaded)
}

/// Bytes in a file, or why it cannot be used.
fn length(config: &Path, name: &str) -> Result<u64, String> {
    let file = absolute(config, name).and_then(File::open).map_err(|error| error.to_string())?;
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    if metadata.is_file() { Ok(metadata.len()) } else { Err("it is not a regular file".into()) }
}

/// A name in the configuration as a path without links, so that one file has one path.
fn absolute(config: &Path, name: &str) -> io::Result<PathBuf> {
    config.parent().unwrap_or(Path::new("")).join(name).canonicalize()
}

/// The kernel is one, and it fits into the VM's memory with what comes beside it.
fn bootable(loaded: &Loaded, index: usize, vm: &Vm<String>) -> Result<(), ConfigError> {
    let bytes = |name: &str| loaded.file(name).map(|(_, contents)| contents).unwrap_or_default();
    let refused =
        |rule: String| loaded.refused(Refusal::text(Role::Kernel { vm: index }.to_string(), &vm.kernel, rule));
    let hint = match vm.kernel_format {
        KernelFormat::Auto => Hint::Auto,
        KernelFormat::Flat => Hint::Flat,
        // It takes no memory, and any bytes may be code.
        KernelFormat::Firmware => return Ok(()),
    };
    let initrd = vm.initrd.as_deref().map(bytes).unwrap_or_default();
    // Where the owner does not say, the kernel's own format tells which architecture its machine has.
    let says = loaded.config.outer.arch == Arch::X86;
    if says || hint == Hint::Auto && x86::is_kernel(bytes(&vm.kernel)) {
        let machine = x86::Machine { memory: vm.memory, vcpus: vm.vcpus as u8, virtio: 0, cmdline: &vm.cmdline };
        return match x86::boot(&machine, bytes(&vm.kernel), initrd) {
            Ok(_) => Ok(()),
            Err(error) => Err(refused(error.to_string())),
        };
    }
    let kernel = kernel::recognise(bytes(&vm.kernel), hint).map_err(|error| refused(error.to_string()))?;
    let ram = Ram { base: Gpa::new(virt::RAM_BASE), size: vm.memory };
    // Trees start and memory ends at 2 MiB boundaries, and no tree is larger: one that is small stands for all.
    let smallest_tree = 1;
    layout::layout(ram, &kernel, initrd.len() as u64, smallest_tree)
        .map_err(|error| refused(format!("must fit into vms[{index}].memory = {}: {error}", format_size(vm.memory))))?;
    Ok(())
}
