//! What a device and the VM around it know of each other.
//!
//! Purpose: the four seams of a device: the registers that it shows ([`Device`]), the memory that it reads and writes
//! ([`GuestMemory`]), the line by which it interrupts ([`Interrupt`]), the host's end of its character stream
//! ([`Terminal`]).
//!
//! Protocol: an access comes in by [`Device::read`] or [`Device::write`] and is complete when the call returns, unless
//! the returned [`Work`] says otherwise. Guest memory is only ever copied from and to; no reference into it exists, so
//! a guest that changes it meanwhile can change values but not what they mean.

use alloc::sync::Arc;

use entresol_addr::Gpa;

/// Why guest memory could not be copied. Part of the bytes may have been.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryError {
    /// No memory slot holds this address.
    Outside {
        /// The first address that is in none.
        gpa: Gpa,
    },
    /// The slot at this address does not allow writes.
    ReadOnly {
        /// The first address that may not be written.
        gpa: Gpa,
    },
    /// The guest keeps this page to itself, and its owner lets devices reach only what it shares.
    Private {
        /// The first address that may not be reached.
        gpa: Gpa,
    },
    /// The frame behind the page is bad.
    Poisoned {
        /// The first address that cannot be reached.
        gpa: Gpa,
    },
    /// The machine has no frame to back the page. The copy may be tried again when it has.
    OutOfMemory,
    /// The page is not in memory now. Whoever the memory belongs to brings it; then the copy may be tried again.
    Absent,
}

/// One of a virtqueue's three areas in guest memory (virtio 2.7).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Area {
    /// The descriptor table.
    Descriptors,
    /// The available ring, written by the driver.
    Driver,
    /// The used ring, written by the device.
    Device,
}

/// An area of one of a device's queues: what it reads or writes again and again while the queue works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// The queue's number.
    pub queue: usize,
    /// Which of its areas.
    pub area: Area,
}

/// A VM's memory, for devices: copies only.
///
/// An access of 2, 4 or 8 bytes at an address aligned to its size is single-copy atomic, as it would be for a
/// driver's own load or store; the indices of virtqueues rely on it. Copies are not reordered across the fences of
/// [`entresol_sync::atomic::fence`].
pub trait GuestMemory: Send + Sync {
    /// Fills `to` from guest memory at `gpa`.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Outside`] if a byte lies in no slot or past the address space, [`MemoryError::OutOfMemory`] if a
    /// page had to be populated and could not be, [`MemoryError::Private`], [`MemoryError::Poisoned`], [`MemoryError::Absent`]. The content of `to` is then unspecified.
    fn read(&self, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError>;

    /// Stores `from` to guest memory at `gpa`.
    ///
    /// # Errors
    ///
    /// As [`Self::read`], and [`MemoryError::ReadOnly`]. A prefix of the bytes may have been stored.
    fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError>;

    /// As [`Self::read`], of a piece of `ring`: where that lies may be remembered for the next time.
    ///
    /// # Errors
    ///
    /// Those of [`Self::read`].
    fn read_ring(&self, _ring: Ring, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError> {
        self.read(gpa, to)
    }

    /// As [`Self::write`], of a piece of `ring`: where that lies may be remembered for the next time.
    ///
    /// # Errors
    ///
    /// Those of [`Self::write`].
    fn write_ring(&self, _ring: Ring, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        self.write(gpa, from)
    }

    /// Queue `queue` works no more: what is remembered of its rings is of no use.
    fn forget_rings(&self, _queue: usize) {}

    /// Whether devices reach a part of memory only, so that drivers must ask their platform which.
    fn is_restricted(&self) -> bool {
        false
    }
}

impl<T: GuestMemory + ?Sized> GuestMemory for Arc<T> {
    fn read(&self, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError> {
        (**self).read(gpa, to)
    }

    fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        (**self).write(gpa, from)
    }

    fn read_ring(&self, ring: Ring, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError> {
        (**self).read_ring(ring, gpa, to)
    }

    fn write_ring(&self, ring: Ring, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        (**self).write_ring(ring, gpa, from)
    }

    fn forget_rings(&self, queue: usize) {
        (**self).forget_rings(queue);
    }

    fn is_restricted(&self) -> bool {
        (**self).is_restricted()
    }
}

/// A device's interrupt line.
///
/// Called with the device's lock held, so that levels arrive in the order in which the device changed them.
pub trait Interrupt: Send + Sync {
    /// Drives the line. Each call is a change of level; a low and a high in a row make an edge.
    fn set_level(&self, high: bool);
}

impl<T: Interrupt + ?Sized> Interrupt for Arc<T> {
    fn set_level(&self, high: bool) {
        (**self).set_level(high);
    }
}

/// The host's end of a device's character stream.
pub trait Terminal: Send + Sync {
    /// Takes what the guest has sent. Called with the device's lock held, so that bytes arrive in order; must not call
    /// the device, and must not wait for anything that needs the guest to run.
    fn put(&self, bytes: &[u8]);

    /// The guest has room for input again after `offer` took less than it was given. Called with no lock of the device
    /// held; it may call `offer`, or wake whoever does. Comes once for each time that input was refused.
    fn input_wanted(&self);
}

impl<T: Terminal + ?Sized> Terminal for Arc<T> {
    fn put(&self, bytes: &[u8]) {
        (**self).put(bytes);
    }

    fn input_wanted(&self) {
        (**self).input_wanted();
    }
}

/// What is left to do after an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "work that is not run is never completed"]
pub enum Work {
    /// Nothing: the guest may go on.
    Idle,
    /// The access started more work than one exit may take. [`Device::run`] does the next part; the guest may run in
    /// between, and other VMs should.
    More,
    /// [`MemoryError::OutOfMemory`] stopped it. Nothing is lost: [`Device::run`] carries on when there is memory again.
    Stalled,
    /// [`MemoryError::Absent`] stopped it. Nothing is lost: [`Device::run`] carries on when the page has come.
    Waiting,
}

/// Registers that a guest reaches by loads and stores.
///
/// `offset` is in bytes from the device's start and may be any number, as may `size` in bytes and `value`: what the
/// registers do not define reads as zero and ignores writes.
pub trait Device: Send + Sync {
    /// A load of `size` bytes; the value is zero-extended.
    fn read(&self, offset: u64, size: u8) -> u64;

    /// A store of the low `size` bytes of `value`.
    fn write(&self, offset: u64, size: u8, value: u64) -> Work;

    /// Does a bounded part of what [`Work::More`], [`Work::Stalled`] or [`Work::Waiting`] announced. Without such work it does nothing.
    fn run(&self) -> Work {
        Work::Idle
    }

    /// Back to the state at power-on, as the VM's reset does it. Input that the host offered and the guest did not
    /// read is dropped.
    fn reset(&self);
}
