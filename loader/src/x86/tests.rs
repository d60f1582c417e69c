//! Both protocols against their documents, read back by code of the tests' own; every broken rule once; files that nobody made.

use super::memory::Kind;
use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::string::{String, ToString};
use std::vec;

const MIB: u64 = 1 << 20;

/// Guest memory by piece.
#[derive(Default)]
struct Pieces(BTreeMap<u64, Vec<u8>>);

impl GuestMemory for Pieces {
    type Error = core::convert::Infallible;

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), Self::Error> {
        self.0.insert(gpa.get(), bytes.to_vec());
        Ok(())
    }

    fn zero(&mut self, gpa: Gpa, size: u64) -> Result<(), Self::Error> {
        self.0.insert(gpa.get(), vec![0; size as usize]);
        Ok(())
    }
}

impl Pieces {
    fn bytes(&self, at: u64, size: usize) -> &[u8] {
        let (start, bytes) = self.0.range(..=at).next_back().unwrap();
        &bytes[(at - start) as usize..][..size]
    }

    fn number(&self, at: u64, size: usize) -> u64 {
        self.bytes(at, size).iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn text(&self, at: u64) -> String {
        let (start, bytes) = self.0.range(..=at).next_back().unwrap();
        let text = bytes[(at - start) as usize..].split(|byte| *byte == 0).next().unwrap();
        String::from_utf8(text.to_vec()).unwrap()
    }
}

/// A bzImage with a protected-mode part of `size` bytes that needs `init_size`.
fn bzimage(size: usize, init_size: u32) -> Vec<u8> {
    let offset = 5 * 512;
    let mut file: Vec<u8> = (0..offset + size).map(|at| (at * 7 / 3) as u8).collect();
    file[..offset].fill(0);
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[4]);
    put(0x1f4, &(size as u32 / 16).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &0x7fu16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &init_size.to_le_bytes());
    file
}

/// An x86-64 ELF with one segment at 16 MiB and a note that names `entry`.
fn vmlinux(entry: u64, note: &[u8]) -> Vec<u8> {
    use crate::kernel::samples::{elf, load};
    let notes = [4 | 4 << 32, 4096, 0, 0, note.len() as u64, note.len() as u64, 4];
    let mut file = elf(2, 0, &[load(8192, 0xffff_ffff_8100_0000, 16 * MIB, 5000, 9000), notes]);
    file[18..20].copy_from_slice(&62u16.to_le_bytes());
    file[4096..4096 + note.len()].copy_from_slice(note);
    if let Some(place) = note.len().checked_sub(8).filter(|_| entry != 0) {
        file[4096 + place..4096 + place + 8].copy_from_slice(&entry.to_le_bytes());
    }
    file
}

/// The note, behind another one whose name has to be padded.
fn note(kind: u32, size: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [6u32, 3, 7] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Linux\0\0\0abc\0");
    for word in [4, size, kind] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend([0; 8]);
    note
}

fn machine(memory: u64) -> Machine<'static> {
    Machine { memory, vcpus: 2, virtio: 0b101, cmdline: "console=ttyS0 quiet" }
}

fn placed(boot: &Boot<'_>) -> Pieces {
    let mut memory = Pieces::default();
    boot.place(&mut memory).unwrap();
    memory
}

/// Every piece lies in memory, below what is reserved or above it, and touches no other.
fn assert_apart(boot: &Boot<'_>) {
    let regions: Vec<Region> = boot.pieces.iter().map(Piece::region).collect();
    for (index, region) in regions.iter().enumerate() {
        assert!(region.size != 0 && region.end().get() <= boot.memory.low.size, "{region}");
        for other in &regions[..index] {
            assert!(!region.overlaps(*other), "{region} {other}");
        }
    }
}

#[test]
fn a_bzimage_finds_what_its_protocol_promises() {
    let (file, initrd) = (bzimage(100_000, 0x30_0000), vec![7; 5000]);
    let boot = boot(&machine(64 * MIB), &file, &initrd).unwrap();
    assert_apart(&boot);
    let memory = placed(&boot);
    assert_eq!(memory.bytes(0x100_0000, 100_000), &file[5 * 512..]);
    let start = boot.start;
    assert_eq!((start.rip, start.rflags), (0x100_0200, 2));
    assert_eq!((start.cr0 & (1 << 31 | 1), start.cr4, start.efer), (1 << 31 | 1, 1 << 5, 1 << 8 | 1 << 10));
    let params = start.rsi;
    assert_eq!(memory.bytes(params + 0x1fe, 0x264 - 0x1fe - 0x60), &file[0x1fe..0x204]);
    assert_eq!(memory.number(params + 0x210, 1), 0xff);
    assert_eq!(memory.number(params + 0x214, 4), 0x100_0000);
    assert_eq!(memory.number(params + 0x258, 8), 0x100_0000);
    assert_eq!(memory.text(memory.number(params + 0x228, 4)), "console=ttyS0 quiet");
    let disk = memory.number(params + 0x218, 4);
    assert_eq!((disk, memory.number(params + 0x21c, 4)), (64 * MIB - 8192, 5000));
    assert_eq!(memory.bytes(disk, 5000), initrd);
    assert_eq!(memory.bytes(memory.number(params + 0x70, 8), 8), b"RSD PTR ");
    let entries = memory.number(params + 0x1e8, 1);
    let ranges: Vec<[u64; 3]> = (0..entries)
        .map(|index| params + 0x2d0 + 20 * index)
        .map(|at| [memory.number(at, 8), memory.number(at + 8, 8), memory.number(at + 16, 4)])
        .collect();
    assert_eq!(ranges, [[0, 0xa_0000, 1], [0xa_0000, 0x6_0000, 2], [MIB, 63 * MIB, 1]]);
}

#[test]
fn a_small_machine_has_the_kernel_lower() {
    let file = bzimage(4096, 0x30_0000);
    let at = |memory: u64| boot(&machine(memory), &file, &[]).map(|boot| boot.start.rip - 0x200);
    assert_eq!(at(32 * MIB), Ok(16 * MIB));
    assert_eq!(at(16 * MIB), Ok(2 * MIB));
    assert_eq!(at(4 * MIB).unwrap_err().to_string().split(';').next(), Some("memory is 0x400000"));
    let mut fixed = file.clone();
    fixed[0x234] = 0;
    assert!(boot(&machine(16 * MIB), &fixed, &[]).is_err());
    assert!(boot(&machine(32 * MIB), &fixed, &[]).is_ok());
}

#[test]
fn a_vmlinux_finds_what_its_protocol_promises() {
    let (file, initrd) = (vmlinux(16 * MIB + 0x100, &note(18, 8)), vec![7; 5000]);
    let boot = boot(&machine(5 << 30), &file, &initrd).unwrap();
    assert_apart(&boot);
    let memory = placed(&boot);
    assert_eq!(memory.bytes(16 * MIB, 5000), &file[8192..]);
    assert_eq!(memory.bytes(16 * MIB + 5000, 4000), [0; 4000]);
    let start = boot.start;
    assert_eq!((start.rip, start.cr0, start.cr4, start.efer), (16 * MIB + 0x100, 1 | 1 << 4, 0, 0));
    let info = start.rbx;
    assert_eq!((memory.number(info, 4), memory.number(info + 4, 4)), (0x336e_c578, 1));
    assert_eq!((memory.number(info + 8, 4), memory.number(info + 12, 4)), (0, 1));
    let module = memory.number(info + 16, 8);
    assert_eq!(memory.bytes(memory.number(module, 8), 5000), initrd);
    assert_eq!(memory.number(module + 8, 8), 5000);
    assert_eq!(memory.text(memory.number(info + 24, 8)), "console=ttyS0 quiet");
    assert_eq!(memory.bytes(memory.number(info + 32, 8), 8), b"RSD PTR ");
    let (ranges, count) = (memory.number(info + 40, 8), memory.number(info + 48, 4));
    assert_eq!(count, 4);
    let last = ranges + 24 * 3;
    assert_eq!([0, 8, 16].map(|at| memory.number(last + at, 8)), [4 << 30, 2 << 30, 1]);
    assert_eq!(boot.memory.high.unwrap().size, 2 << 30);
}

#[test]
fn registers_and_tables_say_the_same() {
    let file = bzimage(4096, 0x30_0000);
    let long = boot(&machine(32 * MIB), &file, &[]).unwrap();
    let protected = vmlinux(16 * MIB, &note(18, 8));
    let protected = boot(&machine(32 * MIB), &protected, &[]).unwrap();
    for (boot, code) in [(&long, 0x00af_9b00_0000_ffff), (&protected, 0x00cf_9b00_0000_ffff_u64)] {
        let (memory, start) = (placed(boot), boot.start);
        let descriptor = |selector: u16| memory.number(start.gdt.base + u64::from(selector), 8);
        assert_eq!(start.gdt.limit, 39);
        assert_eq!([start.code.selector, start.data.selector], [0x10, 0x18], "as the boot protocol asks");
        assert_eq!(descriptor(start.code.selector), code);
        assert_eq!(descriptor(start.data.selector), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(start.task.selector), 0x0000_8b00_0000_0067);
    }
    let memory = placed(&long);
    for address in [0, 0x7000, MIB, 0x3fff_ffff, 0x4000_0000, 0xffff_ffff_u64] {
        let mut table = long.start.cr3;
        for shift in [39, 30] {
            let entry = memory.number(table + (address >> shift & 511) * 8, 8);
            assert_eq!(entry & 0xfff, 3);
            table = entry & !0xfff;
        }
        let block = memory.number(table + (address >> 21 & 511) * 8, 8);
        assert_eq!(block, address >> 21 << 21 | 0x83);
    }
    assert_eq!(memory.number(long.start.cr3 + 8, 8), 0);
}

#[test]
fn each_broken_rule_names_field_value_and_rule() {
    let good = || bzimage(4096, 0x30_0000);
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let refused =
        |file: &[u8], machine: &Machine<'_>, initrd: &[u8]| boot(machine, file, initrd).unwrap_err().to_string();
    let usual = machine(64 * MIB);
    #[rustfmt::skip]
    let files: &[(Vec<u8>, &str)] = &[
        (vec![], "not a kernel"),
        (b"#!/bin/sh".to_vec(), "not a kernel"),
        (good()[..0x240].to_vec(), "cut off: its setup header ends at byte 612"),
        (good()[..5 * 512 + 4000].to_vec(), "cut off: its protected-mode part ends at byte 6641, its contents at byte 6560"),
        (with(0x1fe, &[0, 0]), "setup header boot_flag is 0x0; it must be 0xaa55"),
        (with(0x206, &[0x0b, 2]), "setup header version is 0x20b; it must be at least 0x20c"),
        (with(0x211, &[0x80]), "setup header loadflags is 0x80; it must be with bit 0"),
        (with(0x236, &[0x7e]), "setup header xloadflags is 0x7e; it must be with bit 0"),
        (with(0x201, &[0x61]), "setup header jump is 0x61"),
        (with(0x1f4, &[32, 0]), "setup header syssize is 0x20; it must be more than 32"),
        (with(0x260, &[0, 4, 0, 0]), "setup header init_size is 0x400; it must be at least"),
        (with(0x230, &[3, 0, 0, 0]), "setup header kernel_alignment is 0x3"),
        (with(0x230, &[0, 0, 0, 0x80]), "setup header kernel_alignment is 0x80000000"),
        (with(0x258, &[0, 0, 0, 0]), "setup header pref_address is 0x0; it must be from 1 MiB"),
        (vmlinux(16 * MIB, &note(17, 8)), "number of ELF notes PHYS32_ENTRY is 0x0; it must be in the file"),
        (vmlinux(16 * MIB, &note(18, 2)), "bytes of ELF note PHYS32_ENTRY is 0x2; it must be 4 or 8"),
        (vmlinux(16 * MIB, &note(18, 64)), "cut off: its ELF note ends at byte"),
        (vmlinux(17 * MIB, &note(18, 8)), "ELF note PHYS32_ENTRY is 0x1100000; it must be inside a loadable segment"),
    ];
    for (file, what) in files {
        let text = refused(file, &usual, &[]);
        assert!(text.contains(what), "{what}: {text}");
    }
    let many = "x".repeat(2048);
    #[rustfmt::skip]
    let machines: &[(Machine<'_>, &str)] = &[
        (machine(0), "memory is 0x0; it must be a multiple of 2 MiB"),
        (machine(64 * MIB + 1), "memory is 0x4000001; it must be a multiple of 2 MiB"),
        (Machine { vcpus: 0, ..usual }, "vcpus is 0x0; it must be from 1 to 240"),
        (Machine { vcpus: 241, ..usual }, "vcpus is 0xf1; it must be from 1 to 240"),
        (Machine { cmdline: &many, ..usual }, "bytes of the command line is 0x800; it must be at most what the kernel says"),
        (Machine { cmdline: "a\0b", ..usual }, "byte of the command line is 0x0"),
    ];
    for (machine, what) in machines {
        let text = refused(&good(), machine, &[]);
        assert!(text.contains(what), "{what}: {text}");
    }
    let initrd = vec![0; 48 << 20];
    assert!(
        refused(&good(), &usual, &initrd).contains("size of the initrd is 0x3000000; it must be such that it fits")
    );
    let low = vmlinux(0, &note(18, 8));
    assert!(refused(&low, &machine(16 * MIB), &[]).contains("inside a loadable segment"));
    let tight = vmlinux(16 * MIB, &note(18, 8));
    assert!(refused(&tight, &machine(16 * MIB), &[]).contains("the kernel needs 0x1000000..0x1002328"));
}

#[test]
fn memory_is_where_its_map_says() {
    for size in [2 * MIB, 3 << 30, (3 << 30) + 2 * MIB, 64 << 30] {
        let memory = Memory::of(size).unwrap();
        assert_eq!(memory.low.size + memory.high.map_or(0, |high| high.size), size);
        let ranges = memory.ranges();
        for pair in ranges.windows(2) {
            assert!(pair[0].region.end() <= pair[1].region.start);
        }
        let usable: u64 = ranges.iter().filter(|it| it.kind == Kind::Usable).map(|it| it.region.size).sum();
        assert_eq!(usable, size - 0x6_0000);
    }
}

/// A table by its signature, its length and sum checked.
fn table(memory: &Pieces, at: u64) -> (String, &[u8]) {
    let length = memory.number(at + 4, 4) as usize;
    let bytes = memory.bytes(at, length);
    assert_eq!(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0, "{:?}", &bytes[..4]);
    assert_eq!(at % 8, 0);
    (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes)
}

#[test]
fn acpi_leads_from_the_root_pointer_to_every_device() {
    let file = bzimage(4096, 0x30_0000);
    for virtio in [0, 0b101, u32::MAX] {
        let boot = boot(&Machine { vcpus: 8, virtio, ..machine(64 * MIB) }, &file, &[]).unwrap();
        let memory = placed(&boot);
        let root = memory.bytes(0xe_0000, 36);
        for part in [&root[..20], root] {
            assert_eq!(part.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        }
        let (name, xsdt) = table(&memory, memory.number(0xe_0000 + 24, 8));
        assert_eq!((name.as_str(), xsdt.len()), ("XSDT", 36 + 16));
        let entry = |index: usize| u64::from_le_bytes(xsdt[36 + 8 * index..][..8].try_into().unwrap());
        let (name, fadt) = table(&memory, entry(0));
        assert_eq!((name.as_str(), fadt.len(), fadt[8]), ("FACP", 276, 6));
        assert_eq!(u32::from_le_bytes(fadt[112..116].try_into().unwrap()) & 1 << 20, 1 << 20, "reduced hardware");
        assert_eq!(fadt[116..129], [1, 8, 0, 1, 2, 6, 0, 0, 0, 0, 0, 0, 1], "reset");
        assert_eq!((&fadt[248..250], &fadt[260..262]), (&[0, 6][..], &[1, 6][..]), "sleep control and status");
        let (name, madt) = table(&memory, entry(1));
        assert_eq!((name.as_str(), madt.len()), ("APIC", 44 + 8 * 8 + 12));
        assert_eq!(madt[36..44], [0, 0, 0xe0, 0xfe, 0, 0, 0, 0]);
        assert!(madt[44..108].chunks(8).enumerate().all(|(id, it)| *it == [0, 8, id as u8, id as u8, 1, 0, 0, 0]));
        assert_eq!(madt[108..], [1, 12, 0xf0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
        let (name, dsdt) = table(&memory, u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
        assert_eq!(name, "DSDT");
        let count = |what: &[u8]| dsdt.windows(what.len()).filter(|part| *part == what).count();
        assert_eq!(count(b"LNRO0005"), virtio.count_ones() as usize);
        assert_eq!(count(b"COM1"), 1);
        assert_eq!(count(b"\x08_S5_\x12"), 1);
    }
}

proptest! {
    /// Whatever a file says: an answer, and what is placed lies apart.
    #[test]
    fn files_that_nobody_made(
        elf: bool,
        changes in prop::collection::vec((0usize..0x280, any::<u8>()), 0..12),
        cut in 0usize..9000,
        memory in 1u64..40,
        initrd in 0usize..100_000,
    ) {
        let mut file = if elf { vmlinux(16 * MIB, &note(18, 8)) } else { bzimage(6000, 0x30_0000) };
        for (at, value) in changes {
            let at = if elf && at >= 0x100 { at - 0x100 + 4096 } else { at };
            file[at] = value;
        }
        file.truncate(file.len() - cut / 8 * (cut % 2));
        let initrd = vec![1; initrd];
        if let Ok(boot) = boot(&machine(memory * 2 * MIB), &file, &initrd) {
            assert_apart(&boot);
            // Pieces are written where they are.
            prop_assert_eq!(placed(&boot).0.len(), boot.pieces.len());
        }
    }
}
