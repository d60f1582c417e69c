//! The first instructions of the image, and of every other CPU.
//!
//! Sources: Linux, Documentation/arch/arm64/booting.rst for what holds here; Arm DDI 0487 D13.1 for the state at reset
//! of what is set; the ELF for the Arm 64-bit Architecture (AAELF64) 5.7 for R_AARCH64_RELATIVE.
//!
//! Protocol: what runs from [`super::header`]'s first instruction on needs the image at a multiple of 4 KiB only; the
//! 2 MiB of the boot protocol are what loaders are used to. Relocating twice does what once does, so an image that ran
//! as an EFI application is started again at its first instruction, where it is.
//!
//! Known holes: a loader that enters with the MMU on breaks the protocol and is not detected.

use core::arch::global_asm;

use crate::cpu::{PER_CPU_STACK_TOP, STACK_STRIDE};

/// AAELF64 5.7.15.
const R_AARCH64_RELATIVE: u32 = 1027;

global_asm!(
    r#"
    .text
    .global entresol_head
entresol_head:
    msr     daifset, #0xf
    mov     x19, x0                     // the device tree

    // A known EL2: little endian, no alignment checks, everything off.
    mrs     x0, currentel
    cmp     x0, #(2 << 2)
    b.ne    1f
    ldr     x0, =0x30c50830
    msr     sctlr_el2, x0
    isb
1:
    // Writes from here to the MMU's start go past the caches: drop lines that could cover them.
    adrp    x0, __rodata_start
    adrp    x1, __bss_end
    bl      entresol_invalidate_to_poc

    bl      entresol_relocate
2:  cbnz    x0, 2b                      // a relocation the linker script does not let through

    adrp    x1, __bss_start
    adrp    x2, __bss_end
3:  stp     xzr, xzr, [x1], #16
    cmp     x1, x2
    b.lo    3b

    adrp    x0, __stacks_start
    mov     x1, #{stride}
    add     sp, x0, x1                  // the boot CPU has the first area
    mov     x29, xzr
    mov     x30, xzr
    mov     x0, x19
    mrs     x1, currentel
    lsr     x1, x1, #2
    bl      entresol_boot
4:  wfe
    b       4b

    .ltorg

    // Adds where we run to each address that the linker left open. Returns 0 in x0, or 1 if it met anything else.
    // Clobbers x1 to x6. Needs no stack.
    .global entresol_relocate
entresol_relocate:
    adrp    x6, __image_start           // linked at 0: where we run is also the offset to add
    adrp    x1, __rela_start
    add     x1, x1, :lo12:__rela_start
    adrp    x2, __rela_end
    add     x2, x2, :lo12:__rela_end
    mov     x0, xzr
5:  cmp     x1, x2
    b.hs    7f
    ldp     x3, x4, [x1], #16           // r_offset, r_info
    ldr     x5, [x1], #8                // r_addend
    cmp     x4, #{relative}
    b.ne    6f
    add     x5, x5, x6
    str     x5, [x3, x6]
    b       5b
6:  mov     x0, #1
7:  ret

    // A CPU that PSCI started: MMU off, x0 = its block, whose line was cleaned to memory.
    .global entresol_secondary_head
entresol_secondary_head:
    msr     daifset, #0xf
    mov     x19, x0
    ldr     x1, =0x30c50830
    msr     sctlr_el2, x1
    isb
    ldr     x1, [x0, #{stack_top}]
    mov     sp, x1
    mov     x29, xzr
    mov     x30, xzr
    adrp    x0, entresol_mmu
    add     x0, x0, :lo12:entresol_mmu
    bl      entresol_enable_mmu
    mov     x0, x19
    bl      entresol_secondary_start
8:  wfe
    b       8b

    // x0 = pointer to MAIR, TCR, TTBR0, SCTLR of EL2. What runs is mapped where it is.
    .global entresol_enable_mmu
entresol_enable_mmu:
    ldp     x1, x2, [x0]
    ldp     x3, x4, [x0, #16]
    msr     mair_el2, x1
    msr     tcr_el2, x2
    msr     ttbr0_el2, x3
    isb
    tlbi    alle2
    ic      iallu
    dsb     nsh
    isb
    msr     sctlr_el2, x4
    isb
    ret

    .ltorg

    // Invalidates the data cache lines of [x0, x1) to the point of coherency. Clobbers x0, x2, x3.
    .global entresol_invalidate_to_poc
entresol_invalidate_to_poc:
    mrs     x2, ctr_el0
    ubfx    x2, x2, #16, #4             // DminLine: log2 of words
    mov     x3, #4
    lsl     x2, x3, x2
    sub     x3, x2, #1
    bic     x0, x0, x3
9:  dc      ivac, x0
    add     x0, x0, x2
    cmp     x0, x1
    b.lo    9b
    dsb     sy
    ret
    "#,
    relative = const R_AARCH64_RELATIVE,
    stride = const STACK_STRIDE,
    stack_top = const PER_CPU_STACK_TOP,
);
