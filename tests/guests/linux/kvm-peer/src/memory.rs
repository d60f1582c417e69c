//! The guest's memory: one anonymous mapping, aligned for huge pages.

use std::io;
use std::ptr::NonNull;

use crate::RAM;

/// Alignment that a huge page needs.
const HUGE: usize = 2 << 20;

/// What the host kernel may back it with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// 4 KiB pages only.
    Pages,
    /// Transparent huge pages.
    Huge,
}

/// Memory that a guest will have; it is given back when the process ends.
pub struct Memory {
    start: NonNull<u8>,
    size: usize,
}

impl Memory {
    /// `size` bytes, none of them populated.
    pub fn new(size: u64, backing: Backing) -> io::Result<Self> {
        let size = usize::try_from(size).map_err(io::Error::other)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let raw = unsafe { libc::mmap(core::ptr::null_mut(), size + HUGE, access, flags, -1, 0) };
        if raw == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = raw.cast::<u8>().wrapping_add(raw.cast::<u8>().align_offset(HUGE));
        let advice = if backing == Backing::Huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
        // SAFETY: the aligned part of the mapping above; the advice changes no content.
        if unsafe { libc::madvise(start.cast(), size, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start).ok_or_else(|| io::Error::other("a mapping at zero"))?;
        Ok(Self { start, size })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    /// The address that the kernel maps for the guest.
    pub fn host_address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Copies to a guest address, before the guest runs.
    pub fn write(&mut self, guest: u64, bytes: &[u8]) -> io::Result<()> {
        let offset = guest.checked_sub(RAM).and_then(|offset| usize::try_from(offset).ok());
        match offset.and_then(|offset| Some((offset, offset.checked_add(bytes.len())?))) {
            Some((offset, end)) if end <= self.size => {
                // SAFETY: inside the mapping; no guest runs while this is borrowed mutably, and the source is not in it.
                unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.as_ptr().add(offset), bytes.len()) };
                Ok(())
            }
            _ => Err(io::Error::other(format!("{} bytes at {guest:#x} are outside the guest's memory", bytes.len()))),
        }
    }
}
