//! What this machine is, and what its user has to type when we cannot fetch for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::apt::{self, Suite};
use super::sources::{self, Mirrors, Source};
use crate::workspace;

/// A mirror of Debian for machines whose own sources have none.
const MIRROR_VARIABLE: &str = "ENTRESOL_DEBIAN_MIRROR";

/// os-release(5), the two fields that decide.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Os {
    pub id: String,
    pub like: String,
    pub codename: String,
}

impl Os {
    /// Reads this machine's.
    pub fn here() -> Self {
        fs::read_to_string("/etc/os-release").map(|text| Self::parse(&text)).unwrap_or_default()
    }

    fn parse(text: &str) -> Self {
        let field = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default();
            value.trim_matches(['"', '\'']).to_owned()
        };
        Self { id: field("ID"), like: field("ID_LIKE"), codename: field("VERSION_CODENAME") }
    }

    fn uses_apt(&self) -> bool {
        std::iter::once(self.id.as_str()).chain(self.like.split_whitespace()).any(|id| id == "debian" || id == "ubuntu")
    }

    /// Debian's suite from which QEMU is taken: Debian 13 and later have a new enough one of their own.
    pub fn tools_suite(&self) -> Suite {
        if self.id == "debian" && self.codename != "bookworm" { Suite::Trixie } else { Suite::Bookworm }
    }
}

/// Debian's packages as this machine can reach them.
pub struct Debian {
    pub mirrors: Mirrors,
    pub keyring: PathBuf,
    pub architecture: String,
}

/// Finds a mirror and the key for it.
///
/// # Errors
/// On a system without apt, or without a mirror: the error says what to type.
pub fn debian(os: &Os, cache: &Path) -> Result<Debian> {
    if !os.uses_apt() {
        bail!("{}", advice(os));
    }
    let mirrors = match std::env::var(MIRROR_VARIABLE) {
        Ok(mirror) if !mirror.is_empty() => Mirrors { main: mirror.trim_end_matches('/').to_owned(), security: None },
        _ => sources::debian_mirrors(&machine_sources()).with_context(|| {
            format!(
                "this machine's apt sources name no mirror of Debian. Choose one from https://www.debian.org/mirror/list, then type:\n\
                 \n    export {MIRROR_VARIABLE}=http://…/debian\n\nand start this command again"
            )
        })?,
    };
    let architecture = apt::host_architecture()?;
    if !matches!(architecture.as_str(), "amd64" | "arm64") {
        bail!("cannot fetch QEMU for {architecture}: install qemu-system-aarch64 10.0 or newer by hand");
    }
    Ok(Debian { mirrors, keyring: keyring(cache)?, architecture })
}

/// Debian's archive key: the machine's own, else the one that its own distribution packages (and has signed).
fn keyring(cache: &Path) -> Result<PathBuf> {
    let names = ["debian-archive-keyring.gpg", "debian-archive-keyring.pgp"];
    let within = |dir: &Path| names.iter().map(|name| dir.join(name)).find(|path| path.is_file());
    let share = Path::new("usr/share/keyrings");
    if let Some(found) = within(&Path::new("/").join(share)).or_else(|| within(&cache.join("keyring").join(share))) {
        return Ok(found);
    }
    let work = tempfile::tempdir_in(cache).context("cannot make a work folder")?;
    let mut download = Command::new("apt-get");
    download.args(["-q", "download", "debian-archive-keyring"]).current_dir(work.path()).env("LC_ALL", "C");
    workspace::output(&mut download).context(
        "Debian's archive keys are not on this machine. Type:\n\n    sudo apt-get update && sudo apt-get install debian-archive-keyring\n",
    )?;
    let package = fs::read_dir(work.path())?.next().context("apt-get download left nothing")??.path();
    let unpacked = work.path().join("unpacked");
    apt::unpack(&package, &unpacked)?;
    super::publish(&unpacked, &cache.join("keyring"))?;
    within(&cache.join("keyring").join(share)).context("the debian-archive-keyring package holds no keyring")
}

fn machine_sources() -> Vec<Source> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    files.sort();
    let mut found = Vec::new();
    for file in files {
        let extension = file.extension().and_then(|e| e.to_str()).unwrap_or_default();
        // A file that we may not read is one that apt's user may not read either: it is of no use to us.
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match extension {
            "list" => found.extend(sources::parse_list(&text)),
            "sources" => found.extend(sources::parse_deb822(&text)),
            _ => {}
        }
    }
    found
}

/// What to type where there is no apt.
pub fn advice(os: &Os) -> String {
    let ids: Vec<&str> = std::iter::once(os.id.as_str()).chain(os.like.split_whitespace()).collect();
    let command = if cfg!(target_os = "macos") {
        "brew install qemu"
    } else if ids.contains(&"fedora") || ids.contains(&"rhel") {
        "sudo dnf install qemu-system-aarch64-core"
    } else if ids.contains(&"arch") {
        "sudo pacman -S qemu-system-aarch64"
    } else if ids.iter().any(|id| id.contains("suse")) {
        "sudo zypper install qemu-arm"
    } else if ids.contains(&"alpine") {
        "sudo apk add qemu-system-aarch64"
    } else {
        "(your system's command to install qemu-system-aarch64 10.0 or newer)"
    };
    format!(
        "Entresol fetches QEMU and a guest only where apt is. On this machine type:\n\n    {command}\n\n\
         and give the guest's files yourself: cargo xtask run -- --kernel Image --initrd initrd.cpio"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn os_release_is_read_with_and_without_quotes() {
        let os = Os::parse("PRETTY_NAME=\"x\"\nID=linuxmint\nID_LIKE=\"ubuntu debian\"\nVERSION_CODENAME=wilma\n");
        assert_eq!(os, Os { id: "linuxmint".into(), like: "ubuntu debian".into(), codename: "wilma".into() });
        assert!(os.uses_apt());
        assert_eq!(os.tools_suite(), Suite::Bookworm);
    }

    #[test]
    fn each_debian_takes_qemu_from_where_it_is_new_enough() {
        let debian = |codename: &str| Os { id: "debian".into(), like: String::new(), codename: codename.into() };
        assert_eq!(debian("bookworm").tools_suite(), Suite::Bookworm);
        assert_eq!(debian("trixie").tools_suite(), Suite::Trixie);
        assert_eq!(debian("forky").tools_suite(), Suite::Trixie);
    }

    #[test]
    fn a_system_without_apt_is_told_what_to_type() {
        let fedora = Os { id: "fedora".into(), ..Os::default() };
        assert!(!fedora.uses_apt());
        assert!(advice(&fedora).contains("sudo dnf install"));
        let cache = tempfile::tempdir().unwrap();
        assert!(debian(&fedora, cache.path()).is_err());
    }
}
