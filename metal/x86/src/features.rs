//! What this CPU can do, as far as the hypervisor uses it.
//!
//! Protocol: [`init`] once on the boot CPU; all CPUs are taken to be alike.
//!
//! Sources: APM volume 3, appendix E (CPUID); volume 2, 15.4 (enabling SVM).

use core::fmt;

use entresol_sync::Once;
use raw_cpuid::CpuId;
use x86_64::registers::model_specific::Msr;

use crate::vmx::{self, Controls, Lacks};

/// VM_CR and its SVMDIS (APM 15.30.1).
const VM_CR: u32 = 0xc001_0114;
const SVM_DISABLED: u64 = 1 << 4;

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Bits of a physical address, 32–52.
    pub physical_bits: u8,
    /// Pages of 1 GiB.
    pub giant_pages: bool,
    /// The processor saves the next instruction's address at an exit.
    pub next_rip: bool,
    /// It names operands of instructions that exit, and fetches their bytes.
    pub decode_assists: bool,
    /// One address space identifier can be flushed alone.
    pub flush_by_asid: bool,
    /// Address space identifiers, 0 included.
    pub asids: u32,
    /// Intel's VMX, with these controls; else it is AMD's SVM.
    pub vmx: Option<Controls>,
}

/// What this CPU lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// SVM (CPUID 8000_0001 ECX bit 2) and VMX (CPUID 1 ECX bit 5).
    Both,
    /// One is there and firmware has locked it away (VM_CR.SVMDIS; IA32_FEATURE_CONTROL).
    Disabled,
    /// Something of VMX.
    Vmx(Lacks),
    /// Nested paging (CPUID 8000_000A EDX bit 0).
    NestedPaging,
    /// Address space identifiers for guests.
    Asids,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vmx(lacks) => return lacks.fmt(f),
            Self::Both => {
                "this CPU has no SVM (CPUID 8000_0001 ECX bit 2) and no VMX (CPUID 1 ECX bit 5), one of which we use"
            }
            Self::Disabled => {
                "firmware has disabled virtualisation (VM_CR.SVMDIS, IA32_FEATURE_CONTROL): enable it in the machine's setup"
            }
            Self::NestedPaging => "this CPU has no nested paging (CPUID 8000_000A EDX bit 0), which we use",
            Self::Asids => "this CPU has no address space identifiers for guests (CPUID 8000_000A EBX)",
        })
    }
}

static FEATURES: Once<Features> = Once::new();

/// Asks the CPU.
///
/// # Errors
///
/// [`Missing`].
pub(crate) fn init() -> Result<(), Missing> {
    let cpuid = CpuId::new();
    let extended = cpuid.get_extended_processor_and_feature_identifiers();
    let sizes = cpuid.get_processor_capacity_feature_info();
    let physical_bits = sizes.map_or(36, |sizes| sizes.physical_address_bits()).clamp(32, 52);
    let giant_pages = extended.as_ref().is_some_and(|features| features.has_1gib_pages());
    if cpuid.get_feature_info().is_some_and(|features| features.has_vmx()) {
        let vmx = Some(vmx::capabilities()?);
        FEATURES.call_once(|| Features {
            physical_bits,
            giant_pages,
            next_rip: true,
            decode_assists: true,
            flush_by_asid: false,
            asids: 1,
            vmx,
        });
        return Ok(());
    }
    if !extended.as_ref().is_some_and(|features| features.has_svm()) {
        return Err(Missing::Both);
    }
    // SAFETY: VM_CR is there with SVM.
    if unsafe { Msr::new(VM_CR).read() } & SVM_DISABLED != 0 {
        return Err(Missing::Disabled);
    }
    let svm = cpuid.get_svm_info().filter(|svm| svm.has_nested_paging()).ok_or(Missing::NestedPaging)?;
    if svm.supported_asids() < 2 {
        return Err(Missing::Asids);
    }
    FEATURES.call_once(|| Features {
        physical_bits,
        giant_pages,
        next_rip: svm.has_nrip(),
        decode_assists: svm.has_decode_assists(),
        flush_by_asid: svm.has_flush_by_asid(),
        asids: svm.supported_asids(),
        vmx: None,
    });
    Ok(())
}

/// What this CPU can do.
///
/// # Panics
///
/// Before [`init`].
#[inline]
pub fn get() -> &'static Features {
    FEATURES.get().expect("features are asked for before anything uses them")
}
