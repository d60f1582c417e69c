//! Which of VMX's controls are on: what we need, what we take if it is there, and what the processor insists on.
//!
//! Protocol: [`Controls::choose`] once, from the capability registers: bits 31:0 of each are what must be one, bits 63:32 what may be.
//!
//! Invariants: pure; any register values are accepted.
//!
//! Sources: SDM appendix A.3 to A.5 and A.10.

use core::fmt;

/// Capability registers: the true ones, which every processor with extended page tables has (A.2: IA32_VMX_BASIC bit 55).
pub const PIN: u32 = 0x48d;
pub const PRIMARY: u32 = 0x48e;
pub const EXIT: u32 = 0x48f;
pub const ENTRY: u32 = 0x490;
pub const SECONDARY: u32 = 0x48b;
pub const EPT_VPID: u32 = 0x48c;

/// Controls of [`Controls::primary`] that are changed while a guest lives.
pub const INTERRUPT_WINDOW: u32 = 1 << 2;
/// The same of [`Controls::entry`].
pub const LONG_MODE: u32 = 1 << 9;

mod pin {
    pub const INTERRUPTS: u32 = 1 << 0;
    pub const NON_MASKABLE: u32 = 1 << 3;
}

mod primary {
    pub const TSC_OFFSET: u32 = 1 << 3;
    pub const HLT: u32 = 1 << 7;
    pub const MWAIT: u32 = 1 << 10;
    pub const RDPMC: u32 = 1 << 11;
    pub const TPR_SHADOW: u32 = 1 << 21;
    pub const ALL_PORTS: u32 = 1 << 24;
    pub const MSR_BITMAP: u32 = 1 << 28;
    pub const MONITOR: u32 = 1 << 29;
    pub const SECONDARY: u32 = 1 << 31;
}

mod secondary {
    pub const EPT: u32 = 1 << 1;
    pub const VPID: u32 = 1 << 5;
    pub const WBINVD: u32 = 1 << 6;
    pub const UNRESTRICTED: u32 = 1 << 7;
    pub const INVPCID: u32 = 1 << 12;
}

mod exit {
    pub const SAVE_DEBUG: u32 = 1 << 2;
    pub const HOST_LONG_MODE: u32 = 1 << 9;
    pub const SAVE_PAT: u32 = 1 << 18;
    pub const LOAD_PAT: u32 = 1 << 19;
    pub const SAVE_EFER: u32 = 1 << 20;
    pub const LOAD_EFER: u32 = 1 << 21;
}

mod entry {
    pub const LOAD_DEBUG: u32 = 1 << 2;
    pub const LOAD_PAT: u32 = 1 << 14;
    pub const LOAD_EFER: u32 = 1 << 15;
}

/// IA32_VMX_EPT_VPID_CAP.
mod ept {
    pub const FOUR_LEVELS: u64 = 1 << 6;
    pub const WRITE_BACK: u64 = 1 << 14;
    pub const LARGE_PAGES: u64 = 1 << 16;
    pub const INVEPT: u64 = 1 << 20;
    pub const ACCESSED_DIRTY: u64 = 1 << 21;
    pub const INVEPT_ALL: u64 = 1 << 26;
    pub const INVVPID: u64 = 1 << 32;
    pub const INVVPID_ALL: u64 = 1 << 42;
    pub const NEEDED: u64 = FOUR_LEVELS | WRITE_BACK | LARGE_PAGES | INVEPT | INVEPT_ALL;
}

/// The controls of every guest on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    /// Pin-based.
    pub pin: u32,
    /// Primary processor-based.
    pub primary: u32,
    /// Secondary processor-based.
    pub secondary: u32,
    /// VM exits.
    pub exit: u32,
    /// VM entries.
    pub entry: u32,
    /// The processor sets accessed and dirty flags in extended page tables.
    pub accessed_dirty: bool,
}

/// Controls that a processor lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lacks {
    /// The capability register.
    pub register: u32,
    /// Bits that we need and that may not be set.
    pub bits: u64,
}

impl fmt::Display for Lacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "this CPU's VMX lacks {:#x} of capability register {:#x}, which we use", self.bits, self.register)
    }
}

impl Controls {
    /// What we need of this processor; `read` reads a capability register.
    ///
    /// # Errors
    ///
    /// [`Lacks`].
    pub fn choose(read: impl Fn(u32) -> u64) -> Result<Self, Lacks> {
        let capabilities = read(EPT_VPID);
        let lacking = ept::NEEDED & !capabilities;
        if lacking != 0 {
            return Err(Lacks { register: EPT_VPID, bits: lacking });
        }
        let control = |register, needed: u32, wanted: u32| {
            let allowed = read(register);
            let (ones, may) = (allowed as u32, (allowed >> 32) as u32);
            match needed & !may {
                0 => Ok(ones | needed | wanted & may),
                lacking => Err(Lacks { register, bits: lacking.into() }),
            }
        };
        // Identifiers are of use only if what they keep can be forgotten.
        let vpid =
            if capabilities & ept::INVVPID != 0 && capabilities & ept::INVVPID_ALL != 0 { secondary::VPID } else { 0 };
        let primary_needed = primary::TSC_OFFSET
            | primary::HLT
            | primary::MWAIT
            | primary::RDPMC
            | primary::TPR_SHADOW
            | primary::ALL_PORTS
            | primary::MSR_BITMAP
            | primary::MONITOR
            | primary::SECONDARY;
        let exit_needed = exit::SAVE_DEBUG
            | exit::HOST_LONG_MODE
            | exit::SAVE_PAT
            | exit::LOAD_PAT
            | exit::SAVE_EFER
            | exit::LOAD_EFER;
        let secondary_needed = secondary::EPT | secondary::UNRESTRICTED | secondary::WBINVD;
        Ok(Self {
            pin: control(PIN, pin::INTERRUPTS | pin::NON_MASKABLE, 0)?,
            primary: control(PRIMARY, primary_needed, 0)?,
            secondary: control(SECONDARY, secondary_needed, secondary::INVPCID | vpid)?,
            exit: control(EXIT, exit_needed, 0)?,
            entry: control(ENTRY, entry::LOAD_DEBUG | entry::LOAD_PAT | entry::LOAD_EFER, 0)?,
            accessed_dirty: capabilities & ept::ACCESSED_DIRTY != 0,
        })
    }

    /// Guests' translations of their own have an identifier.
    pub const fn has_vpid(&self) -> bool {
        self.secondary & secondary::VPID != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor that can do everything but `lacks`, and insists on `insists` of register [`PRIMARY`].
    fn chosen(lacks: &[(u32, u64)], insists: u64) -> Result<Controls, Lacks> {
        Controls::choose(|register| {
            let may = if register == EPT_VPID { u64::MAX } else { 0xffff_ffff << 32 };
            let without: u64 = lacks.iter().filter(|(of, _)| *of == register).map(|(_, bits)| bits).sum();
            may & !without | if register == PRIMARY { insists } else { 0 }
        })
    }

    #[test]
    fn what_must_be_one_is_and_what_may_not_be_is_not() {
        let all = chosen(&[], 1 << 1 | 1 << 4).unwrap();
        assert_eq!(all.primary & 0b10010, 0b10010, "the processor's");
        assert_eq!(all.primary & INTERRUPT_WINDOW, 0);
        assert!(all.has_vpid() && all.accessed_dirty && all.secondary & secondary::INVPCID != 0);
        let few =
            chosen(&[(EPT_VPID, ept::INVVPID_ALL | ept::ACCESSED_DIRTY), (SECONDARY, 1 << (32 + 12))], 0).unwrap();
        assert!(!few.has_vpid() && !few.accessed_dirty && few.secondary & secondary::INVPCID == 0);
        assert_eq!(few.secondary & secondary::EPT, secondary::EPT);
    }

    #[test]
    fn what_we_need_is_named_where_it_lacks() {
        for (register, bit) in [(PIN, 32), (PRIMARY, 32 + 21), (SECONDARY, 32 + 7), (EXIT, 32 + 9), (ENTRY, 32 + 15)] {
            assert_eq!(chosen(&[(register, 1 << bit)], 0), Err(Lacks { register, bits: 1 << (bit - 32) }));
        }
        let lacks = chosen(&[(EPT_VPID, ept::INVEPT)], 0).unwrap_err();
        assert_eq!(lacks, Lacks { register: EPT_VPID, bits: ept::INVEPT });
        assert!(std::string::ToString::to_string(&lacks).contains("0x100000 of capability register 0x48c"));
    }
}
