//! Control registers of a guest on shadow tables: what it believes is in them, and what the processor has instead.
//!
//! Purpose: such a guest's CR0, CR3, CR4 and EFER are kept apart, because the processor always runs with paging on and by other tables.
//! A store to one obeys the manual's rules here ([`ControlRegisters::set_cr0`] and others); what the processor gets is
//! [`ControlRegisters::hardware`]; what a walk of the guest's tables has to know is [`ControlRegisters::regime`].
//!
//! Protocol: a store is tried on a copy. Where [`ControlRegisters::needs_pointers`] says so then, the four page-directory pointers are read and
//! given to [`ControlRegisters::set_pointers`]; if all went well the copy takes the place of what was there.
//!
//! Invariants: pure; what a guest stores leaves registers that a processor could hold, or changes nothing.
//!
//! Sources: APM volume 2, 3.1 (registers), 14.6 (long mode), 15.5.1 (what VMRUN accepts), 15.19 (paged real mode); SDM volume 3, 2.5, 4.4.1.
//!
//! Known holes: five levels are not offered; CR0.CD and CR0.NW are the guest's alone, caches stay on.

use crate::msr::Refused;
use crate::paging::{Controls, Mode, Regime, pointer_is_valid};

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_TS: u64 = 1 << 3;
const CR0_WP: u64 = 1 << 16;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
/// PE, MP, EM, TS, ET, NE, WP, AM, NW, CD, PG.
const CR0_KNOWN: u64 = CR0_PE | 0b110 | CR0_TS | CR0_ET | 1 << 5 | CR0_WP | 1 << 18 | CR0_NW | CR0_CD | CR0_PG;

const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_PGE: u64 = 1 << 7;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
/// VME, PVI, TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT, UMIP, FSGSBASE, SMEP, SMAP: what CPUID offers.
const CR4_KNOWN: u64 = 0x7ff | 1 << 11 | 1 << 16 | CR4_SMEP | CR4_SMAP;

const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;

/// What a guest believes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ControlRegisters {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// The page-directory pointers of PAE paging, as they were loaded last.
    pub pointers: [u64; 4],
}

/// What the processor gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// CR0: with paging, and with write protection for the supervisor.
    pub cr0: u64,
    /// CR4: with PAE.
    pub cr4: u64,
    /// EFER: with NXE; in long mode exactly if the guest is.
    pub efer: u64,
}

impl ControlRegisters {
    /// The paging mode.
    pub const fn mode(&self) -> Mode {
        Mode::of(self.cr0, self.cr4, self.efer)
    }

    /// Stores `value` to CR0. `long_code`: the code that does is 64-bit code.
    ///
    /// # Errors
    ///
    /// [`Refused`]: a general-protection fault; nothing has changed.
    pub const fn set_cr0(&mut self, value: u64, long_code: bool) -> Result<(), Refused> {
        let value = value & (CR0_KNOWN | !0xffff_ffff) | CR0_ET;
        let (paging, was) = (value & CR0_PG != 0, self.cr0 & CR0_PG != 0);
        if value >> 32 != 0 || paging && value & CR0_PE == 0 || value & (CR0_NW | CR0_CD) == CR0_NW {
            return Err(Refused);
        }
        let enters = paging && !was && self.efer & EFER_LME != 0;
        if enters && (self.cr4 & CR4_PAE == 0 || long_code) || was && !paging && long_code {
            return Err(Refused);
        }
        self.cr0 = value;
        if enters {
            self.efer |= EFER_LMA;
        } else if !paging {
            self.efer &= !EFER_LMA;
        }
        Ok(())
    }

    /// Stores `value` to CR3.
    ///
    /// # Errors
    ///
    /// As [`Self::set_cr0`].
    pub const fn set_cr3(&mut self, value: u64, physical_bits: u8) -> Result<(), Refused> {
        if self.efer & EFER_LMA != 0 && value >> physical_bits != 0 {
            return Err(Refused);
        }
        self.cr3 = value;
        Ok(())
    }

    /// Stores `value` to CR4.
    ///
    /// # Errors
    ///
    /// As [`Self::set_cr0`].
    pub const fn set_cr4(&mut self, value: u64) -> Result<(), Refused> {
        if value & !CR4_KNOWN != 0 || self.efer & EFER_LMA != 0 && value & CR4_PAE == 0 {
            return Err(Refused);
        }
        self.cr4 = value;
        Ok(())
    }

    /// CLTS.
    pub const fn clear_task_switched(&mut self) {
        self.cr0 &= !CR0_TS;
    }

    /// What LMSW of `value` would store to CR0: it changes the low four bits, and clears PE never.
    pub const fn with_status(&self, value: u16) -> u64 {
        self.cr0 & !0b1110 | value as u64 & 0b1111
    }

    /// Whether a store that led from `before` to these registers loads the page-directory pointers. `by_cr3`: it was one to CR3.
    pub fn needs_pointers(&self, before: &Self, by_cr3: bool) -> bool {
        const LOADING: u64 = CR0_PG | CR0_CD | CR0_NW;
        let changed = (self.cr0 ^ before.cr0) & LOADING != 0
            || (self.cr4 ^ before.cr4) & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP) != 0;
        self.mode() == Mode::Pae && (by_cr3 || changed)
    }

    /// Where they are.
    pub const fn pointers_at(&self) -> u64 {
        self.cr3 & 0xffff_ffe0
    }

    /// Loads them.
    ///
    /// # Errors
    ///
    /// [`Refused`]: one is present and has a bit that must be zero.
    pub fn set_pointers(&mut self, pointers: [u64; 4], physical_bits: u8) -> Result<(), Refused> {
        if pointers.iter().any(|pointer| !pointer_is_valid(*pointer, physical_bits)) {
            return Err(Refused);
        }
        self.pointers = pointers;
        Ok(())
    }

    /// What the processor gets.
    pub const fn hardware(&self) -> Hardware {
        let long = self.efer & EFER_LMA != 0;
        // Without paging nobody asks who may fetch or touch what.
        let rights = if self.cr0 & CR0_PG == 0 { CR4_SMEP | CR4_SMAP } else { 0 };
        Hardware {
            cr0: self.cr0 & !(CR0_CD | CR0_NW) | CR0_PG | CR0_WP | CR0_ET,
            cr4: self.cr4 & !rights | CR4_PAE,
            efer: self.efer & !(EFER_LME | EFER_LMA) | EFER_NXE | if long { EFER_LME | EFER_LMA } else { 0 },
        }
    }

    /// What a walk of the guest's tables has to know.
    pub fn regime(&self, physical_bits: u8, giant_pages: bool) -> Regime {
        let mut controls = Controls::empty();
        for (set, flag) in [
            (self.cr0 & CR0_WP != 0, Controls::WRITE_PROTECT),
            (self.cr4 & CR4_PSE != 0, Controls::LARGE_PAGES),
            (self.cr4 & CR4_PGE != 0, Controls::GLOBAL_PAGES),
            (self.cr4 & CR4_SMEP != 0, Controls::NO_SUPERVISOR_FETCH),
            (self.cr4 & CR4_SMAP != 0, Controls::NO_SUPERVISOR_ACCESS),
            (self.efer & EFER_NXE != 0, Controls::NO_EXECUTE),
            (giant_pages, Controls::GIGABYTE_PAGES),
        ] {
            controls.set(flag, set);
        }
        // CPUID says that there are no protection keys.
        Regime { mode: self.mode(), root: self.cr3, pointers: self.pointers, controls, pkru: 0, physical_bits }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BITS: u8 = 40;

    fn long() -> ControlRegisters {
        ControlRegisters {
            cr0: CR0_PE | CR0_ET | CR0_PG,
            cr3: 0x1000,
            cr4: CR4_PAE,
            efer: EFER_LME | EFER_LMA,
            pointers: [0; 4],
        }
    }

    #[test]
    fn a_guest_comes_to_long_mode_step_by_step() {
        let mut own = ControlRegisters { cr0: CR0_PE | CR0_ET, ..ControlRegisters::default() };
        assert_eq!(own.mode(), Mode::Off);
        own.efer = EFER_LME;
        assert_eq!(own.set_cr0(own.cr0 | CR0_PG, false), Err(Refused), "not without PAE");
        assert_eq!(own.set_cr4(CR4_PAE), Ok(()));
        assert_eq!(own.set_cr3(0x1000, BITS), Ok(()));
        assert_eq!(own.hardware().efer & (EFER_LME | EFER_LMA), 0, "the processor stays out until the guest is in");
        assert_eq!(own.set_cr0(own.cr0 | CR0_PG, false), Ok(()));
        assert_eq!(own, long());
        assert_eq!((own.mode(), own.hardware().efer), (Mode::Level4, EFER_LME | EFER_LMA | EFER_NXE));
        assert_eq!(own.set_cr4(0), Err(Refused), "PAE stays");
        assert_eq!(own.set_cr0(own.cr0 & !CR0_PG, true), Err(Refused), "64-bit code cannot leave");
        assert_eq!(own.set_cr0(own.cr0 & !CR0_PG, false), Ok(()));
        assert_eq!((own.mode(), own.efer), (Mode::Off, EFER_LME));
    }

    #[test]
    fn what_no_processor_takes_is_refused() {
        for cr0 in [CR0_PG, CR0_PE | CR0_NW, CR0_PE | 1 << 32] {
            assert_eq!(long().set_cr0(cr0, false), Err(Refused), "{cr0:#x}");
        }
        for cr4 in [1 << 17, 1 << 18, 1 << 12, 1 << 22, 1 << 63] {
            assert_eq!(long().set_cr4(CR4_PAE | cr4), Err(Refused), "{cr4:#x}");
        }
        for cr3 in [1 << BITS, 1 << 63] {
            assert_eq!(long().set_cr3(cr3, BITS), Err(Refused), "{cr3:#x}");
        }
        assert_eq!(long().set_cr3((1 << BITS) - 8, BITS), Ok(()), "low bits are ignored, or flags");
    }

    #[test]
    fn pointers_are_loaded_with_pae_alone() {
        let before = ControlRegisters { efer: 0, cr0: CR0_PE, ..long() };
        let pae = ControlRegisters { cr0: CR0_PE | CR0_PG, cr3: 0x1234_5678_9abc_def8, ..before };
        assert!(
            pae.needs_pointers(&before, false) && pae.needs_pointers(&pae, true) && !pae.needs_pointers(&pae, false)
        );
        assert!(!long().needs_pointers(&before, true));
        assert_eq!(pae.pointers_at(), 0x9abc_dee0);
        let mut loaded = pae;
        assert_eq!(
            loaded.set_pointers([0x2001, 0x3001, 0xfff0_0000_0000_0006, 0], BITS),
            Ok(()),
            "an absent one is anything"
        );
        assert_eq!(loaded.set_pointers([0x2001, 0x3003, 0, 0], BITS), Err(Refused));
        assert_eq!(loaded.pointers[1], 0x3001);
    }

    #[test]
    fn status_words_change_four_bits() {
        let mut own = ControlRegisters { cr0: long().cr0 | CR0_TS, ..long() };
        assert_eq!(own.with_status(0), CR0_PE | CR0_ET | CR0_PG, "PE cannot be cleared so");
        assert_eq!(own.with_status(0xffff), CR0_ET | CR0_PG | 0b1111);
        own.clear_task_switched();
        assert_eq!(own, long());
    }

    proptest! {
        /// APM 15.5.1: what VMRUN refuses never comes out, whatever a guest tries.
        #[test]
        fn the_processor_gets_what_it_can_run(stores in prop::collection::vec((0u8..4, any::<u64>(), any::<bool>()), 1..40)) {
            let mut own = ControlRegisters::default();
            for (register, bits, long_code) in stores {
                // Single bits as often as any number.
                let value = if long_code { 1 << (bits % 64) | own.cr0 } else { bits };
                let before = own;
                let done = match register {
                    0 => own.set_cr0(value, long_code),
                    1 => own.set_cr3(value, BITS),
                    2 => own.set_cr4(value & CR4_KNOWN),
                    _ => crate::msr::efer(own.efer, value & 0xd01, own.cr0).map(|efer| own.efer = efer),
                };
                prop_assert!(done.is_ok() || own == before);
                let Hardware { cr0, cr4, efer } = own.hardware();
                prop_assert!(cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0 && cr0 >> 32 == 0);
                prop_assert!(cr0 & CR0_NW == 0 && efer & (EFER_LME | EFER_LMA) != EFER_LME);
                prop_assert!(efer & EFER_LMA == 0 || cr0 & CR0_PE != 0, "no long mode without protection");
                prop_assert_eq!(efer & EFER_LMA != 0, matches!(own.mode(), Mode::Level4));
            }
        }
    }
}
