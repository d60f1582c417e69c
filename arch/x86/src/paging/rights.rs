//! Whether an access may be made through the entries that lead to its page.
//!
//! Source: SDM 4.6 (access rights) and 4.7 (the error code).
//!
//! Invariants: pure and total.

use super::{Controls, Mode, PageFault, Regime};

const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const NO_EXECUTE: u64 = 1 << 63;

/// What is done at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A load.
    Read,
    /// A store, or an atomic update.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// An access, as far as its rights go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    /// What is done.
    pub kind: Kind,
    /// By user code (CPL 3), and not by the processor on its own account.
    pub user: bool,
    /// The supervisor may touch user pages: EFLAGS.AC is set and the access is the instruction's own, not one to a descriptor
    /// table or a task state.
    pub by_leave: bool,
}

/// What all entries of a way allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rights {
    pub user: bool,
    pub write: bool,
    pub execute: bool,
}

/// The error code of an access that found nothing.
pub(super) fn absent(regime: &Regime, request: Request) -> PageFault {
    let mut code = PageFault::empty();
    code.set(PageFault::WRITE, request.kind == Kind::Write);
    code.set(PageFault::USER, request.user);
    let controls = regime.controls;
    let wide = regime.mode != Mode::Bits32;
    let told = controls.contains(Controls::NO_SUPERVISOR_FETCH) || wide && controls.contains(Controls::NO_EXECUTE);
    code.set(PageFault::FETCH, request.kind == Kind::Fetch && told);
    code
}

impl Rights {
    /// Before the first entry.
    pub const ALL: Self = Self { user: true, write: true, execute: true };

    /// Through one more entry.
    pub const fn through(self, raw: u64, mode: Mode) -> Self {
        let forbids = !matches!(mode, Mode::Bits32) && raw & NO_EXECUTE != 0;
        Self {
            user: self.user && raw & USER != 0,
            write: self.write && raw & WRITABLE != 0,
            execute: self.execute && !forbids,
        }
    }

    /// Whether the access may be made to a page with protection key `key`.
    pub fn judge(self, regime: &Regime, request: Request, key: u8) -> Result<(), PageFault> {
        let keyed = self.key_forbids(regime, regime.controls, request, key);
        if self.allow(regime.controls, request) && !keyed {
            return Ok(());
        }
        let mut code = absent(regime, request) | PageFault::PRESENT;
        code.set(PageFault::KEY, keyed);
        Err(code)
    }

    /// Whether the access may be made, whatever the page's protection key.
    #[inline]
    pub fn allow(self, controls: Controls, request: Request) -> bool {
        match request.kind {
            Kind::Fetch => self.may_fetch(controls, request),
            Kind::Read => self.may_touch(controls, request),
            Kind::Write => self.may_touch(controls, request) && self.may_write(controls, request),
        }
    }

    #[inline]
    fn may_touch(self, controls: Controls, request: Request) -> bool {
        match (request.user, self.user) {
            (true, page) => page,
            (false, true) => request.by_leave || !controls.contains(Controls::NO_SUPERVISOR_ACCESS),
            (false, false) => true,
        }
    }

    fn may_write(self, controls: Controls, request: Request) -> bool {
        self.write || !request.user && !controls.contains(Controls::WRITE_PROTECT)
    }

    fn may_fetch(self, controls: Controls, request: Request) -> bool {
        let side = match (request.user, self.user) {
            (true, page) => page,
            (false, true) => !controls.contains(Controls::NO_SUPERVISOR_FETCH),
            (false, false) => true,
        };
        side && (self.execute || !controls.contains(Controls::NO_EXECUTE))
    }

    /// Protection keys: data accesses to user pages, with four or five levels (SDM 4.6.2).
    #[inline]
    pub fn key_forbids(self, regime: &Regime, controls: Controls, request: Request, key: u8) -> bool {
        let keys = matches!(regime.mode, Mode::Level4 | Mode::Level5)
            && controls.contains(Controls::PROTECTION_KEYS)
            && self.user
            && request.kind != Kind::Fetch;
        let bits = regime.pkru >> (2 * u32::from(key & 0xf));
        let (access_disable, write_disable) = (bits & 1 != 0, bits & 2 != 0);
        let obeys = request.user || controls.contains(Controls::WRITE_PROTECT);
        keys && (access_disable || write_disable && request.kind == Kind::Write && obeys)
    }
}
