//! Entering a guest and coming back: AMD's SVM (APM chapter 15).
//!
//! Purpose: [`enter`] is the whole of what happens at every exit. The processor loads and saves what is in the [`Vmcb`]; the
//! general registers but RAX and RSP are moved here.
//!
//! Protocol: a vCPU is a [`Guest`], which hides its VMCB. GIF is clear from before the guest's state is loaded until ours is
//! back (15.17), so no NMI finds the guest's segment bases. VMLOAD and VMSAVE move what VMRUN leaves alone (15.5.2): FS, GS, TR,
//! LDTR with their hidden state, KernelGSBase, STAR, LSTAR, CSTAR, SFMASK and SYSENTER's; ours were saved once
//! and never change.
//!
//! x87 and SSE registers stay in hardware: the hypervisor has none, so they are moved only when another vCPU comes to the CPU
//! ([`fp`]).
//!
//! Sources: APM 15.5 (VMRUN), 15.16 (TLB control), 15.17 (global interrupt flag).

pub mod fp;
mod guest;
mod permissions;
mod vmcb;

use core::arch::asm;
use core::cell::UnsafeCell;
use core::mem::offset_of;

use crate::cpu;
use crate::machine::FLUSHES;
pub use fp::FpState;
pub use guest::Guest;
pub use vmcb::Segment;
use vmcb::Vmcb;

/// A guest's general registers but RAX and RSP, which are in its VMCB, in the order of their numbers.
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// RBX.
    pub rbx: u64,
    /// RBP.
    pub rbp: u64,
    /// RSI.
    pub rsi: u64,
    /// RDI.
    pub rdi: u64,
    /// R8 to R15.
    pub r: [u64; 8],
}

/// The state in which a vCPU begins. What is not named is zero, or as after a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// First instruction.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER, with LMA as CR0 makes it.
    pub efer: u64,
    /// CS.
    pub code: Segment,
    /// DS, ES and SS.
    pub data: Segment,
    /// TR.
    pub task: Segment,
    /// Where the global descriptor table is.
    pub gdt_base: u64,
    /// Its last byte.
    pub gdt_limit: u16,
}

/// What a guest can be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An interrupt of its controller.
    Interrupt(u8),
    /// A non-maskable interrupt.
    NonMaskable,
    /// An exception, with the error code that it pushes, if it pushes one.
    Exception {
        /// Which.
        vector: u8,
        /// Its error code.
        error: Option<u32>,
    },
}

/// Our own state that VMRUN does not keep, as VMSAVE left it.
struct HostState(UnsafeCell<Vmcb>);

// SAFETY: written by VMSAVE of the one CPU before it enters a guest, read by its VMLOAD after.
unsafe impl Sync for HostState {}

static HOST: HostState = HostState(UnsafeCell::new(Vmcb::ZERO));

const _: () = assert!(cpu::MAX_CPUS == 1, "each CPU needs a host state of its own");
const _: () = assert!(offset_of!(Registers, rdi) == 40 && offset_of!(Registers, r) == 48, "as the assembly has them");

/// Saves what VMRUN does not keep of our own state, and lets x87 and SSE registers be moved. On each CPU, once, before it enters a
/// guest.
pub(crate) fn init_cpu() {
    fp::init_cpu();
    // SAFETY: VMSAVE writes a page that is a VMCB, which nobody else uses yet.
    unsafe { asm!("vmsave rax", in("rax") HOST.0.get(), options(nostack, preserves_flags)) };
}

/// Runs the guest until it comes back; [`Guest::exit`] says why. `cpu` is the CPU that we are on.
///
/// # Safety
///
/// It is that. The guest was started, its nested tables keep it away from all that it does not own, and its x87 and SSE registers
/// are in the hardware.
#[inline]
pub unsafe fn enter(cpu: usize, guest: &mut Guest) {
    guest.vmcb.control.tlb_control = if FLUSHES.enter(cpu, &mut guest.tenant) { vmcb::FLUSH_ALL } else { 0 };
    // SAFETY: VMCB and registers are the guest's, which is ours alone; every register that the guest leaves behind is put back or
    // named as lost, and nothing of the guest's is on the stack. The caller answers for the guest.
    unsafe {
        asm!(
            "push   rbp",
            "push   rbx",
            "push   rsi",
            "clgi",
            "vmload rax",
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
            "vmrun  rax",
            // VMRUN gave our RAX back: the VMCB.
            "vmsave rax",
            "pop    rax",
            "mov    [rax], rcx",
            "mov    [rax + 8], rdx",
            "mov    [rax + 16], rbx",
            "mov    [rax + 24], rbp",
            "mov    [rax + 32], rsi",
            "mov    [rax + 40], rdi",
            "mov    [rax + 48], r8",
            "mov    [rax + 56], r9",
            "mov    [rax + 64], r10",
            "mov    [rax + 72], r11",
            "mov    [rax + 80], r12",
            "mov    [rax + 88], r13",
            "mov    [rax + 96], r14",
            "mov    [rax + 104], r15",
            "lea    rax, [rip + {host}]",
            "vmload rax",
            "stgi",
            "pop    rbx",
            "pop    rbp",
            host = sym HOST,
            inout("rax") &raw mut guest.vmcb => _,
            inout("rsi") &raw mut guest.registers => _,
            out("rcx") _, out("rdx") _, out("rdi") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
    FLUSHES.leave(cpu);
}
