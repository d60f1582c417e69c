//! Merging pages of equal content, of one object or of several: the object's side.
//!
//! Protocol: an object takes part once it is told to ([`Object::take_part`]); its untouched memory reads as the zero page
//! from then on. Then, page by page: [`Object::standing`] says what is there, [`Object::keep`] makes a page that others
//! may join, [`Object::hold_offered`] refers to one, [`Object::join`] compares and joins, [`Object::vacate`] gives a page of
//! zeros back. For the three that change something the caller has taken every translation to the page away, keeps new
//! ones out, and has waited a grace period for whoever writes it for the guest; it is pinned.
//!
//! Devices and ROM never take part.

use entresol_machine::Machine;

use super::{Kind, Object};
use crate::tree::{Merged, Offered, Span, Standing};
use crate::{OutOfMemory, Supply};

impl Object {
    /// Whether its kind can be merged. Private memory is neither compared nor shared with strangers.
    pub fn can_merge(&self) -> bool {
        matches!(self.kind(), Kind::Anonymous(_)) && !self.is_private()
    }

    /// From now on its pages may be offered and joined. Before any is, the caller waits a grace period and takes away what is
    /// mapped: a fault that is on its way may still make a page where another maps the zero page.
    pub fn take_part(&self) {
        if self.can_merge() {
            self.tree.take_part();
        }
    }

    /// What stands at `frame`, without touching it. The caller is pinned.
    pub fn standing<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Standing {
        if !self.can_merge() || frame >= self.frames() {
            return Standing::Other;
        }
        self.tree.standing(supply, frame)
    }

    /// What the 512 frames from `start`, a multiple of 512, hold. The caller is pinned.
    pub fn span<M: Machine>(&self, machine: &M, start: u64) -> Span {
        if !self.can_merge() || start >= self.frames() {
            return Span::Nothing { next: u64::MAX };
        }
        self.tree.span(machine, start)
    }

    /// The own page at `frame` is never written again, and others may join it. `false` if there is none.
    pub fn offer<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> bool {
        let _structure = self.structure.lock();
        self.standing(supply, frame) != Standing::Other && self.tree.offer(supply.machine, frame)
    }

    /// A reference to the offered page at `frame`, if one is there that another page may join. The caller is pinned.
    pub fn hold_offered<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Option<Offered> {
        matches!(self.standing(supply, frame), Standing::Offered(_)).then(|| self.tree.hold_offered(supply, frame))?
    }

    /// Whether the own page at `frame` has the bytes and the tags of `offered`, now.
    pub fn reads_as<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, offered: &Offered) -> bool {
        frame < self.frames() && self.can_merge() && self.tree.reads_as(supply, frame, offered)
    }

    /// The own page at `frame` becomes `offered`, if it has its bytes and its tags.
    pub fn join<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64, offered: Offered) -> Merged {
        let _structure = self.structure.lock();
        if self.standing(supply, frame) == Standing::Other {
            offered.give_back(supply);
            return Merged::Gone;
        }
        self.tree.join(supply, frame, offered)
    }

    /// The own page at `frame` becomes vacant, if it is all zeros, its tags too.
    pub fn vacate<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Merged {
        let _structure = self.structure.lock();
        if self.standing(supply, frame) == Standing::Other {
            return Merged::Gone;
        }
        self.tree.vacate(supply, frame)
    }

    /// The own block around `frame` becomes vacant, if it is all zeros, its tags too.
    pub fn vacate_block<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Merged {
        let _structure = self.structure.lock();
        match self.span(supply.machine, frame & !511) {
            Span::Block if !self.tree.is_zero_block(supply.machine, frame) => Merged::Differs,
            Span::Block => {
                let start = frame & !511;
                let punched = self.tree.punch(supply, start, start + 512);
                if punched.is_ok() { Merged::Done } else { Merged::Gone }
            }
            Span::Nothing { .. } | Span::Pages => Merged::Gone,
        }
    }

    /// The own block around `frame` becomes own pages, which can be merged one by one. `false` if there is none.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`], for the node; nothing changed.
    pub fn break_block<M: Machine>(&self, supply: &Supply<'_, M>, frame: u64) -> Result<bool, OutOfMemory> {
        let _structure = self.structure.lock();
        if self.standing(supply, frame) == Standing::Other {
            return Ok(false);
        }
        self.tree.break_own_block(supply, frame)
    }
}
