//! What a multiboot2 loader says of the machine (Multiboot2 Specification 2.0, 3.6: boot information format).
//!
//! Protocol: as [`info`](super::info), whose [`StartInfo`] it makes. The first module is the bundle. The loader copies ACPI's root
//! pointer into its own structure, which is memory like any other once the machine has started: it is read before that.
//!
//! Invariants: tags are looked at within the size that the structure states, and no more than [`MOST_TAGS`] of them.

use arrayvec::ArrayVec;
use entresol_metal_common::memory::Region;

use super::info::{self, InfoError, Map, StartInfo, u32_at};

/// What is in EAX when such a loader starts us.
pub const LOADER: u32 = 0x36d7_6289;

/// Kinds of tags.
const END: u32 = 0;
const COMMAND_LINE: u32 = 1;
const MODULE: u32 = 3;
const MEMORY_MAP: u32 = 6;
const OLD_ACPI: u32 = 14;
const NEW_ACPI: u32 = 15;
/// Bytes of a tag's head, which its size counts too, and what the next tag's address is a multiple of.
const HEAD: u64 = 8;
/// Tags of a structure, more than which no loader writes.
const MOST_TAGS: u32 = 1024;
/// Bytes of a memory map's tag before its first entry.
const MAP_HEAD: u64 = 16;

/// Reads the structure at `address` through `read`, which fills bytes from physical memory.
///
/// # Errors
///
/// [`InfoError`].
pub fn parse(address: u64, mut read: impl FnMut(u64, &mut [u8])) -> Result<StartInfo, InfoError> {
    let mut head = [0; HEAD as usize];
    read(address, &mut head);
    let end = address.saturating_add(u32_at(&head, 0).into());
    let (mut map, mut bundle, mut rsdp) = (None, None, None);
    let mut virtio_mmio = ArrayVec::new();
    let mut at = address.saturating_add(HEAD);
    for _ in 0..MOST_TAGS {
        let mut tag = [0; MAP_HEAD as usize];
        read(at, &mut tag);
        let (kind, size) = (u32_at(&tag, 0), u64::from(u32_at(&tag, 4)));
        if kind == END || size < HEAD || end.saturating_sub(at) < size {
            break;
        }
        match kind {
            COMMAND_LINE => virtio_mmio = info::command_line(at + HEAD, &mut read)?,
            MODULE if bundle.is_none() => {
                let (start, end) = (u32_at(&tag, 8).into(), u32_at(&tag, 12).into());
                let module = Region { start, end };
                bundle = Some(if start <= end { Ok(module) } else { Err(InfoError::Module { start, size: end }) });
            }
            MEMORY_MAP => {
                let stride = u32_at(&tag, 8);
                let entries = size.saturating_sub(MAP_HEAD).checked_div(stride.into()).unwrap_or(0);
                map = Some(Map { start: at + MAP_HEAD, entries: entries as u32, stride });
            }
            NEW_ACPI => rsdp = Some(at + HEAD),
            OLD_ACPI if rsdp.is_none() => rsdp = Some(at + HEAD),
            _ => {}
        }
        at = at.saturating_add(size.next_multiple_of(HEAD));
    }
    let (ram, start_page) = info::ram(map.ok_or(InfoError::Entries(0))?, &mut read)?;
    Ok(StartInfo { ram, start_page, bundle: bundle.transpose()?, rsdp, virtio_mmio })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    const AT: u64 = 0x100;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The structure of these tags: kind and what follows the head.
    fn structure(tags: &[(u32, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = vec![0; AT as usize + 8];
        for (kind, body) in tags {
            bytes.extend(words(&[*kind, body.len() as u32 + 8]));
            bytes.extend(body);
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        bytes.extend(words(&[0, 8]));
        let size = bytes.len() as u32 - AT as u32;
        bytes[AT as usize..AT as usize + 4].copy_from_slice(&size.to_le_bytes());
        bytes
    }

    fn parsed(memory: &[u8]) -> Result<StartInfo, InfoError> {
        parse(AT, |at, to| {
            for (index, byte) in to.iter_mut().enumerate() {
                *byte = memory.get(at as usize + index).copied().unwrap_or(0);
            }
        })
    }

    /// A map of RAM from 1 MiB to 2 MiB, in entries of `stride` bytes.
    fn map(stride: u32) -> (u32, Vec<u8>) {
        let mut body = words(&[stride, 0]);
        for entry in
            [[0, 0, 0x9_f000, 0, 1, 0], [0x10_0000, 0, 0x10_0000, 0, 1, 0], [0xfffc_0000, 0, 0x4_0000, 0, 2, 0]]
        {
            let mut entry = words(&entry);
            entry.resize(stride as usize, 0xff);
            body.extend(entry);
        }
        (MEMORY_MAP, body)
    }

    #[test]
    fn tags_are_read_in_any_order_and_others_passed_over() {
        let module = |start, end| (MODULE, [words(&[start, end]), b"name\0".to_vec()].concat());
        for stride in [24, 32] {
            let tags = [
                (COMMAND_LINE, b"a virtio_mmio.device=512@0xfeb00000:5 b\0".to_vec()),
                module(0x40_0000, 0x40_1234),
                (OLD_ACPI, b"RSD PTR ".to_vec()),
                map(stride),
                module(0x50_0000, 0x50_0001),
            ];
            let memory = structure(&tags);
            let info = parsed(&memory).unwrap();
            assert_eq!(info.ram[..], [Region { start: 0x10_0000, end: 0x20_0000 }]);
            assert_eq!(info.bundle, Some(Region { start: 0x40_0000, end: 0x40_1234 }));
            let rsdp = info.rsdp.unwrap() as usize;
            assert_eq!(&memory[rsdp..rsdp + 8], b"RSD PTR ");
            assert_eq!(info.virtio_mmio.len(), 1);
            assert_eq!(info.start_page, Some(0x9_e000));
        }
    }

    #[test]
    fn the_newer_root_pointer_is_preferred() {
        let (old, new) = ((OLD_ACPI, b"old.....".to_vec()), (NEW_ACPI, b"new.....".to_vec()));
        for tags in [[old.clone(), new.clone(), map(24)], [new, old, map(24)]] {
            let memory = structure(&tags);
            let rsdp = parsed(&memory).unwrap().rsdp.unwrap() as usize;
            assert_eq!(&memory[rsdp..rsdp + 3], b"new");
        }
    }

    #[test]
    fn what_cannot_carry_us_is_refused() {
        assert_eq!(parsed(&structure(&[])).unwrap_err(), InfoError::Entries(0));
        assert_eq!(parsed(&structure(&[(MEMORY_MAP, words(&[0, 0, 1, 2]))])).unwrap_err(), InfoError::Entries(0));
        let short = parsed(&structure(&[(MEMORY_MAP, words(&[8, 0, 1, 2]))])).unwrap_err();
        assert_eq!(short, InfoError::Stride(8));
        let backwards = parsed(&structure(&[map(24), (MODULE, words(&[9, 8]))])).unwrap_err();
        assert_eq!(backwards, InfoError::Module { start: 9, size: 8 });
    }

    #[test]
    fn any_bytes_end() {
        let good = structure(&[map(24), (MODULE, words(&[1, 2]))]);
        for at in AT as usize..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = parsed(&bad);
            }
        }
        assert!(parsed(&[]).is_err());
    }
}
