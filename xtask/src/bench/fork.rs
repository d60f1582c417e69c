//! Live forks: how long the parent stands still, and what an idle copy costs.
//!
//! The guest `forks` writes all its memory, in 4 KiB entries, and is forked while its two vCPUs run on two CPUs. The pause is
//! every instruction that both CPUs execute from the moment in which the first vCPU stops to that in which both are at
//! work again: what one CPU does while it waits for the other is in it, so it is more than the longer of the two. What a CPU
//! executes for a vCPU that is at work again, as the copies of its first writes, is not.

use anyhow::{Context, Result};
use entresol_wire::config::{LargestEntry, WrittenPolicies, WrittenVm};

use super::Bench;
use super::machine::{self, Run};
use super::table::Row;
use crate::{bundle, guests};

/// Key, size of the guest and of the machine, in MiB, and whether a second fork follows each at once.
const SIZES: [(&str, u64, u64, bool); 4] = [
    ("fork_pause_256m", 256, 4096, false),
    ("fork_pause_1g", 1024, 4096, false),
    ("fork_pause_3g", 3072, 6144, false),
    ("fork_again_1g", 1024, 4096, true),
];
/// What the guest leaves untouched, in MiB: its image and the device tree.
const REST: u64 = 16;
/// Forks of each guest.
const FORKS: u64 = 9;
/// The guest's phases: a fork, and one that follows at once.
const FORK: u8 = 13;
const AGAIN: u8 = 14;
/// The largest pause may be so many times the smallest.
const FLAT: f64 = 1.2;

/// Measures all of it.
///
/// # Errors
/// When a machine does not come to its end.
pub fn measure(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut medians = Vec::new();
    let mut child = None;
    for (key, mib, outer, again) in SIZES {
        let outcome = run(bench, key, mib, outer, again)?;
        let phase = if again { AGAIN } else { FORK };
        let ours = outcome.counts.phases.get(&phase).with_context(|| format!("the guest did not measure {key}"))?;
        if !again {
            medians.push(ours.median);
        }
        rows.push(Row::Operation { key, ours: ours.clone(), peer: None });
        child = child.or(Some(child_kib(&outcome.console)?));
    }
    let (least, most) = (medians.iter().min().copied(), medians.iter().max().copied());
    let ratio = most.unwrap_or(0) as f64 / least.unwrap_or(1).max(1) as f64;
    rows.push(Row::Figure { key: "fork_pause_ratio", value: ratio, target: FLAT, unit: "largest / smallest" });
    rows.push(Row::Figure { key: "fork_child_kib", value: child.unwrap_or(0.0), target: 300.0, unit: "KiB" });
    Ok(rows)
}

fn run(bench: &Bench, key: &str, mib: u64, outer: u64, again: bool) -> Result<machine::Outcome> {
    let back_to_back = if again { " back-to-back" } else { "" };
    let vm = WrittenVm {
        name: "forks".to_owned(),
        memory: format!("{mib}M").into(),
        vcpus: Some(2),
        kernel: guests::flat("forks")?.to_string_lossy().into_owned(),
        cmdline: format!("mib={} forks={FORKS}{back_to_back}", mib - REST),
        policies: WrittenPolicies { page_size: LargestEntry::Page4K, services: true, ..WrittenPolicies::default() },
        ..WrittenVm::default()
    };
    let packed = machine::file(bench, &format!("{key}.bundle"));
    bundle::pack(&bundle::check(bundle::written(&format!("{outer}M"), 2, vec![vm]))?, &packed)?;
    let run = Run { cpus: 2, memory: outer << 20, ..Run::new(key, &bench.hypervisor, &packed, "FORKS DONE") };
    run.to_end(bench)
}

/// Frames and heap that each copy but the first took: the guest says what is free before the second fork and after the
/// last.
fn child_kib(console: &str) -> Result<f64> {
    let free = |line: &str| -> Option<u64> {
        let (frames, heap) = line.trim().strip_prefix("FREE frames=")?.split_once(" heap=")?;
        Some(frames.parse::<u64>().ok()? * 4096 + heap.parse::<u64>().ok()?)
    };
    let mut told = console.lines().filter_map(free);
    let (before, after) = (told.next(), told.next());
    let (before, after) = before.zip(after).context("the guest did not say what is free")?;
    Ok(before.saturating_sub(after) as f64 / (FORKS - 1) as f64 / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_takes_what_is_no_longer_free() {
        let console = "x\r\nFREE frames=1000 heap=90000\r\nFREE frames=920 heap=8080\r\n";
        assert_eq!(child_kib(console).unwrap(), (80.0 * 4096.0 + 81920.0) / 8.0 / 1024.0);
        assert!(child_kib("FREE frames=1 heap=1").is_err());
        assert!(child_kib("FREE frames=x heap=1\nFREE frames=1 heap=1").is_err());
    }
}
