//! What all virtual machines of one machine share.

use entresol_backing::{FramePool, Objects, Supply};
use entresol_machine::{Features, Machine};
use entresol_sync::Epoch;

use crate::{Merging, OutOfHeap, Vmids};

/// The machine, its frames, its objects, its VMIDs, its grace periods.
pub struct Host<M> {
    /// The machine.
    pub machine: M,
    /// Frames for guests and tables.
    pub pool: FramePool,
    /// Memory objects.
    pub objects: Objects,
    /// VMIDs.
    pub vmids: Vmids,
    /// Which pages are equal.
    pub merging: Merging,
    /// Grace periods: pinned while a fault is handled.
    pub epoch: Epoch,
    /// The machine's constants.
    features: Features,
}

impl<M: Machine> Host<M> {
    /// A host on `machine`, with the frames that `pool` was given and the objects that `objects` has room for.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn new(machine: M, pool: FramePool, objects: Objects) -> Result<Self, OutOfHeap> {
        let vmids = Vmids::new(machine.features().vmid_bits)?;
        let features = machine.features();
        Ok(Self { machine, pool, objects, vmids, merging: Merging::new(), epoch: Epoch::new(), features })
    }

    /// The machine's constants.
    #[inline]
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// Where CPU `cpu` gets frames.
    #[inline]
    pub fn supply(&self, cpu: usize) -> Supply<'_, M> {
        Supply::new(&self.machine, &self.pool, cpu)
    }
}
