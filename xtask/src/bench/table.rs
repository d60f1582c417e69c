//! Results with their targets, for people and for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use super::operations::Results;
use super::plugin::Statistics;

/// Targets: medians, in instructions, and what KVM's median is on the same machine where nobody measures it again; none
/// where KVM does not carry the operation out.
const TARGETS: [(&str, u64, Option<u64>); 45] = [
    ("fault_populated_4k", 700, Some(4447)),
    ("fault_fresh_4k", 1400, Some(7277)),
    ("fault_populated_2m", 900, Some(4610)),
    ("mmio_read", 700, Some(5368)),
    ("mmio_write", 700, Some(5368)),
    ("mmio_coalesced", 350, Some(1656)),
    ("doorbell", 350, Some(1664)),
    ("mmio_pair", 1100, None),
    ("cmo_trap", 400, None),
    ("hvc", 250, Some(1056)),
    ("dirty_log_fault", 500, Some(2883)),
    ("get_dirty_log_1g_16384", 1_500_000, Some(11_100_000)),
    ("dirty_log_split", 900, Some(3077)),
    ("dirty_log_split_page", 1400, Some(3077)),
    ("cow_4k", 1600, Some(12_777)),
    ("cow_2m", 2500, None),
    ("fork_pause_256m", 60_000, None),
    ("fork_pause_1g", 60_000, None),
    ("fork_pause_3g", 60_000, None),
    ("fork_again_1g", 60_000, None),
    ("private_populated_4k", 700, None),
    ("private_fresh_4k", 1400, None),
    ("private_cow_4k", 2500, None),
    ("private_read_window", 900, None),
    ("private_read_place", 1400, None),
    ("private_lease", 1400, None),
    ("pfn_cache_check", 300, None),
    ("tagged_populated_4k", 700, None),
    ("tagged_fresh_4k", 1400, None),
    ("tagged_cow_4k", 2500, None),
    ("tag_save_4k", 600, None),
    ("tag_restore_4k", 600, None),
    ("tagged_major_fault_4k", 12_500, None),
    ("tagged_major_fault_again_4k", 12_500, None),
    ("major_fault_4k", 12_000, None),
    ("major_fault_again_4k", 12_000, None),
    ("x86_fault_populated_4k", 733, Some(3666)),
    ("x86_fault_fresh_4k", 1377, Some(6888)),
    ("x86_mmio_read", 1224, Some(6123)),
    ("x86_mmio_write", 1141, Some(5709)),
    ("x86_hypercall", 653, Some(3265)),
    ("x86_port_write", 691, Some(3459)),
    ("x86_dirty_log_fault", 545, Some(1636)),
    ("x86_get_dirty_log_16384", 1_500_000, None),
    ("x86_shadow_fault_populated_4k", 2140, Some(10_700)),
];

/// One line.
pub enum Row {
    /// An operation.
    Operation { key: &'static str, ours: Statistics, peer: Option<Statistics> },
    /// A boot, in instructions, with its target as a ratio to the bare machine's.
    Boot { key: &'static str, instructions: u64, bare: u64, target: f64, peer: Option<u64> },
    /// Something else.
    Figure { key: &'static str, value: f64, target: f64, unit: &'static str },
}

impl Row {
    /// Whether the target is met.
    pub fn met(&self) -> bool {
        match self {
            Self::Operation { key, ours, .. } => target(key).is_none_or(|(target, _)| ours.median <= target),
            Self::Boot { instructions, bare, target, .. } => ratio(*instructions, *bare) <= *target,
            Self::Figure { value, target, .. } => value <= target,
        }
    }

    fn json(&self) -> (String, Value) {
        match self {
            Self::Operation { key, ours, peer } => {
                let mut value = statistics(ours);
                value["target"] = json!(target(key).map(|(target, _)| target));
                value["met"] = json!(self.met());
                value["kvm_reference"] = json!(target(key).and_then(|(_, reference)| reference));
                value["kvm"] = json!(peer.as_ref().map(statistics));
                ((*key).to_owned(), value)
            }
            Self::Boot { key, instructions, bare, target, peer } => {
                let value = json!({
                    "instructions": instructions, "bare": bare, "ratio": ratio(*instructions, *bare),
                    "target": target, "met": self.met(),
                    "kvm": peer.map(|peer| json!({"instructions": peer, "ratio": ratio(peer, *bare)})),
                });
                ((*key).to_owned(), value)
            }
            Self::Figure { key, value, target, unit } => {
                ((*key).to_owned(), json!({"value": value, "target": target, "unit": unit, "met": self.met()}))
            }
        }
    }
}

/// All lines.
#[derive(Default)]
pub struct Rows(pub Vec<Row>);

impl Rows {
    /// Adds operations with their peer's.
    pub fn add(&mut self, ours: Results, peer: Option<&Results>) {
        for (key, ours) in ours {
            let peer = peer.and_then(|peer| peer.iter().find(|(other, _)| *other == key)).map(|(_, peer)| peer.clone());
            self.0.push(Row::Operation { key, ours, peer });
        }
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let operations = self.0.iter().any(|row| matches!(row, Row::Operation { .. }));
        if operations {
            text += "instructions from the guest's instruction to its successor\n";
            text += "operation             median    p99    max      mean  count  target          KVM  KVM/ours\n";
        }
        for row in &self.0 {
            if let Row::Operation { key, ours, peer } = row {
                operation(&mut text, key, ours, peer.as_ref(), row.met());
            }
        }
        for row in &self.0 {
            if let Row::Figure { key, value, target, unit } = row {
                let mark = verdict(row.met());
                let _infallible = writeln!(text, "{key:<19} {value:>7.2} {unit:<32} {target:>7} {mark}");
            }
        }
        if self.0.iter().any(|row| matches!(row, Row::Boot { .. })) {
            text += "\ninstructions from the kernel's first to user space's first\n";
            text += "boot            instructions          bare   ratio  target               KVM   ratio\n";
        }
        for row in &self.0 {
            if let Row::Boot { key, instructions, bare, target, peer } = row {
                let (mark, own) = (verdict(row.met()), ratio(*instructions, *bare));
                let peer = peer.map_or_else(String::new, |peer| format!("{peer:>13}  {:.4}", ratio(peer, *bare)));
                // Writing to a string cannot fail.
                let _infallible =
                    writeln!(text, "{key:<14} {instructions:>13} {bare:>13}  {own:.4}  {target:<4} {mark:<5} {peer}");
            }
        }
        text
    }

    /// For programs.
    pub fn json(&self) -> String {
        let object: serde_json::Map<String, Value> = self.0.iter().map(Row::json).collect();
        format!("{:#}\n", Value::Object(object))
    }
}

fn operation(text: &mut String, key: &str, ours: &Statistics, peer: Option<&Statistics>, met: bool) {
    let (limit, reference) = target(key).unwrap_or_default();
    let kvm = peer.map_or_else(|| reference.map(|median| format!("({median})")), |peer| Some(peer.median.to_string()));
    let against = peer.map(|peer| peer.median).or(reference).map(|kvm| format!("{:.2}", ratio(kvm, ours.median)));
    let (kvm, against) = (kvm.as_deref().unwrap_or("-"), against.as_deref().unwrap_or("-"));
    let Statistics { median, p99, max, mean, count, .. } = ours;
    // Writing to a string cannot fail.
    let _infallible = writeln!(
        text,
        "{key:<20} {median:>7} {p99:>6} {max:>6} {mean:>9.1} {count:>6}  {limit:>5} {:<5} {kvm:>7} {against:>9}",
        verdict(met)
    );
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "OVER" }
}

fn target(key: &str) -> Option<(u64, Option<u64>)> {
    TARGETS.iter().find(|(name, ..)| *name == key).map(|(_, target, reference)| (*target, *reference))
}

fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b.max(1) as f64
}

fn statistics(s: &Statistics) -> Value {
    json!({"median": s.median, "p99": s.p99, "min": s.min, "max": s.max, "mean": s.mean, "count": s.count})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statistics_of(median: u64) -> Statistics {
        Statistics { count: 3, min: 1, median, p99: median + 1, max: median + 2, mean: median as f64 }
    }

    #[test]
    fn a_target_is_met_up_to_its_own_value() {
        let met = |key, median| Row::Operation { key, ours: statistics_of(median), peer: None }.met();
        assert!(met("hvc", 250) && !met("hvc", 251));
        let boot = |instructions| Row::Boot { key: "boot_2m", instructions, bare: 100, target: 1.02, peer: None };
        assert!(boot(102).met() && !boot(103).met());
    }

    #[test]
    fn what_the_peer_does_not_do_has_no_ratio() {
        let mut rows = Rows::default();
        rows.add(vec![("mmio_pair", statistics_of(1000))], Some(&vec![("hvc", statistics_of(1000))]));
        let table = rows.table();
        assert!(table.lines().any(|line| line.starts_with("mmio_pair") && line.ends_with("met         -         -")));
        let json: Value = serde_json::from_str(&rows.json()).unwrap();
        assert_eq!((&json["mmio_pair"]["kvm"], &json["mmio_pair"]["kvm_reference"]), (&Value::Null, &Value::Null));
    }

    #[test]
    fn a_peer_that_was_measured_takes_the_references_place() {
        let mut rows = Rows::default();
        let peer = vec![("hvc", statistics_of(1000))];
        rows.add(vec![("hvc", statistics_of(200))], Some(&peer));
        rows.0.push(Row::Boot { key: "boot_4k", instructions: 104, bare: 100, target: 1.05, peer: Some(111) });
        let table = rows.table();
        assert!(table.contains("1000      5.00") && table.contains("1.0400") && table.contains("1.1100"), "{table}");
        let json: Value = serde_json::from_str(&rows.json()).unwrap();
        assert_eq!(json["hvc"]["kvm"]["median"], 1000);
        assert_eq!(json["boot_4k"]["met"], true);
    }
}
