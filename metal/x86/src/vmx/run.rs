//! An entry, and the exit that ends it.

use core::arch::asm;

use entresol_arch_x86::vmx;

use super::{fields, instructions};
use crate::features;
use crate::switch::Guest;
use crate::switch::vmcb::ELSEWHERE;

/// Runs the guest until it comes back, if it `flushes` without anything that the CPU knows of guests' translations. `left` is called as soon as it has.
///
/// # Safety
///
/// As [`switch::enter_intel`](crate::switch::enter_intel); the guest was [loaded](Guest::load) on this CPU.
#[inline(never)]
pub unsafe fn enter(guest: &mut Guest, flushes: bool, left: impl FnOnce()) {
    if flushes {
        instructions::forget_extended();
        if features::get().vmx.is_some_and(|controls| controls.has_vpid()) {
            instructions::forget_linear();
        }
    }
    let Guest { vmcb, registers, vmx, .. } = guest;
    vmx.give_back(vmcb);
    let launches = u64::from(vmx.launches());
    let failed: u64;
    // SAFETY: structure and registers are the guest's, which is ours alone. Every register that it leaves behind is put back or named
    // as lost; it has no stack of ours. The caller answers for the guest.
    unsafe {
        asm!(
            "push   rbp",
            "push   rbx",
            "push   rsi",
            "mov    cr2, rcx",
            "mov    ecx, {host_rsp}",
            "vmwrite rcx, rsp",
            "mov    ecx, {host_rip}",
            "lea    rbx, [rip + 4f]",
            "vmwrite rcx, rbx",
            "test   rdx, rdx",
            "mov    rcx, [rsi]",
            "mov    rdx, [rsi + 8]",
            "mov    rbx, [rsi + 16]",
            "mov    rbp, [rsi + 24]",
            "mov    rdi, [rsi + 40]",
            "mov    r8,  [rsi + 48]",
            "mov    r9,  [rsi + 56]",
            "mov    r10, [rsi + 64]",
            "mov    r11, [rsi + 72]",
            "mov    r12, [rsi + 80]",
            "mov    r13, [rsi + 88]",
            "mov    r14, [rsi + 96]",
            "mov    r15, [rsi + 104]",
            "mov    rsi, [rsi + 32]",
            "jnz    3f",
            "vmresume",
            "jmp    5f",
            "3:",
            "vmlaunch",
            "5:",
            // It was refused: nothing of the guest's has run.
            "pop    rsi",
            "mov    edx, 1",
            "jmp    6f",
            "4:",
            "xchg   rsi, [rsp]",
            "mov    [rsi], rcx",
            "mov    [rsi + 8], rdx",
            "mov    [rsi + 16], rbx",
            "mov    [rsi + 24], rbp",
            "pop    rcx",
            "mov    [rsi + 32], rcx",
            "mov    [rsi + 40], rdi",
            "mov    [rsi + 48], r8",
            "mov    [rsi + 56], r9",
            "mov    [rsi + 64], r10",
            "mov    [rsi + 72], r11",
            "mov    [rsi + 80], r12",
            "mov    [rsi + 88], r13",
            "mov    [rsi + 96], r14",
            "mov    [rsi + 104], r15",
            "xor    edx, edx",
            "6:",
            "pop    rbx",
            "pop    rbp",
            "mov    rcx, cr2",
            host_rsp = const fields::HOST_RSP,
            host_rip = const fields::HOST_RIP,
            inout("rax") vmcb.save.rax,
            inout("rsi") &raw mut *registers => _,
            inout("rdx") launches => failed,
            inout("rcx") vmcb.save.cr2, out("rdi") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
    left();
    vmcb.control.exit_code = ELSEWHERE;
    if failed != 0 {
        panic!("the processor refuses to enter a guest: error {}", instructions::read(fields::INSTRUCTION_ERROR));
    }
    vmx.came_back(vmcb);
    take_non_maskable();
}

/// A non-maskable interrupt that ended the guest's turn is not pending any more, and others wait for its handler's return (SDM 28.2): it is taken
/// here.
fn take_non_maskable() {
    let (reason, interruption) = (instructions::read(fields::EXIT_REASON), instructions::read(fields::EXIT_EVENT));
    if vmx::is_non_maskable(reason as u32, interruption as u32) {
        // SAFETY: the gate of an NMI, on a stack of its own; it keeps every register.
        unsafe { asm!("int 2") };
    }
}
