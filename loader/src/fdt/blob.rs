//! The flattened device tree format, written (Devicetree Specification 0.4, chapter 5, version 17).
//!
//! Purpose: a writer whose every allocation can fail, since a device tree is made inside a hypervisor (D8); the crates for it
//! abort when memory is short. Reading the result back is left to one of those, in tests.
//!
//! Protocol: [`Blob::node`] nests; properties come before child nodes; [`Blob::finish`] after the root.
//!
//! Invariants: nothing grows beyond [`super::MAX_SIZE`].

use alloc::vec::Vec;

use super::FdtError;

const MAGIC: u32 = 0xd00d_feed;
const VERSION: u32 = 17;
const LAST_COMPATIBLE_VERSION: u32 = 16;
/// Bytes of the header, and of the empty memory reservation block: a terminator of two zero words.
const HEADER: usize = 40;
const RESERVATIONS: usize = 16;

const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const END: u32 = 9;

/// A tree being written.
pub(super) struct Blob {
    structure: Vec<u8>,
    strings: Vec<u8>,
}

impl Blob {
    pub(super) const fn new() -> Self {
        Self { structure: Vec::new(), strings: Vec::new() }
    }

    /// A node `name` (`device@address`; empty for the root) with what `inside` writes.
    pub(super) fn node(
        &mut self,
        name: &str,
        inside: impl FnOnce(&mut Self) -> Result<(), FdtError>,
    ) -> Result<(), FdtError> {
        self.word(BEGIN_NODE)?;
        append(&mut self.structure, name.as_bytes())?;
        append(&mut self.structure, &[0])?;
        self.align()?;
        inside(self)?;
        self.word(END_NODE)
    }

    /// A property of bytes.
    pub(super) fn bytes(&mut self, name: &str, value: &[u8]) -> Result<(), FdtError> {
        self.property(name, value.len())?;
        append(&mut self.structure, value)?;
        self.align()
    }

    /// A property that is just there.
    pub(super) fn empty(&mut self, name: &str) -> Result<(), FdtError> {
        self.bytes(name, &[])
    }

    /// A property of 32-bit cells.
    pub(super) fn cells(&mut self, name: &str, cells: &[u32]) -> Result<(), FdtError> {
        self.property(name, cells.len() * 4)?;
        cells.iter().try_for_each(|cell| self.word(*cell))
    }

    /// A property of 64-bit numbers, two cells each.
    pub(super) fn numbers(&mut self, name: &str, numbers: &[u64]) -> Result<(), FdtError> {
        self.property(name, numbers.len() * 8)?;
        numbers.iter().try_for_each(|number| append(&mut self.structure, &number.to_be_bytes()))
    }

    /// A property of strings. None may contain a zero byte.
    pub(super) fn strings(&mut self, name: &str, strings: &[&str]) -> Result<(), FdtError> {
        self.property(name, strings.iter().map(|string| string.len() + 1).sum())?;
        for string in strings {
            append(&mut self.structure, string.as_bytes())?;
            append(&mut self.structure, &[0])?;
        }
        self.align()
    }

    /// The finished blob.
    pub(super) fn finish(mut self) -> Result<Vec<u8>, FdtError> {
        self.word(END)?;
        let structure = HEADER + RESERVATIONS;
        let strings = structure + self.structure.len();
        let total = strings + self.strings.len();
        let header = [
            MAGIC,
            cell(total)?,
            cell(structure)?,
            cell(strings)?,
            cell(HEADER)?,
            VERSION,
            LAST_COMPATIBLE_VERSION,
            0, // boot CPU
            cell(self.strings.len())?,
            cell(self.structure.len())?,
        ];
        let mut blob = Vec::new();
        blob.try_reserve_exact(total).map_err(|_| FdtError::OutOfMemory)?;
        header.iter().try_for_each(|field| append(&mut blob, &field.to_be_bytes()))?;
        append(&mut blob, &[0; RESERVATIONS])?;
        append(&mut blob, &self.structure)?;
        append(&mut blob, &self.strings)?;
        Ok(blob)
    }

    fn property(&mut self, name: &str, size: usize) -> Result<(), FdtError> {
        let name = self.string(name)?;
        self.word(PROPERTY)?;
        self.word(cell(size)?)?;
        self.word(name)
    }

    /// Offset of a property's name in the strings block, in which it may be already.
    fn string(&mut self, name: &str) -> Result<u32, FdtError> {
        let mut at = 0;
        for known in self.strings.split(|byte| *byte == 0) {
            if known == name.as_bytes() {
                return cell(at);
            }
            at += known.len() + 1;
        }
        let at = self.strings.len();
        append(&mut self.strings, name.as_bytes())?;
        append(&mut self.strings, &[0])?;
        cell(at)
    }

    fn word(&mut self, word: u32) -> Result<(), FdtError> {
        append(&mut self.structure, &word.to_be_bytes())
    }

    fn align(&mut self) -> Result<(), FdtError> {
        let padding = self.structure.len().next_multiple_of(4) - self.structure.len();
        append(&mut self.structure, &[0; 3][..padding])
    }
}

/// Grows by `bytes`, within [`super::MAX_SIZE`].
fn append(to: &mut Vec<u8>, bytes: &[u8]) -> Result<(), FdtError> {
    let size = to.len() + bytes.len();
    if size as u64 > super::MAX_SIZE {
        return Err(FdtError::TooLarge);
    }
    to.try_reserve(bytes.len()).map_err(|_| FdtError::OutOfMemory)?;
    to.extend_from_slice(bytes);
    Ok(())
}

fn cell(value: usize) -> Result<u32, FdtError> {
    u32::try_from(value).map_err(|_| FdtError::TooLarge)
}
