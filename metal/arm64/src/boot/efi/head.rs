//! The first and the last instructions of the EFI application.
//!
//! Sources: UEFI 2.10, 2.3.6 (what holds on entry, calling convention); Arm DDI 0487 D24.2 (SCTLR_EL2), C5.3 (DC CIVAC,
//! IC IALLU), C5.5 (TLBI ALLE2).

use core::arch::global_asm;

global_asm!(
    r#"
    .text
    // x0 = the application's handle, x1 = the system table, x30 = back to the firmware, on its stack.
    .global entresol_efi_head
entresol_efi_head:
    stp     x29, x30, [sp, #-32]!
    stp     x0, x1, [sp, #16]
    mov     x29, sp
    bl      entresol_relocate
    cbnz    x0, 1f
    ldp     x0, x1, [sp, #16]
    mrs     x2, currentel
    lsr     x2, x2, #2
    bl      entresol_efi_main           // comes back only with an error
    b       2f
1:  mov     x0, #1                      // EFI_LOAD_ERROR
    movk    x0, #0x8000, lsl #48
2:  ldp     x29, x30, [sp], #32
    ret

    // x0 = the device tree. All that is needed from here on is in memory, past the caches. What runs is mapped where it is.
    .global entresol_efi_leave
entresol_efi_leave:
    msr     daifset, #0xf
    ldr     x1, =0x30c50830             // as the start code sets it: MMU and caches off
    dsb     sy
    msr     sctlr_el2, x1
    isb
    tlbi    alle2
    ic      iallu
    dsb     sy
    isb
    mov     x1, xzr                     // booting.rst: x1 to x3 are zero
    mov     x2, xzr
    mov     x3, xzr
    b       _start

    .ltorg

    // Cleans and invalidates the data cache lines of [x0, x1) to the point of coherency. Clobbers x0, x2, x3.
    .global entresol_clean_to_poc
entresol_clean_to_poc:
    mrs     x2, ctr_el0
    ubfx    x2, x2, #16, #4             // DminLine: log2 of words
    mov     x3, #4
    lsl     x2, x3, x2
    sub     x3, x2, #1
    bic     x0, x0, x3
1:  dc      civac, x0
    add     x0, x0, x2
    cmp     x0, x1
    b.lo    1b
    dsb     sy
    ret
    "#,
);
