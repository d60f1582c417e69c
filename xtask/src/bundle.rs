//! From what a user asked for to the boot bundle: the configuration is written as TOML, and the host tool `entresol`
//! checks and packs it. xtask has no second opinion of what is a good configuration; it only reads the outer machine's
//! size from it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use entresol_wire::config::{Outer, Written};
use toml::{Table, Value};

use crate::progress::Step;
use crate::workspace;

/// A virtual machine that a command asks for.
#[derive(Clone, Debug)]
pub struct VmRequest {
    pub name: String,
    pub memory: String,
    pub vcpus: u32,
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
    /// (image, read-only)
    pub disks: Vec<(PathBuf, bool)>,
    /// Policies by their TOML names: `unclaimed_mmio = "read-as-zero"`.
    pub policies: Vec<(&'static str, String)>,
}

impl VmRequest {
    /// A VM with one vCPU, 512 MiB and Linux's console on the PL011.
    pub fn linux(name: &str, kernel: &Path, initrd: &Path) -> Self {
        Self {
            name: name.to_owned(),
            memory: "512M".to_owned(),
            vcpus: 1,
            kernel: kernel.to_owned(),
            initrd: Some(initrd.to_owned()),
            cmdline: "console=ttyAMA0".to_owned(),
            disks: Vec::new(),
            policies: Vec::new(),
        }
    }
}

/// The configuration as an owner would write it.
pub fn to_toml(outer_memory: &str, outer_cpus: u32, vms: &[VmRequest]) -> String {
    let text = |value: &str| Value::String(value.to_owned());
    let path = |value: &Path| text(&value.to_string_lossy());
    let mut list = Vec::new();
    for vm in vms {
        let mut table = Table::new();
        table.insert("name".into(), text(&vm.name));
        table.insert("memory".into(), text(&vm.memory));
        table.insert("vcpus".into(), Value::Integer(vm.vcpus.into()));
        table.insert("kernel".into(), path(&vm.kernel));
        if let Some(initrd) = &vm.initrd {
            table.insert("initrd".into(), path(initrd));
        }
        table.insert("cmdline".into(), text(&vm.cmdline));
        let disk = |(file, read_only): &(PathBuf, bool)| {
            Value::Table(Table::from_iter([
                ("file".to_owned(), path(file)),
                ("read_only".to_owned(), Value::Boolean(*read_only)),
            ]))
        };
        table.insert("disks".into(), Value::Array(vm.disks.iter().map(disk).collect()));
        let policies = vm.policies.iter().map(|(name, value)| ((*name).to_owned(), text(value)));
        table.insert("policies".into(), Value::Table(policies.collect()));
        list.push(Value::Table(table));
    }
    let outer = Table::from_iter([
        ("memory".to_owned(), text(outer_memory)),
        ("cpus".to_owned(), Value::Integer(outer_cpus.into())),
    ]);
    Table::from_iter([("outer".to_owned(), Value::Table(outer)), ("vms".to_owned(), Value::Array(list))]).to_string()
}

/// The outer machine that a configuration file asks for.
///
/// # Errors
/// When the file cannot be read, is not TOML or breaks a rule of the outer machine.
pub fn outer_of(config: &Path) -> Result<Outer> {
    let text = fs::read_to_string(config).with_context(|| format!("cannot read {}", config.display()))?;
    let written: Written =
        toml::from_str(&text).with_context(|| format!("{} is not a configuration", config.display()))?;
    // Paths in the file are relative to it; a length is all that a check wants of a file.
    let folder = config.parent().unwrap_or(Path::new(".")).to_owned();
    let mut length =
        |path: &String| fs::metadata(folder.join(path)).map(|data| data.len()).map_err(|error| error.to_string());
    let checked = written.check(&mut length).with_context(|| format!("{}", config.display()))?;
    Ok(checked.outer)
}

/// Checks a configuration and packs it with its files.
///
/// # Errors
/// When the host tool refuses it: its words are the error.
pub fn pack(config: &Path, bundle: &Path) -> Result<()> {
    let step = Step::start("building the host tool");
    let mut build = workspace::cargo();
    workspace::output(build.args(["build", "--quiet", "--package", "entresol-cli", "--bin", "entresol"]))?;
    step.say("packing the boot bundle");
    let tool = workspace::target_dir().join("debug/entresol");
    let mut pack = std::process::Command::new(&tool);
    workspace::output(pack.arg("bundle").arg("--config").arg(config).arg("--output").arg(bundle)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_what_the_configuration_says() {
        let dir = tempfile::tempdir().unwrap();
        for file in ["Image", "in\"itrd", "disk"] {
            fs::write(dir.path().join(file), [0u8; 512]).unwrap();
        }
        let mut vm = VmRequest::linux("a", &dir.path().join("Image"), &dir.path().join("in\"itrd"));
        vm.disks.push((dir.path().join("disk"), true));
        vm.policies.push(("unclaimed_mmio", "read-as-zero".into()));
        let config = dir.path().join("vms.toml");
        fs::write(&config, to_toml("1G", 3, &[vm])).unwrap();
        let outer = outer_of(&config).unwrap();
        assert_eq!((outer.memory, outer.cpus), (1 << 30, 3));
        let written: Written = toml::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
        assert_eq!(written.vms.len(), 1);
        assert_eq!((written.vms[0].disks.len(), written.vms[0].disks[0].read_only), (1, true));
        assert_eq!(written.vms[0].cmdline, "console=ttyAMA0");
    }

    #[test]
    fn a_bad_configuration_is_refused_before_anything_starts() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("vms.toml");
        fs::write(&config, to_toml("4G", 2, &[])).unwrap();
        assert!(outer_of(&config).is_err());
        fs::write(&config, "colour = 1").unwrap();
        assert!(format!("{:?}", outer_of(&config).unwrap_err()).contains("colour"));
    }
}
