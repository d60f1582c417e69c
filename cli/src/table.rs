//! Answers as tables for people.

use comfy_table::{CellAlignment, Table, presets};
use entresol_wire::config::format_size;
use entresol_wire::control::{Audit, Files, MergeStatus, PageRun, Poisoned, Posted, Probe, SlotRow, Stats, VmRow};

/// Columns whose numbers are easier to compare with their last digits above each other.
fn table(header: &[&str], right: &[usize]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for &index in right {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Lines without blanks at their ends.
fn text(table: &Table) -> String {
    table.lines().map(|line| format!("{}\n", line.trim_end().strip_prefix(' ').unwrap_or(line.trim_end()))).collect()
}

/// `ps`.
pub fn ps(rows: &[VmRow<'_>]) -> String {
    let mut table = table(&["NAME", "STATE", "VCPUS", "MEMORY", "RESIDENT"], &[2, 3, 4]);
    for row in rows {
        let state = match &row.reason {
            Some(reason) => format!("{} ({reason})", row.state),
            None => row.state.to_string(),
        };
        let (vcpus, memory, resident) = (row.vcpus.to_string(), format_size(row.memory), in_kib(row.resident));
        table.add_row([row.name.as_ref(), &state, &vcpus, &memory, &resident]);
    }
    text(&table)
}

/// `stats`.
pub fn stats(stats: &Stats<'_>) -> String {
    let Stats { faults, entries, tlb, .. } = stats;
    let mut table = table(&["WHAT", "KIND", "COUNT"], &[2]);
    let fixed = [
        ("faults", "translation", faults.translation),
        ("faults", "permission", faults.permission),
        ("faults", "access flag", faults.access_flag),
        ("faults", "absent", faults.absent),
        ("faults", "poisoned", faults.poisoned),
        ("faults", "fresh", faults.fresh),
        ("faults", "populated", faults.populated),
        ("faults", "retry", faults.retry),
        ("faults", "spurious", faults.spurious),
        ("faults", "outside", faults.outside),
        ("faults", "injected", faults.injected),
        ("entries", "4K", entries.size_4k),
        ("entries", "2M", entries.size_2m),
        ("entries", "1G", entries.size_1g),
        ("tables", "pages", stats.table_pages),
        ("tlb", "ipa", tlb.ipa),
        ("tlb", "range", tlb.range),
        ("tlb", "vmid", tlb.vmid),
        ("tlb", "all", tlb.all),
        ("frames", "resident", stats.resident_frames),
        ("frames", "stored", stats.stored_frames),
        ("frames", "free", stats.free_frames),
        ("frames", "poisoned", stats.poisoned_frames),
        ("mmio", "unclaimed", stats.unclaimed_mmio),
        ("merge", "scanned", stats.merge.scanned),
        ("merge", "offered", stats.merge.offered),
        ("merge", "joined", stats.merge.joined),
        ("merge", "vacated", stats.merge.vacated),
        ("merge", "blocks broken", stats.merge.broken),
        ("merge", "differed", stats.merge.differed),
        ("shared", "copied", stats.merge.copied),
    ];
    let exits = stats.exits.iter().map(|(reason, count)| ("exits", reason.as_ref(), *count));
    let balloon = stats.balloon.as_ref().map(|balloon| {
        [
            ("balloon", "target", balloon.target),
            ("balloon", "actual", balloon.actual),
            ("balloon", "inflated", balloon.inflated),
            ("balloon", "deflated", balloon.deflated),
            ("balloon", "reported", balloon.reported),
            ("balloon", "refused", balloon.refused),
            ("balloon", "kept", balloon.kept),
            ("balloon", "updates", balloon.updates),
        ]
    });
    let guest = stats.balloon.iter().flat_map(|balloon| &balloon.guest);
    let guest = guest.map(|(name, count)| ("guest", name.as_ref(), *count));
    for (what, kind, count) in fixed.into_iter().chain(balloon.into_iter().flatten()).chain(guest).chain(exits) {
        table.add_row([what, kind, &count.to_string()]);
    }
    text(&table)
}

/// `merge`.
pub fn merge(status: &MergeStatus) -> String {
    let mut table = table(&["WHAT", "COUNT"], &[1]);
    let per_page = status.nanoseconds.checked_div(status.scanned).unwrap_or(0);
    for (what, count) in [
        ("virtual machines", u64::from(status.vms)),
        ("rounds", status.rounds),
        ("rounds left", status.rounds_left.into()),
        ("pages a second, at most", status.pages_per_second.into()),
        ("pages read", status.scanned),
        ("pages given back", status.given_back),
        ("nanoseconds a page", per_page),
        ("frames for sums", status.held_frames),
    ] {
        table.add_row([what, &count.to_string()]);
    }
    text(&table)
}

/// `audit`.
pub fn audit(audit: &Audit) -> String {
    let mut table = table(&["FRAMES", "COUNT"], &[1]);
    let rows = [
        ("all", audit.frames),
        ("private", audit.private),
        ("pages of private machines", audit.pages),
        ("private, mapped, leased", audit.leased),
        ("private, mapped, shared by the guest", audit.open),
        ("private, mapped, to be removed", audit.stuck),
        ("poisoned", audit.poisoned),
        ("blocks of 2 MiB, mapped", audit.own_blocks),
        ("blocks of 2 MiB, mapped page by page", audit.own_tables),
        ("blocks of 2 MiB, absent", audit.own_absent),
        ("wrong", audit.wrong),
    ];
    for (what, count) in rows {
        table.add_row([what, &count.to_string()]);
    }
    let example = audit.example.map(|frame| format!("frame {frame:#x} is one that is wrong\n"));
    text(&table) + &example.unwrap_or_default()
}

/// `poison`.
pub fn poisoned(poisoned: &Poisoned) -> String {
    let kind = if poisoned.private { "private" } else { "not private" };
    format!("frame {:#x}, {kind}, is never used again\n", poisoned.frame)
}

/// `probe`.
pub fn probe(probe: &Probe) -> String {
    let kind = if probe.private { "private" } else { "not private" };
    match probe.fault {
        Some(fault) => {
            format!(
                "frame {:#x}, {kind}: the read faulted: syndrome {:#x}, address {:#x}\n",
                probe.frame, fault.syndrome, fault.address
            )
        }
        None => format!("frame {:#x}, {kind}: the read went through\n", probe.frame),
    }
}

/// `posted`.
pub fn posted(posted: &Posted) -> String {
    let mut table = table(&["WHAT", "ADDRESS", "SIZE", "VALUE"], &[1, 2, 3]);
    for write in &posted.writes {
        let (address, size) = (format!("{:#x}", write.address), write.size.to_string());
        table.add_row(["write", &address, &size, &write.value.to_string()]);
    }
    for bell in &posted.doorbells {
        table.add_row(["rings", &format!("{:#x}", bell.address), "-", &bell.rings.to_string()]);
    }
    text(&table)
}

/// `slots`.
pub fn slots(rows: &[SlotRow<'_>]) -> String {
    let mut table = table(&["SLOT", "BASE", "SIZE", "OBJECT", "KIND", "FLAGS"], &[0, 1, 2, 3]);
    for row in rows {
        let flags = if row.flags.is_empty() { "-".into() } else { row.flags.join(",") };
        let (id, object) = (row.id.to_string(), row.object.to_string());
        let (base, size) = (format!("{:#x}", row.base), format_size(row.size));
        table.add_row([id.as_str(), &base, &size, &object, row.kind.as_ref(), &flags]);
    }
    text(&table)
}

/// `files`.
pub fn files(files: &Files<'_>) -> String {
    let mut table = table(&["FILE", "BYTES", "BASE"], &[1]);
    for row in &files.rows {
        table.add_row([row.name.as_ref(), &row.length.to_string(), row.base.as_deref().unwrap_or("-")]);
    }
    format!("{}{} of {} free\n", text(&table), in_kib(files.free), format_size(files.size))
}

/// `dirty get`, `harvest` and `since`.
pub fn pages(runs: &[PageRun], slots: &[SlotRow<'_>]) -> String {
    let mut table = table(&["SLOT", "PAGE", "PAGES", "BASE"], &[0, 1, 2, 3]);
    for PageRun(slot, first, count) in runs {
        // A slot may have gone since.
        let base = slots.iter().find(|row| row.id == *slot).map(|row| format!("{:#x}", row.base + (first << 12)));
        let base = base.unwrap_or_else(|| "-".to_owned());
        table.add_row([slot.to_string(), first.to_string(), count.to_string(), base]);
    }
    let count: u64 = runs.iter().map(|run| run.2).sum();
    format!("{}{count} pages\n", text(&table))
}

/// `young`.
pub fn young(ranges: &[(u64, u64, u64)]) -> String {
    let mut table = table(&["BASE", "SIZE", "YOUNG"], &[0, 1, 2]);
    for (base, size, young) in ranges {
        table.add_row([format!("{base:#x}"), format_size(*size), young.to_string()]);
    }
    text(&table)
}

/// Resident memory changes by pages: whole KiB, so that numbers compare.
fn in_kib(bytes: u64) -> String {
    format!("{}K", bytes >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_wire::control::{Balloon, Faults, State};

    #[test]
    fn virtual_machines_line_up() {
        let row = |name: &'static str, state, reason: Option<&'static str>, resident| VmRow {
            name: name.into(),
            state,
            reason: reason.map(Into::into),
            vcpus: 2,
            memory: 512 << 20,
            resident,
        };
        let rows = [row("web", State::Running, None, 12 << 20), row("db", State::Paused, Some("OutOfMemory"), 4096)];
        let expected = "\
NAME  STATE                 VCPUS  MEMORY  RESIDENT
web   running                   2    512M    12288K
db    paused (OutOfMemory)      2    512M        4K
";
        assert_eq!(ps(&rows), expected);
    }

    #[test]
    fn slots_line_up() {
        let row = |id, flags: &[&'static str]| SlotRow {
            id,
            base: 1 << 30,
            size: 2 << 20,
            object: 1,
            kind: "anonymous".into(),
            flags: flags.iter().map(|&flag| flag.into()).collect(),
        };
        let expected = "\
SLOT        BASE  SIZE  OBJECT  KIND       FLAGS
   0  0x40000000    2M       1  anonymous  -
  10  0x40000000    2M       1  anonymous  read-only,dirty-log
";
        assert_eq!(slots(&[row(0, &[]), row(10, &["read-only", "dirty-log"])]), expected);
    }

    #[test]
    fn every_count_is_shown() {
        let faults = Faults { translation: 11, injected: 99, ..Faults::default() };
        let stats = Stats { faults, exits: [("wfi".into(), 77)].into(), ..Stats::default() };
        let shown = super::stats(&stats);
        let line = |what: &str| shown.lines().find(|line| line.contains(what)).expect(what).split_whitespace().last();
        assert_eq!((line("translation"), line("injected"), line("wfi")), (Some("11"), Some("99"), Some("77")));
        assert_eq!(shown.lines().count(), 1 + 31 + 1);
    }

    #[test]
    fn a_balloon_is_shown_where_there_is_one() {
        let guest = [("free-memory".into(), 4096)].into();
        let balloon = Balloon { target: 5, actual: 3, guest, ..Balloon::default() };
        let shown = super::stats(&Stats { balloon: Some(balloon), ..Stats::default() });
        let shown: Vec<Vec<&str>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        for line in [["balloon", "target", "5"], ["balloon", "actual", "3"], ["guest", "free-memory", "4096"]] {
            assert!(shown.contains(&line.to_vec()), "{line:?}");
        }
        assert_eq!(shown.len(), 1 + 31 + 8 + 1);
    }
}
