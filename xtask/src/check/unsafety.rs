//! `unsafe` only in the seam, the metal and the program that owns the machine; the core forbids it by name.
//!
//! The compiler denies it too (`unsafe_code`), but a crate could allow it for itself: this rule is about where.

use super::Finding;
use super::source::{File, Tree, has_word};

/// Folders in which it may stand. Guests are programs of their own, below any rule of the hypervisor's.
const ALLOWED: [&str; 4] = ["machine/", "metal/", "hypervisor/", "tests/guests/"];

pub fn findings(tree: &Tree) -> Vec<Finding> {
    tree.rust().flat_map(judge).collect()
}

fn judge(file: &File) -> Vec<Finding> {
    let path = file.path.to_string_lossy().into_owned();
    let finding = |line, what: &str| Finding { file: file.path.clone(), line, what: what.to_owned() };
    let mut findings = Vec::new();
    let code = file.code();
    let allowed = ALLOWED.iter().any(|folder| path.starts_with(folder));
    for (index, line) in code.lines().enumerate() {
        if !allowed && has_word(line, "unsafe") {
            findings.push(finding(index + 1, "`unsafe` belongs in machine, metal or hypervisor"));
        }
        if !allowed && line.contains("allow(unsafe_code") {
            findings.push(finding(index + 1, "`unsafe_code` is allowed outside machine, metal and hypervisor"));
        }
    }
    if path.starts_with("core/") && path.ends_with("/src/lib.rs") {
        for attribute in ["#![no_std]", "#![forbid(unsafe_code)]"] {
            if !code.contains(attribute) {
                findings.push(finding(0, &format!("a crate of the core says {attribute}")));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(path: &str, text: &str) -> usize {
        judge(&File { path: path.into(), text: text.into() }).len()
    }

    #[test]
    fn it_may_stand_only_where_it_may() {
        assert_eq!(count("cli/src/x.rs", "fn f() { unsafe { g() } }"), 1);
        assert_eq!(count("cli/src/x.rs", "#![allow(unsafe_code)]"), 1);
        assert_eq!(count("cli/src/x.rs", "// unsafe\n#![forbid(unsafe_code)]"), 0);
        assert_eq!(count("metal/arm64/src/x.rs", "unsafe { g() }"), 0);
    }

    #[test]
    fn a_core_crate_forbids_it() {
        assert_eq!(count("core/x/src/lib.rs", "//! x\n"), 2);
        assert_eq!(count("core/x/src/lib.rs", "#![no_std]\n#![forbid(unsafe_code)]"), 0);
    }
}
