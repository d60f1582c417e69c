//! Results as lines: `PASS name`, `FAIL name: why`, at the end `ALL PASS n` or `FAILED k of n`.

use core::fmt::Display;

use crate::println;

/// Counts what passed.
#[derive(Default)]
pub struct Report {
    passed: usize,
    failed: usize,
}

impl Report {
    /// One more result.
    pub fn check(&mut self, name: &str, result: Result<(), impl Display>) {
        match result {
            Ok(()) => {
                self.passed += 1;
                println!("PASS {name}");
            }
            Err(why) => {
                self.failed += 1;
                println!("FAIL {name}: {why}");
            }
        }
    }

    /// The last line.
    pub fn end(self) {
        match self.failed {
            0 => println!("ALL PASS {}", self.passed),
            failed => println!("FAILED {failed} of {}", self.passed + failed),
        }
    }
}

/// A value that should have been another.
pub struct Differs<T> {
    /// What was looked at: an address, an index.
    pub at: u64,
    /// What it should be.
    pub expected: T,
    /// What it is.
    pub found: T,
}

impl<T: core::fmt::LowerHex> Display for Differs<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "at {:#x}: expected {:#x}, found {:#x}", self.at, self.expected, self.found)
    }
}

/// `Ok` if they are the same.
///
/// # Errors
/// Both, with the place.
pub fn same<T: PartialEq>(at: u64, expected: T, found: T) -> Result<(), Differs<T>> {
    if expected == found { Ok(()) } else { Err(Differs { at, expected, found }) }
}
