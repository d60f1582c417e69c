//! Who may import whom: design.md's arrows, extended by devices, loader and wire (ADR 13).
//!
//! A crate that is not in the table is a finding too, so a new crate says first where it stands.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::Finding;
use crate::workspace;

/// (crate, the crates of ours that it may import). Names without their common prefix.
const ARROWS: &[(&str, &[&str])] = &[
    ("addr", &[]),
    ("sync", &[]),
    ("wire", &[]),
    ("fault", &["addr"]),
    ("loader", &["addr"]),
    ("slot", &["addr", "sync"]),
    ("machine", &["addr", "sync"]),
    ("devices", &["addr", "sync"]),
    ("backing", &["addr", "sync", "machine"]),
    ("table", &["addr", "sync", "machine"]),
    ("shadow", &["addr", "sync", "machine"]),
    ("arch-arm64", &["addr", "fault", "table"]),
    ("arch-x86", &["addr", "fault", "table", "shadow"]),
    ("mmu", &["addr", "sync", "fault", "slot", "backing", "table", "shadow", "machine"]),
    ("metal-common", &["addr", "sync", "machine"]),
    ("metal-arm64", &["addr", "sync", "machine", "mmu", "arch-arm64", "metal-common"]),
    ("metal-x86", &["addr", "sync", "machine", "mmu", "arch-x86", "metal-common"]),
    ("hypervisor", &HYPERVISOR),
    ("model", &["addr", "sync", "fault", "slot", "backing", "table", "machine", "mmu", "arch-arm64", "arch-x86"]),
    ("fuzz", &["addr", "sync", "fault", "slot", "backing", "table", "machine", "mmu", "arch-arm64", "devices"]),
    ("cli", &["wire", "addr", "mmu", "loader", "model"]),
    ("xtask", &["wire", "cli"]),
];

/// What only tests may import besides: real formats for the pipeline's. No arrow leads back, so there is no circle.
const TEST_ARROWS: &[(&str, &[&str])] = &[("mmu", &["arch-arm64", "arch-x86"]), ("arch-x86", &["machine", "sync"])];

/// Features that exist for the lab, and may be switched on by nothing else but tests and the fuzz target, whose canary is a
/// planted bug: the hypervisor has no planted bugs, and no
/// scheduler but its own.
const LAB_FEATURES: &[(&str, &[&str])] = &[("sync", &["lab", "zoo"]), ("machine", &["model"])];

const HYPERVISOR: [&str; 15] = [
    "addr",
    "sync",
    "fault",
    "slot",
    "backing",
    "table",
    "mmu",
    "machine",
    "arch-arm64",
    "arch-x86",
    "metal-arm64",
    "metal-x86",
    "devices",
    "loader",
    "wire",
];

const PREFIX: &str = "entresol-";

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    path: Option<PathBuf>,
    kind: Option<String>,
    #[serde(default)]
    features: Vec<String>,
}

/// Every import that is not an arrow.
///
/// # Errors
/// When cargo cannot tell.
pub fn findings() -> Result<Vec<Finding>> {
    let text =
        workspace::output(workspace::cargo().args(["metadata", "--format-version", "1", "--no-deps", "--offline"]))?;
    Ok(judge(&serde_json::from_str(&text).context("cargo metadata printed something else")?))
}

fn judge(metadata: &Metadata) -> Vec<Finding> {
    let finding = |what: String| Finding { file: "Cargo.toml".into(), line: 0, what };
    let mut findings = Vec::new();
    for package in &metadata.packages {
        let name = package.name.strip_prefix(PREFIX).unwrap_or(&package.name);
        let Some((_, allowed)) = ARROWS.iter().find(|(known, _)| *known == name) else {
            findings.push(finding(format!("{name} has no place in the table of arrows (xtask/src/check/arrows.rs)")));
            continue;
        };
        for dependency in package.dependencies.iter().filter(|dependency| dependency.path.is_some()) {
            let other = dependency.name.strip_prefix(PREFIX).unwrap_or(&dependency.name);
            let for_tests = TEST_ARROWS.iter().any(|(from, to)| *from == name && to.contains(&other));
            let is_test = dependency.kind.as_deref() == Some("dev");
            if !(allowed.contains(&other) || for_tests && is_test) {
                let kind = dependency.kind.as_deref().unwrap_or("normal");
                findings
                    .push(finding(format!("{name} imports {other} ({kind}); it may import: {}", allowed.join(", "))));
            }
            let of_the_lab = LAB_FEATURES.iter().find(|(owner, _)| *owner == other).map_or(&[][..], |(_, all)| *all);
            if let Some(feature) = dependency.features.iter().find(|feature| of_the_lab.contains(&feature.as_str()))
                && !["model", "fuzz"].contains(&name)
                && !is_test
            {
                findings.push(finding(format!("{name} switches {other}'s {feature} on, which is the lab's alone")));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(name: &str, on: &str) -> Metadata {
        let text = format!(
            r#"{{"packages":[{{"name":"{name}","dependencies":[
                {{"name":"{on}","path":"/x","kind":null}},{{"name":"spin","path":null,"kind":"dev"}}]}}]}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn an_arrow_is_no_finding_and_everything_else_is() {
        assert!(judge(&metadata("entresol-slot", "entresol-addr")).is_empty());
        assert!(judge(&metadata("entresol-slot", "entresol-backing"))[0].what.contains("slot imports backing"));
        assert!(judge(&metadata("entresol-new", "entresol-addr"))[0].what.contains("no place"));
    }

    #[test]
    fn only_the_lab_has_planted_bugs() {
        let with = |name: &str, kind: &str| {
            let text = format!(
                r#"{{"packages":[{{"name":"{name}","dependencies":[
                    {{"name":"entresol-sync","path":"/x","kind":{kind},"features":["zoo"]}}]}}]}}"#
            );
            judge(&serde_json::from_str(&text).unwrap())
        };
        assert!(with("entresol-model", "null").is_empty());
        assert!(with("entresol-mmu", "\"dev\"").is_empty());
        assert!(with("entresol-mmu", "null")[0].what.contains("mmu switches sync's zoo on"));
    }

    #[test]
    fn the_table_has_no_circle() {
        for (index, (name, allowed)) in ARROWS.iter().enumerate() {
            for other in *allowed {
                let place = ARROWS.iter().position(|(known, _)| known == other);
                assert!(place.is_some_and(|place| place < index), "{name} stands before {other}");
            }
        }
    }
}
