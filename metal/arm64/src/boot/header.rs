//! What boot loaders read of the image before they start it: two headers in its first page.
//!
//! Purpose: one file that is both a Linux `Image`, whose first instruction is `code0`, and an EFI application, whose
//! first two bytes are `MZ`. The two fit into each other: `code0` is an instruction without effect that is encoded as
//! `MZ`, and the offset of the PE header is where `Image` has a reserved field.
//!
//! Sources: Linux, Documentation/arch/arm64/booting.rst for `Image`; Microsoft PE Format, "COFF File Header" to "Section
//! Table", with UEFI 2.10, 2.1.1 for the machine and the subsystem.
//!
//! Invariants: file offset and address are the same, so that one file serves loaders that copy it as it is and loaders
//! that place sections. No section is both writable and executable: EFI firmware may enforce it. Constants are in the
//! writable section, because they are relocated where they run, by ourselves: there are no PE base relocations, which an
//! EFI loader takes for "runs anywhere" as long as the file does not claim that they were stripped.

use core::arch::global_asm;

/// IMAGE_FILE_MACHINE_ARM64.
const MACHINE: u32 = 0xaa64;
/// EXECUTABLE_IMAGE, LINE_NUMS_STRIPPED, LARGE_ADDRESS_AWARE, DEBUG_STRIPPED; not RELOCS_STRIPPED.
const CHARACTERISTICS: u32 = 0x0002 | 0x0004 | 0x0020 | 0x0200;
/// PE32+.
const OPTIONAL_MAGIC: u32 = 0x20b;
/// IMAGE_SUBSYSTEM_EFI_APPLICATION.
const SUBSYSTEM: u32 = 10;
/// IMAGE_DLLCHARACTERISTICS_NX_COMPAT.
const NX_COMPAT: u32 = 0x100;
/// CNT_CODE, MEM_EXECUTE, MEM_READ.
const TEXT: u32 = 0x0000_0020 | 0x2000_0000 | 0x4000_0000;
/// CNT_INITIALIZED_DATA, MEM_READ, MEM_WRITE.
const DATA: u32 = 0x0000_0040 | 0x4000_0000 | 0x8000_0000;

global_asm!(
    r#"
    .section .head.text, "ax"
    .global _start
_start:
    ccmp    x18, #0, #0xd, pl           // code0: "MZ", and flags that nobody reads
    b       entresol_head               // code1
    .quad   0                           // text_offset: at the start of a 2 MiB block
    .quad   __image_size                // image_size, with everything that is not in the file
    .quad   0xa                         // flags: little endian, 4 KiB pages, anywhere in memory
    .quad   0
    .quad   0
    .quad   0
    .ascii  "ARM\x64"
    .long   pe_header - _start

pe_header:
    .ascii  "PE\0\0"
    .short  {machine}
    .short  2                           // sections
    .long   0                           // no date: the same source makes the same bytes
    .long   0, 0                        // no symbols
    .short  section_table - optional_header
    .short  {characteristics}

optional_header:
    .short  {optional_magic}
    .byte   0, 0                        // linker
    .long   __pe_text_size
    .long   __pe_data_file_size
    .long   __pe_zeroed_size
    .long   __pe_entry
    .long   __pe_text_start             // base of code
    .quad   0                           // preferred address: none
    .long   4096                        // section alignment
    .long   512                         // file alignment
    .short  0, 0                        // operating system
    .short  1, 0                        // image: an initial RAM disk comes by LoadFile2
    .short  0, 0                        // subsystem
    .long   0
    .long   __image_size
    .long   __pe_text_start             // size of the headers
    .long   0                           // checksum: not looked at
    .short  {subsystem}
    .short  {nx_compat}
    .quad   0, 0, 0, 0                  // stack and heap: the firmware's
    .long   0
    .long   (section_table - directories) / 8
directories:
    .quad   0, 0, 0, 0, 0, 0            // the sixth: base relocations
section_table:
    .ascii  ".text\0\0\0"
    .long   __pe_text_size, __pe_text_start
    .long   __pe_text_size, __pe_text_start
    .long   0, 0, 0
    .long   {text}
    .ascii  ".data\0\0\0"
    .long   __pe_data_size, __pe_data_start
    .long   __pe_data_file_size, __pe_data_start
    .long   0, 0, 0
    .long   {data}
    "#,
    machine = const MACHINE,
    characteristics = const CHARACTERISTICS,
    optional_magic = const OPTIONAL_MAGIC,
    subsystem = const SUBSYSTEM,
    nx_compat = const NX_COMPAT,
    text = const TEXT,
    data = const DATA,
);
