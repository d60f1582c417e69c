//! Exits by reason.

use entresol_mmu::Counter;

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// Why a guest left.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            const ALL: &'static [(Self, &'static str)] = &[$((Self::$name, $text),)*];
        }

        const REASONS: usize = [$($text),*].len();
    };
}

reasons! {
    /// Data abort.
    DataAbort = "data-abort",
    /// Instruction abort.
    InstructionAbort = "instruction-abort",
    /// Of the aborts, and of x86-64's nested faults, which the core counts: an access to a device or to nothing.
    Mmio = "mmio",
    /// Of the aborts: a store to a zone of coalesced MMIO or to a doorbell.
    Posted = "posted",
    /// Of the aborts: an access that the hardware did not describe.
    NoSyndrome = "no-syndrome",
    /// Of those: an access whose instruction is not decoded either.
    NotDecoded = "not-decoded",
    /// HVC.
    Hvc = "hvc",
    /// SMC.
    Smc = "smc",
    /// MSR, MRS, SYS, or their AArch32 forms.
    SystemRegister = "system-register",
    /// Of those: cache maintenance by address.
    CacheMaintenance = "cache-maintenance",
    /// Of those: all memory was cleaned for maintenance by set/way, or for caches that went on or off after it.
    CacheToggle = "cache-toggle",
    /// WFI, WFE, HLT.
    Wait = "wait",
    /// A physical interrupt.
    Interrupt = "interrupt",
    /// Something that is UNDEFINED for a guest.
    Undefined = "undefined",
    /// SError.
    SystemError = "system-error",
    /// IN, OUT.
    Port = "port",
    /// RDMSR, WRMSR.
    Msr = "msr",
    /// CPUID.
    Cpuid = "cpuid",
    /// VMMCALL, VMCALL.
    Hypercall = "hypercall",
}

/// Counts by reason.
#[derive(Debug, Default)]
pub struct Counters([Counter; REASONS]);

impl Counters {
    /// One more.
    #[inline]
    pub fn bump(&self, reason: Reason) {
        self.0[reason as usize].bump();
    }

    /// How often.
    pub fn get(&self, reason: Reason) -> u64 {
        self.0[reason as usize].get()
    }

    /// Names and counts.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Reason::ALL.iter().map(|(reason, name)| (*name, self.0[*reason as usize].get()))
    }
}
