//! No placeholder reaches main: neither the macros, nor a remark that says so.

use super::Finding;
use super::source::{File, Tree, has_word};

const MACROS: [&str; 2] = ["todo!", "unimplemented!"];

/// Spelt in two parts, so that this file is not its own finding.
const REMARKS: [&str; 3] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];

pub fn findings(tree: &Tree) -> Vec<Finding> {
    tree.rust().flat_map(judge).collect()
}

fn judge(file: &File) -> Vec<Finding> {
    let code = file.code();
    let mut findings = Vec::new();
    for (index, (code, text)) in code.lines().zip(file.text.lines()).enumerate() {
        let called = MACROS.iter().find(|name| code.contains(**name));
        let remarked = REMARKS.iter().find(|word| has_word(text, word));
        if let Some(what) = called.or(remarked) {
            findings.push(Finding { file: file.path.clone(), line: index + 1, what: format!("unfinished: {what}") });
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn macros_count_in_code_and_remarks_everywhere() {
        let judge = |text: &str| judge(&File { path: "a.rs".into(), text: text.into() }).len();
        assert_eq!(judge("fn f() { todo!() }\n// todo! is a macro\n"), 1);
        assert_eq!(judge(&format!("// {}: later\n", REMARKS[0])), 1);
        assert_eq!(judge("let s = \"unimplemented!\";\n"), 0);
    }
}
