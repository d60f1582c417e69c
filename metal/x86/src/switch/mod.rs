//! Entering a guest and coming back: AMD's SVM (APM chapter 15), or Intel's [`vmx`].
//!
//! Purpose: [`enter_amd`] and [`enter_intel`] are the whole of what happens at every exit. On AMD's the processor loads and saves what is in the [`Vmcb`]; the
//! general registers but RAX and RSP are moved here.
//!
//! Protocol: a vCPU is a [`Guest`], which hides its VMCB. GIF is clear from before the guest's state is loaded until ours is
//! back (15.17), so no NMI finds the guest's segment bases, and IF is set so that interrupts end the guest's turn (`crate::interrupts`). VMLOAD and VMSAVE move what VMRUN leaves alone (15.5.2): FS, GS, TR,
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
mod shadow;
pub(crate) mod vmcb;

use core::arch::asm;
use core::mem::offset_of;

use crate::machine::FLUSHES;
use crate::{cpu, features, flush, vmx};
pub use fp::FpState;
pub use guest::{Guest, Saved};
pub use shadow::RootTooHigh;
pub use vmcb::Segment;
pub(crate) use vmcb::Vmcb;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
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

/// From the VMCB to the registers, and to `host`.
const REGISTERS: usize = offset_of!(Guest, registers) - offset_of!(Guest, vmcb);
const HOST: usize = offset_of!(Guest, host) - offset_of!(Guest, vmcb);
const _: () = assert!(
    offset_of!(Guest, vmcb) == 0 && offset_of!(Registers, rdi) == 40 && offset_of!(Registers, r) == 48,
    "as the assembly has them"
);

/// Saves what VMRUN does not keep of our own state, and lets x87 and SSE registers be moved. On each CPU, once, before it enters a
/// guest.
pub(crate) fn init_cpu() {
    fp::init_cpu();
    if features::get().vmx.is_some() {
        return;
    }
    // SAFETY: VMSAVE writes a page that is a VMCB of this CPU's own.
    unsafe { asm!("vmsave rax", in("rax") cpu::host_rest(cpu::index()), options(nostack, preserves_flags)) };
}

/// Whether guests are entered by [`enter_intel`].
pub fn is_intel() -> bool {
    features::get().vmx.is_some()
}

/// Runs the guest until it comes back, on Intel's processors: as [`enter_amd`].
///
/// # Safety
///
/// As there.
pub unsafe fn enter_intel(cpu: usize, guest: &mut Guest) {
    let own = cpu::flush_of(cpu);
    let flushes = FLUSHES.enter(own);
    // SAFETY: as the caller promises.
    unsafe { vmx::run::enter(guest, flushes, || own.leave()) };
}

/// Runs the guest until it comes back, on AMD's processors; [`Guest::exit`] says why. `cpu` is the CPU that we are on.
///
/// # Safety
///
/// It is that, to which the guest [came](Guest::load), and interrupts are held off (`crate::interrupts`). The guest was started, its nested
/// tables keep it away from all that it does not own, and its x87 and SSE registers are in the hardware.
#[inline(always)]
pub unsafe fn enter_amd(cpu: usize, guest: &mut Guest) {
    if FLUSHES.enter(cpu::flush_of(cpu)) {
        // SAFETY: as the caller promises.
        unsafe { run_flushed(guest) };
    } else {
        // SAFETY: as the caller promises.
        unsafe { run(guest) };
    }
}

/// Runs it once without anything that the CPU knows of guests' translations.
#[cold]
#[inline(never)]
unsafe fn run_flushed(guest: &mut Guest) {
    guest.vmcb.control.tlb_control = vmcb::FLUSH_ALL;
    // SAFETY: as the caller promises.
    unsafe { run(guest) };
    guest.vmcb.control.tlb_control = vmcb::FLUSH_NOTHING;
}

#[inline(always)]
unsafe fn run(guest: &mut Guest) {
    // SAFETY: VMCB and registers are the guest's, which is ours alone; every register that the guest leaves behind is put back or
    // named as lost, and nothing of the guest's is on the stack. The caller answers for the guest.
    unsafe {
        asm!(
            "push   rbp",
            "push   rbx",
            "clgi",
            "sti",
            "vmload rax",
            "mov    rcx, [rax + {registers}]",
            "mov    rdx, [rax + {registers} + 8]",
            "mov    rbx, [rax + {registers} + 16]",
            "mov    rbp, [rax + {registers} + 24]",
            "mov    rsi, [rax + {registers} + 32]",
            "mov    rdi, [rax + {registers} + 40]",
            "mov    r8,  [rax + {registers} + 48]",
            "mov    r9,  [rax + {registers} + 56]",
            "mov    r10, [rax + {registers} + 64]",
            "mov    r11, [rax + {registers} + 72]",
            "mov    r12, [rax + {registers} + 80]",
            "mov    r13, [rax + {registers} + 88]",
            "mov    r14, [rax + {registers} + 96]",
            "mov    r15, [rax + {registers} + 104]",
            "vmrun  rax",
            // VMRUN gave our RAX back: the VMCB.
            "vmsave rax",
            "mov    [rax + {registers}], rcx",
            "mov    [rax + {registers} + 8], rdx",
            "mov    [rax + {registers} + 16], rbx",
            "mov    [rax + {registers} + 24], rbp",
            "mov    [rax + {registers} + 32], rsi",
            "mov    [rax + {registers} + 40], rdi",
            "mov    [rax + {registers} + 48], r8",
            "mov    [rax + {registers} + 56], r9",
            "mov    [rax + {registers} + 64], r10",
            "mov    [rax + {registers} + 72], r11",
            "mov    [rax + {registers} + 80], r12",
            "mov    [rax + {registers} + 88], r13",
            "mov    [rax + {registers} + 96], r14",
            "mov    [rax + {registers} + 104], r15",
            "mov    rax, [rax + {host}]",
            "vmload rax",
            "mov    qword ptr gs:[{outside}], {later}",
            "cli",
            "stgi",
            "pop    rbx",
            "pop    rbp",
            registers = const REGISTERS,
            host = const HOST,
            outside = const cpu::OUTSIDE,
            later = const flush::OUTSIDE as i64,
            inout("rax") &raw mut *guest => _,
            out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
            out("r12") _, out("r13") _, out("r14") _, out("r15") _,
        );
    }
}
