//! `cargo xtask check`: format, compiler lints, and the house's own rules, one rule a file.
//!
//! The house rules read sources as text with comments and literals blanked ([`source`]), so they need no compiler and
//! hold for every target. Each returns its findings; a check fails when there is one.

mod arrows;
mod compiler;
mod length;
mod places;
mod source;
mod unfinished;
mod unsafety;

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::fetch::toolchain;
use source::Tree;

/// Something that breaks a rule.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// Relative to the workspace; a line of 0 means the whole file.
    pub file: PathBuf,
    pub line: usize,
    pub what: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file.display(), self.what),
            line => write!(f, "{}:{line}: {}", self.file.display(), self.what),
        }
    }
}

/// Runs every check; house rules first, because they are quick.
///
/// # Errors
/// After everything that could run has run: what failed.
pub fn run() -> Result<()> {
    let tree = Tree::read()?;
    let rules: [(&str, Vec<Finding>); 5] = [
        ("dependency arrows", arrows::findings()?),
        ("unsafe only where it is allowed", unsafety::findings(&tree)),
        ("length of files", length::findings(&tree)),
        ("nothing unfinished", unfinished::findings(&tree)),
        ("no place of one machine", places::findings(&tree)),
    ];
    let mut failed = Vec::new();
    for (rule, findings) in rules {
        report(rule, findings.is_empty());
        findings.iter().for_each(|finding| eprintln!("    {finding}"));
        if !findings.is_empty() {
            failed.push(rule);
        }
    }
    toolchain::ensure_component("fmt", "rustfmt")?;
    toolchain::ensure_component("clippy", "clippy")?;
    toolchain::ensure_targets(&[toolchain::METAL_TARGET, toolchain::METAL_X86_TARGET])?;
    for (rule, mut command) in compiler::commands() {
        let passed = crate::workspace::run(&mut command).is_ok();
        report(rule, passed);
        if !passed {
            failed.push(rule);
        }
    }
    if !failed.is_empty() {
        bail!("check failed: {}", failed.join(", "));
    }
    Ok(())
}

fn report(rule: &str, passed: bool) {
    println!("check: {rule}: {}", if passed { "ok" } else { "FAILED" });
}
