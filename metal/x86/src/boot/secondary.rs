//! The first instructions of the other CPUs: from a start-up interrupt in real mode to 64-bit Rust.
//!
//! Protocol: [`install`] copies a few instructions to a page below 1 MiB while the start code's tables still map it; our own tables
//! do not have it, so nothing there is ever both writable and executable for them. They jump into the image, which enters long mode
//! on our own tables ([`crate::paging`] says where they are) and takes the stack of the CPU that [`crate::cpu`] is starting.
//!
//! Sources: APM volume 2, 14.1.4 and 16.5 (CS = page, IP = 0), 14.6 (into long mode), 4.7 (descriptors).

use core::arch::global_asm;

use crate::cpu::STACK_TOP;

global_asm!(
    r#"
    .section .head.text, "ax"
    .code16
    .balign 16
    .global entresol_real_mode, entresol_real_mode_end
entresol_real_mode:
    cli
    cld
    mov     ax, cs
    mov     ds, ax
    .byte   0x66, 0x0f, 0x01, 0x16      // LGDT with all four bytes of the address, from our page
    .short  entresol_secondary_gdt_pointer - entresol_real_mode
    mov     eax, cr0
    or      al, 1                       // PE
    mov     cr0, eax
    .byte   0x66, 0xea                  // a far jump with a 32-bit offset
    .long   entresol_secondary32
    .short  16
entresol_secondary_gdt_pointer:
    .short  31
    .long   entresol_secondary_gdt
entresol_real_mode_end:

    .code32
entresol_secondary32:
    mov     eax, 24
    mov     ds, ax
    mov     ss, ax
    mov     eax, [entresol_root]
    mov     cr3, eax
    mov     eax, 0x20                   // CR4.PAE
    mov     cr4, eax
    mov     ecx, 0xc0000080             // EFER: LME and NXE
    rdmsr
    or      eax, 0x900
    wrmsr
    mov     eax, 0x80010033             // CR0: PG, WP, NE, ET, MP, PE
    mov     cr0, eax
    .byte   0xea
    .long   entresol_secondary64
    .short  8

    .code64
entresol_secondary64:
    xor     eax, eax
    mov     ds, eax
    mov     es, eax
    mov     ss, eax
    mov     fs, eax
    mov     gs, eax
    mov     rdi, [rip + entresol_starting]
    mov     rsp, [rdi + {stack_top}]
    xor     ebp, ebp
    call    entresol_secondary_start    // does not return
4:  hlt
    jmp     4b

    .section .rodata
    .balign 8
entresol_secondary_gdt:
    .quad   0, 0x00209b0000000000       // 64-bit code
    .quad   0x00cf9b000000ffff, 0x00cf93000000ffff  // 32-bit code and data
    "#,
    stack_top = const STACK_TOP,
);

unsafe extern "C" {
    static entresol_real_mode: u8;
    static entresol_real_mode_end: u8;
}

/// Puts the first instructions into `page`.
///
/// # Safety
///
/// It is RAM below 1 MiB that nobody uses, mapped writable where it is.
pub(super) unsafe fn install(page: u64) {
    let (start, end) = (&raw const entresol_real_mode, &raw const entresol_real_mode_end);
    // SAFETY: the instructions are in the image, less than a page; the page is the caller's to give.
    unsafe { core::ptr::copy_nonoverlapping(start, page as *mut u8, end as usize - start as usize) };
}
