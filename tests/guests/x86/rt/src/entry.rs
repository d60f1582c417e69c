//! From a PVH loader's 32-bit jump to long mode (APM volume 2, 14.6).

use core::arch::global_asm;

global_asm!(
    r#"
    .section .note.pvh, "a", @note
    .balign 4
    .long   4, 4, 18                    // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz  "Xen"
    .long   guest_start

    .section .text.entry, "ax"
    .code32
    .global guest_start
guest_start:
    cld
    mov     esp, offset guest_stack_top
    mov     esi, ebx                    // hvm_start_info
    mov     eax, offset guest_pdpt
    or      eax, 3
    mov     [guest_pml4], eax
    mov     edi, offset guest_pdpt
    mov     eax, offset guest_pd
    or      eax, 3
    mov     ecx, 4
1:  mov     [edi], eax
    add     eax, 4096
    add     edi, 8
    dec     ecx
    jnz     1b
    mov     edi, offset guest_pd
    mov     eax, 0x83
    mov     ecx, 2048
2:  mov     [edi], eax
    add     eax, 0x200000
    add     edi, 8
    dec     ecx
    jnz     2b
    mov     eax, offset guest_pml4
    mov     cr3, eax
    mov     eax, 0x20                   // CR4.PAE
    mov     cr4, eax
    mov     ecx, 0xc0000080             // EFER.LME
    rdmsr
    or      eax, 0x100
    wrmsr
    mov     eax, 0x80000033             // CR0: PG, NE, ET, MP, PE
    mov     cr0, eax
    lgdt    [guest_gdt_pointer]
    push    8
    mov     eax, offset guest_start64
    push    eax
    retf

    .code64
guest_start64:
    xor     eax, eax
    mov     ds, eax
    mov     es, eax
    mov     ss, eax
    mov     fs, eax
    mov     gs, eax
    xor     ebp, ebp
    mov     edi, esi
    call    guest_boot                  // does not return

    .section .rodata
    .balign 8
guest_gdt:
    .quad   0, 0x00209b0000000000
guest_gdt_pointer:
    .short  15
    .long   guest_gdt

    .section .bss
    .balign 4096
guest_pml4: .skip 4096
guest_pdpt: .skip 4096
guest_pd:   .skip 16384
    .skip   65536
guest_stack_top:
    "#
);
