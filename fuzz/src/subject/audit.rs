//! What must hold after every operation, for every translation that the tables have.

use entresol_addr::{Gfn, GfnRange};
use entresol_backing::ObjectHandle;
use entresol_table::Leaf;

use super::{CPU, RAM, Subject, WINDOW};
use crate::reference::Behind;

impl Subject<'_> {
    pub(super) fn audit(&self) -> Result<(), String> {
        let mut wrong = None;
        let window = GfnRange::new(Gfn::new(RAM), WINDOW).expect("a range");
        self.vm.table().visit(&self.host.machine, window, |gfn, leaf| {
            if wrong.is_none() {
                wrong = self.judge(gfn, leaf).err();
            }
        });
        wrong.map_or(Ok(()), Err)
    }

    fn judge(&self, gfn: Gfn, leaf: Leaf) -> Result<(), String> {
        let range = GfnRange::block(gfn, leaf.size);
        let what = format!("{gfn:#x} is translated by {leaf:?}");
        if self.is_excluded(range) {
            return Err(format!("INV-3: {what} while it is being invalidated"));
        }
        let last = range.end().get() - 1;
        let Some((_, slot)) = self.reference.at(gfn.get()).filter(|(_, slot)| slot.holds(last)) else {
            return Err(format!("INV-5: {what} and lies in no slot"));
        };
        let object = self.reference.object(slot.object).ok_or_else(|| format!("{what} to no object"))?;
        if leaf.permissions.write && (slot.is_read_only() || object.behind == Behind::Rom) {
            return Err(format!("INV-13: {what} and is read-only"));
        }
        let pin = self.host.epoch.pin(CPU);
        for at in [gfn.get(), last] {
            let frame = slot.behind(at);
            let behind = self.host.objects.get(&pin, ObjectHandle::from_raw(slot.object));
            let behind = behind.and_then(|object| object.present(&self.host.supply(CPU), frame));
            let expected = behind.map(|grant| grant.frame(frame));
            let shown = leaf.frame_of(Gfn::new(at));
            // Memory of a forked object that nobody has written reads as the one page of zeros.
            let is_zero = self.host.pool.is_zero_page(shown)
                && !leaf.permissions.write
                && self.reference.word(slot.object, frame) == 0;
            if expected != Some(shown) && !is_zero {
                return Err(format!("INV-11: {what}, and {expected:?} is behind {at:#x}"));
            }
            let dirty = self.vm.is_dirty(&pin, Gfn::new(at));
            if slot.logs() && leaf.permissions.write && object.behind == Behind::Memory && dirty != Some(true) {
                return Err(format!("INV-4: {what}, and the log says {dirty:?} of {at:#x}"));
            }
        }
        Ok(())
    }
}
