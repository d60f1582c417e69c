//! What the loader says of the machine: its `hvm_start_info`, read once.
//!
//! Sources: Xen, public/arch-x86/hvm/start_info.h (the layout; version 1, which has a memory map); Linux,
//! Documentation/admin-guide/kernel-parameters.txt (`virtio_mmio.device`, [`command`](super::command)).
//!
//! Protocol: [`parse`] allocates nothing and returns values only. It reads through a closure, so that a host can test it.
//!
//! Known holes: memory below 1 MiB is left alone, whatever the map says of it.

use core::fmt;

use arrayvec::ArrayVec;
use entresol_metal_common::memory::{MAX_FREE, MAX_REGIONS, Region, pages_around, without};

use super::command;
use super::machine::{Device, MAX_VIRTIO};

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const WITH_MAP: u32 = 1;
/// Bytes of `hvm_start_info`, of a module and of an entry of the memory map.
const START_INFO: usize = 56;
const MODULE: usize = 32;
const MAP_ENTRY: usize = 24;
/// An entry of the map that is RAM.
const RAM: u32 = 1;
/// Entries of a map, more than which no firmware writes.
const MOST_ENTRIES: u32 = 128;
/// What is below belongs to firmware and to starting CPUs.
const FIRST_MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Bytes of a command line that are read.
const COMMAND: usize = 2048;

/// What the loader says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartInfo {
    /// All RAM from 1 MiB on, by address, disjoint, in whole pages.
    pub ram: ArrayVec<Region, MAX_REGIONS>,
    /// The last page of RAM below 1 MiB, but not the first of all.
    pub start_page: Option<u64>,
    /// The loader's first module: the bundle.
    pub bundle: Option<Region>,
    /// ACPI's root system description pointer, if the loader knows it.
    pub rsdp: Option<u64>,
    /// virtio-mmio transports that the command line names, by address, empty or not.
    pub virtio_mmio: ArrayVec<Device, MAX_VIRTIO>,
}

/// Why what the loader says cannot carry the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InfoError {
    /// Not an `hvm_start_info`.
    Magic(u32),
    /// A version without a memory map.
    Version(u32),
    /// The memory map has no entry, or more than we believe.
    Entries(u32),
    /// The memory map's entries are shorter than they are.
    Stride(u32),
    /// A module that wraps.
    Module {
        /// Its first byte.
        start: u64,
        /// Its size.
        size: u64,
    },
    /// More ranges of RAM than we have room for.
    TooManyRanges,
    /// No RAM from 1 MiB on.
    NoRam,
    /// The command line names a device and does not say what it should.
    Command(command::Error),
}

impl fmt::Display for InfoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(found) => write!(f, "EBX points to no hvm_start_info: magic {found:#x}, not {MAGIC:#x}"),
            Self::Version(found) => write!(f, "hvm_start_info: version {found}: must be at least {WITH_MAP}"),
            Self::Entries(found) => write!(f, "the memory map has {found} entries: must be 1 to {MOST_ENTRIES}"),
            Self::Stride(found) => {
                write!(f, "the memory map's entries have {found} bytes: must be {MAP_ENTRY} or more")
            }
            Self::Module { start, size } => write!(f, "a module of {size:#x} bytes at {start:#x} wraps"),
            Self::TooManyRanges => write!(f, "the memory map has more than {MAX_REGIONS} ranges of RAM"),
            Self::NoRam => write!(f, "the memory map has no RAM above 1 MiB"),
            Self::Command(error) => write!(f, "the command line: {error}"),
        }
    }
}

/// Reads the structure at `address` through `read`, which fills bytes from physical memory.
///
/// # Errors
///
/// [`InfoError`].
pub fn parse(address: u64, mut read: impl FnMut(u64, &mut [u8])) -> Result<StartInfo, InfoError> {
    let mut start = [0; START_INFO];
    read(address, &mut start);
    let (magic, version, modules) = (u32_at(&start, 0), u32_at(&start, 4), u32_at(&start, 12));
    if magic != MAGIC {
        return Err(InfoError::Magic(magic));
    }
    if version < WITH_MAP {
        return Err(InfoError::Version(version));
    }
    let (map, entries) = (u64_at(&start, 40), u32_at(&start, 48));
    let bundle = if modules == 0 { None } else { Some(module(u64_at(&start, 16), &mut read)?) };
    let rsdp = Some(u64_at(&start, 32)).filter(|rsdp| *rsdp != 0);
    let (ram, start_page) = ram(Map { start: map, entries, stride: MAP_ENTRY as u32 }, &mut read)?;
    let virtio_mmio = command_line(u64_at(&start, 24), &mut read)?;
    Ok(StartInfo { ram, start_page, bundle, rsdp, virtio_mmio })
}

fn module(address: u64, read: &mut impl FnMut(u64, &mut [u8])) -> Result<Region, InfoError> {
    let mut bytes = [0; MODULE];
    read(address, &mut bytes);
    let (start, size) = (u64_at(&bytes, 0), u64_at(&bytes, 8));
    Region::sized(start, size).ok_or(InfoError::Module { start, size })
}

/// The transports that the command line at `address` names; it ends with a zero.
pub(super) fn command_line(
    address: u64,
    read: &mut impl FnMut(u64, &mut [u8]),
) -> Result<ArrayVec<Device, MAX_VIRTIO>, InfoError> {
    let mut line = [0; COMMAND];
    read(address, &mut line);
    let end = line.iter().position(|byte| *byte == 0).unwrap_or(COMMAND);
    command::virtio_mmio(&line[..end]).map_err(InfoError::Command)
}

/// Where a memory map is: entries that begin with address (8 bytes), size (8) and kind (4), as firmware's own do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Map {
    pub start: u64,
    pub entries: u32,
    /// Bytes from one to the next.
    pub stride: u32,
}

/// RAM from 1 MiB on.
type Ram = ArrayVec<Region, MAX_REGIONS>;

/// RAM without whatever else the map says of the same bytes: firmware's maps overlap now and then. And the last page of it below 1 MiB.
pub(super) fn ram(map: Map, read: &mut impl FnMut(u64, &mut [u8])) -> Result<(Ram, Option<u64>), InfoError> {
    let Map { start, entries, stride } = map;
    if !(1..=MOST_ENTRIES).contains(&entries) {
        return Err(InfoError::Entries(entries));
    }
    if stride < MAP_ENTRY as u32 {
        return Err(InfoError::Stride(stride));
    }
    let mut entry = |index: u32| {
        let mut bytes = [0; MAP_ENTRY];
        read(start.wrapping_add(u64::from(index) * u64::from(stride)), &mut bytes);
        Some((Region::sized(u64_at(&bytes, 0), u64_at(&bytes, 8))?, u32_at(&bytes, 16)))
    };
    let mut ram = ArrayVec::<Region, MAX_REGIONS>::new();
    for (region, _) in (0..entries).filter_map(&mut entry).filter(|(_, kind)| *kind == RAM) {
        // Page 0 is firmware's.
        let start = region.start.max(PAGE).checked_next_multiple_of(PAGE).unwrap_or(region.end);
        let whole = Region { start, end: region.end & !(PAGE - 1) };
        if whole.start < whole.end {
            ram.try_push(whole).map_err(|_| InfoError::TooManyRanges)?;
        }
    }
    ram.sort_unstable_by_key(|region| region.start);
    let mut parts: ArrayVec<Region, MAX_FREE> = ram.into_iter().collect();
    for (region, _) in (0..entries).filter_map(&mut entry).filter(|(_, kind)| *kind != RAM) {
        if parts.len() * 2 > MAX_FREE {
            return Err(InfoError::TooManyRanges);
        }
        parts = without(&parts, pages_around(region));
    }
    let low = |part: &Region| part.end.min(FIRST_MIB).checked_sub(PAGE).filter(|page| *page >= part.start);
    let start_page = parts.iter().filter_map(low).max();
    let parts = without(&parts, Region { start: 0, end: FIRST_MIB });
    let ram = disjoint(&parts)?;
    if ram.is_empty() { Err(InfoError::NoRam) } else { Ok((ram, start_page)) }
}

/// Ranges sorted by their start, with what overlaps or touches put together.
fn disjoint(parts: &[Region]) -> Result<ArrayVec<Region, MAX_REGIONS>, InfoError> {
    let mut ram = ArrayVec::<Region, MAX_REGIONS>::new();
    for part in parts {
        match ram.last_mut() {
            Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
            _ => ram.try_push(*part).map_err(|_| InfoError::TooManyRanges)?,
        }
    }
    Ok(ram)
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    /// Physical memory with a start info at 0x100, a module list at 0x200 and a map at 0x300.
    fn memory(map: &[(u64, u64, u32)], module: Option<(u64, u64)>) -> Vec<u8> {
        let mut memory = vec![0; 0x1000];
        let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x100, &MAGIC.to_le_bytes());
        put(0x104, &1u32.to_le_bytes());
        put(0x10c, &u32::from(module.is_some()).to_le_bytes());
        put(0x110, &0x200u64.to_le_bytes());
        put(0x120, &0xf_5000u64.to_le_bytes());
        put(0x128, &0x300u64.to_le_bytes());
        put(0x130, &(map.len() as u32).to_le_bytes());
        if let Some((start, size)) = module {
            put(0x200, &start.to_le_bytes());
            put(0x208, &size.to_le_bytes());
        }
        for (index, (start, size, kind)) in map.iter().enumerate() {
            put(0x300 + index * 24, &start.to_le_bytes());
            put(0x308 + index * 24, &size.to_le_bytes());
            put(0x310 + index * 24, &kind.to_le_bytes());
        }
        memory
    }

    fn parsed(memory: &[u8]) -> Result<StartInfo, InfoError> {
        parse(0x100, |at, to| {
            for (index, byte) in to.iter_mut().enumerate() {
                *byte = memory.get(at as usize + index).copied().unwrap_or(0);
            }
        })
    }

    #[test]
    fn what_the_loader_says_is_read() {
        let map =
            [(0, 0x9_fc00, 1), (0x9_fc00, 0x400, 2), (0x10_0000, 0x7fe_0000 - 0x10_0000, 1), (1 << 32, 1 << 30, 1)];
        let info = parsed(&memory(&map, Some((0x700_0000, 0x1234)))).unwrap();
        let ram = [Region { start: 0x10_0000, end: 0x7fe_0000 }, Region { start: 1 << 32, end: (1 << 32) + (1 << 30) }];
        assert_eq!(info.ram[..], ram);
        assert_eq!(info.bundle, Some(Region { start: 0x700_0000, end: 0x700_1234 }));
        assert_eq!((info.rsdp, info.start_page), (Some(0xf_5000), Some(0x9_e000)));
        assert!(info.virtio_mmio.is_empty());
        assert_eq!(parsed(&memory(&map, None)).unwrap().bundle, None);
    }

    #[test]
    fn ram_is_what_nothing_else_claims_in_whole_pages() {
        let map = [(0x30_0000, 0x10_0000, 1), (0x10_0800, 0x20_0000, 1), (0x20_0fff, 2, 4), (u64::MAX, 9, 2)];
        let ram = [Region { start: 0x10_1000, end: 0x20_0000 }, Region { start: 0x20_2000, end: 0x40_0000 }];
        assert_eq!(parsed(&memory(&map, None)).unwrap().ram[..], ram);
    }

    #[test]
    fn the_page_to_start_in_is_ram_alone_and_not_the_first() {
        let rest = (0x10_0000, 0x10_0000, 1);
        let page = |low: &[(u64, u64, u32)]| {
            let map: Vec<_> = low.iter().copied().chain([rest]).collect();
            parsed(&memory(&map, None)).unwrap().start_page
        };
        assert_eq!(page(&[]), None);
        assert_eq!(page(&[(0, 0x1fff, 1)]), None);
        assert_eq!(page(&[(0, 0x2000, 1)]), Some(0x1000));
        assert_eq!(page(&[(0, 0xa_0000, 1), (0x9_0800, 0x1_0000, 2)]), Some(0x8_f000));
        assert_eq!(page(&[(0, 0x18_0000, 1)]), Some(0xf_f000));
    }

    #[test]
    fn transports_are_named_on_the_command_line() {
        let mut memory = memory(&[(0x10_0000, 0x10_0000, 1)], None);
        let line = b"quiet virtio_mmio.device=512@0xfeb00000:16";
        memory[0x118..0x120].copy_from_slice(&0x800u64.to_le_bytes());
        memory[0x800..0x800 + line.len()].copy_from_slice(line);
        let found = parsed(&memory).unwrap().virtio_mmio;
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].registers.start, found[0].intid), (0xfeb0_0000, 48));
        memory[0x800 + line.len() - 2] = b'x';
        assert!(matches!(parsed(&memory).unwrap_err(), InfoError::Command(_)));
    }

    #[test]
    fn what_cannot_carry_us_is_refused_by_name() {
        let good = memory(&[(0x10_0000, 0x10_0000, 1)], None);
        let changed = |at: usize, value: u32| {
            let mut bad = good.clone();
            bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
            parsed(&bad).unwrap_err()
        };
        assert_eq!(changed(0x100, 7), InfoError::Magic(7));
        assert_eq!(changed(0x104, 0), InfoError::Version(0));
        assert_eq!(changed(0x130, 0), InfoError::Entries(0));
        assert_eq!(changed(0x130, 1 << 20), InfoError::Entries(1 << 20));
        assert_eq!(changed(0x310, 2), InfoError::NoRam);
        let wraps = parsed(&memory(&[(0x10_0000, 0x10_0000, 1)], Some((u64::MAX, 2)))).unwrap_err();
        assert!(wraps.to_string().contains("a module of 0x2 bytes"), "{wraps}");
        let many: Vec<_> = (0..MAX_REGIONS as u64 + 1).map(|n| (0x10_0000 + n * 0x2000, 0x1000, 1)).collect();
        assert_eq!(parsed(&memory(&many, None)).unwrap_err(), InfoError::TooManyRanges);
    }

    use std::string::ToString;
}
