//! Second-stage aborts: ESR_EL2, FAR_EL2 and HPFAR_EL2 as the core's [`Fault`].
//!
//! Purpose: [`fault`] is the first step of every memory fault, so it is a table look-up and a few shifts, and inlines.
//! What the hardware can say about an abort, and when, is Arm DDI 0487 D24.2 (ESR_EL2, "ISS encoding for an exception
//! from a Data Abort", "... from an Instruction Abort", HPFAR_EL2) and D8.15.
//!
//! Protocol: HPFAR_EL2 holds the address only for the faults named by [`hpfar_is_valid`]. For a permission fault that
//! is not on a stage-1 walk it is UNKNOWN: the caller translates FAR_EL2 with `AT S1E1R`, hands PAR_EL1 to
//! [`hpfar_from_par`], and passes the result to [`fault`]. If that translation fails, another vCPU changed the guest's
//! tables meanwhile; the guest is simply re-entered, and faults again or not.
//!
//! Invariants: pure; any 64-bit values are accepted. `gpa` has at most 56 bits.

use entresol_addr::Gpa;
use entresol_fault::{Access, Cause, Fault, Transfer};

use crate::syndrome;

/// Fault status codes, ISS.DFSC and ISS.IFSC (5:0).
mod status {
    pub const ADDRESS_SIZE: usize = 0b00_0000;
    pub const TRANSLATION: usize = 0b00_0100;
    pub const ACCESS_FLAG: usize = 0b00_1000;
    pub const PERMISSION: usize = 0b00_1100;
    pub const EXTERNAL: usize = 0b01_0000;
    pub const EXTERNAL_WALK_MINUS_1: usize = 0b01_0011;
    pub const EXTERNAL_WALK: usize = 0b01_0100;
    pub const PARITY: usize = 0b01_1000;
    pub const PARITY_WALK_MINUS_1: usize = 0b01_1011;
    pub const PARITY_WALK: usize = 0b01_1100;
    pub const ADDRESS_SIZE_MINUS_1: usize = 0b10_1001;
    pub const TRANSLATION_MINUS_1: usize = 0b10_1011;
    pub const UNSUPPORTED_ATOMIC: usize = 0b11_0101;
}

/// ISS bits of an abort.
mod bit {
    pub const TRANSFER_VALID: u64 = 1 << 24;
    pub const SIGN_EXTEND: u64 = 1 << 21;
    pub const WIDE: u64 = 1 << 15;
    pub const FAR_NOT_VALID: u64 = 1 << 10;
    pub const CACHE_MAINTENANCE: u64 = 1 << 8;
    pub const STAGE1_WALK: u64 = 1 << 7;
    pub const WRITE: u64 = 1 << 6;
}

/// HPFAR_EL2.FIPA: address bits 55:12 in bits 47:4.
const HPFAR_ADDRESS: u64 = 0x0000_ffff_ffff_fff0;
/// PAR_EL1.PA: bits 51:12, when PAR_EL1.F is 0.
const PAR_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Cause by fault status code.
const CAUSES: [Cause; 64] = causes();

const fn causes() -> [Cause; 64] {
    let mut table = [Cause::Other; 64];
    let mut level = 0;
    while level < 4 {
        table[status::ADDRESS_SIZE + level] = Cause::AddressSize;
        table[status::TRANSLATION + level] = Cause::Translation;
        table[status::ACCESS_FLAG + level] = Cause::AccessFlag;
        table[status::PERMISSION + level] = Cause::Permission { level: level as u8 };
        table[status::EXTERNAL_WALK + level] = Cause::External;
        table[status::PARITY_WALK + level] = Cause::External;
        level += 1;
    }
    table[status::ADDRESS_SIZE_MINUS_1] = Cause::AddressSize;
    table[status::TRANSLATION_MINUS_1] = Cause::Translation;
    table[status::EXTERNAL] = Cause::External;
    table[status::EXTERNAL_WALK_MINUS_1] = Cause::External;
    table[status::PARITY] = Cause::External;
    table[status::PARITY_WALK_MINUS_1] = Cause::External;
    table[status::UNSUPPORTED_ATOMIC] = Cause::UnsupportedAtomic;
    table
}

/// Bit n: HPFAR_EL2 is written for fault status code n.
const HPFAR_STATUS: u64 = {
    let (mut mask, mut code) = (0, 0);
    while code < 64 {
        let written = matches!(CAUSES[code], Cause::Translation | Cause::AccessFlag | Cause::AddressSize);
        mask |= (written as u64) << code;
        code += 1;
    }
    mask
};

#[inline]
const fn cause(esr: u64) -> Cause {
    CAUSES[(esr & 0x3f) as usize]
}

/// Whether HPFAR_EL2 holds the faulting address (Arm DDI 0487 D24.2 HPFAR_EL2: translation, access flag and address
/// size faults of stage 2, and every stage-2 fault on a stage-1 walk).
#[inline]
pub const fn hpfar_is_valid(esr: u64) -> bool {
    esr & bit::STAGE1_WALK != 0 || (HPFAR_STATUS >> (esr & 0x3f)) & 1 != 0
}

/// Whether FAR_EL2 holds the virtual address: always, except for external aborts that say otherwise (ISS.FnV).
#[inline]
pub const fn far_is_valid(esr: u64) -> bool {
    esr & bit::FAR_NOT_VALID == 0 || !matches!(cause(esr), Cause::External)
}

/// What HPFAR_EL2 would have been, from PAR_EL1 after an `AT S1E1R` of FAR_EL2; `None` if the translation failed.
#[inline]
pub const fn hpfar_from_par(par: u64) -> Option<u64> {
    if par & 1 != 0 { None } else { Some((par & PAR_ADDRESS) >> 8) }
}

/// The fault behind an instruction or data abort from a lower exception level.
///
/// `hpfar` is HPFAR_EL2, or what stands in for it (see the module). The low 12 bits of the address come from `far`;
/// for a stage-1 walk they are unknown, and 0.
#[inline]
pub const fn fault(esr: u64, far: u64, hpfar: u64) -> Fault {
    let fetch = syndrome::class(esr) == syndrome::class::INSTRUCTION_ABORT;
    let stage1_walk = esr & bit::STAGE1_WALK != 0;
    let offset = if stage1_walk { 0 } else { far & 0xfff };
    // Maintenance, WnR and the transfer are RES0 in an instruction abort, but a guest's words are not to be trusted.
    let access = match (fetch, esr & bit::WRITE != 0) {
        (true, _) => Access::Fetch,
        (false, true) => Access::Write,
        (false, false) => Access::Read,
    };
    Fault {
        gpa: Gpa::new((hpfar & HPFAR_ADDRESS) << 8 | offset),
        access,
        cause: cause(esr),
        stage1_walk,
        cache_maintenance: !fetch && esr & bit::CACHE_MAINTENANCE != 0,
        transfer: if fetch || esr & bit::TRANSFER_VALID == 0 { None } else { Some(transfer(esr)) },
        syndrome: esr,
    }
}

/// A store of one general register to where nothing is mapped, whole in its syndrome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Store {
    /// Where.
    pub gpa: Gpa,
    /// Bytes: 1, 2, 4 or 8.
    pub size: u8,
    /// The register.
    pub register: u8,
}

/// The page that HPFAR_EL2 names, where it is valid.
#[inline]
pub const fn page(hpfar: u64) -> Gpa {
    Gpa::new((hpfar & HPFAR_ADDRESS) << 8)
}

/// The store behind a data abort from a lower exception level, if it is one: a translation fault by a write that is
/// described (ISV), and neither maintenance nor a walk. `esr` is of a data abort; then HPFAR_EL2 is valid.
#[inline]
pub const fn described_store(esr: u64, far: u64, hpfar: u64) -> Option<Store> {
    const LOOKED_AT: u64 =
        bit::TRANSFER_VALID | bit::FAR_NOT_VALID | bit::CACHE_MAINTENANCE | bit::STAGE1_WALK | bit::WRITE | 0b11_1100;
    if esr & LOOKED_AT != bit::TRANSFER_VALID | bit::WRITE | status::TRANSLATION as u64 {
        return None;
    }
    let Transfer { size, register, .. } = transfer(esr);
    Some(Store { gpa: Gpa::new((hpfar & HPFAR_ADDRESS) << 8 | far & 0xfff), size, register })
}

/// SAS 23:22, SSE 21, SRT 20:16, SF 15; meaningful if ISV is 1.
#[inline]
const fn transfer(esr: u64) -> Transfer {
    Transfer {
        size: 1 << ((esr >> 22) & 0x3),
        sign_extend: esr & bit::SIGN_EXTEND != 0,
        register: (esr >> 16) as u8 & 0x1f,
        wide: esr & bit::WIDE != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DATA: u64 = (syndrome::class::DATA_ABORT as u64) << 26 | 1 << 25;
    const FETCH: u64 = (syndrome::class::INSTRUCTION_ABORT as u64) << 26 | 1 << 25;

    #[test]
    fn a_store_to_a_device() {
        // str w3, [x1] at 0x0900_0018, translation fault level 3.
        let esr = DATA | 1 << 24 | 2 << 22 | 3 << 16 | 1 << 6 | 0b000111;
        let fault = fault(esr, 0xffff_8000_0010_0018, 0x0900_0000 >> 8);
        assert_eq!(fault.gpa, Gpa::new(0x0900_0018));
        assert_eq!((fault.access, fault.cause), (Access::Write, Cause::Translation));
        assert_eq!(fault.transfer, Some(Transfer { size: 4, sign_extend: false, register: 3, wide: false }));
        assert!(!fault.stage1_walk && !fault.cache_maintenance && fault.is_write());
    }

    proptest! {
        /// The short way says what the long one does, and takes nothing else.
        #[test]
        fn a_described_store_is_the_fault_that_it_is(esr in 0u64..1 << 25, far: u64, hpfar: u64) {
            let esr = DATA | esr;
            let fault = fault(esr, far, hpfar);
            let plain = fault.access == Access::Write && fault.cause == Cause::Translation && esr & 0x3f != 43;
            let ours = plain && !fault.stage1_walk && !fault.cache_maintenance && esr & 1 << 10 == 0;
            let expected = fault.transfer.filter(|_| ours);
            let expected = expected.map(|it| Store { gpa: fault.gpa, size: it.size, register: it.register });
            prop_assert_eq!(described_store(esr, far, hpfar), expected);
        }
    }

    #[test]
    fn a_walk_has_no_offset() {
        let fault = fault(DATA | 1 << 7 | 0b000110, 0xffff_0000_1234_5678, 0x4567_8000 >> 8);
        assert_eq!(fault.gpa, Gpa::new(0x4567_8000));
        assert!(fault.stage1_walk);
    }

    #[test]
    fn every_status_code_has_its_cause() {
        for code in 0..64u64 {
            let want = match code {
                0..=3 | 41 => Cause::AddressSize,
                4..=7 | 43 => Cause::Translation,
                8..=11 => Cause::AccessFlag,
                12..=15 => Cause::Permission { level: code as u8 & 3 },
                16 | 19..=24 | 27..=31 => Cause::External,
                53 => Cause::UnsupportedAtomic,
                _ => Cause::Other,
            };
            assert_eq!(fault(DATA | code, 0, 0).cause, want, "{code:#b}");
        }
    }

    #[test]
    fn hpfar_is_unknown_for_a_permission_fault_that_is_no_walk() {
        assert!(hpfar_is_valid(DATA | 0b000111));
        assert!(hpfar_is_valid(FETCH | 0b001011));
        assert!(hpfar_is_valid(DATA));
        assert!(!hpfar_is_valid(DATA | 0b001111));
        assert!(hpfar_is_valid(DATA | 1 << 7 | 0b001111));
        assert!(!hpfar_is_valid(DATA | 0b010000));
    }

    #[test]
    fn a_failed_translation_gives_no_address() {
        assert_eq!(hpfar_from_par(1 | 0x4000_0000), None);
        // The attributes above and the shareability below the address fall away.
        let hpfar = hpfar_from_par(0xff00_0000_4567_8b80).unwrap();
        assert_eq!(fault(DATA | 0b001111, 0x123, hpfar).gpa, Gpa::new(0x4567_8123));
    }

    proptest! {
        #[test]
        fn any_registers_make_a_fault_within_56_bits(esr: u64, far: u64, hpfar: u64) {
            let fault = fault(esr, far, hpfar);
            prop_assert!(fault.gpa.get() >> 56 == 0);
            prop_assert_eq!(fault.syndrome, esr);
            if let Some(transfer) = fault.transfer {
                prop_assert!(matches!(transfer.size, 1 | 2 | 4 | 8) && transfer.register < 32);
                prop_assert!(fault.access != Access::Fetch);
            }
        }

        #[test]
        fn an_address_survives_both_ways_in(page in 0u64..1 << 40, far: u64) {
            let hpfar = page << 4;
            prop_assert_eq!(fault(DATA | 4, far, hpfar).gpa, Gpa::new(page << 12 | far & 0xfff));
            prop_assert_eq!(hpfar_from_par(page << 12), Some(hpfar));
        }
    }
}
