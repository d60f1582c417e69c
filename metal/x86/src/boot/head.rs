//! The first instructions of the image: from a loader's 32-bit jump to 64-bit Rust.
//!
//! Sources: Xen's "x86/HVM direct boot ABI" for what holds here (EBX = `hvm_start_info`, flat segments, paging off, interrupts
//! off), and the Multiboot2 Specification 2.0, 3.1 and 3.5 (the same, with EAX = 36d76289h and another structure at EBX); APM volume 2, 14.6 for the way into long mode, 5.4 for the entries.
//!
//! Protocol: the tables here map the first 4 GiB to themselves with 2 MiB pages that may be written and executed, for the length
//! of [`super::start::entresol_boot`], which loads better ones. What lies above is not touched before.
//!
//! What the compiler was allowed to use (BMI1 and BMI2: every processor since 2015 that has SVM) is asked for before any Rust code runs; a
//! processor without, or without long mode, is refused on COM1 from here, and halted.

use core::arch::global_asm;

use crate::cpu::STACK_STRIDE;

/// XEN_ELFNOTE_PHYS32_ENTRY: where a loader jumps in 32-bit mode.
const PHYS32_ENTRY: u32 = 18;

/// What a multiboot2 header begins with, and the architecture: 32-bit protected mode of i386.
const MULTIBOOT: u32 = 0xe852_50d6;

global_asm!(
    r#"
    .section .head.multiboot, "a"
    .balign 8
entresol_multiboot:
    .long   {multiboot}, 0, entresol_multiboot_end - entresol_multiboot
    .long   0x100000000 - ({multiboot} + (entresol_multiboot_end - entresol_multiboot))
    .short  3, 0                        // the entry
    .long   12, entresol_start_multiboot
    .balign 8
    .short  6, 0                        // modules begin with a page
    .long   8
    .short  0, 0
    .long   8
entresol_multiboot_end:

    .section .note.pvh, "a", @note
    .balign 4
    .long   4, 4, {phys32}
    .asciz  "Xen"
    .long   entresol_start

    .section .head.text, "ax"
    .code32
    .global entresol_start
entresol_start:
    xor     eax, eax
entresol_start_multiboot:
    cli
    cld
    mov     ebp, eax                    // which loader
    mov     esi, ebx                    // what it says
    mov     edi, offset __bss_start
    mov     ecx, offset __bss_end
    sub     ecx, edi
    shr     ecx, 2
    xor     eax, eax
    rep     stosd
    mov     esp, offset __stacks_start
    add     esp, {stride}               // the boot CPU has the first area

    mov     eax, 0x80000001
    cpuid
    bt      edx, 29                     // long mode
    jnc     5f
    xor     eax, eax
    cpuid
    cmp     eax, 7
    jb      5f
    mov     eax, 7
    xor     ecx, ecx
    cpuid
    and     ebx, 0x108                  // BMI1, BMI2
    cmp     ebx, 0x108
    je      7f
5:  mov     esi, offset entresol_start_refusal
6:  mov     edx, 0x3fd                  // COM1's line status: the transmitter takes a byte
    in      al, dx
    test    al, 0x20
    jz      6b
    mov     edx, 0x3f8
    lodsb
    out     dx, al
    test    al, al
    jnz     6b
8:  hlt
    jmp     8b
7:

    // One root entry, four of level 3, 2048 pages of 2 MiB.
    mov     eax, offset entresol_start_pdpt
    or      eax, 3                      // present, writable
    mov     [entresol_start_pml4], eax
    mov     edi, offset entresol_start_pdpt
    mov     eax, offset entresol_start_pd
    or      eax, 3
    mov     ecx, 4
1:  mov     [edi], eax
    add     eax, 4096
    add     edi, 8
    dec     ecx
    jnz     1b
    mov     edi, offset entresol_start_pd
    mov     eax, 0x83                   // present, writable, 2 MiB
    mov     ecx, 2048
2:  mov     [edi], eax
    add     eax, 0x200000
    add     edi, 8
    dec     ecx
    jnz     2b

    mov     eax, offset entresol_start_pml4
    mov     cr3, eax
    mov     eax, 0x20                   // CR4.PAE
    mov     cr4, eax
    mov     ecx, 0xc0000080             // EFER: LME and NXE
    rdmsr
    or      eax, 0x900
    wrmsr
    mov     eax, 0x80010033             // CR0: PG, WP, NE, ET, MP, PE
    mov     cr0, eax
    lgdt    [entresol_start_gdt_pointer]
    push    8                           // a far return is a jump with a selector
    mov     eax, offset entresol_start64
    push    eax
    retf

    .code64
entresol_start64:
    xor     eax, eax
    mov     ds, eax
    mov     es, eax
    mov     ss, eax
    mov     fs, eax
    mov     gs, eax
    mov     edi, esi
    mov     esi, ebp
    xor     ebp, ebp
    call    entresol_boot               // does not return
3:  hlt
    jmp     3b

    .section .rodata
entresol_start_refusal:
    .asciz  "\r\nPANIC: this CPU has no long mode, BMI1 or BMI2, which we use\r\nEND OF PANIC\r\n"
    .balign 8
entresol_start_gdt:
    .quad   0, 0x00209b0000000000       // 64-bit code
entresol_start_gdt_pointer:
    .short  15
    .long   entresol_start_gdt

    .section .bss
    .balign 4096
entresol_start_pml4: .skip 4096
entresol_start_pdpt: .skip 4096
entresol_start_pd:   .skip 16384
    "#,
    multiboot = const MULTIBOOT,
    phys32 = const PHYS32_ENTRY,
    stride = const STACK_STRIDE,
);
