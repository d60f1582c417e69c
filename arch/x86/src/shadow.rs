//! The guest's tables as shadow tables need them, and the words of a shadow table.
//!
//! Purpose: [`Guest`] puts the guest's tables of every paging mode ([`paging`](crate::paging)) behind the one shape that
//! `entresol_shadow` knows; [`Shadow`] writes what the processor walks in their place, in 4 KiB pages: four- or five-level tables for a guest
//! in long mode that has as many, and PAE's otherwise, because interrupts are delivered otherwise in long mode.
//!
//! | guest | shadow level 5 | 4 | 3 | 2 | 1 |
//! |---|---|---|---|---|---|
//! | no paging | | | four pointers to physical memory | physical memory | physical memory |
//! | 32-bit | | | four pointers by registers | a quarter of the directory, two words an entry | half of a table |
//! | PAE | | | the four pointers | directory | table |
//! | four levels | | PML4 | PDPT | directory | table |
//! | five levels | PML5 | PML4 | PDPT | directory | table |
//!
//! A table of pointers is the first 32 bytes of its frame, which must lie below 4 GiB: CR3 has 32 bits then. The processor reads
//! them when it enters the guest.
//!
//! Below a large page the tables are parts of it. The processor runs with CR0.WP and EFER.NXE set, and with the guest's SMEP, SMAP and
//! PKE, as far as its mode has them. A store by the supervisor of a guest without CR0.WP to a page that it may only read gets an entry that is the supervisor's
//! alone: user code faults there, and gets its own again.
//!
//! Invariants: pure, but for the guest's memory behind [`Tables`]; nothing here panics, whatever the tables hold.
//!
//! Known holes: with CR0.WP clear, neither SMAP nor protection keys see the supervisor's accesses to such an entry.

use entresol_addr::{Gfn, Gpa, Pfn};
use entresol_shadow::{GuestTables, GuestWords, Key, MOST_LEVELS, Rights, Says, ShadowFormat, Source, Stop, Walk};

use crate::mmio;
use crate::npt::{ACCESSED as A, NO_EXECUTE, PRESENT, USER, WRITABLE};
use crate::paging::entry::{self, Step};
use crate::paging::{Controls, Kind, Mode, PageFault, Regime, Request, Tables, WalkError, Width, allows, trace};

/// D of an entry.
const DIRTY: u64 = 1 << 6;
const KEY_SHIFT: u32 = 59;

/// The guest's memory and registers, for one call.
pub struct Guest<T> {
    /// Its memory.
    pub tables: T,
    /// Its registers.
    pub regime: Regime,
}

impl<T: Tables> Guest<T> {
    /// The paging mode, and the flags by which entries are read.
    fn role(&self) -> u32 {
        let mode = match self.regime.mode {
            Mode::Off => 0,
            Mode::Bits32 => 1,
            Mode::Pae => 2,
            Mode::Level4 => 3,
            Mode::Level5 => 4,
        };
        mode << 16 | u32::from(self.regime.controls.bits())
    }

    fn by_registers(&self, level: u8) -> Key {
        Key {
            source: Source::Registers { root: self.regime.root, pointers: self.regime.pointers },
            level,
            rights: Rights::ALL,
            role: self.role(),
        }
    }

    fn table(&self, at: u64, shift: u8, level: u8, rights: Rights) -> Key {
        Key { source: Source::Table { at: Gpa::new(at), shift }, level, rights, role: self.role() }
    }

    /// What registers say behind word `index` of a table at `level`.
    fn registers_say(&self, level: u8, index: u64) -> Says {
        let regime = &self.regime;
        match (regime.mode, level, index) {
            (Mode::Off, 3, 0..4) => {
                let source = Source::Page { gfn: Gfn::new(index << 18) };
                Says::Table(Key { source, ..self.by_registers(2) })
            }
            (Mode::Bits32, 3, 0..4) => {
                let directory = regime.root & 0xffff_f000;
                Says::Table(self.table(directory + index * 1024, 2, 2, Rights::ALL))
            }
            (Mode::Pae, 3, 0..4) => match regime.pointers[index as usize] {
                pointer if pointer & PRESENT == 0 => Says::Nothing,
                pointer => {
                    Says::Table(self.table(pointer & entry::address_mask(regime.physical_bits), 0, 2, Rights::ALL))
                }
            },
            _ => Says::Nothing,
        }
    }

    /// What the entry `raw` says behind word `index` of the shadow table `key`.
    fn entry_says(&self, key: &Key, index: u64, raw: u64) -> Says {
        if raw & A == 0 {
            return Says::Nothing;
        }
        let (regime, level) = (&self.regime, key.level);
        let rights = through(key.rights, raw, regime);
        match entry::read(regime, level, raw) {
            Step::Absent | Step::Reserved => Says::Nothing,
            Step::Table(next) => match regime.mode {
                // Each half of a table of 1,024 entries.
                Mode::Bits32 => Says::Table(self.table(next + (index & 1) * 2048, 1, level - 1, rights)),
                _ => Says::Table(self.table(next, 0, level - 1, rights)),
            },
            Step::Page(base) => {
                let dirty = raw & DIRTY != 0;
                let rights = Rights { write: rights.write && dirty, key: entry::key(regime.mode, raw), ..rights };
                let gfn = Gpa::new(base).frame();
                if level == 1 {
                    return Says::Page { gfn, rights };
                }
                // A word of 32-bit paging's directory stands for half of a 4 MiB page.
                let half = if regime.mode == Mode::Bits32 { index & 1 } else { 0 };
                let source = Source::Page { gfn: gfn.offset(half * 512) };
                Says::Table(Key { source, level: level - 1, rights, role: key.role })
            }
        }
    }
}

/// What is left of `above` through an entry.
fn through(above: Rights, raw: u64, regime: &Regime) -> Rights {
    let wide = regime.mode != Mode::Bits32 && regime.controls.contains(Controls::NO_EXECUTE);
    Rights {
        user: above.user && raw & USER != 0,
        write: above.write && raw & WRITABLE != 0,
        execute: above.execute && !(wide && raw & NO_EXECUTE != 0),
        key: 0,
    }
}

/// The guest's entry behind word `index` of a [`Source::Table`].
const fn behind(at: Gpa, shift: u8, index: u64) -> (Gpa, Width) {
    let width = if shift == 0 { Width::Long } else { Width::Word };
    (Gpa::new(at.get() + (((index * 8) >> shift) & !(width.bytes() - 1))), width)
}

impl<T: Tables> GuestTables for Guest<T> {
    type Request = Request;
    type Error = WalkError<T::Error>;

    fn walk(&mut self, linear: u64, request: Request) -> Result<Walk, Self::Error> {
        let (translation, way) = trace(&mut self.tables, &self.regime, linear, request)?;
        let mut keys = [self.root(); MOST_LEVELS];
        let (mut depth, mut entries) = (1, way.entries().iter());
        let mut rights = Rights::ALL;
        // Without long mode addresses have 32 bits.
        let linear = if keys[0].level == 3 { linear & 0xffff_ffff } else { linear };
        for above in (1..=keys[0].level).rev() {
            let key = keys[depth - 1];
            let index = linear >> (12 + 9 * (u32::from(above) - 1)) & 511;
            let says = match key.source {
                Source::Registers { .. } => self.registers_say(above, index),
                Source::Table { .. } => match entries.next() {
                    Some(entry) => self.entry_says(&key, index, entry.raw),
                    None => Says::Nothing,
                },
                Source::Page { gfn } if above > 1 => {
                    let source = Source::Page { gfn: gfn.offset(index << (9 * (u32::from(above) - 1))) };
                    Says::Table(Key { source, level: above - 1, ..key })
                }
                Source::Page { gfn } => Says::Page { gfn: gfn.offset(index), rights: key.rights },
            };
            match says {
                Says::Table(next) if depth < MOST_LEVELS => {
                    keys[depth] = next;
                    depth += 1;
                }
                Says::Page { rights: allowed, .. } => rights = allowed,
                // The walk has come to a page by these very entries.
                Says::Table(_) | Says::Nothing => return Err(WalkError::Contended),
            }
        }
        if request.kind == Kind::Write && !rights.write {
            // Allowed all the same: the supervisor's, without CR0.WP. Fetches from what is now its own would be allowed too.
            let execute = rights.execute && !self.regime.controls.contains(Controls::NO_SUPERVISOR_FETCH);
            rights = Rights { user: false, write: true, execute, ..rights };
        }
        Ok(Walk { keys, depth, gpa: translation.gpa, rights })
    }

    #[inline]
    fn last(&mut self, key: &Key, linear: u64, request: Request) -> Result<Option<(Gpa, Rights)>, Self::Error> {
        if !self.regime.mode.reaches(linear) {
            return Ok(None);
        }
        let index = linear >> 12 & 511;
        let says = match key.source {
            Source::Page { gfn } => Says::Page { gfn: gfn.offset(index), rights: key.rights },
            Source::Table { at, shift } => {
                let (entry, width) = behind(at, shift, index);
                let raw = self.tables.load(entry, width).map_err(WalkError::Tables)?;
                self.entry_says(key, index, raw)
            }
            Source::Registers { .. } => Says::Nothing,
        };
        let Says::Page { gfn, rights } = says else { return Ok(None) };
        // A store without the right to: the page's dirty flag may be missing, or the guest runs without CR0.WP.
        if request.kind == Kind::Write && !rights.write || !self.allows(rights, request) {
            return Ok(None);
        }
        Ok(Some((Gpa::new(gfn.base().get() | linear & 0xfff), rights)))
    }

    fn read(&mut self, key: &Key, index: u16) -> Says {
        let index = u64::from(index);
        match key.source {
            Source::Registers { .. } if *key != self.by_registers(key.level) => Says::Nothing,
            Source::Registers { .. } => self.registers_say(key.level, index),
            Source::Table { at, shift } => {
                let (entry, width) = behind(at, shift, index);
                // Entries are read as they were when the table was made.
                if key.role != self.role() {
                    return Says::Nothing;
                }
                match self.tables.load(entry, width) {
                    Ok(raw) => self.entry_says(key, index, raw),
                    Err(_) => Says::Nothing,
                }
            }
            Source::Page { .. } => Says::Nothing,
        }
    }

    fn root(&self) -> Key {
        let regime = &self.regime;
        let address = regime.root & entry::address_mask(regime.physical_bits);
        match regime.mode {
            Mode::Level5 => self.table(address, 0, 5, Rights::ALL),
            Mode::Level4 => self.table(address, 0, 4, Rights::ALL),
            Mode::Off | Mode::Bits32 | Mode::Pae => self.by_registers(3),
        }
    }

    #[inline]
    fn is_root(&self, key: &Key) -> bool {
        let regime = &self.regime;
        match (regime.mode, key.source) {
            (Mode::Level4 | Mode::Level5, Source::Table { at, shift: 0 }) => {
                let level = if regime.mode == Mode::Level5 { 5 } else { 4 };
                let root = regime.root & entry::address_mask(regime.physical_bits);
                at.get() == root && key.level == level && key.role == self.role() && key.rights == Rights::ALL
            }
            _ => *key == self.root(),
        }
    }

    #[inline]
    fn writes(&self, request: Request) -> bool {
        request.kind == Kind::Write
    }

    fn fetches(&self, request: Request) -> bool {
        request.kind == Kind::Fetch
    }

    fn allows(&self, rights: Rights, request: Request) -> bool {
        // As the processor judges shadow entries, whatever the guest's own flags are: an entry says all that they have led to.
        let controls = self.regime.controls | Controls::WRITE_PROTECT | Controls::NO_EXECUTE;
        allows(&self.regime, controls, (rights.user, rights.write, rights.execute), rights.key, request)
    }
}

/// An exception by the guest's own tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// A page fault with this code.
    Page(PageFault),
    /// The address is not canonical: general protection, or a stack fault.
    NonCanonical,
}

impl<E> From<WalkError<E>> for Stop<Exception, E> {
    fn from(error: WalkError<E>) -> Self {
        match error {
            WalkError::Fault(code) => Self::Guest(Exception::Page(code)),
            WalkError::NonCanonical => Self::Guest(Exception::NonCanonical),
            WalkError::Contended => Self::Contended,
            WalkError::Tables(error) => Self::Words(error),
        }
    }
}

/// Memory of which only whole words of eight bytes are to be had.
pub struct ByWords<W>(W);

impl<W: GuestWords> Tables for ByWords<W> {
    type Error = W::Error;

    fn load(&mut self, at: Gpa, width: Width) -> Result<u64, W::Error> {
        let word = self.0.load(Gpa::new(at.get() & !7))?;
        Ok(match width {
            Width::Long => word,
            Width::Word => word >> (at.get() % 8 * 8) & u64::from(u32::MAX),
        })
    }

    fn compare_exchange(&mut self, at: Gpa, width: Width, current: u64, new: u64) -> Result<bool, W::Error> {
        let place = Gpa::new(at.get() & !7);
        if width == Width::Long {
            return self.0.compare_exchange(place, current, new);
        }
        let (whole, shift) = (self.0.load(place)?, at.get() % 8 * 8);
        let mask = u64::from(u32::MAX) << shift;
        if whole & mask != current << shift {
            return Ok(false);
        }
        // The other half may change meanwhile: then this one counts as changed too, and the walk is made again.
        self.0.compare_exchange(place, whole, whole & !mask | new << shift)
    }
}

impl entresol_shadow::Regime for Regime {
    type Request = Request;
    type Fault = Exception;
    type Tables<W: GuestWords> = Guest<ByWords<W>>;

    fn tables<W: GuestWords>(&self, words: W) -> Guest<ByWords<W>> {
        Guest { tables: ByWords(words), regime: *self }
    }
}

/// The words of shadow tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shadow {
    mmio: Option<mmio::Format>,
}

impl Shadow {
    /// For a processor, as [`Nested::new`](crate::npt::Nested::new).
    pub const fn new(physical_bits: u8, leaking_bits: Option<u8>) -> Self {
        Self { mmio: mmio::Format::new(mmio::Kind::Reserved, physical_bits, leaking_bits) }
    }
}

impl ShadowFormat for Shadow {
    fn leaf(&self, frame: Pfn, rights: Rights) -> u64 {
        let bit = |set: bool, bits: u64| if set { bits } else { 0 };
        frame.base().get()
            | PRESENT
            | A
            | DIRTY
            | bit(rights.user, USER)
            | bit(rights.write, WRITABLE)
            | bit(!rights.execute, NO_EXECUTE)
            | u64::from(rights.key & 0xf) << KEY_SHIFT
    }

    fn table(&self, frame: Pfn, above: &Key) -> u64 {
        let open = match above.source {
            // In a page-directory pointer these bits must be zero (APM 5.2.3).
            Source::Registers { .. } => 0,
            Source::Table { .. } | Source::Page { .. } => WRITABLE | USER | A,
        };
        frame.base().get() | PRESENT | open
    }

    fn mmio(&self, gfn: Gfn, rights: Rights, generation: u64) -> Option<u64> {
        let Rights { user, write, execute, .. } = rights;
        let access = mmio::Access { write, user, execute };
        self.mmio?.encode(&mmio::Entry { gfn, access, generation: mmio::stored(generation) })
    }
}
