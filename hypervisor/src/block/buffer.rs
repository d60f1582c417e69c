//! Memory that block devices read and fill: frames of the pool, whole pages.
//!
//! Invariants: a buffer owns its frames. While a device has them the buffer is inside the driver, so nobody touches them.

use crate::arch::cpu;
use entresol_addr::{PAGE_SIZE, Pfn};
use entresol_backing::{Order, OutOfMemory};

use crate::host;

/// A naturally aligned run of frames.
#[derive(Debug)]
pub struct Buffer {
    first: Pfn,
    order: Order,
}

impl Buffer {
    /// A new one, of `order`. What is in it is whatever was there.
    ///
    /// # Errors
    ///
    /// [`OutOfMemory`].
    pub fn take(order: Order) -> Result<Self, OutOfMemory> {
        Ok(Self { first: host::get().pool.take(cpu::index(), order)?, order })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        (self.order.frames() * PAGE_SIZE) as usize
    }

    /// What is in it.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the pool's frames are RAM, mapped at EL2 where they are, and these are the buffer's alone.
        unsafe { core::slice::from_raw_parts(self.first.base().get() as *const u8, self.len()) }
    }

    /// The same, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is the only way to them.
        unsafe { core::slice::from_raw_parts_mut(self.first.base().get() as *mut u8, self.len()) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        host::get().pool.give(cpu::index(), self.first, self.order);
    }
}
