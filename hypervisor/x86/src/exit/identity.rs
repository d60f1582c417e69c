//! What the guest's processor says that it is: CPUID and model-specific registers.
//!
//! Rule: of CPUID a guest sees the leaves that are listed, without what the hypervisor does not keep for it; a register that is not
//! listed does not exist, and says so.
//!
//! Sources: APM volume 3, appendix E (CPUID); volume 2, 3.1.7 (EFER), 7.8 (PAT).

use core::arch::x86_64::__cpuid_count;

use entresol_metal_x86::switch::Guest;

use super::{GENERAL_PROTECTION, Next, inject, skip};

/// EFER.SVME, which VMRUN demands of every guest, and which none sees.
pub const EFER_SVME: u64 = 1 << 12;
const EFER_SCE: u64 = 1 << 0;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const CR0_PG: u64 = 1 << 31;

const EFER: u32 = 0xc000_0080;
const PAT: u32 = 0x277;

/// The last leaves that a guest sees.
const LAST: u32 = 1;
const LAST_EXTENDED: u32 = 0x8000_0008;

/// Leaf 1, ECX: without MONITOR (3), VMX (5), PCID (17), x2APIC (21), the TSC deadline (24), XSAVE (26, 27), AVX, F16C and RDRAND (28–30); with a
/// hypervisor (31).
const BASIC_ECX_NOT: u32 = 1 << 3 | 1 << 5 | 1 << 17 | 1 << 21 | 1 << 24 | 0b11 << 26 | 0b111 << 28;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: without MCE (7), APIC (9), MTRR (12), MCA (14).
const BASIC_EDX_NOT: u32 = 1 << 7 | 1 << 9 | 1 << 12 | 1 << 14;
/// Leaf 8000_0001, ECX: LAHF, CR8, ABM, SSE4A, misaligned SSE, 3DNow! prefetch.
const EXTENDED_ECX: u32 = 1 << 0 | 0b1_1111 << 4;
/// EDX: SYSCALL, NX, pages of 1 GiB, RDTSCP not, long mode.
const EXTENDED_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 29;

/// Those that leaf 8000_0001 repeats of leaf 1.
const COMMON_EDX: u32 = 0x0183_f3ff;

/// CPUID.
pub fn cpuid(guest: &mut Guest) -> Next {
    let (leaf, subleaf) = (guest.state().rax as u32, guest.registers.rcx as u32);
    let [eax, ebx, ecx, edx] = answer(leaf, subleaf);
    guest.state().rax = eax.into();
    let registers = &mut guest.registers;
    (registers.rbx, registers.rcx, registers.rdx) = (ebx.into(), ecx.into(), edx.into());
    skip(guest, 2)
}

fn answer(leaf: u32, subleaf: u32) -> [u32; 4] {
    let machine = __cpuid_count(leaf, subleaf);
    let [eax, ebx, ecx, edx] = [machine.eax, machine.ebx, machine.ecx, machine.edx];
    match leaf {
        0 => [LAST, ebx, ecx, edx],
        // EBX: one logical processor, APIC 0.
        1 => [eax, 1 << 16, ecx & !BASIC_ECX_NOT | HYPERVISOR, edx & !BASIC_EDX_NOT],
        0x8000_0000 => [LAST_EXTENDED, ebx, ecx, edx],
        0x8000_0001 => [eax, 0, ecx & EXTENDED_ECX, edx & (EXTENDED_EDX | COMMON_EDX & !BASIC_EDX_NOT)],
        0x8000_0002..=0x8000_0006 => [eax, ebx, ecx, edx],
        // Address sizes; one core.
        0x8000_0008 => [eax, 0, 0, 0],
        _ => [0; 4],
    }
}

/// RDMSR.
pub fn read_register(guest: &mut Guest) -> Next {
    let value = match guest.registers.rcx as u32 {
        EFER => guest.state().efer & !EFER_SVME,
        PAT => guest.state().g_pat,
        _ => return inject(guest, GENERAL_PROTECTION, Some(0)),
    };
    guest.state().rax = value & 0xffff_ffff;
    guest.registers.rdx = value >> 32;
    skip(guest, 2)
}

/// WRMSR.
pub fn write_register(guest: &mut Guest) -> Next {
    let value = guest.state().rax & 0xffff_ffff | guest.registers.rdx << 32;
    let taken = match guest.registers.rcx as u32 {
        EFER => efer(guest.state().efer, guest.state().cr0, value).map(|efer| guest.state().efer = efer),
        PAT => is_pat(value).then(|| guest.state().g_pat = value),
        _ => None,
    };
    match taken {
        Some(()) => skip(guest, 2),
        None => inject(guest, GENERAL_PROTECTION, Some(0)),
    }
}

/// EFER after a store of `value`, or `None` if that is refused: a bit that is not there, or a change of LME under paging. LMA is the
/// processor's.
fn efer(old: u64, cr0: u64, value: u64) -> Option<u64> {
    let allowed = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
    let toggles = (old ^ value) & EFER_LME != 0 && cr0 & CR0_PG != 0;
    let refused = value & !allowed != 0 || toggles;
    (!refused).then_some(value & !EFER_LMA | old & EFER_LMA | EFER_SVME)
}

/// Each byte is a memory type: 0, 1, 4, 5, 6 or 7.
fn is_pat(value: u64) -> bool {
    value.to_le_bytes().into_iter().all(|kind| matches!(kind, 0 | 1 | 4..=7))
}
