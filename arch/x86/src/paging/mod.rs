//! The guest's own page tables: what an address means to it, and what it is told when it means nothing.
//!
//! Purpose: shadow paging builds its entries from this walk, and emulation finds its operands by it. It does what the processor
//! does for the same access (SDM chapter 4, APM chapter 5): all paging modes, access rights, reserved bits, accessed and dirty
//! flags.
//!
//! Protocol of a walk: the entries are read from the top; then the access is judged; only then accessed and dirty flags are set,
//! each by a compare-and-swap against the word that was read. If one fails, the guest has changed its tables meanwhile and the
//! walk begins again, a bounded number of times: [`WalkError::Contended`] has the guest's instruction made again.
//!
//! | room | question |
//! |---|---|
//! | `entry` | what does one entry of one level say? |
//! | `rights` | may this access be made through these entries? |
//!
//! Invariants: every walk ends; no address is loaded from that the guest's entries do not name within its physical bits.
//!
//! Known holes: no shadow stacks, no supervisor protection keys, no write-protect by HLAT; no memory-type bits are read.

pub(crate) mod entry;
mod rights;
#[cfg(test)]
mod tests;

use bitflags::bitflags;
use entresol_addr::Gpa;

use entry::Step;
use rights::Rights;

pub use rights::{Kind, Request};

/// How many bits of which table stand where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// No paging: linear addresses are physical, 32 bits.
    Off,
    /// Two levels of 32-bit entries.
    Bits32,
    /// Two levels of 64-bit entries below four page-directory pointers.
    Pae,
    /// Four levels.
    Level4,
    /// Five levels.
    Level5,
}

impl Mode {
    /// The mode that CR0, CR4 and IA32_EFER choose (SDM 4.1.1).
    pub const fn of(cr0: u64, cr4: u64, efer: u64) -> Self {
        const PG: u64 = 1 << 31;
        const PAE: u64 = 1 << 5;
        const LA57: u64 = 1 << 12;
        const LMA: u64 = 1 << 10;
        match (cr0 & PG != 0, cr4 & PAE != 0, efer & LMA != 0) {
            (false, _, _) => Self::Off,
            (true, false, _) => Self::Bits32,
            (true, true, false) => Self::Pae,
            (true, true, true) if cr4 & LA57 != 0 => Self::Level5,
            (true, true, true) => Self::Level4,
        }
    }

    /// Number of the top level; the level of 4 KiB pages is 1.
    const fn top(self) -> u8 {
        match self {
            Self::Off => 0,
            Self::Bits32 => 2,
            Self::Pae => 3,
            Self::Level4 => 4,
            Self::Level5 => 5,
        }
    }

    /// Whether tables of this mode say anything of `linear`: outside long mode of its lower 32 bits.
    pub(crate) const fn reaches(self, linear: u64) -> bool {
        match self {
            Self::Off | Self::Bits32 | Self::Pae => true,
            Self::Level4 => is_canonical(linear, 48),
            Self::Level5 => is_canonical(linear, 57),
        }
    }

    /// Bytes of an entry.
    const fn width(self) -> Width {
        if matches!(self, Self::Bits32) { Width::Word } else { Width::Long }
    }

    /// Bits of an address that index one table.
    const fn index_bits(self) -> u32 {
        if matches!(self, Self::Bits32) { 10 } else { 9 }
    }
}

bitflags! {
    /// What decides about an access besides the entries.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Controls: u16 {
        /// CR0.WP: the supervisor obeys R/W.
        const WRITE_PROTECT = 1 << 0;
        /// CR4.PSE: 4 MiB pages in 32-bit paging.
        const LARGE_PAGES = 1 << 1;
        /// CR4.PGE.
        const GLOBAL_PAGES = 1 << 2;
        /// CR4.SMEP: the supervisor does not fetch from user pages.
        const NO_SUPERVISOR_FETCH = 1 << 3;
        /// CR4.SMAP: nor touches them, but by leave.
        const NO_SUPERVISOR_ACCESS = 1 << 4;
        /// CR4.PKE: protection keys.
        const PROTECTION_KEYS = 1 << 5;
        /// EFER.NXE: bit 63 forbids fetches.
        const NO_EXECUTE = 1 << 6;
        /// CPUID 8000_0001 EDX bit 26: 1 GiB pages.
        const GIGABYTE_PAGES = 1 << 7;
    }
}

/// Everything that a walk reads but the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regime {
    /// The paging mode.
    pub mode: Mode,
    /// CR3.
    pub root: u64,
    /// The page-directory pointers of PAE paging, as the processor loaded them with CR3 (SDM 4.4.1).
    pub pointers: [u64; 4],
    /// Flags.
    pub controls: Controls,
    /// Protection key rights for user pages.
    pub pkru: u32,
    /// Bits of the guest's physical addresses, 32–52.
    pub physical_bits: u8,
}

/// Bytes of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// Four.
    Word,
    /// Eight.
    Long,
}

impl Width {
    /// Bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Word => 4,
            Self::Long => 8,
        }
    }
}

/// The guest's memory, as far as its tables need it. Addresses are aligned to the width.
pub trait Tables {
    /// Why memory cannot be reached.
    type Error;

    /// Loads an entry in one piece; a four-byte one is extended by zeros.
    ///
    /// # Errors
    ///
    /// The implementor's.
    fn load(&mut self, at: Gpa, width: Width) -> Result<u64, Self::Error>;

    /// Stores `new` where `current` still is; whether it was.
    ///
    /// # Errors
    ///
    /// The implementor's.
    fn compare_exchange(&mut self, at: Gpa, width: Width, current: u64, new: u64) -> Result<bool, Self::Error>;
}

impl<T: Tables + ?Sized> Tables for &mut T {
    type Error = T::Error;

    fn load(&mut self, at: Gpa, width: Width) -> Result<u64, T::Error> {
        (**self).load(at, width)
    }

    fn compare_exchange(&mut self, at: Gpa, width: Width, current: u64, new: u64) -> Result<bool, T::Error> {
        (**self).compare_exchange(at, width, current, new)
    }
}

/// Where an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The physical address, to the byte.
    pub gpa: Gpa,
    /// Base-two logarithm of the page's size: 12, 21, 22 or 30. 12 without paging.
    pub page_shift: u8,
    /// User code may access it (U/S on the whole way).
    pub user: bool,
    /// R/W on the whole way.
    pub write: bool,
    /// No entry on the way forbids fetches.
    pub execute: bool,
    /// The page's dirty flag, after this access.
    pub dirty: bool,
    /// The page stays in the TLB over a load of CR3.
    pub global: bool,
    /// Its protection key; 0 where there are none.
    pub key: u8,
}

bitflags! {
    /// The error code of a page fault (SDM 4.7).
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct PageFault: u32 {
        /// The entries were all present.
        const PRESENT = 1 << 0;
        /// A store.
        const WRITE = 1 << 1;
        /// By user code.
        const USER = 1 << 2;
        /// A reserved bit is set.
        const RESERVED = 1 << 3;
        /// A fetch, where the processor tells fetches apart.
        const FETCH = 1 << 4;
        /// The protection key forbids it.
        const KEY = 1 << 5;
    }
}

/// Why an address leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError<E> {
    /// The guest gets a page fault with this code.
    Fault(PageFault),
    /// The address is not canonical: a general-protection or stack fault, as the instruction says.
    NonCanonical,
    /// The guest changes its tables faster than they can be walked: have it try again.
    Contended,
    /// The tables are where no memory is.
    Tables(E),
}

/// Most times that one walk begins.
const TRIES: usize = 8;
/// The accessed flag of an entry, and the dirty flag of a page's, at every level of every mode.
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const GLOBAL: u64 = 1 << 8;
/// A walk reads at most this many entries above the page's.
const DEEPEST: usize = 4;

/// An entry that was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Where it is.
    pub at: Gpa,
    /// The word, with its flags set as the walk has set them.
    pub raw: u64,
}

impl Used {
    const NONE: Self = Self { at: Gpa::new(0), raw: 0 };
}

/// Translates the linear address `address` as the processor would for `request`, and sets accessed and dirty flags as it would.
///
/// # Errors
///
/// [`WalkError`]; no flag was set if it is a [`WalkError::Fault`].
pub fn walk<T: Tables>(
    tables: &mut T,
    regime: &Regime,
    address: u64,
    request: Request,
) -> Result<Translation, WalkError<T::Error>> {
    trace(tables, regime, address, request).map(|(translation, _)| translation)
}

/// [`walk`], and the entries that it has used. As long as they hold these words, and the regime is the same, it leads to the same.
///
/// # Errors
///
/// As [`walk`].
pub fn trace<T: Tables>(
    tables: &mut T,
    regime: &Regime,
    address: u64,
    request: Request,
) -> Result<(Translation, Way), WalkError<T::Error>> {
    let address = match regime.mode {
        Mode::Off => return Ok((untranslated(address), Way { used: [Used::NONE; DEEPEST + 1], depth: 0 })),
        Mode::Bits32 | Mode::Pae => address & 0xffff_ffff,
        Mode::Level4 => canonical(address, 48)?,
        Mode::Level5 => canonical(address, 57)?,
    };
    for _ in 0..TRIES {
        if let Some(found) = once(tables, regime, address, request)? {
            return Ok(found);
        }
    }
    Err(WalkError::Contended)
}

/// The entries that a walk has used, from the top. The page-directory pointers of PAE paging are not among them: they are the regime's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    used: [Used; DEEPEST + 1],
    depth: usize,
}

impl Way {
    /// Them.
    pub fn entries(&self) -> &[Used] {
        &self.used[..self.depth]
    }
}

/// Whether an access may be made to a page that allows this on its whole way, by the flags `controls` in the place of `regime`'s.
#[inline]
pub(crate) fn allows(
    regime: &Regime,
    controls: Controls,
    (user, write, execute): (bool, bool, bool),
    key: u8,
    request: Request,
) -> bool {
    let rights = Rights { user, write, execute };
    rights.allow(controls, request) && !rights.key_forbids(regime, controls, request, key)
}

const fn untranslated(address: u64) -> Translation {
    Translation {
        gpa: Gpa::new(address & 0xffff_ffff),
        page_shift: 12,
        user: true,
        write: true,
        execute: true,
        dirty: true,
        global: false,
        key: 0,
    }
}

const fn is_canonical(address: u64, bits: u32) -> bool {
    ((address << (64 - bits)) as i64 >> (64 - bits)) as u64 == address
}

const fn canonical<E>(address: u64, bits: u32) -> Result<u64, WalkError<E>> {
    if is_canonical(address, bits) { Ok(address) } else { Err(WalkError::NonCanonical) }
}

/// One walk; `None` if an entry changed before its flags were set.
fn once<T: Tables>(
    tables: &mut T,
    regime: &Regime,
    address: u64,
    request: Request,
) -> Result<Option<(Translation, Way)>, WalkError<T::Error>> {
    let (mode, width) = (regime.mode, regime.mode.width());
    let mut used = [Used::NONE; DEEPEST + 1];
    let mut depth = 0;
    let mut rights = Rights::ALL;
    let (mut table, mut level) = start(regime, address).ok_or(WalkError::Fault(rights::absent(regime, request)))?;
    let (base, shift, page) = loop {
        let shift = 12 + u32::from(level - 1) * mode.index_bits();
        let index = address >> shift & ((1 << mode.index_bits()) - 1);
        let at = Gpa::new(table + index * width.bytes());
        let raw = tables.load(at, width).map_err(WalkError::Tables)?;
        rights = rights.through(raw, mode);
        match entry::read(regime, level, raw) {
            Step::Absent => return Err(WalkError::Fault(rights::absent(regime, request))),
            Step::Reserved => {
                return Err(WalkError::Fault(
                    rights::absent(regime, request) | PageFault::PRESENT | PageFault::RESERVED,
                ));
            }
            Step::Table(next) => {
                used[depth] = Used { at, raw };
                (depth, table, level) = (depth + 1, next, level - 1);
            }
            Step::Page(base) => break (base, shift, Used { at, raw }),
        }
    };
    let key = entry::key(mode, page.raw);
    rights.judge(regime, request, key).map_err(WalkError::Fault)?;
    let dirties = if request.kind == Kind::Write { DIRTY } else { 0 };
    for entry in &used[..depth] {
        if !set(tables, width, entry, ACCESSED)? {
            return Ok(None);
        }
    }
    if !set(tables, width, &page, ACCESSED | dirties)? {
        return Ok(None);
    }
    used[..depth].iter_mut().for_each(|entry| entry.raw |= ACCESSED);
    used[depth] = Used { raw: page.raw | ACCESSED | dirties, ..page };
    let way = Way { used, depth: depth + 1 };
    let translation = Translation {
        gpa: Gpa::new(base | address & ((1 << shift) - 1)),
        page_shift: shift as u8,
        user: rights.user,
        write: rights.write,
        execute: rights.execute || !regime.controls.contains(Controls::NO_EXECUTE),
        dirty: (page.raw | dirties) & DIRTY != 0,
        global: regime.controls.contains(Controls::GLOBAL_PAGES) && page.raw & GLOBAL != 0,
        key,
    };
    Ok(Some((translation, way)))
}

/// The first table and its level; `None` if a page-directory pointer is not present.
fn start(regime: &Regime, address: u64) -> Option<(u64, u8)> {
    match regime.mode {
        Mode::Pae => {
            let pointer = regime.pointers[(address >> 30 & 3) as usize];
            (pointer & 1 != 0).then_some((pointer & entry::address_mask(regime.physical_bits), 2))
        }
        Mode::Bits32 => Some((regime.root & 0xffff_f000, 2)),
        mode => Some((regime.root & entry::address_mask(regime.physical_bits), mode.top())),
    }
}

/// Sets flags in an entry that was read; whether it was still the same.
fn set<T: Tables>(tables: &mut T, width: Width, entry: &Used, flags: u64) -> Result<bool, WalkError<T::Error>> {
    if entry.raw & flags == flags {
        return Ok(true);
    }
    tables.compare_exchange(entry.at, width, entry.raw, entry.raw | flags).map_err(WalkError::Tables)
}

/// Whether a load of CR3 accepts this page-directory pointer (SDM 4.4.1: else a general-protection fault).
pub const fn pointer_is_valid(pointer: u64, physical_bits: u8) -> bool {
    const ALWAYS_RESERVED: u64 = 0b1_1110_0110;
    pointer & 1 == 0 || pointer & (ALWAYS_RESERVED | !(entry::address_mask(physical_bits) | 0xfff)) == 0
}
