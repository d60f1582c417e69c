//! An entry that one CPU has taken out of service: the owned forms of a word.
//!
//! Protocol (INV-2): a valid word becomes [`Broken`] by compare-and-swap; [`Broken::flush`] is the only way to a
//! [`Blank`], and only a `Blank` can be filled with something else. While either exists its word says "claimed", which
//! nobody else overwrites, so what ends a claim is a plain store.

use core::marker::PhantomData;

use entresol_machine::{Machine, TlbOp, Vmid, Word};

use crate::entry::vacant;
use crate::marker::Marker;
use crate::vmid::flush;
use crate::{Format, VmidSource};

/// A claimed word whose old translation TLBs may still hold.
#[must_use = "a claim that is dropped leaves its entry claimed for ever"]
pub(crate) struct Broken<'m, M, F> {
    machine: &'m M,
    word: Word,
    format: PhantomData<F>,
}

/// A claimed word that no TLB holds a translation for.
#[must_use = "a claim that is dropped leaves its entry claimed for ever"]
pub(crate) struct Blank<'m, M, F> {
    machine: &'m M,
    word: Word,
    format: PhantomData<F>,
}

impl<'m, M: Machine, F: Format> Broken<'m, M, F> {
    /// Breaks `word` if it still holds `current`, a valid entry.
    pub(crate) fn take(machine: &'m M, word: Word, current: u64) -> Option<Self> {
        machine.compare_exchange(word, current, Marker::Claimed.encode::<F>()).ok()?;
        Some(Self { machine, word, format: PhantomData })
    }

    /// Invalidates what TLBs hold for the old entry, and waits for it.
    pub(crate) fn flush<V: VmidSource>(self, vmid: &V, op: impl FnOnce(Vmid) -> TlbOp) -> Blank<'m, M, F> {
        flush(self.machine, vmid, op);
        Blank { machine: self.machine, word: self.word, format: self.format }
    }

    /// Puts the very word back that was broken: no invalidation is needed for that.
    pub(crate) fn restore(self, old: u64) {
        self.machine.store(self.word, old);
    }
}

impl<'m, M: Machine, F: Format> Blank<'m, M, F> {
    /// Claims a word that was seen to be vacant, and held `raw`.
    pub(crate) fn take(machine: &'m M, format: F, word: Word, raw: u64) -> Option<Self> {
        machine.compare_exchange(word, vacant(format, raw), Marker::Claimed.encode::<F>()).ok()?;
        Some(Self { machine, word, format: PhantomData })
    }

    /// Publishes a valid word.
    pub(crate) fn publish(self, raw: u64) {
        self.machine.store(self.word, raw);
    }
}
