//! Forking objects, and what relatives differ in.
//!
//! Protocol: [`Objects::freeze`]; a grace period; the caller takes writable translations away; [`Frozen::share_with`] a
//! fresh object of the same shape, once for each child; drop the [`Frozen`]. Writers are refused in between, readers are
//! not. [`Objects::fork`] does all of it for an object that no guest can write, a snapshot for example.

use core::fmt;

use entresol_machine::Machine;
use entresol_sync::Epoch;

use super::{CreateError, Kind, Object, ObjectHandle, Objects, Spec};
use crate::Supply;

/// Why an object was not forked. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForkError {
    /// The handle names no live object.
    Unknown {
        /// The handle.
        handle: ObjectHandle,
    },
    /// Only anonymous memory can be shared.
    Kind {
        /// What it is.
        kind: Kind,
    },
    /// Somebody else is forking it.
    Forking,
    /// The object that is to share is not fresh, or not of the same kind and extent.
    Shape {
        /// Its handle.
        handle: ObjectHandle,
    },
    /// The child could not be made.
    Create(CreateError),
}

impl fmt::Display for ForkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown { handle } => write!(f, "object {:#x}: must name a live object", handle.raw()),
            Self::Kind { kind } => write!(f, "object {kind:?}: must be anonymous memory"),
            Self::Forking => crate::GrantError::Forking.fmt(f),
            Self::Shape { handle } => {
                write!(f, "object {:#x}: must be as the other is, and never have been touched", handle.raw())
            }
            Self::Create(error) => error.fmt(f),
        }
    }
}

impl core::error::Error for ForkError {}

/// An object that is being forked: it is read, and not written, until this is dropped. It cannot be destroyed meanwhile.
#[must_use = "dropping it ends the fork"]
pub struct Frozen<'o> {
    objects: &'o Objects,
    object: &'o Object,
    handle: ObjectHandle,
}

impl Objects {
    /// Begins a fork. Before anything is shared, the caller waits a grace period and takes writable translations away.
    /// Not called by a pinned CPU.
    ///
    /// # Errors
    ///
    /// [`ForkError`]; nothing changed.
    pub fn freeze(&self, handle: ObjectHandle) -> Result<Frozen<'_>, ForkError> {
        let object = self.held(handle)?;
        let freeze = || {
            let Kind::Anonymous(_) = object.kind() else { return Err(ForkError::Kind { kind: object.kind() }) };
            let _structure = object.structure.lock();
            object.tree.freeze().map_err(|_| ForkError::Forking)
        };
        match freeze() {
            Ok(()) => Ok(Frozen { objects: self, object, handle }),
            Err(error) => {
                self.let_go(handle);
                Err(error)
            }
        }
    }

    /// A new object that reads as `handle` does, in the time of a grace period, whatever its size. No guest has a writable
    /// translation to it. Not called by a pinned CPU.
    ///
    /// # Errors
    ///
    /// [`ForkError`]; nothing changed.
    pub fn fork<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        epoch: &Epoch,
        handle: ObjectHandle,
    ) -> Result<ObjectHandle, ForkError> {
        let child = self.create_like(supply, handle)?;
        let shared = self.freeze(handle).and_then(|frozen| {
            epoch.synchronize();
            frozen.share_with(supply, child)
        });
        match shared {
            Ok(()) => Ok(child),
            Err(error) => {
                self.destroy(supply, epoch, child).expect("nobody else knows it");
                Err(error)
            }
        }
    }

    /// A fresh anonymous object of the same kind and extent.
    ///
    /// # Errors
    ///
    /// [`ForkError`]; nothing changed.
    pub fn create_like<M: Machine>(
        &self,
        supply: &Supply<'_, M>,
        handle: ObjectHandle,
    ) -> Result<ObjectHandle, ForkError> {
        let object = self.held(handle)?;
        let (kind, frames) = (object.kind(), object.frames());
        let (tagged, private) = (object.is_tagged(), object.is_private());
        self.let_go(handle);
        let Kind::Anonymous(policy) = kind else { return Err(ForkError::Kind { kind }) };
        let spec = if private { Spec::Private { frames, policy } } else { Spec::Anonymous { frames, policy, tagged } };
        self.create(supply, spec).map_err(ForkError::Create)
    }

    /// The object, held.
    fn held(&self, handle: ObjectHandle) -> Result<&Object, ForkError> {
        self.hold(handle).map_err(|_| ForkError::Unknown { handle })?;
        Ok(self.place(handle))
    }

    fn let_go(&self, handle: ObjectHandle) {
        self.release(handle).expect("a held object is there");
    }
}

impl Frozen<'_> {
    /// The object.
    pub fn handle(&self) -> ObjectHandle {
        self.handle
    }

    /// `child`, which nobody uses yet, becomes a relative with the same content. A grace period has passed since the
    /// freeze, and no guest can write what is shared.
    ///
    /// # Errors
    ///
    /// [`ForkError::Unknown`], [`ForkError::Shape`]; nothing changed.
    pub fn share_with<M: Machine>(&self, supply: &Supply<'_, M>, child: ObjectHandle) -> Result<(), ForkError> {
        let object = self.objects.held(child)?;
        let shape = |object: &Object| (object.kind(), object.frames(), object.is_tagged(), object.is_private());
        let alike = shape(object) == shape(self.object);
        let fits = alike && object.tree.is_untouched();
        if fits {
            object.tree.adopt(supply, &self.object.tree);
        }
        self.objects.let_go(child);
        if fits { Ok(()) } else { Err(ForkError::Shape { handle: child }) }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.object.tree.thaw();
        self.objects.let_go(self.handle);
    }
}

impl Object {
    /// Whether it shares with relatives, or did once.
    pub fn is_forked(&self) -> bool {
        matches!(self.kind(), Kind::Anonymous(_)) && self.tree.is_forked()
    }

    /// Whether it is memory whose every page may be written where it is: nobody else refers to one, and no store has one. (A
    /// device or ROM has a tree that counts as forked.)
    #[inline]
    pub fn is_own(&self) -> bool {
        self.tree.is_own()
    }

    /// Whether it is memory of which relatives, strangers or a store may have a page: who writes it by its address makes that page
    /// its own first.
    #[inline]
    pub fn may_share(&self) -> bool {
        matches!(self.kind(), Kind::Anonymous(_)) && !self.tree.is_own()
    }

    /// Calls `visit` with every frame of memory and of nodes that an anonymous object reaches, for audits: what relatives
    /// share is reached by each. Nobody changes the object meanwhile.
    pub fn visit_frames<M: Machine>(&self, machine: &M, visit: &mut impl FnMut(entresol_addr::Pfn)) {
        if let Kind::Anonymous(_) = self.kind() {
            self.tree.visit_frames(machine, visit);
        }
    }

    /// The parts, from frame `from` on, in which this object has other frames than `base`, by walking only what they do
    /// not share. What was never written since both were one is not among them. The caller stays pinned while it uses the
    /// iterator, and may begin again later where it stopped.
    ///
    /// # Errors
    ///
    /// [`ForkError::Kind`], [`ForkError::Shape`]: the two cannot be compared.
    pub fn differences<'a, M: Machine>(
        &'a self,
        supply: &Supply<'a, M>,
        base: &'a Self,
        from: u64,
    ) -> Result<Differences<'a, M>, ForkError> {
        for object in [self, base] {
            let Kind::Anonymous(_) = object.kind() else { return Err(ForkError::Kind { kind: object.kind() }) };
        }
        if self.frames() != base.frames() || !self.tree.is_shaped_as(&base.tree) {
            return Err(ForkError::Shape { handle: ObjectHandle::from_raw(base.live.load(super::Ordering::Relaxed)) });
        }
        let supply = Supply::new(supply.machine, supply.pool, supply.cpu);
        Ok(Differences { object: self, base, supply, next: from })
    }
}

/// The parts in which two objects differ, in rising order, as first frame and number of frames; neighbours are one part,
/// of at most 512 frames beyond its first span.
pub struct Differences<'a, M> {
    object: &'a Object,
    base: &'a Object,
    supply: Supply<'a, M>,
    next: u64,
}

impl<M: Machine> Differences<'_, M> {
    /// Whether they differ at the frame that is next, and where the answer ends.
    fn look(&self) -> (bool, u64) {
        let (differs, until) = self.object.tree.differs(&self.supply, &self.base.tree, self.next);
        (differs, until.min(self.object.frames()))
    }
}

impl<M: Machine> Iterator for Differences<'_, M> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        while self.next < self.object.frames() {
            let start = self.next;
            let (mut differs, mut until) = self.look();
            self.next = until;
            if !differs {
                continue;
            }
            // Bounded, so that a caller who must unpin now and then can.
            while self.next < self.object.frames() && self.next - start < 512 {
                (differs, until) = self.look();
                if !differs {
                    break;
                }
                self.next = until;
            }
            return Some((start, self.next - start));
        }
        None
    }
}
