//! What is in a store, found by walking all objects: a place does not say who names it.
//!
//! Protocol: whoever empties a store lets nothing more leave for it, and searches, bringing what is found, until a search that began afterwards
//! finds nothing: an object that is made, forked or changed meanwhile may name a place behind where the search is. What no object names
//! then is still read, or known to be in a frame too ([`crate::FramePool::stop_keeping_for`]), or goes with an object that ends.

use entresol_machine::Machine;
use entresol_sync::Pin;

use super::{Kind, ObjectHandle, Objects};
use crate::{StoreId, StoreSlot};

/// A walk through all objects, some steps at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Search {
    place: usize,
    frame: u64,
}

/// What some steps of a search came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Frame `frame` of `object` is at `slot`, and in no frame that the object knows.
    Page {
        /// Whose.
        object: ObjectHandle,
        /// Which.
        frame: u64,
        /// Where it is.
        slot: StoreSlot,
    },
    /// Nothing yet.
    Nothing,
    /// There are no more objects.
    End,
}

impl Search {
    /// At most `steps` steps, each a frame, or as many as are the same way vacant or present together, or a place without an object.
    pub fn next<M: Machine>(
        &mut self,
        objects: &Objects,
        pin: &Pin<'_>,
        machine: &M,
        store: StoreId,
        steps: usize,
    ) -> Found {
        for _ in 0..steps {
            let Some(object) = objects.at(pin, self.place) else { return Found::End };
            let live = object.handle().filter(|_| matches!(object.kind(), Kind::Anonymous(_)));
            let Some(handle) = live.filter(|_| self.frame < object.frames()) else {
                (self.place, self.frame) = (self.place + 1, 0);
                continue;
            };
            let frame = self.frame;
            let (stored, behind) = object.tree.stored_from(machine, frame);
            self.frame = behind;
            if let Some(slot) = stored.filter(|slot| slot.store() == store) {
                return Found::Page { object: handle, frame, slot };
            }
        }
        Found::Nothing
    }
}
