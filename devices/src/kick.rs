//! Which vCPUs have to look at their interrupts again.

use core::ops::{BitOr, BitOrAssign};

use entresol_sync::atomic::{AtomicBool, Ordering};

/// The most vCPUs of one virtual machine.
pub const MAX_VCPUS: usize = 8;

/// A set of vCPUs whose deliverable interrupts may have changed. Wake the blocked, interrupt the running.
///
/// May name the vCPU whose access caused it; that one is out of the guest and will look before it enters.
#[must_use = "a kicked vCPU may run or sleep on without seeing its interrupt"]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kick(u8);

const _: () = assert!(MAX_VCPUS <= u8::BITS as usize);

impl Kick {
    /// Nobody.
    pub const NONE: Self = Self(0);

    pub(crate) const fn one(vcpu: usize) -> Self {
        Self(1 << vcpu)
    }

    /// Every vCPU of a machine that has `vcpus`.
    pub const fn all(vcpus: usize) -> Self {
        Self(((1u16 << vcpus) - 1) as u8)
    }

    pub(crate) const fn without(self, vcpu: usize) -> Self {
        Self(self.0 & !(1 << vcpu))
    }

    /// Whether it names nobody.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether it names `vcpu`.
    #[inline]
    pub const fn contains(self, vcpu: usize) -> bool {
        vcpu < MAX_VCPUS && self.0 >> vcpu & 1 == 1
    }

    /// Who, in ascending order.
    #[inline]
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..MAX_VCPUS).filter(move |&vcpu| self.contains(vcpu))
    }
}

/// Whether one vCPU has to look at its interrupts before it enters its guest.
#[derive(Clone, Copy)]
pub struct Flag<'g>(&'g AtomicBool);

impl<'g> Flag<'g> {
    pub(crate) const fn new(flag: &'g AtomicBool) -> Self {
        Self(flag)
    }

    /// One atomic load, sequentially consistent.
    #[inline]
    pub fn is_up(self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl BitOr for Kick {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Kick {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}
