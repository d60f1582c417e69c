//! One entry of the guest's tables: where it leads, and which of its bits must be zero.
//!
//! Sources: SDM tables 4-5 and 4-6 (32-bit paging), 4-9 to 4-11 (PAE), 4-15 to 4-20 (four and five levels).
//!
//! Invariants: pure and total; an address that is given lies within the guest's physical bits.

use super::{Controls, Mode, Regime};

const PRESENT: u64 = 1 << 0;
/// PS, in levels that can have pages.
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing.
    Absent,
    /// A bit is set that must not be.
    Reserved,
    /// The next table's address.
    Table(u64),
    /// A page's first address.
    Page(u64),
}

/// Bits 12 up to the last of a physical address.
pub(crate) const fn address_mask(physical_bits: u8) -> u64 {
    let bits = if physical_bits > 52 { 52 } else { physical_bits };
    ones(12, bits as u32)
}

/// Bits from `low` to below `end`, which is at most 64.
const fn ones(low: u32, end: u32) -> u64 {
    if low >= end {
        return 0;
    }
    (u64::MAX >> (64 - (end - low))) << low
}

/// Reads an entry of `level` (1: of 4 KiB pages).
pub(crate) const fn read(regime: &Regime, level: u8, raw: u64) -> Step {
    if raw & PRESENT == 0 {
        return Step::Absent;
    }
    match regime.mode {
        Mode::Bits32 => read_narrow(regime, level, raw),
        _ => read_wide(regime, level, raw),
    }
}

/// The protection key of a page.
pub(crate) const fn key(mode: Mode, raw: u64) -> u8 {
    match mode {
        Mode::Level4 | Mode::Level5 => (raw >> 59) as u8 & 0xf,
        Mode::Off | Mode::Bits32 | Mode::Pae => 0,
    }
}

const fn read_narrow(regime: &Regime, level: u8, raw: u64) -> Step {
    let large = level == 2 && raw & LARGE != 0 && regime.controls.contains(Controls::LARGE_PAGES);
    if !large {
        let address = raw & 0xffff_f000;
        return if level == 1 { Step::Page(address) } else { Step::Table(address) };
    }
    // Bits 20:13 are address bits 39:32, as far as the processor has them.
    let bits = if regime.physical_bits > 40 { 40 } else { regime.physical_bits as u32 };
    let high = bits.saturating_sub(32);
    if raw & ones(13 + high, 22) != 0 {
        return Step::Reserved;
    }
    Step::Page(raw & 0xffc0_0000 | (raw >> 13 & ones(0, high)) << 32)
}

const fn read_wide(regime: &Regime, level: u8, raw: u64) -> Step {
    let can_be_page = match level {
        1 => return page(regime, raw, 12),
        2 => true,
        3 => !matches!(regime.mode, Mode::Pae) && regime.controls.contains(Controls::GIGABYTE_PAGES),
        _ => false,
    };
    if raw & LARGE == 0 {
        return if raw & reserved(regime) != 0 {
            Step::Reserved
        } else {
            Step::Table(raw & address_mask(regime.physical_bits))
        };
    }
    if can_be_page { page(regime, raw, if level == 2 { 21 } else { 30 }) } else { Step::Reserved }
}

const fn page(regime: &Regime, raw: u64, shift: u32) -> Step {
    // Bit 12 of a large page is its PAT bit.
    let low = ones(13, shift);
    if raw & (reserved(regime) | low) != 0 {
        return Step::Reserved;
    }
    Step::Page(raw & address_mask(regime.physical_bits) & !ones(12, shift))
}

/// Bits that must be zero in every entry of eight bytes.
const fn reserved(regime: &Regime) -> u64 {
    let bits = if regime.physical_bits > 52 { 52 } else { regime.physical_bits as u32 };
    let above = if matches!(regime.mode, Mode::Pae) { ones(bits, 63) } else { ones(bits, 52) };
    let no_execute = if regime.controls.contains(Controls::NO_EXECUTE) { 0 } else { NO_EXECUTE };
    above | no_execute
}
