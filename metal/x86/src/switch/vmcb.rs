//! The virtual machine control block: what the processor is told of a guest, and tells.
//!
//! Purpose: APM appendix B as a type. Fields that we neither write nor read are padding, and zero.
//!
//! Protocol: the processor reads and writes it during VMRUN, VMLOAD and VMSAVE only, which are calls for the compiler.
//!
//! Invariants: a VMCB that no one filled in is refused by the processor: VMRUN is not intercepted in it (15.5.1).

use core::mem::offset_of;

/// TLB_CONTROL: everything of every identifier, ours included (15.16.1).
pub const FLUSH_ALL: u32 = 1;
/// TLB_CONTROL: nothing.
pub const FLUSH_NOTHING: u32 = 0;

/// What makes a guest come back (table B-1, from 0).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Intercepts {
    /// CR0–CR15: reads 15:0, writes 31:16.
    pub control_registers: u32,
    /// DR0–DR15: reads 15:0, writes 31:16.
    pub debug_registers: u32,
    /// Exceptions 0–31.
    pub exceptions: u32,
    /// INTR (0) to SHUTDOWN (31).
    pub first: u32,
    /// VMRUN (0) and on.
    pub second: u32,
}

/// Bits of [`Intercepts::first`].
pub mod first {
    /// Interrupts of the machine.
    pub const INTR: u32 = 1 << 0;
    /// Non-maskable ones.
    pub const NMI: u32 = 1 << 1;
    /// System management interrupts.
    pub const SMI: u32 = 1 << 2;
    /// INIT.
    pub const INIT: u32 = 1 << 3;
    /// A virtual interrupt that the guest is about to take.
    pub const VINTR: u32 = 1 << 4;
    /// CPUID.
    pub const CPUID: u32 = 1 << 18;
    /// INVD.
    pub const INVD: u32 = 1 << 22;
    /// HLT.
    pub const HLT: u32 = 1 << 24;
    /// INVLPG.
    pub const INVLPG: u32 = 1 << 25;
    /// INVLPGA.
    pub const INVLPGA: u32 = 1 << 26;
    /// Ports that the permission map names.
    pub const IO: u32 = 1 << 27;
    /// Model-specific registers that the permission map names.
    pub const MSR: u32 = 1 << 28;
    /// Task switches: there are none in long mode, and nested ones are not emulated.
    pub const TASK_SWITCH: u32 = 1 << 29;
    /// A triple fault.
    pub const SHUTDOWN: u32 = 1 << 31;
}

/// Bits of [`Intercepts::second`].
pub mod second {
    /// VMRUN; it must be set.
    pub const VMRUN: u32 = 1 << 0;
    /// VMMCALL.
    pub const VMMCALL: u32 = 1 << 1;
    /// VMLOAD.
    pub const VMLOAD: u32 = 1 << 2;
    /// VMSAVE.
    pub const VMSAVE: u32 = 1 << 3;
    /// STGI.
    pub const STGI: u32 = 1 << 4;
    /// CLGI.
    pub const CLGI: u32 = 1 << 5;
    /// SKINIT.
    pub const SKINIT: u32 = 1 << 6;
    /// WBINVD and WBNOINVD.
    pub const WBINVD: u32 = 1 << 9;
    /// MONITOR.
    pub const MONITOR: u32 = 1 << 10;
    /// MWAIT.
    pub const MWAIT: u32 = 1 << 11;
    /// XSETBV.
    pub const XSETBV: u32 = 1 << 13;
}

/// Machine checks are the machine's.
pub const MACHINE_CHECK: u32 = 1 << 18;
/// Those that a guest can arrange to meet again in their own delivery, which would never end by itself and lets no interrupt in between: #DB
/// and #AC. They come back, and are injected.
pub const DEBUG: u32 = 1 << 1;
/// As above.
pub const ALIGNMENT_CHECK: u32 = 1 << 17;
/// V_INTR_MASKING: RFLAGS.IF of a guest masks its virtual interrupts only (15.21.1).
pub const VIRTUAL_MASKING: u64 = 1 << 24;
/// NP_ENABLE (15.25.3).
pub const NESTED_PAGING: u64 = 1 << 0;

/// EXITCODE where the processor keeps no VMCB: the reason is told elsewhere. None of AMD's.
pub const ELSEWHERE: u64 = u64::MAX - 0xff;
/// EFER.SVME, which VMRUN demands of every guest (15.5.1), and which none sees.
pub const EFER_SVME: u64 = 1 << 12;
/// EVENTINJ and EXITINTINFO (15.20): valid.
pub const VALID: u64 = 1 << 31;
/// Virtual interrupts: V_TPR, V_IRQ (15.21).
pub const TPR: u64 = 0xff;
/// As above.
pub const PENDING: u64 = 1 << 8;

/// What no guest does without coming back.
pub const CONFINED: Intercepts = Intercepts {
    control_registers: 0,
    debug_registers: 0,
    exceptions: MACHINE_CHECK | DEBUG | ALIGNMENT_CHECK,
    first: first::INTR
        | first::NMI
        | first::SMI
        | first::INIT
        | first::CPUID
        | first::INVD
        | first::HLT
        | first::INVLPGA
        | first::IO
        | first::MSR
        | first::TASK_SWITCH
        | first::SHUTDOWN,
    second: second::VMRUN
        | second::VMMCALL
        | second::VMLOAD
        | second::VMSAVE
        | second::STGI
        | second::CLGI
        | second::SKINIT
        | second::WBINVD
        | second::MONITOR
        | second::MWAIT
        | second::XSETBV,
};

/// The first KiB.
#[repr(C)]
#[derive(Clone)]
pub struct Control {
    /// What makes the guest come back.
    pub intercepts: Intercepts,
    padding_014: [u8; 0x40 - 0x14],
    /// Physical address of the ports' permission map.
    pub iopm_base: u64,
    /// Physical address of the registers' permission map.
    pub msrpm_base: u64,
    /// Added to what the guest reads of the time stamp counter.
    pub tsc_offset: u64,
    /// Identifier of the guest's translations; never 0.
    pub asid: u32,
    /// What is flushed at the next entry.
    pub tlb_control: u32,
    /// Virtual interrupts.
    pub virtual_interrupts: u64,
    /// The guest is in an interrupt shadow (bit 0).
    pub interrupt_shadow: u64,
    /// EXITCODE.
    pub exit_code: u64,
    /// EXITINFO1.
    pub exit_info_1: u64,
    /// EXITINFO2.
    pub exit_info_2: u64,
    /// An event that was being delivered.
    pub exit_interrupt_info: u64,
    /// NP_ENABLE and others.
    pub nested: u64,
    padding_098: [u8; 0xa8 - 0x98],
    /// An event for the guest.
    pub event_injection: u64,
    /// Physical address of the nested tables' root.
    pub nested_cr3: u64,
    padding_0b8: [u8; 8],
    /// What of the VMCB the processor may remember: nothing.
    pub clean: u64,
    /// The next instruction's address, where the processor saves it.
    pub next_rip: u64,
    padding_0d0: [u8; 0x400 - 0xd0],
}

/// A segment register.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Bits 55:52 and 47:40 of a descriptor, together (15.5.1).
    pub attributes: u16,
    /// Limit.
    pub limit: u32,
    /// Base.
    pub base: u64,
}

impl Segment {
    const ZERO: Self = Self { selector: 0, attributes: 0, limit: 0, base: 0 };
}

/// The guest's state (table B-2, from 400h).
#[repr(C)]
#[derive(Clone)]
pub struct SaveArea {
    /// ES, CS, SS, DS.
    pub es: Segment,
    /// CS.
    pub cs: Segment,
    /// SS.
    pub ss: Segment,
    /// DS.
    pub ds: Segment,
    /// FS.
    pub fs: Segment,
    /// GS.
    pub gs: Segment,
    /// GDTR.
    pub gdtr: Segment,
    /// LDTR.
    pub ldtr: Segment,
    /// IDTR.
    pub idtr: Segment,
    /// TR.
    pub tr: Segment,
    padding_0a0: [u8; 0xcb - 0xa0],
    /// Current privilege level.
    pub cpl: u8,
    padding_0cc: [u8; 4],
    /// EFER; SVME must be set.
    pub efer: u64,
    padding_0d8: [u8; 0x148 - 0xd8],
    /// CR4.
    pub cr4: u64,
    /// CR3.
    pub cr3: u64,
    /// CR0.
    pub cr0: u64,
    /// DR7.
    pub dr7: u64,
    /// DR6.
    pub dr6: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RIP.
    pub rip: u64,
    padding_180: [u8; 0x1d8 - 0x180],
    /// RSP.
    pub rsp: u64,
    padding_1e0: [u8; 0x1f8 - 0x1e0],
    /// RAX.
    pub rax: u64,
    /// STAR, LSTAR, CSTAR, SFMASK, KernelGSBase, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP.
    pub system_calls: [u64; 8],
    /// CR2.
    pub cr2: u64,
    padding_248: [u8; 0x268 - 0x248],
    /// The guest's PAT, with nested paging.
    pub g_pat: u64,
    padding_270: [u8; 0xc00 - 0x270],
}

/// The whole page.
#[repr(C, align(4096))]
#[derive(Clone)]
pub struct Vmcb {
    /// The first KiB.
    pub control: Control,
    /// The rest.
    pub save: SaveArea,
}

impl Vmcb {
    /// All zero.
    pub const ZERO: Self = Self {
        control: Control {
            intercepts: Intercepts { control_registers: 0, debug_registers: 0, exceptions: 0, first: 0, second: 0 },
            padding_014: [0; 0x40 - 0x14],
            iopm_base: 0,
            msrpm_base: 0,
            tsc_offset: 0,
            asid: 0,
            tlb_control: 0,
            virtual_interrupts: 0,
            interrupt_shadow: 0,
            exit_code: 0,
            exit_info_1: 0,
            exit_info_2: 0,
            exit_interrupt_info: 0,
            nested: 0,
            padding_098: [0; 0xa8 - 0x98],
            event_injection: 0,
            nested_cr3: 0,
            padding_0b8: [0; 8],
            clean: 0,
            next_rip: 0,
            padding_0d0: [0; 0x400 - 0xd0],
        },
        save: SaveArea {
            es: Segment::ZERO,
            cs: Segment::ZERO,
            ss: Segment::ZERO,
            ds: Segment::ZERO,
            fs: Segment::ZERO,
            gs: Segment::ZERO,
            gdtr: Segment::ZERO,
            ldtr: Segment::ZERO,
            idtr: Segment::ZERO,
            tr: Segment::ZERO,
            padding_0a0: [0; 0xcb - 0xa0],
            cpl: 0,
            padding_0cc: [0; 4],
            efer: 0,
            padding_0d8: [0; 0x148 - 0xd8],
            cr4: 0,
            cr3: 0,
            cr0: 0,
            dr7: 0,
            dr6: 0,
            rflags: 0,
            rip: 0,
            padding_180: [0; 0x1d8 - 0x180],
            rsp: 0,
            padding_1e0: [0; 0x1f8 - 0x1e0],
            rax: 0,
            system_calls: [0; 8],
            cr2: 0,
            padding_248: [0; 0x268 - 0x248],
            g_pat: 0,
            padding_270: [0; 0xc00 - 0x270],
        },
    };
}

const _: () = {
    assert!(size_of::<Vmcb>() == 4096 && size_of::<Control>() == 0x400);
    assert!(offset_of!(Control, iopm_base) == 0x40 && offset_of!(Control, asid) == 0x58);
    assert!(offset_of!(Control, tlb_control) == 0x5c && offset_of!(Control, exit_code) == 0x70);
    assert!(offset_of!(Control, nested) == 0x90 && offset_of!(Control, event_injection) == 0xa8);
    assert!(offset_of!(Control, nested_cr3) == 0xb0 && offset_of!(Control, clean) == 0xc0);
    assert!(offset_of!(Control, next_rip) == 0xc8);
    assert!(
        offset_of!(SaveArea, tr) == 0x90 && offset_of!(SaveArea, cpl) == 0xcb && offset_of!(SaveArea, efer) == 0xd0
    );
    assert!(offset_of!(SaveArea, cr4) == 0x148 && offset_of!(SaveArea, rip) == 0x178);
    assert!(offset_of!(SaveArea, rsp) == 0x1d8 && offset_of!(SaveArea, rax) == 0x1f8);
    assert!(offset_of!(SaveArea, system_calls) == 0x200 && offset_of!(SaveArea, cr2) == 0x240);
    assert!(offset_of!(SaveArea, g_pat) == 0x268);
};
