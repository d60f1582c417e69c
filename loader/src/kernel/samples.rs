//! Small kernel files for tests.

use std::vec;
use std::vec::Vec;

/// An arm64 Image of `size` bytes, which are a pattern behind the header.
pub(crate) fn image(text_offset: u64, image_size: u64, size: usize) -> Vec<u8> {
    let mut file: Vec<u8> = (0..size).map(|at| (at * 7 / 3) as u8).collect();
    file[..64].fill(0);
    file[..4].copy_from_slice(b"MZ\x40\xfa");
    file[8..16].copy_from_slice(&text_offset.to_le_bytes());
    file[16..24].copy_from_slice(&image_size.to_le_bytes());
    file[24..32].copy_from_slice(&10u64.to_le_bytes());
    file[56..60].copy_from_slice(b"ARM\x64");
    file
}

/// A PT_LOAD program header.
pub(crate) fn load(offset: u64, virtual_address: u64, address: u64, file_size: u64, memory_size: u64) -> [u64; 7] {
    [1 | 7 << 32, offset, virtual_address, address, file_size, memory_size, 4096]
}

/// An AArch64 ELF whose file ends with its last segment, filled with a pattern.
pub(crate) fn elf(kind: u16, entry: u64, headers: &[[u64; 7]]) -> Vec<u8> {
    let end = headers.iter().map(|header| header[1] + header[4]).max().unwrap_or(0).max(64 + 56 * headers.len() as u64);
    let mut file: Vec<u8> = (0..end).map(|at| (at * 5 / 2) as u8).collect();
    file[..64].fill(0);
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
    for (at, value) in [(16, kind), (18, 183), (20, 1), (52, 64), (54, 56), (56, headers.len() as u16)] {
        file[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    file[24..32].copy_from_slice(&entry.to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    for (header, place) in headers.iter().zip(file[64..].chunks_exact_mut(56)) {
        for (field, bytes) in header.iter().zip(place.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&field.to_le_bytes());
        }
    }
    file
}

/// `contents` as a gzip member with a name.
pub(crate) fn gzip(contents: &[u8]) -> Vec<u8> {
    let mut file = vec![0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 2, 3];
    file.extend_from_slice(b"Image\0");
    file.extend(miniz_oxide::deflate::compress_to_vec(contents, 6));
    file.extend(crc32fast::hash(contents).to_le_bytes());
    file.extend((contents.len() as u32).to_le_bytes());
    file
}

/// An EFI zboot image around `payload`.
pub(crate) fn zboot(payload: &[u8], compression: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 4096];
    file[..8].copy_from_slice(b"MZ\0\0zimg");
    file[8..12].copy_from_slice(&4096u32.to_le_bytes());
    file[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file[24..24 + compression.len()].copy_from_slice(compression);
    file.extend_from_slice(payload);
    file
}
