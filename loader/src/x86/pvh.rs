//! An ELF kernel with an entry for virtual machines: `vmlinux`, by the x86/HVM direct boot ABI (Xen, docs/misc/pvh.pandoc).
//!
//! Purpose: the note XEN_ELFNOTE_PHYS32_ENTRY, which names the entry, and `hvm_start_info` with its lists.
//!
//! Invariants: the entry lies in a loadable segment; [`start_info`] writes no more than a page.

use super::map;
use super::memory::Range;
use crate::Region;
use crate::kernel::{KernelError, Program, Segment, le32, le64};
use crate::{Invalid, kernel};

/// e_machine of x86-64, and the rule that says so.
pub(super) const MACHINE: (u16, &str) = (62, "62, x86-64");
const PT_NOTE: u32 = 4;
/// XEN_ELFNOTE_PHYS32_ENTRY.
const PHYS32_ENTRY: u32 = 18;
const NAME: &[u8] = b"Xen\0";
/// Bytes before a note's name: sizes of name and descriptor, and the type.
const NOTE_HEADER: u64 = 12;
/// XEN_HVM_START_MAGIC_VALUE.
const START_MAGIC: u32 = 0x336e_c578;
/// The version with a memory map.
const START_VERSION: u32 = 1;

/// Bytes of `hvm_start_info`, of its one module, and of a range of its memory map.
const START: usize = 56;
const MODULE: usize = 32;
const RANGE: usize = 24;
/// Bytes of all, at most.
pub(super) const MOST: usize = START + MODULE + RANGE * super::memory::MAX_RANGES;

/// The entry that the notes of `program` name.
///
/// # Errors
///
/// No such note, one that is cut off, or one that leads outside the program.
pub(super) fn entry(file: &[u8], program: &Program<'_>) -> Result<u64, KernelError> {
    let notes = program.headers().filter(|header| header.kind == PT_NOTE);
    for note in notes {
        let bytes = kernel::contents(file, note.offset, note.file_size, "ELF notes")?;
        if let Some(entry) = search(bytes)? {
            let inside = |segment: &Segment| (segment.address..segment.end()).contains(&entry);
            if entry > u64::from(u32::MAX) || !program.segments.iter().any(inside) {
                let rule = "inside a loadable segment, below 4 GiB";
                return Err(Invalid { field: "ELF note PHYS32_ENTRY", value: entry, rule }.into());
            }
            return Ok(entry);
        }
    }
    let rule = "in the file (a Linux with CONFIG_PVH has it); or use the bzImage";
    Err(Invalid { field: "number of ELF notes PHYS32_ENTRY", value: 0, rule }.into())
}

/// The note's descriptor among `notes`: each has its name and its descriptor padded to four bytes.
fn search(notes: &[u8]) -> Result<Option<u64>, KernelError> {
    let (mut at, have) = (0, notes.len() as u64);
    while at + NOTE_HEADER <= have {
        let word = |offset: u64| le32(notes, (at + offset) as usize).unwrap_or_default();
        let (name_size, size, kind) = (u64::from(word(0)), u64::from(word(4)), word(8));
        let name = at + NOTE_HEADER;
        let descriptor = name + name_size.next_multiple_of(4);
        let next = descriptor + size.next_multiple_of(4);
        if descriptor + size > have {
            return Err(KernelError::Truncated { what: "ELF note", need: descriptor + size, have });
        }
        if kind == PHYS32_ENTRY && notes[name as usize..].starts_with(NAME) && name_size == NAME.len() as u64 {
            return match size {
                4 => Ok(le32(notes, descriptor as usize).map(u64::from)),
                8 => Ok(le64(notes, descriptor as usize)),
                _ => {
                    let rule = "4 or 8";
                    Err(Invalid { field: "bytes of ELF note PHYS32_ENTRY", value: size, rule }.into())
                }
            };
        }
        at = next;
    }
    Ok(None)
}

/// Fills `bytes`, which lie at [`map::START_INFO`], and says how many are used.
pub(super) fn start_info(bytes: &mut [u8; MOST], initrd: Option<Region>, ranges: &[Range], rsdp: u64) -> usize {
    let modules = map::START_INFO + START as u64;
    let memory_map = modules + MODULE as u64;
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, &START_MAGIC.to_le_bytes());
    put(4, &START_VERSION.to_le_bytes());
    put(12, &u32::from(initrd.is_some()).to_le_bytes());
    put(16, &modules.to_le_bytes());
    put(24, &map::CMDLINE.to_le_bytes());
    put(32, &rsdp.to_le_bytes());
    put(40, &memory_map.to_le_bytes());
    put(48, &(ranges.len() as u32).to_le_bytes());
    if let Some(initrd) = initrd {
        put(START, &initrd.start.get().to_le_bytes());
        put(START + 8, &initrd.size.to_le_bytes());
    }
    for (index, range) in ranges.iter().enumerate() {
        let entry = START + MODULE + RANGE * index;
        put(entry, &range.region.start.get().to_le_bytes());
        put(entry + 8, &range.region.size.to_le_bytes());
        put(entry + 16, &(range.kind as u32).to_le_bytes());
    }
    START + MODULE + RANGE * ranges.len()
}
