//! Programs of Debian's for guests, with the libraries that they are linked with.
//!
//! Only packages of the guest's architecture are taken out of what Debian would install, and of their files only the programs and what these
//! are linked with.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use entresol_wire::config::Arch;
use object::LittleEndian;
use object::read::elf::{Dyn as _, ElfFile64, FileHeader as _};

use super::apt::{self, Root, Suite};
use super::host::{self, Os};
use crate::progress::Step;

/// What is fetched together.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    /// As Debian calls it.
    name: &'static str,
    /// As in [`super::qemu`], for arm64 and for amd64.
    folders: [&'static str; 2],
    /// What a guest gets in `/bin`.
    programs: &'static [&'static str],
}

/// An in-memory store, and the load that is put on it.
pub const REDIS: Package = Package {
    name: "redis-server",
    folders: ["redis-1", "redis-x86-1"],
    programs: &["redis-server", "redis-cli", "redis-benchmark"],
};

/// An interpreter that takes addresses apart and puts them together.
pub const PERL: Package = Package { name: "perl-base", folders: ["perl-1", "perl-x86-1"], programs: &["perl"] };

/// What Debian calls an architecture, and where it puts things.
#[derive(Debug)]
struct Port {
    arch: &'static str,
    /// The loader that every program names.
    loader: &'static str,
    /// The shared libraries, and the loader, lie in one of these.
    libraries: &'static [&'static str],
}

const ARM64: Port = Port {
    arch: "arm64",
    loader: "ld-linux-aarch64.so.1",
    libraries: &["lib/aarch64-linux-gnu", "usr/lib/aarch64-linux-gnu", "lib"],
};
const AMD64: Port = Port {
    arch: "amd64",
    loader: "ld-linux-x86-64.so.2",
    libraries: &["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64"],
};

/// The fetched files.
#[derive(Clone, Debug)]
pub struct Programs {
    package: Package,
    port: &'static Port,
    folder: PathBuf,
}

/// A package's programs for a guest of `arch`, fetched when they have to be.
///
/// # Errors
/// When it cannot be fetched: the error says what to type.
pub fn ensure(cache: &Path, package: Package, arch: Arch) -> Result<Programs> {
    let (port, folder) = match arch {
        Arch::Arm64 => (&ARM64, package.folders[0]),
        Arch::X86 => (&AMD64, package.folders[1]),
    };
    let folder = cache.join(folder);
    if !folder.is_dir() {
        fetch(cache, package.name, port.arch, &folder)?;
    }
    Ok(Programs { package, port, folder })
}

fn fetch(cache: &Path, name: &str, arch: &str, folder: &Path) -> Result<()> {
    let text = format!("fetching Debian's {arch} {name}");
    let step = Step::start(&text);
    let debian = host::debian(&Os::here(), cache)?;
    let root = Root::open(cache, Suite::Bookworm, &debian.architecture, &debian.mirrors, &debian.keyring, &step)?;
    step.say(&text);
    let mut packages = root.closure(&[&format!("{name}:{arch}")])?;
    // What a whole Debian has besides is for its scripts of installation.
    let of_arch = format!(":{arch}=");
    packages.retain(|package| package.contains(&of_arch));
    let work = tempfile::tempdir_in(cache).context("cannot make a work folder")?;
    let (packed, tree) = (work.path().join("packed"), work.path().join("tree"));
    fs::create_dir(&packed).and_then(|()| fs::create_dir(&tree)).context("cannot make a work folder")?;
    for package in root.download(&packages, &packed, &step)? {
        apt::unpack(&packed.join(&package.file), &tree)?;
    }
    super::publish(&tree, folder)
}

impl Programs {
    /// Paths in a guest, and the bytes of the file there: programs, their loader, every library that one of them needs.
    ///
    /// # Errors
    /// When a file is missing or not what it should be.
    pub fn files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = Vec::new();
        let mut wanted = VecDeque::from([self.port.loader.to_owned()]);
        for program in self.package.programs {
            let bytes = self.read(&self.folder.join("usr/bin").join(program))?;
            wanted.extend(needed(&bytes).with_context(|| format!("{program} is no program"))?);
            files.push((format!("bin/{program}"), bytes));
        }
        while let Some(name) = wanted.pop_front() {
            let path = format!("lib/{name}");
            if files.iter().any(|(at, _)| *at == path) {
                continue;
            }
            let bytes = self.read(&self.library(&name)?)?;
            wanted.extend(needed(&bytes).with_context(|| format!("{name} is no library"))?);
            files.push((path, bytes));
        }
        Ok(files)
    }

    fn library(&self, name: &str) -> Result<PathBuf> {
        let mut places = self.port.libraries.iter().map(|place| self.folder.join(place).join(name));
        let found = places.find(|path| path.is_file());
        found.with_context(|| format!("{} holds no {name}: remove it and try again", self.folder.display()))
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        fs::read(path).with_context(|| format!("cannot read {}: remove {}", path.display(), self.folder.display()))
    }
}

/// The libraries that an ELF file names (System V ABI, DT_NEEDED).
fn needed(bytes: &[u8]) -> Result<Vec<String>> {
    let file = ElfFile64::<LittleEndian>::parse(bytes)?;
    let (endian, header) = (file.endian(), file.elf_header());
    let sections = header.sections(endian, bytes)?;
    let Some((dynamic, strings)) = sections.dynamic(endian, bytes)? else { return Ok(Vec::new()) };
    let strings = sections.strings(endian, bytes, strings)?;
    let names = dynamic.iter().filter(|entry| entry.tag32(endian) == Some(object::elf::DT_NEEDED));
    names.map(|entry| Ok(String::from_utf8_lossy(entry.string(endian, strings)?).into_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_elf_file_is_refused() {
        assert!(needed(b"#!/bin/sh\n").is_err());
        assert!(needed(&[]).is_err());
    }
}
