//! The workspace's own text files, and Rust code with its comments and literals blanked.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::workspace;

/// Places that hold nothing of ours; in a second working tree `.git` is a file.
const SKIPPED: [&str; 2] = ["target", ".git"];
const TEXT: [&str; 9] = ["rs", "toml", "md", "sh", "ld", "S", "c", "yml", "lock"];

/// One text file.
pub struct File {
    /// Relative to the workspace.
    pub path: PathBuf,
    pub text: String,
}

impl File {
    pub fn is_rust(&self) -> bool {
        self.path.extension().is_some_and(|extension| extension == "rs")
    }

    /// Rust code only: comments, strings and characters are spaces; lines stay where they are.
    pub fn code(&self) -> String {
        blank(&self.text)
    }
}

/// Every text file of the workspace, by path.
pub struct Tree {
    pub files: Vec<File>,
}

impl Tree {
    /// Reads the workspace.
    ///
    /// # Errors
    /// When something cannot be read.
    pub fn read() -> Result<Self> {
        let root = workspace::root();
        let mut files = Vec::new();
        let mut pending = vec![root.clone()];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if SKIPPED.contains(&name.as_ref()) {
                    continue;
                }
                if path.is_dir() {
                    pending.push(path);
                } else if is_text(&path) {
                    let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
                    let text = String::from_utf8_lossy(&bytes).into_owned();
                    files.push(File { path: path.strip_prefix(&root).unwrap_or(&path).to_owned(), text });
                }
            }
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Self { files })
    }

    pub fn rust(&self) -> impl Iterator<Item = &File> {
        self.files.iter().filter(|file| file.is_rust())
    }
}

fn is_text(path: &Path) -> bool {
    path.extension().is_none_or(|extension| TEXT.iter().any(|known| extension == *known))
}

/// Whether `word` stands in `line` as a word of its own.
pub fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(part) && !line[at + word.len()..].chars().next().is_some_and(part)
    })
}

/// Replaces comments (nested ones too), string, byte, raw and character literals by spaces.
fn blank(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut at = 0;
    while at < chars.len() {
        let end = literal_end(&chars, at).unwrap_or(at);
        if end == at {
            out.push(chars[at]);
            at += 1;
        } else {
            out.extend(chars[at..end].iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
            at = end;
        }
    }
    out
}

/// Where the comment or literal that starts at `at` ends, if one does.
fn literal_end(chars: &[char], at: usize) -> Option<usize> {
    let next = |n: usize| chars.get(at + n).copied();
    match (chars[at], next(1)) {
        ('/', Some('/')) => Some(find(chars, at, |c| c == '\n')),
        ('/', Some('*')) => Some(block_comment_end(chars, at)),
        ('"', _) => Some(string_end(chars, at + 1)),
        ('r', Some('"' | '#')) if !follows_word(chars, at) => raw_string_end(chars, at + 1),
        ('\'', Some('\\')) => Some((find(chars, at + 3, |c| c == '\'') + 1).min(chars.len())),
        ('\'', Some(_)) if next(2) == Some('\'') => Some(at + 3),
        _ => None,
    }
}

fn follows_word(chars: &[char], at: usize) -> bool {
    // `br"…"` is a raw string too; `for"…"` is not one.
    let before = |n: usize| at.checked_sub(n).map(|i| chars[i]);
    let part = |c: char| c.is_alphanumeric() || c == '_';
    match before(1) {
        Some('b' | 'c') => before(2).is_some_and(part),
        Some(c) => part(c),
        None => false,
    }
}

fn find(chars: &[char], from: usize, wanted: impl Fn(char) -> bool) -> usize {
    (from..chars.len()).find(|i| wanted(chars[*i])).unwrap_or(chars.len())
}

fn block_comment_end(chars: &[char], start: usize) -> usize {
    let (mut at, mut depth) = (start, 0);
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => (depth, at) = (depth + 1, at + 2),
            ('*', Some('/')) => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    chars.len()
}

fn string_end(chars: &[char], mut at: usize) -> usize {
    while at < chars.len() {
        match chars[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    chars.len()
}

fn raw_string_end(chars: &[char], from: usize) -> Option<usize> {
    let hashes = chars[from..].iter().take_while(|c| **c == '#').count();
    if chars.get(from + hashes) != Some(&'"') {
        return None;
    }
    let closes = |at: usize| chars[at] == '"' && chars[at + 1..].iter().take_while(|c| **c == '#').count() >= hashes;
    Some((from + hashes + 1..chars.len()).find(|at| closes(*at)).map_or(chars.len(), |at| at + 1 + hashes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_code_stays() {
        let text =
            "a // x\nb /* x /* x */ x */ c \"x \\\" x\" d 'x' e '\\'' f r#\"x\" x\"# g br\"x\" h 'life i for_r h";
        let code = blank(text);
        assert!(!code.contains('x'), "{code}");
        for kept in ["a", "b", "c", "d", "e", "f", "g", "h", "'life", "for_r"] {
            assert!(has_word(&code, kept.trim_start_matches('\'')), "{kept} is gone: {code}");
        }
        assert_eq!(code.lines().count(), text.lines().count());
    }

    #[test]
    fn nothing_cut_off_panics() {
        let text = "r##\"a\"# \"b\\ /* c /* ' '\\ r# //";
        for end in 0..=text.len() {
            blank(&text[..end]);
        }
    }

    #[test]
    fn words_are_whole() {
        assert!(has_word("unsafe {", "unsafe") && has_word("(unsafe)", "unsafe"));
        assert!(!has_word("forbid(unsafe_code)", "unsafe") && !has_word("notunsafe", "unsafe"));
    }
}
