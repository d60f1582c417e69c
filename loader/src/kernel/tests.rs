use super::samples::{elf, gzip, image, load, zboot};
use super::*;
use crate::Ram;
use crate::layout::layout;
use proptest::prelude::*;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

const BASE: u64 = 0x4000_0000;
const RAM: Ram = Ram { base: Gpa::new(BASE), size: 8 << 20 };
const NOP: [u8; 4] = [0x1f, 0x20, 0x03, 0xd5];

/// Guest memory that begins as garbage, so that zeroing shows.
struct Flat(Vec<u8>);

impl Flat {
    fn slice(&mut self, gpa: Gpa, size: u64) -> Result<&mut [u8], String> {
        let start = gpa.get().wrapping_sub(BASE);
        let range = start as usize..start.wrapping_add(size) as usize;
        self.0.get_mut(range).ok_or_else(|| std::format!("{gpa:?}"))
    }
}

impl Memory for Flat {
    type Error = String;

    fn write(&mut self, gpa: Gpa, bytes: &[u8]) -> Result<(), String> {
        self.slice(gpa, bytes.len() as u64)?.copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&mut self, gpa: Gpa, size: u64) -> Result<(), String> {
        self.slice(gpa, size)?.fill(0);
        Ok(())
    }
}

/// Recognises and places `file`; memory, and the offset of the entry.
fn placed(file: &[u8], hint: Hint) -> (Vec<u8>, usize) {
    let kernel = recognise(file, hint).unwrap();
    let layout = layout(RAM, &kernel, 0, 4096).unwrap();
    let mut memory = Flat(vec![0xa5; RAM.size as usize]);
    place(&kernel, file, &layout, &mut memory).unwrap();
    (memory.0, (layout.entry.get() - BASE) as usize)
}

fn refused(file: &[u8], hint: Hint) -> String {
    recognise(file, hint).unwrap_err().to_string()
}

#[test]
fn an_image_arrives_plain_and_compressed() {
    let file = image(0, 0x10_0000, 200_000);
    for packed in [file.clone(), gzip(&file), zboot(&gzip(&file), b"gzip\0")] {
        let (memory, entry) = placed(&packed, Hint::Auto);
        assert_eq!(entry, 2 << 20);
        assert_eq!(memory[entry..entry + file.len()], file);
        assert_eq!(memory[entry + file.len()], 0xa5);
    }
}

#[test]
fn an_elf_arrives_in_pieces_with_its_zeros() {
    let file = elf(
        2,
        0xffff_8000_0000_0010,
        &[
            load(40_000, 0xffff_8000_0000_0000, BASE + 0x20_0000, 70_000, 70_000),
            load(4_000, 0xffff_8000_0010_0000, BASE + 0x40_0000, 30_000, 90_000),
        ],
    );
    for packed in [file.clone(), gzip(&file)] {
        let (memory, entry) = placed(&packed, Hint::Auto);
        assert_eq!(entry, 0x20_0010);
        assert_eq!(memory[0x20_0000..0x20_0000 + 70_000], file[40_000..110_000]);
        assert_eq!(memory[0x20_0000 + 70_000], 0xa5);
        assert_eq!(memory[0x40_0000..0x40_0000 + 30_000], file[4_000..34_000]);
        assert!(memory[0x40_0000 + 30_000..0x40_0000 + 90_000].iter().all(|byte| *byte == 0));
        assert_eq!(memory[0x40_0000 + 90_000], 0xa5);
    }
}

#[test]
fn a_flat_binary_needs_the_owners_word() {
    let code = [NOP; 300].concat();
    assert!(refused(&code, Hint::Auto).starts_with("not a kernel: its first bytes are no header that is known"));
    for packed in [code.clone(), gzip(&code)] {
        let (memory, entry) = placed(&packed, Hint::Flat);
        assert_eq!(entry, 0x8_0000);
        assert_eq!(memory[entry..entry + code.len()], code);
    }
    assert!(matches!(recognise(&image(0, 1, 64), Hint::Flat).unwrap().format(), Format::Image(_)));
    assert!(refused(&NOP[..3], Hint::Flat).contains("size of a flat kernel is 0x3"));
}

#[test]
fn what_is_not_a_kernel_is_named() {
    assert_eq!(refused(b"", Hint::Flat), "the kernel file is empty");
    let mut bzimage = vec![0x90; 1024];
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    let mut riscv = image(0, 1, 256);
    riscv[56..60].copy_from_slice(b"RSC\x05");
    let mut pe = image(0, 1, 256);
    pe[56..60].fill(0);
    for (file, what) in [
        (b"#!/bin/sh\nexec true\n".to_vec(), "a text file"),
        (bzimage, "an x86 Linux kernel"),
        (riscv, "a RISC-V Linux Image"),
        (pe, "a PE program"),
        (b"\x28\xb5\x2f\xfd\x00\x00".to_vec(), "zstd data"),
        (b"070701000000".to_vec(), "a cpio archive"),
        (gzip(&gzip(&NOP)), "a gzip file inside a gzip file"),
        (zboot(b"", b"zstd22\0"), "an EFI zboot image whose compression is not gzip"),
    ] {
        for hint in [Hint::Auto, Hint::Flat] {
            let message = refused(&file, hint);
            assert!(message.starts_with(&std::format!("not a kernel: {what}")), "{message}");
        }
    }
}

#[test]
fn cut_off_headers_are_named() {
    assert!(
        refused(&image(0, 1, 64)[..63], Hint::Auto).contains("Image header ends at byte 64, its contents at byte 63")
    );
    let program = elf(2, 0, &[load(4096, 0, BASE, 100, 100)]);
    assert!(refused(&program[..60], Hint::Auto).contains("ELF header ends at byte 64"));
    assert!(refused(&program[..100], Hint::Auto).contains("ELF program header table ends at byte 120"));
    assert!(refused(&program[..4190], Hint::Auto).contains("ELF segment ends at byte 4196"));
    let packed = zboot(&gzip(&NOP), b"gzip\0");
    assert!(refused(&packed[..packed.len() - 1], Hint::Auto).contains("EFI zboot payload"));
    assert!(refused(b"MZ\0\0zimg\0", Hint::Auto).contains("EFI zboot header"));
}

#[test]
fn elf_fields_have_their_rules() {
    let good = elf(2, BASE, &[load(4096, BASE, BASE, 100, 100)]);
    for (at, byte, message) in [
        (4, 1, "ELF EI_CLASS is 0x1"),
        (5, 2, "ELF EI_DATA is 0x2"),
        (18, 62, "ELF e_machine is 0x3e; it must be 183, AArch64"),
        (16, 1, "ELF e_type is 0x1"),
        (54, 32, "ELF e_phentsize is 0x20"),
        (56, 0, "number of loadable ELF segments is 0x0; it must be at least 1"),
        (27, 0xff, "ELF e_entry is 0xff000000"),
        (64 + 40, 99, "ELF p_filesz is 0x64; it must be at most p_memsz"),
    ] {
        let mut bad = good.clone();
        bad[at] = byte;
        let message_found = refused(&bad, Hint::Auto);
        assert!(message_found.starts_with(message), "{message_found}");
    }
    let wrapping = elf(2, 0, &[load(4096, 0, u64::MAX - 10, 10, 100)]);
    assert!(refused(&wrapping, Hint::Auto).starts_with("ELF p_memsz is 0x64"));
    let overlapping = elf(2, 0, &[load(4096, 0, BASE, 10, 100), load(4096, 0x1000, BASE + 99, 10, 100)]);
    assert!(refused(&overlapping, Hint::Auto).starts_with("ELF p_paddr"));
    let many: Vec<_> = (0..17).map(|n| load(4096, n * 4096, BASE + n * 4096, 10, 10)).collect();
    assert!(refused(&elf(2, 0, &many), Hint::Auto).starts_with("number of loadable ELF segments is 0x11"));
}

#[test]
fn damaged_compressed_data_is_found() {
    let file = image(0, 0x10_0000, 200_000);
    let good = gzip(&file);
    let kernel = recognise(&good, Hint::Auto).unwrap();
    let layout = layout(RAM, &kernel, 0, 4096).unwrap();
    let outcome = |file: &[u8]| {
        let kernel = recognise(file, Hint::Auto).map_err(PlaceError::Kernel)?;
        place(&kernel, file, &layout, &mut Flat(vec![0; RAM.size as usize]))
    };
    let gzip_error = |file: &[u8]| match outcome(file) {
        Err(PlaceError::Kernel(KernelError::Gzip(error))) => error,
        other => panic!("{other:?}"),
    };
    let end = good.len();
    let mut checksum = good.clone();
    checksum[end - 8] ^= 1;
    assert!(matches!(gzip_error(&checksum), GzipError::Checksum { .. }));
    for wrong in [199_999u32, 200_001, 0] {
        let mut length = good.clone();
        length[end - 4..].copy_from_slice(&wrong.to_le_bytes());
        assert_eq!(gzip_error(&length), GzipError::Length { expected: wrong.into() });
    }
    let mut cut = good[..end / 2].to_vec();
    cut.extend_from_slice(&good[end - 8..]);
    assert_eq!(gzip_error(&cut), GzipError::Truncated);
    assert_eq!(gzip_error(&good[..12]), GzipError::Truncated);
    let mut method = good.clone();
    method[2] = 7;
    assert_eq!(gzip_error(&method), GzipError::Header);
    let mut block = good;
    block[16] |= 0b110;
    assert_eq!(gzip_error(&block), GzipError::Corrupt);
}

#[test]
fn a_memory_that_refuses_is_not_a_bad_kernel() {
    for file in [image(0, 0x10_0000, 200_000), gzip(&image(0, 0x10_0000, 200_000))] {
        let kernel = recognise(&file, Hint::Auto).unwrap();
        let layout = layout(RAM, &kernel, 0, 4096).unwrap();
        let outcome = place(&kernel, &file, &layout, &mut Flat(vec![0; (2 << 20) + 100_000]));
        assert!(matches!(outcome, Err(PlaceError::Memory(_))), "{outcome:?}");
    }
    let file = image(0, 0x10_0000, 4096);
    let kernel = recognise(&file, Hint::Auto).unwrap();
    let layout = layout(RAM, &kernel, 0, 4096).unwrap();
    let outcome = place(&kernel, &file[..4095], &layout, &mut Flat(vec![0; RAM.size as usize]));
    assert!(matches!(outcome, Err(PlaceError::Kernel(KernelError::Truncated { .. }))));
}

/// Recognises, lays out and places whatever it is; only panics are wrong.
fn survives(file: &[u8]) {
    for hint in [Hint::Auto, Hint::Flat] {
        let Ok(kernel) = recognise(file, hint) else { continue };
        let Ok(layout) = layout(Ram { base: Gpa::new(BASE), size: 4 << 20 }, &kernel, 0, 4096) else { continue };
        let mut memory = Flat(vec![0; 4 << 20]);
        if let Err(PlaceError::Memory(address)) = place(&kernel, file, &layout, &mut memory) {
            panic!("the layout led outside memory: {address}");
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_recognised_or_refused(file: Vec<u8>) {
        survives(&file);
    }

    #[test]
    fn changed_headers_never_lead_astray(
        which in 0usize..4, changes in prop::collection::vec((0usize..180, any::<u8>()), 0..6), cut in 0usize..9000,
    ) {
        let program = elf(2, BASE + 0x20_0000, &[
            load(4096, BASE + 0x20_0000, BASE + 0x20_0000, 4000, 9000), load(200, BASE, BASE, 300, 600),
        ]);
        let mut file = match which {
            0 => program,
            1 => gzip(&program),
            2 => image(0x8_0000, 0x4000, 8192),
            _ => zboot(&gzip(&image(0, 0x4000, 8192)), b"gzip\0"),
        };
        for (at, byte) in changes {
            if let Some(place) = file.get_mut(at) {
                *place = byte;
            }
        }
        file.truncate(cut.max(1));
        survives(&file);
    }

    #[test]
    fn inflating_is_the_inverse(size in 0usize..100_000, step in 1usize..40, noise: u32) {
        let contents: Vec<u8> = (0..size).map(|at| ((at / step) as u32).wrapping_mul(noise | 1) as u8).collect();
        let member = gzip(&contents);
        let mut out = Vec::new();
        let size = gzip::inflated_size(&member).unwrap();
        Inflater::new().unwrap().run(&member, size, |offset, bytes| {
            assert_eq!(offset, out.len() as u64);
            out.extend_from_slice(bytes);
            ControlFlow::Continue(())
        }).unwrap();
        prop_assert_eq!(out, contents);
    }
}
