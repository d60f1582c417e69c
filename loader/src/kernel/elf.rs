//! ELF programs (System V ABI, "Object Files" and "Program Loading"; ELF for the Arm 64-bit Architecture, AAELF64).
//!
//! Purpose: the loadable segments by physical address, and the entry of an AArch64 program as a physical address; where another
//! architecture's begins is for its own protocol to say. Sections are not looked at.
//!
//! Invariants: in a [`Program`] every segment's file part lies inside the contents, no segment wraps, no two overlap in
//! memory; in a parsed [`Elf`] the entry lies inside one.

use arrayvec::ArrayVec;

use super::{KernelError, le16, le32, le64};
use crate::Invalid;

/// Loadable segments that a kernel may have.
pub const MAX_SEGMENTS: usize = 16;

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
/// e_machine, and the rule that says so.
const AARCH64: (u16, &str) = (183, "183, AArch64");
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;

/// Part of a kernel, from the file to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Segment {
    /// Where it begins in the contents, in bytes.
    pub offset: u64,
    /// Bytes in the contents.
    pub file_size: u64,
    /// Where it begins in memory: p_paddr, or the guest physical address in a layout.
    pub address: u64,
    /// Bytes in memory; those beyond `file_size` are zero.
    pub memory_size: u64,
}

impl Segment {
    /// One past the last byte in memory.
    pub const fn end(&self) -> u64 {
        self.address.wrapping_add(self.memory_size)
    }
}

/// What the headers say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elf {
    /// Loadable segments, in the order of the program headers.
    pub segments: ArrayVec<Segment, MAX_SEGMENTS>,
    /// Physical address of the first instruction, before any sliding.
    pub entry: u64,
    /// ET_DYN: it runs at any 2 MiB aligned distance from its addresses.
    pub movable: bool,
}

const fn invalid(field: &'static str, value: u64, rule: &'static str) -> KernelError {
    KernelError::Field(Invalid { field, value, rule })
}

/// A program header, as far as anybody asks.
pub(crate) struct ProgramHeader {
    /// p_type.
    pub kind: u32,
    /// p_offset.
    pub offset: u64,
    /// p_filesz.
    pub file_size: u64,
    virtual_address: u64,
    address: u64,
    memory_size: u64,
}

/// What every architecture's programs say alike.
pub(crate) struct Program<'a> {
    /// Loadable segments, in the order of the program headers.
    pub segments: ArrayVec<Segment, MAX_SEGMENTS>,
    movable: bool,
    virtual_entry: u64,
    table: &'a [u8],
}

impl<'a> Program<'a> {
    /// The program that begins with `head` and has `size` bytes, if it begins with ELF's magic. `machine` is the e_machine that
    /// it must have, and the rule that says so.
    ///
    /// # Errors
    ///
    /// Another machine's program, or one whose headers are cut off or contradict themselves.
    pub fn read(head: &'a [u8], size: u64, machine: (u16, &'static str)) -> Result<Option<Self>, KernelError> {
        if !head.starts_with(b"\x7fELF") {
            return Ok(None);
        }
        let Some(header) = head.get(..HEADER) else {
            return Err(KernelError::Truncated { what: "ELF header", need: HEADER as u64, have: head.len() as u64 });
        };
        let movable = kind(header, machine)?;
        let table = program_headers(header, head, size)?;
        let mut program = Self { segments: ArrayVec::new(), movable, virtual_entry: field64(header, 24), table };
        for header in program.headers().filter(|header| header.kind == PT_LOAD) {
            let segment = loadable(&header, size)?;
            if segment.memory_size != 0 {
                push(&mut program.segments, segment)?;
            }
        }
        if program.segments.is_empty() {
            return Err(invalid("number of loadable ELF segments", 0, "at least 1"));
        }
        Ok(Some(program))
    }

    /// All program headers.
    pub fn headers(&self) -> impl Iterator<Item = ProgramHeader> + use<'a> {
        self.table.chunks_exact(PROGRAM_HEADER).map(|raw| ProgramHeader {
            kind: le32(raw, 0).unwrap_or_default(),
            offset: field64(raw, 8),
            virtual_address: field64(raw, 16),
            address: field64(raw, 24),
            file_size: field64(raw, 32),
            memory_size: field64(raw, 40),
        })
    }
}

impl Elf {
    /// The AArch64 program that begins with `head` and has `size` bytes, if it begins with ELF's magic.
    ///
    /// # Errors
    ///
    /// As [`Program::read`], and an entry outside the program.
    pub(super) fn parse(head: &[u8], size: u64) -> Result<Option<Self>, KernelError> {
        let Some(program) = Program::read(head, size, AARCH64)? else { return Ok(None) };
        let Program { movable, virtual_entry, .. } = program;
        let loaded = program.headers().filter(|header| header.kind == PT_LOAD);
        let entry = loaded.filter_map(|header| {
            let inside = virtual_entry.wrapping_sub(header.virtual_address);
            (inside < header.memory_size).then(|| header.address + inside)
        });
        match entry.last() {
            Some(entry) => Ok(Some(Self { segments: program.segments, entry, movable })),
            None => Err(invalid("ELF e_entry", virtual_entry, "inside a loadable segment")),
        }
    }
}

/// Appends a segment that overlaps no other.
fn push(segments: &mut ArrayVec<Segment, MAX_SEGMENTS>, segment: Segment) -> Result<(), KernelError> {
    let clash = |other: &Segment| segment.address < other.end() && other.address < segment.end();
    if segments.iter().any(clash) {
        return Err(invalid("ELF p_paddr", segment.address, "outside every other loadable segment"));
    }
    let count = segments.len() as u64 + 1;
    segments.try_push(segment).map_err(|_| invalid("number of loadable ELF segments", count, "at most 16"))
}

/// Checks e_ident, e_type and e_machine; whether the program can move.
fn kind(header: &[u8], (wanted, rule): (u16, &'static str)) -> Result<bool, KernelError> {
    if header[4] != CLASS_64 {
        return Err(invalid("ELF EI_CLASS", header[4].into(), "2, 64-bit"));
    }
    if header[5] != LITTLE_ENDIAN {
        return Err(invalid("ELF EI_DATA", header[5].into(), "1, little-endian"));
    }
    let machine = le16(header, 18).unwrap_or_default();
    if machine != wanted {
        return Err(invalid("ELF e_machine", machine.into(), rule));
    }
    match le16(header, 16).unwrap_or_default() {
        ET_EXEC => Ok(false),
        ET_DYN => Ok(true),
        other => Err(invalid("ELF e_type", other.into(), "2 (executable) or 3 (position-independent)")),
    }
}

/// The program header table.
fn program_headers<'a>(header: &[u8], head: &'a [u8], size: u64) -> Result<&'a [u8], KernelError> {
    let entry_size = le16(header, 54).unwrap_or_default();
    if usize::from(entry_size) != PROGRAM_HEADER {
        return Err(invalid("ELF e_phentsize", entry_size.into(), "56"));
    }
    let offset = field64(header, 32);
    let bytes = u64::from(le16(header, 56).unwrap_or_default()) * PROGRAM_HEADER as u64;
    let Some(end) = offset.checked_add(bytes).filter(|end| *end <= size) else {
        let need = offset.saturating_add(bytes);
        return Err(KernelError::Truncated { what: "ELF program header table", need, have: size });
    };
    head.get(offset as usize..end as usize).ok_or(invalid(
        "ELF e_phoff",
        offset,
        "so that all program headers of a gzip'd ELF lie in its first 4 KiB",
    ))
}

/// The segment of a PT_LOAD header.
fn loadable(header: &ProgramHeader, size: u64) -> Result<Segment, KernelError> {
    let ProgramHeader { offset, address, file_size, memory_size, .. } = *header;
    let segment = Segment { offset, file_size, address, memory_size };
    if segment.file_size > segment.memory_size {
        return Err(invalid("ELF p_filesz", segment.file_size, "at most p_memsz"));
    }
    if segment.address.checked_add(segment.memory_size).is_none() {
        return Err(invalid("ELF p_memsz", segment.memory_size, "such that p_paddr + p_memsz fits in 64 bits"));
    }
    match segment.offset.checked_add(segment.file_size) {
        Some(end) if end <= size => Ok(segment),
        _ => {
            let need = segment.offset.saturating_add(segment.file_size);
            Err(KernelError::Truncated { what: "ELF segment", need, have: size })
        }
    }
}

/// A 64-bit field of a header whose length was checked.
fn field64(raw: &[u8], at: usize) -> u64 {
    le64(raw, at).unwrap_or_default()
}
