//! Fields of a virtual machine control structure that we use, by their encodings.
//!
//! Sources: SDM appendix B.

/// A field's encoding.
pub type Field = u64;

pub const VPID: Field = 0x0000;
/// Guest selectors: ES, CS, SS, DS, FS, GS, LDTR, TR, two apart; the other parts of a segment in the same order.
pub const GUEST_SELECTOR: Field = 0x0800;
pub const HOST_ES: Field = 0x0c00;
pub const HOST_CS: Field = 0x0c02;
pub const HOST_SS: Field = 0x0c04;
pub const HOST_DS: Field = 0x0c06;
pub const HOST_TR: Field = 0x0c0c;

pub const MSR_BITMAP: Field = 0x2004;
pub const TSC_OFFSET: Field = 0x2010;
pub const VIRTUAL_APIC: Field = 0x2012;
pub const EPT_POINTER: Field = 0x201a;
pub const GUEST_PHYSICAL: Field = 0x2400;
pub const LINK: Field = 0x2800;
pub const GUEST_DEBUG_CONTROL: Field = 0x2802;
pub const GUEST_PAT: Field = 0x2804;
pub const GUEST_EFER: Field = 0x2806;
pub const HOST_PAT: Field = 0x2c00;
pub const HOST_EFER: Field = 0x2c02;

pub const PIN_CONTROLS: Field = 0x4000;
pub const PRIMARY_CONTROLS: Field = 0x4002;
pub const EXCEPTIONS: Field = 0x4004;
pub const EXIT_CONTROLS: Field = 0x400c;
pub const ENTRY_CONTROLS: Field = 0x4012;
pub const ENTRY_EVENT: Field = 0x4016;
pub const ENTRY_ERROR: Field = 0x4018;
pub const TPR_THRESHOLD: Field = 0x401c;
pub const SECONDARY_CONTROLS: Field = 0x401e;
pub const INSTRUCTION_ERROR: Field = 0x4400;
pub const EXIT_REASON: Field = 0x4402;
pub const EXIT_EVENT: Field = 0x4404;
pub const EXIT_ERROR: Field = 0x4406;
pub const VECTORING: Field = 0x4408;
pub const VECTORING_ERROR: Field = 0x440a;
pub const INSTRUCTION_LENGTH: Field = 0x440c;
pub const GUEST_LIMIT: Field = 0x4800;
pub const GUEST_GDTR_LIMIT: Field = 0x4810;
pub const GUEST_IDTR_LIMIT: Field = 0x4812;
pub const GUEST_RIGHTS: Field = 0x4814;
pub const GUEST_SHADOW: Field = 0x4824;
pub const GUEST_SYSENTER_CS: Field = 0x482a;

pub const CR0_MASK: Field = 0x6000;
pub const CR4_MASK: Field = 0x6002;
pub const CR0_SHADOW: Field = 0x6004;
pub const CR4_SHADOW: Field = 0x6006;
pub const QUALIFICATION: Field = 0x6400;
pub const GUEST_CR0: Field = 0x6800;
pub const GUEST_CR3: Field = 0x6802;
pub const GUEST_CR4: Field = 0x6804;
pub const GUEST_BASE: Field = 0x6806;
pub const GUEST_GDTR_BASE: Field = 0x6816;
pub const GUEST_IDTR_BASE: Field = 0x6818;
pub const GUEST_DR7: Field = 0x681a;
pub const GUEST_RSP: Field = 0x681c;
pub const GUEST_RIP: Field = 0x681e;
pub const GUEST_RFLAGS: Field = 0x6820;
pub const GUEST_SYSENTER_ESP: Field = 0x6824;
pub const GUEST_SYSENTER_EIP: Field = 0x6826;
pub const HOST_CR0: Field = 0x6c00;
pub const HOST_CR3: Field = 0x6c02;
pub const HOST_CR4: Field = 0x6c04;
pub const HOST_FS_BASE: Field = 0x6c06;
pub const HOST_GS_BASE: Field = 0x6c08;
pub const HOST_TR_BASE: Field = 0x6c0a;
pub const HOST_GDTR_BASE: Field = 0x6c0c;
pub const HOST_IDTR_BASE: Field = 0x6c0e;
pub const HOST_RSP: Field = 0x6c14;
pub const HOST_RIP: Field = 0x6c16;

/// Segments by their numbers in the encodings.
pub const ES: u64 = 0;
pub const CS: u64 = 1;
pub const SS: u64 = 2;
pub const DS: u64 = 3;
pub const FS: u64 = 4;
pub const GS: u64 = 5;
pub const LDTR: u64 = 6;
pub const TR: u64 = 7;
