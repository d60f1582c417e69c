//! Which kernel modules an initial file system needs, in the order in which they must be loaded.
//!
//! Debian's package has no `modules.dep` (that is made where it is installed), so the dependencies are read from the
//! modules themselves: section `.modinfo` holds `key=value` strings, and `depends=` names a comma-separated list.
//! Names are compared with `-` and `_` taken as the same, as modprobe does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};

/// The modules of one kernel, by name.
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    /// Lists `lib/modules/RELEASE`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn list(dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut pending = vec![dir.join("kernel")];
        while let Some(folder) = pending.pop() {
            for entry in fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    pending.push(entry.path());
                } else if let Some(name) = module_name(&entry.path()) {
                    files.insert(name, entry.path());
                }
            }
        }
        let list = dir.join("modules.builtin");
        let builtin = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
        let builtin = builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { files, builtin })
    }

    /// The files to load for `wanted`, dependencies first. What is built into the kernel needs no file.
    ///
    /// # Errors
    /// When a module does not exist or cannot be read.
    pub fn load_order(&self, wanted: &[&str]) -> Result<Vec<PathBuf>> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for name in wanted {
            self.visit(&normal(name), &mut seen, &mut order)?;
        }
        Ok(order)
    }

    fn visit(&self, name: &str, seen: &mut BTreeSet<String>, order: &mut Vec<PathBuf>) -> Result<()> {
        if self.builtin.contains(name) || !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(file) = self.files.get(name) else { bail!("this kernel has no module {name}") };
        let bytes = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        for dependency in depends(&bytes).with_context(|| format!("cannot read the module {}", file.display()))? {
            self.visit(&dependency, seen, order)?;
        }
        order.push(file.clone());
        Ok(())
    }
}

/// `depends=` of a module's `.modinfo`.
fn depends(elf: &[u8]) -> Result<Vec<String>> {
    let file = object::File::parse(elf)?;
    let section = file.section_by_name(".modinfo").context("it has no section .modinfo")?;
    Ok(parse_modinfo(section.data()?))
}

fn parse_modinfo(data: &[u8]) -> Vec<String> {
    let value = data.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"depends="));
    let names = String::from_utf8_lossy(value.unwrap_or_default());
    names.split(',').filter(|name| !name.is_empty()).map(normal).collect()
}

fn module_name(path: &Path) -> Option<String> {
    path.file_name()?.to_str()?.strip_suffix(".ko").map(normal)
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modinfo_is_a_list_of_strings() {
        assert_eq!(parse_modinfo(b"license=GPL\0depends=virtio-ring,rng_core\0name=x\0"), ["virtio_ring", "rng_core"]);
        assert!(parse_modinfo(b"depends=\0").is_empty());
        assert!(parse_modinfo(b"").is_empty());
    }

    #[test]
    fn built_in_modules_need_no_file_and_missing_ones_are_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("kernel")).unwrap();
        fs::write(dir.path().join("modules.builtin"), "kernel/drivers/virtio/virtio-ring.ko\n").unwrap();
        let modules = Modules::list(dir.path()).unwrap();
        assert!(modules.load_order(&["virtio_ring"]).unwrap().is_empty());
        assert!(modules.load_order(&["nothing"]).unwrap_err().to_string().contains("nothing"));
    }
}
