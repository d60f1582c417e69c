//! From the first instruction to `guest_main`, for the first CPU and the others.
//!
//! The first CPU applies the image's own relocations (only `R_AARCH64_RELATIVE` occurs in a static position-independent
//! program; AAELF64, "Relocation"), then both ways join: EL2 is left for EL1 with nothing trapped, the stack is chosen by
//! MPIDR_EL1.Aff0 (`virt` numbers up to 16 CPUs there), vectors are set.

use core::arch::global_asm;

use crate::machine::Machine;
use crate::{console, smccc, smp, trap};

/// CPUs that have a stack.
pub const MAX_CPUS: usize = 8;
/// Bytes of a CPU's stack.
pub const STACK: usize = 16 << 10;

#[repr(C, align(4096))]
struct Stacks([[u8; STACK]; MAX_CPUS]);

/// Written by the CPUs that run on them only.
#[unsafe(no_mangle)]
static mut RT_STACKS: Stacks = Stacks([[0; STACK]; MAX_CPUS]);

unsafe extern "Rust" {
    fn guest_main(machine: &Machine);
}

global_asm!(
    r#"
    .section .text.entry, "ax"
    .globl _start
_start:
    mov     x20, x0
    // Relocations: the image is linked at 0, so the load address is the addend's base.
    adr     x1, _start
    adrp    x2, rt_rela_start
    add     x2, x2, :lo12:rt_rela_start
    adrp    x3, rt_rela_end
    add     x3, x3, :lo12:rt_rela_end
1:  cmp     x2, x3
    b.hs    2f
    ldp     x4, x5, [x2], #16
    ldr     x6, [x2], #8
    cmp     w5, #1027
    b.ne    3f
    add     x6, x6, x1
    str     x6, [x1, x4]
    b       1b
3:  wfi
    b       3b
2:  dsb     sy
    ic      iallu
    dsb     sy
    isb
    bl      rt_to_el1
    bl      rt_set_stack
    mov     x0, x20
    bl      rt_main

    .globl rt_secondary_entry
rt_secondary_entry:
    mov     x20, x0
    bl      rt_to_el1
    bl      rt_set_stack
    mov     x0, x20
    bl      rt_secondary

// Returns at EL1 with interrupts masked, whether it was entered at EL1 or EL2.
rt_to_el1:
    msr     daifset, #0xf
    mrs     x1, CurrentEL
    cmp     x1, #8
    b.ne    1f
    mov     x1, #(1 << 31)
    msr     hcr_el2, x1
    mov     x1, #3
    msr     cnthctl_el2, x1
    msr     cntvoff_el2, xzr
    mov     x1, #0x33ff
    msr     cptr_el2, x1
    mrs     x1, midr_el1
    msr     vpidr_el2, x1
    mrs     x1, mpidr_el1
    msr     vmpidr_el2, x1
    mov     x1, #0xf
    msr     S3_4_C12_C9_5, x1       // ICC_SRE_EL2: SRE, DFB, DIB, Enable
    isb
    mov     x1, #0x3c5
    msr     spsr_el2, x1
    msr     elr_el2, x30
    eret
1:  mrs     x2, sctlr_el1             // MMU, data and instruction caches off
    mov     x3, #0x1005
    bic     x2, x2, x3
    msr     sctlr_el1, x2
    isb
    ret

rt_set_stack:
    mrs     x1, mpidr_el1
    and     x1, x1, #0xff
    cmp     x1, #{cpus}
    b.hs    2f
    adrp    x2, RT_STACKS
    add     x2, x2, :lo12:RT_STACKS
    add     x1, x1, #1
    mov     x3, #{stack}
    madd    x2, x1, x3, x2
    msr     spsel, #1
    mov     sp, x2
    adrp    x2, rt_vectors
    add     x2, x2, :lo12:rt_vectors
    msr     vbar_el1, x2
    isb
    ret
2:  wfi
    b       2b
"#,
    cpus = const MAX_CPUS,
    stack = const STACK,
);

#[unsafe(no_mangle)]
extern "C" fn rt_main(device_tree: u64) -> ! {
    console::init();
    let machine = Machine::read(device_tree);
    smccc::set_conduit(machine.conduit);
    // SAFETY: guest! defines it with this signature; a guest that does not use guest! does not link.
    unsafe { guest_main(&machine) };
    smccc::system_off()
}

#[unsafe(no_mangle)]
extern "C" fn rt_secondary(_context: u64) -> ! {
    smp::run_here()
}

/// This CPU's number: affinity level 0.
pub fn cpu() -> usize {
    (crate::sysreg_read!("mpidr_el1") & 0xff) as usize
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    trap::stop_all_of_it(format_args!("{info}"))
}
