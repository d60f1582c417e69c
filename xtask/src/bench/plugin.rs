//! The counting plugin (`bench/icount.c`): built with the host's C compiler, and its result read.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::progress::Step;
use crate::workspace;

/// Intervals of one phase, in instructions.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Statistics {
    pub count: u64,
    pub min: u64,
    pub median: u64,
    pub p99: u64,
    pub max: u64,
    pub mean: f64,
}

/// What the plugin writes when QEMU ends.
#[derive(Clone, Debug, Deserialize)]
pub struct Counts {
    /// Whether an interval had begun and not ended.
    pub open: bool,
    /// By phase.
    pub phases: BTreeMap<u8, Statistics>,
}

impl Counts {
    /// Reads a result.
    ///
    /// # Errors
    /// When it is not there or not whole.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("the plugin left no result at {}", path.display()))?;
        let counts: Self = serde_json::from_str(&text).context("the plugin's result is not what we write")?;
        ensure!(!counts.open, "the machine ended inside an interval");
        Ok(counts)
    }
}

/// Compiles the plugin into `work`.
///
/// # Errors
/// When there is no C compiler, or it finds an error.
pub fn build(work: &Path) -> Result<PathBuf> {
    let _step = Step::start("building the counting plugin");
    let library = work.join("icount.so");
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let mut command = Command::new(compiler);
    command.args(["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", "-o"]);
    command.arg(&library).arg(workspace::root().join("bench/icount.c"));
    workspace::output(&mut command).context("a C compiler is needed (Debian: apt install gcc)")?;
    Ok(library)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_read_back_and_a_cut_off_run_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("counts.json");
        let text =
            r#"{"executed":9,"open":false,"phases":{"1":{"count":2,"min":1,"median":1,"p99":2,"max":2,"mean":1.50}}}"#;
        std::fs::write(&path, text).unwrap();
        let counts = Counts::read(&path).unwrap();
        assert_eq!(counts.phases[&1].p99, 2);
        std::fs::write(&path, text.replace("false", "true")).unwrap();
        assert!(Counts::read(&path).unwrap_err().to_string().contains("inside an interval"));
        std::fs::write(&path, "{").unwrap();
        assert!(Counts::read(&path).is_err());
    }
}
