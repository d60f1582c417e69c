//! A private apt root: Debian packages resolved, downloaded and unpacked without being installed, and without root.
//!
//! apt is given its own state, cache, source list and an empty dpkg status, so that it sees a machine with nothing
//! installed and never touches the real one. It checks the archive's signature with Debian's keyring and each package
//! against the signed lists; [`Root::download`] then checks every file against those lists' SHA-256 once more, on disk,
//! before anything is unpacked.
//!
//! Known hole: a root's folder is trusted between runs as much as the rest of the user's home is.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use super::sources::Mirrors;
use crate::progress::Step;
use crate::workspace;

/// Which of Debian's suites a root sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Suite {
    /// Debian 12 with its backports.
    Bookworm,
    /// Debian 13.
    Trixie,
}

impl Suite {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
        }
    }

    /// The suite whose QEMU is 10.0 or newer, for apt's `--target-release`.
    pub fn newest(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm-backports",
            Self::Trixie => "trixie",
        }
    }

    fn pockets(self) -> &'static [&'static str] {
        match self {
            Self::Bookworm => &["bookworm", "bookworm-updates", "bookworm-backports"],
            Self::Trixie => &["trixie", "trixie-updates"],
        }
    }
}

/// One package file as the signed lists describe it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub file: String,
    /// Lower-case hexadecimal.
    pub sha256: String,
}

/// A private apt root on disk.
pub struct Root {
    config: PathBuf,
    suite: Suite,
    host: String,
}

impl Root {
    /// Makes or refreshes the root for `suite` below `cache`; `host` is dpkg's name of this machine's architecture.
    ///
    /// # Errors
    /// When files cannot be written, or the mirror cannot be reached or is not signed as it must be.
    pub fn open(
        cache: &Path,
        suite: Suite,
        host: &str,
        mirrors: &Mirrors,
        keyring: &Path,
        step: &Step,
    ) -> Result<Self> {
        let dir = cache.join(format!("apt-{}", suite.name()));
        for part in ["state/lists/partial", "cache/archives/partial", "dpkg"] {
            fs::create_dir_all(dir.join(part)).with_context(|| format!("cannot make {}", dir.join(part).display()))?;
        }
        fs::write(dir.join("dpkg/status"), "").context("cannot write the empty dpkg status")?;
        fs::write(dir.join("sources.list"), source_list(suite, host, mirrors, keyring))
            .context("cannot write the source list")?;
        let config = dir.join("apt.conf");
        fs::write(&config, apt_config(&dir, host)).context("cannot write apt's configuration")?;
        let root = Self { config, suite, host: host.to_owned() };
        step.say(&format!("reading Debian's package lists ({})", suite.name()));
        workspace::output(root.apt("apt-get").args(["update", "-q", "--error-on=any"]))?;
        Ok(root)
    }

    /// `packages` and everything they need to run, as `name:arch=version`.
    ///
    /// # Errors
    /// When apt cannot resolve them.
    pub fn closure(&self, packages: &[&str]) -> Result<Vec<String>> {
        let target = self.suite.newest();
        let arguments = ["-q", "-y", "--simulate", "--no-install-recommends", "-t", target, "install"];
        let plan = workspace::output(self.apt("apt-get").args(arguments).args(packages))?;
        let plan = parse_plan(&plan, &self.host);
        ensure!(!plan.is_empty(), "apt planned nothing for {}", packages.join(" "));
        Ok(plan)
    }

    /// What `package` depends on by a name that starts with `prefix`: the real package behind a meta-package.
    ///
    /// # Errors
    /// When there is none.
    pub fn behind(&self, package: &str, prefix: &str) -> Result<String> {
        let text = workspace::output(self.apt("apt-cache").args(["depends", "--important", package]))?;
        let found =
            text.lines().filter_map(|line| line.trim().strip_prefix("Depends: ")).find(|name| name.starts_with(prefix));
        found.map(str::to_owned).with_context(|| format!("{package} depends on nothing named {prefix}…"))
    }

    /// Downloads `packages` into `dir` and checks every file.
    ///
    /// # Errors
    /// When one cannot be fetched, or its SHA-256 is not the one in the signed lists.
    pub fn download(&self, packages: &[String], dir: &Path, step: &Step) -> Result<Vec<Listed>> {
        let uris = workspace::output(self.apt("apt-get").args(["-q", "download", "--print-uris"]).args(packages))?;
        let listed = parse_uris(&uris)?;
        ensure!(listed.len() == packages.len(), "apt knows {} files for {} packages", listed.len(), packages.len());
        step.counts_to(listed.len());
        let mut apt = self.apt("apt-get");
        apt.args(["-q", "download"]).args(packages).current_dir(dir).stdin(Stdio::null());
        let mut child = apt.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("cannot start apt-get")?;
        let lines = child.stdout.take().context("apt-get has no standard output")?;
        for line in BufReader::new(lines).lines() {
            if line.context("cannot read what apt-get prints")?.starts_with("Get:") {
                step.one_done();
            }
        }
        let ended = child.wait_with_output().context("cannot wait for apt-get")?;
        if !ended.status.success() {
            bail!(
                "apt-get download ended with {}:\n{}",
                ended.status,
                String::from_utf8_lossy(&ended.stderr).trim_end()
            );
        }
        for package in &listed {
            check(&dir.join(&package.file), &package.sha256)?;
        }
        Ok(listed)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(&self.config).env("LC_ALL", "C");
        command
    }
}

/// Unpacks a package's files into `dir`.
///
/// # Errors
/// When `dpkg` refuses it.
pub fn unpack(package: &Path, dir: &Path) -> Result<()> {
    workspace::output(Command::new("dpkg").arg("-x").arg(package).arg(dir)).map(drop)
}

/// dpkg's name of this machine's architecture.
///
/// # Errors
/// When there is no dpkg.
pub fn host_architecture() -> Result<String> {
    Ok(workspace::output(Command::new("dpkg").arg("--print-architecture"))?.trim().to_owned())
}

/// What guests are of, whatever the host is.
const GUESTS: [&str; 2] = ["arm64", "amd64"];

fn source_list(suite: Suite, host: &str, mirrors: &Mirrors, keyring: &Path) -> String {
    let mut architectures = vec![host];
    architectures.extend(GUESTS.into_iter().filter(|guest| *guest != host));
    let options = format!("[arch={} signed-by={}]", architectures.join(","), keyring.display());
    let mut list: String =
        suite.pockets().iter().map(|pocket| format!("deb {options} {} {pocket} main\n", mirrors.main)).collect();
    if let Some(security) = &mirrors.security {
        list += &format!("deb {options} {security} {}-security main\n", suite.name());
    }
    list
}

/// Hooks and extra indexes that the machine's own configuration adds are none of ours: they would touch the real system
/// or download what nobody reads.
fn apt_config(dir: &Path, host: &str) -> String {
    let dir = dir.display();
    let guests: String = GUESTS.iter().map(|guest| format!("\"{guest}\"; ")).collect();
    format!(
        "#clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n\
         #clear DPkg::Post-Invoke;\n#clear APT::Architectures;\n#clear APT::Default-Release;\n\
         #clear Acquire::IndexTargets::deb::DEP-11;\n#clear Acquire::IndexTargets::deb::DEP-11-icons;\n\
         #clear Acquire::IndexTargets::deb::DEP-11-icons-hidpi;\n#clear Acquire::IndexTargets::deb::CNF;\n\
         #clear Acquire::IndexTargets::deb::Contents-deb;\n\
         APT::Architecture \"{host}\";\nAPT::Architectures {{ \"{host}\"; {guests} }};\nAPT::Sandbox::User \"root\";\n\
         Acquire::Languages \"none\";\nAcquire::Retries \"3\";\n\
         Dir::State \"{dir}/state\";\nDir::State::status \"{dir}/dpkg/status\";\nDir::Cache \"{dir}/cache\";\n\
         Dir::Etc::sourcelist \"{dir}/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n\
         Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"/dev/null\";\n"
    )
}

/// `Inst name (version suite [arch])` and `Inst name:arch (…)` lines of a simulated installation.
fn parse_plan(text: &str, host: &str) -> Vec<String> {
    let one = |line: &str| {
        let (name, rest) = line.strip_prefix("Inst ")?.split_once(" (")?;
        let (source, _) = rest.split_once(')')?;
        let version = source.split_whitespace().next()?;
        let architecture = source.rsplit_once('[').map_or(host, |(_, tail)| tail.trim_end_matches(']'));
        let name = name.split(':').next()?;
        let of = if architecture == "all" { String::new() } else { format!(":{architecture}") };
        Some(format!("{name}{of}={version}"))
    };
    text.lines().filter_map(one).collect()
}

/// `'URI' file size SHA256:hash` lines.
fn parse_uris(text: &str) -> Result<Vec<Listed>> {
    let mut listed = Vec::new();
    for line in text.lines().filter(|line| line.starts_with('\'')) {
        let mut words = line.rsplit(' ');
        let (hash, _size, file) = (words.next(), words.next(), words.next());
        let sha256 = hash.and_then(|hash| hash.strip_prefix("SHA256:"));
        let (Some(sha256), Some(file)) = (sha256, file) else { bail!("apt lists a package without a SHA-256: {line}") };
        ensure!(!file.contains('/'), "apt lists a file name with a slash: {file}");
        listed.push(Listed { file: file.to_owned(), sha256: sha256.to_ascii_lowercase() });
    }
    Ok(listed)
}

fn check(file: &Path, sha256: &str) -> Result<()> {
    let bytes = fs::read(file).with_context(|| format!("apt-get left no {}", file.display()))?;
    let digest = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    ensure!(digest == sha256, "{}: SHA-256 is {digest}, the signed list says {sha256}", file.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_becomes_exact_packages() {
        let text = "Reading package lists...\nInst libc6 (2.36-9+deb12u14 Debian:12/stable [amd64])\n\
                    Inst adduser (3.134 Debian:12/oldstable [all]) []\nConf libc6 (2.36-9)\n";
        assert_eq!(parse_plan(text, "amd64"), ["libc6:amd64=2.36-9+deb12u14", "adduser=3.134"]);
    }

    #[test]
    fn uris_give_the_file_and_its_hash_and_nothing_weaker() {
        let good = "'http://m.example/b.deb' b_1%3a2_arm64.deb 12 SHA256:00FF\n";
        assert_eq!(parse_uris(good).unwrap(), [Listed { file: "b_1%3a2_arm64.deb".into(), sha256: "00ff".into() }]);
        assert!(parse_uris("'http://m.example/b.deb' b.deb 12 MD5Sum:00\n").is_err());
        assert!(parse_uris("'http://m.example/b.deb' ../b.deb 12 SHA256:00\n").is_err());
    }

    #[test]
    fn a_changed_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("p.deb");
        fs::write(&file, b"abc").unwrap();
        check(&file, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad").unwrap();
        fs::write(&file, b"abd").unwrap();
        let error =
            check(&file, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad").unwrap_err().to_string();
        assert!(error.contains("the signed list says ba78"), "{error}");
    }

    #[test]
    fn sources_name_both_architectures_and_the_key() {
        let mirrors =
            Mirrors { main: "http://m.example/debian".into(), security: Some("http://m.example/security".into()) };
        let list = source_list(Suite::Bookworm, "amd64", &mirrors, Path::new("/k.gpg"));
        assert_eq!(list.lines().count(), 4);
        assert!(list.lines().all(|line| line.starts_with("deb [arch=amd64,arm64 signed-by=/k.gpg] ")));
        assert!(list.ends_with("http://m.example/security bookworm-security main\n"));
        assert!(source_list(Suite::Trixie, "arm64", &mirrors, Path::new("/k.gpg")).contains("[arch=arm64,amd64 "));
    }
}
