//! Changes that leave the memory behind an entry as it is: wider permissions, the access flag.
//!
//! Both happen in place. Arm DDI 0487 D8.16.1 (rule R_WHZWS in every issue) asks for break-before-make when the output
//! address, the block size, the memory type or shareability change; access permissions and the access flag are not
//! among them.

use entresol_addr::{Gfn, Pfn};
use entresol_machine::{Machine, TlbOp};

use crate::vmid::flush_narrower;
use crate::{Entry, Format, Leaf, PageWork, Permissions, Table, VmidSource, Walk};

/// Why an entry was not relaxed. Nothing was changed; unless it is `Outside`, the guest may try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelaxError {
    /// The table translates no such address.
    Outside {
        /// The guest frame asked for.
        gfn: Gfn,
    },
    /// There is no leaf, or it maps another frame by now.
    Gone,
    /// Another CPU is changing the entry.
    Busy,
}

impl<F: Format> Table<F> {
    /// Adds permissions to the leaf that maps `gfn` to `frame`, whatever its size, and makes it young; returns it as it
    /// is then. `work.prepare` runs before the wider entry is visible; it may have run for nothing on `Busy`.
    ///
    /// The TLBs are flushed of the narrower entry, which may be cached with its refusal.
    ///
    /// # Errors
    ///
    /// [`RelaxError`].
    #[allow(clippy::too_many_arguments, reason = "the place, the condition, the change and the machine")]
    pub fn relax<M: Machine, V: VmidSource, W: PageWork>(
        &self,
        machine: &M,
        vmid: V,
        gfn: Gfn,
        frame: Pfn,
        add: Permissions,
        work: &mut W,
    ) -> Result<Leaf, RelaxError> {
        let at = self.walk(machine, gfn).ok_or(RelaxError::Outside { gfn })?;
        self.relax_at(machine, vmid, gfn, &at, frame, add, work)
    }

    /// [`Self::relax`] of the entry that a walk for `gfn` ended at: for callers that decide by what is there.
    ///
    /// # Errors
    ///
    /// [`RelaxError`]; also if the entry is not what the walk saw any more.
    #[allow(clippy::too_many_arguments, reason = "as above, and the walk")]
    pub fn relax_at<M: Machine, V: VmidSource, W: PageWork>(
        &self,
        machine: &M,
        vmid: V,
        gfn: Gfn,
        at: &Walk,
        frame: Pfn,
        add: Permissions,
        work: &mut W,
    ) -> Result<Leaf, RelaxError> {
        let old = match at.entry {
            Entry::Leaf(leaf) if leaf.frame_of(gfn) == frame => leaf,
            Entry::Broken => return Err(RelaxError::Busy),
            _ => return Err(RelaxError::Gone),
        };
        let new = Leaf { permissions: old.permissions.union(add), young: true, ..old };
        if new == old {
            return Ok(old);
        }
        if work.must_prepare() {
            work.prepare();
        }
        machine.compare_exchange(at.word, at.raw, self.format().leaf(&new)).map_err(|_| RelaxError::Busy)?;
        flush_narrower(machine, &vmid, |vmid| TlbOp::Ipa { vmid, gfn, size: old.size, leaf_only: true });
        machine.published();
        Ok(new)
    }

    /// Sets the access flag of the leaf behind `gfn` and returns it. An entry without the flag is never cached in a
    /// TLB (Arm DDI 0487 D8.5, the Access flag), so nothing is flushed.
    ///
    /// # Errors
    ///
    /// [`RelaxError`].
    #[inline]
    pub fn make_young<M: Machine>(&self, machine: &M, gfn: Gfn) -> Result<Leaf, RelaxError> {
        let at = self.walk(machine, gfn).ok_or(RelaxError::Outside { gfn })?;
        let old = match at.entry {
            Entry::Leaf(leaf) => leaf,
            Entry::Broken => return Err(RelaxError::Busy),
            _ => return Err(RelaxError::Gone),
        };
        if !old.young {
            machine.compare_exchange(at.word, at.raw, self.format().young(at.raw)).map_err(|_| RelaxError::Busy)?;
            machine.published();
        }
        Ok(Leaf { young: true, ..old })
    }
}
