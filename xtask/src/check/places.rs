//! No file names a place that only one machine has: a user's folder, a build's working folder.

use super::Finding;
use super::source::{File, Tree};

/// Each spelt in two parts, so that this file is not its own finding. A guest's own `/root` and `/tmp` have no name below.
const PLACES: [&str; 5] =
    [concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/wo", "rk/"), concat!("/tm", "p/"), concat!("/Us", "ers/")];

pub fn findings(tree: &Tree) -> Vec<Finding> {
    tree.files.iter().flat_map(judge).collect()
}

fn judge(file: &File) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in file.text.lines().enumerate() {
        if let Some(place) = PLACES.iter().find(|place| starts_a_path(line, place)) {
            findings.push(Finding {
                file: file.path.clone(),
                line: index + 1,
                what: format!("names a place of one machine: {place}"),
            });
        }
    }
    findings
}

/// Whether `place` stands at the start of a path, not inside a longer one.
fn starts_a_path(line: &str, place: &str) -> bool {
    let inside = |c: char| c.is_alphanumeric() || "_-.}/".contains(c);
    line.match_indices(place).any(|(at, _)| !line[..at].chars().next_back().is_some_and(inside))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_counts_at_the_start_of_a_path() {
        let judge = |text: String| judge(&File { path: "a.md".into(), text }).len();
        assert_eq!(judge(format!("see {}x", PLACES[0])), 1);
        assert_eq!(judge(format!("see docs{}x", PLACES[2])), 0);
        assert_eq!(judge("mount -t tmpfs tmpfs /tmp".into()), 0);
    }
}
