//! What is in the hypervisor's own mapping, and what should be (INV-10).
//!
//! Purpose: an audit that proves the invariant for every frame: by the machine's tables against each frame's leases, and by
//! the objects against what the frames say that they are. It may run while guests run.
//!
//! Protocol: frames are looked at under their locks, 512 at a time under the lock by which blocks become private or stop
//! being so; objects are walked pinned. A page that goes or comes meanwhile is in one of its states, each of which is right. Where
//! a page and its frame say different things, the page is being converted: it is asked again when that is over.

use entresol_addr::Pfn;
use entresol_machine::Machine;
use entresol_sync::Pin;

use crate::{Objects, Supply};

/// What an audit found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Frames that the pool has.
    pub frames: u64,
    /// Of those, private ones: in use, free, or to be zeroed.
    pub private: u64,
    /// Private frames that are mapped because they are leased.
    pub leased: u64,
    /// Private frames that are mapped because the guest shares their pages with the hypervisor; those that it gave back among them
    /// until they are zeroed.
    pub open: u64,
    /// Private frames that are mapped because their removal failed, and is tried again.
    pub stuck: u64,
    /// Frames that are bad: never given out again, and absent if they are private.
    pub poisoned: u64,
    /// Pages of private objects.
    pub pages: u64,
    /// Frames that break INV-10: private and mapped without a lease or a page that is shared, leased or shared and absent,
    /// absent but not private, pages of a private object that are no private frames or the reverse, or frames that are not
    /// what their page's attribute says.
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
        audit.open += count(seen.open);
        audit.stuck += count(seen.stuck);
        audit.poisoned += count(seen.poisoned);
        if seen.mapped != (!seen.private || seen.leased || seen.open || seen.stuck) {
            audit.blame(seen.frames.start());
        }
    });
    for object in objects.iter(pin) {
        let private = object.is_private();
        object.visit_content(supply.machine, &mut |frame, pfn, open| {
            audit.pages += u64::from(private);
            let follows = !private || supply.pool.is_open(pfn) == open || supply.pool.is_poisoned(pfn);
            if supply.pool.is_private(pfn) != private || !follows && !object.is_followed(supply, frame) {
                audit.blame(pfn);
            }
        });
    }
    audit
}
