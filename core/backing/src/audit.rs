//! What is in the hypervisor's own mapping, and what should be (INV-10).
//!
//! Purpose: an audit that proves the invariant for every frame: by the machine's tables against each frame's leases, and by
//! the objects against what the frames say that they are. It may run while guests run.
//!
//! Protocol: frames are looked at under their locks, 512 at a time under the lock by which blocks become private or stop
//! being so; objects are walked pinned. A page that goes or comes meanwhile is in one of its states, each of which is right.

use entresol_addr::Pfn;
use entresol_machine::Machine;
use entresol_sync::Pin;

use crate::{Object, Objects, Supply};

/// What an audit found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Frames that the pool has.
    pub frames: u64,
    /// Of those, private ones: in use, free, or to be zeroed.
    pub private: u64,
    /// Private frames that are mapped because they are leased.
    pub leased: u64,
    /// Private frames that are mapped because their removal failed, and is tried again.
    pub stuck: u64,
    /// Pages of private objects.
    pub pages: u64,
    /// Frames that break INV-10: private and mapped without a lease, leased and absent, absent but not private, or pages
    /// of a private object that are no private frames, or the reverse.
    pub wrong: u64,
    /// One of them.
    pub example: Option<Pfn>,
}

impl Audit {
    fn blame(&mut self, pfn: Pfn) {
        self.wrong += 1;
        self.example.get_or_insert(pfn);
    }
}

/// Looks at every frame of the supply's pool and at every object.
pub fn audit<M: Machine>(supply: &Supply<'_, M>, objects: &Objects, pin: &Pin<'_>) -> Audit {
    let mut audit = Audit::default();
    supply.pool.visit_mapping(supply.machine, &mut |seen| {
        let count = |which: bool| if which { seen.frames.count() } else { 0 };
        audit.frames += count(true);
        audit.private += count(seen.private);
        audit.leased += count(seen.leased);
        audit.stuck += count(seen.stuck);
        if seen.mapped != (!seen.private || seen.leased || seen.stuck) {
            audit.blame(seen.frames.start());
        }
    });
    for object in objects.iter(pin) {
        let private = object.is_private();
        Object::visit_content(object, supply.machine, &mut |pfn| {
            audit.pages += u64::from(private);
            if supply.pool.is_private(pfn) != private {
                audit.blame(pfn);
            }
        });
    }
    audit
}
