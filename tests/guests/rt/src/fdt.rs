//! Reads a flattened device tree (Devicetree Specification 0.4, chapter 5): just enough to visit its properties.
//!
//! Everything is bounded by the header's `totalsize`, and that by [`LARGEST`]: a bad tree is no tree, or ends early.

use crate::memory;

const MAGIC: u32 = 0xd00d_feed;
const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROP: u32 = 3;
const NOP: u32 = 4;
/// No machine's tree is larger (1 MiB is QEMU's limit).
const LARGEST: u64 = 2 << 20;
/// Nesting that is followed.
const DEPTH: usize = 16;

/// A tree in memory.
pub struct Fdt {
    bytes: &'static [u8],
    structure: usize,
    strings: usize,
}

impl Fdt {
    /// The tree at `address`, if there is one.
    pub fn at(address: u64) -> Option<Self> {
        if address == 0 || !address.is_multiple_of(8) {
            return None;
        }
        let word = |at| u32::from_be(memory::load32(address + at));
        let size = u64::from(word(4));
        if word(0) != MAGIC || !(40..=LARGEST).contains(&size) {
            return None;
        }
        let bytes = memory::view(address, size as usize)?;
        Some(Self { bytes, structure: word(8) as usize, strings: word(12) as usize })
    }

    /// Bytes of the tree.
    pub fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Calls `visit` with each property: its node's name, its own, its value.
    pub fn properties(&self, mut visit: impl FnMut(&[u8], &[u8], &[u8])) {
        let mut at = self.structure;
        let mut names = [&b""[..]; DEPTH];
        let mut depth = 0;
        while let Some(token) = self.word(at) {
            at += 4;
            match token {
                BEGIN_NODE => {
                    let Some(name) = self.text(at) else { return };
                    if depth == DEPTH {
                        return;
                    }
                    names[depth] = name;
                    depth += 1;
                    at += (name.len() + 1).next_multiple_of(4);
                }
                END_NODE if depth > 0 => depth -= 1,
                PROP if depth > 0 => {
                    let (Some(length), Some(name)) = (self.word(at), self.word(at + 4)) else { return };
                    let value = self.bytes.get(at + 8..).and_then(|rest| rest.get(..length as usize));
                    let (Some(value), Some(name)) = (value, self.text(self.strings.saturating_add(name as usize)))
                    else {
                        return;
                    };
                    visit(names[depth - 1], name, value);
                    at += 8 + value.len().next_multiple_of(4);
                }
                NOP => {}
                _ => return,
            }
        }
    }

    fn word(&self, at: usize) -> Option<u32> {
        let bytes = self.bytes.get(at..)?.first_chunk()?;
        Some(u32::from_be_bytes(*bytes))
    }

    fn text(&self, at: usize) -> Option<&'static [u8]> {
        let rest = self.bytes.get(at..)?;
        let end = rest.iter().position(|byte| *byte == 0)?;
        Some(&rest[..end])
    }
}
