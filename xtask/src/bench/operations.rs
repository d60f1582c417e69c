//! The guest `bench` on the hypervisor: one run with 4 KiB entries, one with 2 MiB blocks.

use std::fs::File;

use anyhow::{Context, Result};
use entresol_wire::config::{
    CacheMaintenance, CoalescedZone, Doorbell, LargestEntry, SharedBlock, WrittenMemory, WrittenPolicies, WrittenVm,
};

use super::machine::{self, Run};
use super::plugin::{Counts, Statistics};
use super::{Bench, Part};
use crate::guests;

/// Key of the results and the guest's phase.
const PAGES: [(&str, u8); 7] = [
    ("fault_populated_4k", 2),
    ("fault_fresh_4k", 1),
    ("mmio_read", 4),
    ("mmio_write", 5),
    ("mmio_coalesced", 10),
    ("doorbell", 11),
    ("hvc", 6),
];
/// Of the same run: what KVM does not carry out for a guest.
const OURS: [(&str, u8); 3] = [("mmio_pair", 8), ("cmo_trap", 9), ("cow_4k", 16)];
const OURS_OF_BLOCKS: [(&str, u8); 1] = [("cow_2m", 17)];
/// Of a machine whose memory is private.
const PRIVATE: [(&str, u8); 7] = [
    ("private_populated_4k", 2),
    ("private_fresh_4k", 1),
    ("private_cow_4k", 16),
    ("private_read_window", 18),
    ("private_read_place", 19),
    ("private_lease", 20),
    ("pfn_cache_check", 23),
];
/// Of a machine with a swap device.
const SWAPPED: [(&str, u8); 2] = [("major_fault_4k", 21), ("major_fault_again_4k", 22)];
/// Of a machine with memory tagging: a first touch clears tags, a copy copies them.
const TAGGED: [(&str, u8); 5] = [
    ("tagged_populated_4k", 2),
    ("tagged_fresh_4k", 1),
    ("tagged_cow_4k", 16),
    ("tag_save_4k", 24),
    ("tag_restore_4k", 25),
];
/// Of one that has both.
const TAGGED_SWAPPED: [(&str, u8); 2] = [("tagged_major_fault_4k", 21), ("tagged_major_fault_again_4k", 22)];
/// Bytes of the device: room for 512 MiB, each page with a sector for its tags.
const SWAP: u64 = (512 << 20) / 8 * 9;
const BLOCKS: [(&str, u8); 1] = [("fault_populated_2m", 3)];
const LOG: [(&str, u8); 2] = [("dirty_log_fault", 12), ("get_dirty_log_1g_16384", 13)];
const SPLIT: [(&str, u8); 2] = [("dirty_log_split", 14), ("dirty_log_split_page", 15)];

/// Memory of the guest.
pub const GUEST: (u64, &str) = (512 << 20, "512M");
/// Memory of a guest that logs.
pub const LOGGED: (u64, &str) = (1 << 30, "1G");

/// Where the guest expects a zone of coalesced MMIO, of one page, and a doorbell of 4 bytes.
const COALESCED: u64 = 0x0c00_0000;
const DOORBELL: u64 = 0x0c00_1000;

/// What the guest prints last.
pub const DONE: &str = "BENCH DONE";

/// The guest's command line.
pub fn arguments(part: Part) -> &'static str {
    match part {
        Part::Blocks => "bench=blocks",
        Part::Log => "bench=log",
        Part::Split => "bench=split",
        Part::Private => "bench=pages private",
        Part::Swap | Part::TagsSwap => "bench=swap",
        Part::Tags => "bench=pages tags",
        Part::Pages | Part::Forks | Part::Boot => "bench=pages",
    }
}

/// The guest's memory.
pub fn memory(part: Part) -> (u64, &'static str) {
    if matches!(part, Part::Log | Part::Split) { LOGGED } else { GUEST }
}

/// What the guest's own hypervisor may be asked for besides.
const ALL: &str = "all";

/// Operations in the order of the table.
pub type Results = Vec<(&'static str, Statistics)>;

/// Measures one part's operations.
///
/// # Errors
/// When the machine does not come to its end, or a phase is missing.
pub fn measure(bench: &Bench, part: Part) -> Result<Results> {
    let name = match part {
        Part::Private => "bench=private",
        Part::Tags => "bench=tags",
        Part::TagsSwap => "bench=tags-swap",
        part => arguments(part),
    };
    let blocks = matches!(part, Part::Blocks | Part::Split);
    let page_size = if blocks { LargestEntry::Block2M } else { LargestEntry::Page4K };
    let vm = WrittenVm {
        name: "bench".to_owned(),
        memory: WrittenMemory { size: memory(part).1.to_owned(), private: part == Part::Private, ..Default::default() },
        kernel: guests::flat("bench")?.to_string_lossy().into_owned(),
        cmdline: format!("{} {ALL}", arguments(part)),
        policies: WrittenPolicies {
            page_size,
            services: true,
            cache_maintenance: CacheMaintenance::Trap,
            shared_block: SharedBlock::Whole,
            ..WrittenPolicies::default()
        },
        coalesced_mmio: vec![CoalescedZone { base: COALESCED, size: 0x1000 }],
        mte: matches!(part, Part::Tags | Part::TagsSwap),
        doorbells: vec![Doorbell { address: DOORBELL, size: 4 }],
        ..WrittenVm::default()
    };
    let packed = machine::pack(bench, name, vm)?;
    let disk = machine::file(bench, &format!("{name}.img"));
    let mut run = Run::new(name, &bench.hypervisor, &packed, DONE);
    if matches!(part, Part::Swap | Part::TagsSwap) {
        File::create(&disk)
            .and_then(|file| file.set_len(SWAP))
            .with_context(|| format!("cannot make {}", disk.display()))?;
        run.disk = Some((&disk, "entresol-swap"));
    }
    let counts = run.to_end(bench)?.counts;
    let mut results = phases(part, &counts)?;
    let ours: &[_] = match part {
        Part::Pages => &OURS,
        Part::Blocks => &OURS_OF_BLOCKS,
        _ => &[],
    };
    results.extend(each(ours, &counts)?);
    Ok(results)
}

/// The part's results by key.
///
/// # Errors
/// When a phase is missing: the guest skipped it.
pub fn phases(part: Part, counts: &Counts) -> Result<Results> {
    match part {
        Part::Blocks => each(&BLOCKS, counts),
        Part::Log => each(&LOG, counts),
        Part::Split => each(&SPLIT, counts),
        Part::Private => each(&PRIVATE, counts),
        Part::Swap => each(&SWAPPED, counts),
        Part::Tags => each(&TAGGED, counts),
        Part::TagsSwap => each(&TAGGED_SWAPPED, counts),
        Part::Pages | Part::Forks | Part::Boot => each(&PAGES, counts),
    }
}

/// The results of `keys`, each with its phase.
///
/// # Errors
/// As [`phases`].
pub fn each(keys: &[(&'static str, u8)], counts: &Counts) -> Result<Results> {
    let one = |(key, phase): &(&'static str, u8)| {
        let statistics = counts.phases.get(phase).with_context(|| format!("the guest did not measure {key}"))?;
        Ok((*key, statistics.clone()))
    };
    keys.iter().map(one).collect()
}
