//! The escape key: Ctrl-], then one more.
//!
//! | after Ctrl-] | what happens |
//! |---|---|
//! | `q` | the console is left; the guest runs on |
//! | `?` | these keys are shown |
//! | Ctrl-] | the guest gets one Ctrl-] |
//! | anything else | the guest gets both |

/// Ctrl-].
pub const KEY: u8 = 0x1d;

/// The keys, in a line.
pub const HELP: &str = "Ctrl-] then: q leaves the console, ? shows this, Ctrl-] sends Ctrl-]";

/// What the user asked of this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Leave.
    Quit,
    /// Show the keys.
    Help,
}

/// Finds the escape in what is typed.
#[derive(Debug, Default)]
pub struct Escape {
    /// The last byte was Ctrl-].
    armed: bool,
}

impl Escape {
    /// Puts what is for the guest into `passed`; gives the last command in `typed`. Nothing after `Quit` is passed.
    pub fn filter(&mut self, typed: &[u8], passed: &mut Vec<u8>) -> Option<Command> {
        let mut command = None;
        for &byte in typed {
            if !self.armed && byte == KEY {
                self.armed = true;
                continue;
            }
            let armed = std::mem::take(&mut self.armed);
            match byte {
                b'q' if armed => return Some(Command::Quit),
                b'?' if armed => command = Some(Command::Help),
                KEY => passed.push(KEY),
                _ if armed => passed.extend([KEY, byte]),
                _ => passed.push(byte),
            }
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(bytes: &[u8]) -> (Vec<u8>, Option<Command>) {
        let mut passed = Vec::new();
        let command = Escape::default().filter(bytes, &mut passed);
        (passed, command)
    }

    #[test]
    fn keys_do_what_is_documented() {
        assert_eq!(typed(b"ls\r"), (b"ls\r".to_vec(), None));
        assert_eq!(typed(b"a\x1dqb"), (b"a".to_vec(), Some(Command::Quit)));
        assert_eq!(typed(b"a\x1d?b"), (b"ab".to_vec(), Some(Command::Help)));
        assert_eq!(typed(b"\x1d\x1dq"), (b"\x1dq".to_vec(), None));
        assert_eq!(typed(b"\x1dxq"), (b"\x1dxq".to_vec(), None));
        assert_eq!(typed(b"q?\x03\x1a"), (b"q?\x03\x1a".to_vec(), None));
    }

    #[test]
    fn the_escape_is_found_across_reads() {
        let (mut escape, mut passed) = (Escape::default(), Vec::new());
        assert_eq!(escape.filter(b"a\x1d", &mut passed), None);
        assert_eq!(escape.filter(b"q", &mut passed), Some(Command::Quit));
        assert_eq!(passed, b"a");
    }
}
