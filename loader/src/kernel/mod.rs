//! The kernel file: what it is, and its way into guest memory.
//!
//! Purpose: [`recognise`] tells formats apart by their headers and says of everything else what it seems to be. Nothing is
//! taken for a flat binary by mistake: that needs the owner's word ([`Hint::Flat`]).
//!
//! Protocol: [`recognise`] reads headers only (of a gzip'd file, the first 4 KiB inflated); [`place`] reads the whole file
//! once and writes it piece by piece, so nothing of the kernel's size is ever held.
//!
//! Invariants: every offset that a [`Kernel`] carries was checked against the size of its contents.

mod elf;
mod gzip;
mod image;

use core::ops::{ControlFlow, Range};

pub(crate) use elf::Program;
pub use elf::{Elf, MAX_SEGMENTS, Segment};
pub use gzip::GzipError;
pub use image::Image;

use entresol_addr::Gpa;

use crate::layout::Layout;
use crate::{Invalid, Memory};
use gzip::Inflater;

/// What the owner says about the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Hint {
    /// Nothing: it must have a header that is known.
    #[default]
    Auto,
    /// `format = "flat"`, or a name that ends in `.bin`: without a known header it is position-independent code.
    Flat,
}

/// How the contents are stored in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Container {
    /// As they are.
    Plain,
    /// In a gzip member, by itself or inside an EFI zboot image.
    Gzip,
}

/// What the contents are.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "one for each VM, and a box would be one more allocation that can fail")]
pub enum Format {
    /// Linux's arm64 `Image`.
    Image(Image),
    /// A 64-bit little-endian AArch64 ELF program.
    Elf(Elf),
    /// Code without a header.
    Flat,
}

/// A kernel file that can be started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    container: Container,
    payload: Range<usize>,
    size: u64,
    format: Format,
}

/// Why a file is not a kernel that can be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// Nothing in it.
    #[error("the kernel file is empty")]
    Empty,
    /// Something else; what it seems to be.
    #[error(
        "not a kernel: {0}; it must be an arm64 Image, a gzip'd Image, an AArch64 ELF, or code without a header (format = \
         \"flat\")"
    )]
    NotAKernel(&'static str),
    /// It ends inside `what`.
    #[error("the kernel file is cut off: its {what} ends at byte {need}, its contents at byte {have}")]
    Truncated {
        /// The part that is cut off.
        what: &'static str,
        /// Bytes that the part's end needs.
        need: u64,
        /// Bytes that there are.
        have: u64,
    },
    /// A header field.
    #[error(transparent)]
    Field(#[from] Invalid),
    /// The compressed data.
    #[error(transparent)]
    Gzip(GzipError),
    /// No memory for the inflater.
    #[error("no memory to inflate the kernel")]
    OutOfMemory,
}

impl From<GzipError> for KernelError {
    fn from(error: GzipError) -> Self {
        match error {
            GzipError::OutOfMemory => Self::OutOfMemory,
            error => Self::Gzip(error),
        }
    }
}

/// Why a kernel could not be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError<E> {
    /// The file is not what [`recognise`] saw, or its compressed data is damaged.
    #[error("{0}")]
    Kernel(KernelError),
    /// Guest memory refused.
    #[error("the kernel could not be written to the guest's memory: {0}")]
    Memory(E),
}

/// Bytes of inflated contents in which all headers must lie.
const HEAD: usize = 4096;

impl Kernel {
    /// What the contents are.
    pub const fn format(&self) -> &Format {
        &self.format
    }

    /// How they are stored.
    pub const fn container(&self) -> Container {
        self.container
    }

    /// Bytes of the contents, inflated.
    pub const fn size(&self) -> u64 {
        self.size
    }
}

/// What the kernel file `file` is. See [`KernelError`] for what it may not be.
pub fn recognise(file: &[u8], hint: Hint) -> Result<Kernel, KernelError> {
    if file.is_empty() {
        return Err(KernelError::Empty);
    }
    let payload = match zboot(file)? {
        Some(payload) => payload,
        None if gzip::is_gzip(file) => 0..file.len(),
        None => {
            let size = file.len() as u64;
            return Ok(Kernel {
                container: Container::Plain,
                payload: 0..file.len(),
                size,
                format: format(file, size, hint)?,
            });
        }
    };
    let compressed = &file[payload.clone()];
    let size = gzip::inflated_size(compressed)?;
    let mut head = [0; HEAD];
    let head = Inflater::new()?.head(compressed, &mut head)?;
    Ok(Kernel { container: Container::Gzip, payload, size, format: format(head, size, hint)? })
}

/// The format of contents that begin with `head` and have `size` bytes in all.
fn format(head: &[u8], size: u64, hint: Hint) -> Result<Format, KernelError> {
    if let Some(image) = Image::parse(head)? {
        return Ok(Format::Image(image));
    }
    if let Some(elf) = Elf::parse(head, size)? {
        return Ok(Format::Elf(elf));
    }
    match (hint, stranger(head)) {
        (Hint::Flat, _) if size < 4 => {
            Err(Invalid { field: "size of a flat kernel", value: size, rule: "at least one instruction, 4 bytes" }
                .into())
        }
        (Hint::Flat, None) => Ok(Format::Flat),
        (_, Some(what)) => Err(KernelError::NotAKernel(what)),
        (Hint::Auto, None) => Err(KernelError::NotAKernel("its first bytes are no header that is known")),
    }
}

/// Files that people hand over by mistake, by their magic numbers.
fn stranger(head: &[u8]) -> Option<&'static str> {
    const MAGIC: [(usize, &[u8], &str); 12] = [
        (0x202, b"HdrS", "an x86 Linux kernel"),
        (56, b"RSC\x05", "a RISC-V Linux Image"),
        (0, b"MZ", "a PE program without an arm64 Image header"),
        (0, b"\x7fELF", "an ELF file of another kind"),
        (0, b"\x1f\x8b", "a gzip file inside a gzip file"),
        (0, b"\x28\xb5\x2f\xfd", "zstd data; unpack it first"),
        (0, b"\xfd7zXZ", "xz data; unpack it first"),
        (0, b"BZh", "bzip2 data; unpack it first"),
        (0, b"\x04\x22\x4d\x18", "LZ4 data; unpack it first"),
        (0, b"\x27\x05\x19\x56", "a U-Boot legacy image"),
        (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image"),
        (0, b"070701", "a cpio archive, such as an initial RAM disk"),
    ];
    let magic = MAGIC.iter().find(|(at, magic, _)| head.get(*at..).is_some_and(|rest| rest.starts_with(magic)));
    match magic {
        Some((_, _, what)) => Some(what),
        None if head.iter().all(|byte| matches!(byte, b'\t' | b'\n' | b'\r' | b' '..=b'~')) => Some("a text file"),
        None => None,
    }
}

/// The gzip member inside an EFI zboot image (Linux, drivers/firmware/efi/libstub/zboot-header.S): `MZ`, `zimg` at 4, payload
/// offset and size at 8 and 12, compression as a string at 24.
fn zboot(file: &[u8]) -> Result<Option<Range<usize>>, KernelError> {
    if !(file.starts_with(b"MZ") && file.get(4..8) == Some(b"zimg")) {
        return Ok(None);
    }
    let (Some(offset), Some(size)) = (le32(file, 8), le32(file, 12)) else {
        return Err(KernelError::Truncated { what: "EFI zboot header", need: 32, have: file.len() as u64 });
    };
    if file.get(24..29) != Some(b"gzip\0") {
        return Err(KernelError::NotAKernel("an EFI zboot image whose compression is not gzip; unpack it first"));
    }
    let end = u64::from(offset) + u64::from(size);
    if end > file.len() as u64 {
        return Err(KernelError::Truncated { what: "EFI zboot payload", need: end, have: file.len() as u64 });
    }
    Ok(Some(offset as usize..end as usize))
}

/// Writes the kernel that [`recognise`] found in `file` to where `layout` has it.
///
/// # Errors
///
/// Compressed data that is damaged, or guest memory that refuses a write; part of the kernel may have been written.
pub fn place<M: Memory>(
    kernel: &Kernel,
    file: &[u8],
    layout: &Layout,
    memory: &mut M,
) -> Result<(), PlaceError<M::Error>> {
    let have = file.len() as u64;
    let Some(payload) = file.get(kernel.payload.clone()) else {
        let need = kernel.payload.end as u64;
        return Err(PlaceError::Kernel(KernelError::Truncated { what: "contents", need, have }));
    };
    match kernel.container {
        Container::Plain => scatter(layout.segments(), 0, payload, memory).map_err(PlaceError::Memory)?,
        Container::Gzip => inflate(kernel, payload, layout, memory)?,
    }
    for segment in layout.segments() {
        let zeros = segment.memory_size - segment.file_size;
        if zeros != 0 {
            let start = Gpa::new(segment.address.wrapping_add(segment.file_size));
            memory.zero(start, zeros).map_err(PlaceError::Memory)?;
        }
    }
    Ok(())
}

fn inflate<M: Memory>(
    kernel: &Kernel,
    payload: &[u8],
    layout: &Layout,
    memory: &mut M,
) -> Result<(), PlaceError<M::Error>> {
    let mut refused = None;
    let mut inflater = Inflater::new().map_err(|error| PlaceError::Kernel(error.into()))?;
    let outcome =
        inflater.run(payload, kernel.size, |offset, bytes| match scatter(layout.segments(), offset, bytes, memory) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                refused = Some(error);
                ControlFlow::Break(())
            }
        });
    match refused {
        Some(error) => Err(PlaceError::Memory(error)),
        None => outcome.map_err(|error| PlaceError::Kernel(error.into())),
    }
}

/// Writes the parts of `bytes`, which stand at `offset` of the contents, that segments want.
fn scatter<M: Memory>(segments: &[Segment], offset: u64, bytes: &[u8], memory: &mut M) -> Result<(), M::Error> {
    let end = offset + bytes.len() as u64;
    for segment in segments {
        let from = offset.max(segment.offset);
        let to = end.min(segment.offset + segment.file_size);
        if from < to {
            let address = segment.address.wrapping_add(from - segment.offset);
            let part = &bytes[(from - offset) as usize..(to - offset) as usize];
            memory.write(Gpa::new(address), part)?;
        }
    }
    Ok(())
}

/// `size` bytes of a file from `offset`, which are its `what`.
///
/// # Errors
///
/// [`KernelError::Truncated`].
pub(crate) fn contents<'f>(
    file: &'f [u8],
    offset: u64,
    size: u64,
    what: &'static str,
) -> Result<&'f [u8], KernelError> {
    let need = offset.saturating_add(size);
    let cut_off = KernelError::Truncated { what, need, have: file.len() as u64 };
    if need > file.len() as u64 { Err(cut_off) } else { Ok(&file[offset as usize..need as usize]) }
}

pub(crate) fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|raw| u32::from_le_bytes(*raw))
}

pub(crate) fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|raw| u64::from_le_bytes(*raw))
}

pub(crate) fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|raw| u16::from_le_bytes(*raw))
}

#[cfg(test)]
pub(crate) mod samples;
#[cfg(test)]
mod tests;
