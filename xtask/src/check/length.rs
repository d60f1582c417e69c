//! A file is a room: past 600 lines it is two.

use super::Finding;
use super::source::Tree;

const MOST: usize = 600;

pub fn findings(tree: &Tree) -> Vec<Finding> {
    let long = tree.rust().map(|file| (file, file.text.lines().count())).filter(|(_, lines)| *lines > MOST);
    long.map(|(file, lines)| Finding {
        file: file.path.clone(),
        line: 0,
        what: format!("{lines} lines; at most {MOST}"),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::super::source::File;
    use super::*;

    #[test]
    fn the_limit_is_inclusive() {
        let tree = |lines| Tree { files: vec![File { path: "a.rs".into(), text: "x\n".repeat(lines) }] };
        assert!(findings(&tree(MOST)).is_empty());
        assert_eq!(findings(&tree(MOST + 1)).len(), 1);
    }
}
