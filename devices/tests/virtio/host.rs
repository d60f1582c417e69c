//! The VM around a device, on plain host memory.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use entresol_addr::{GfnRange, Gpa, PAGE_SIZE};
use entresol_devices::bus::{Area, GuestMemory, Interrupt, MemoryError, Ring, Terminal};
use entresol_devices::virtio::balloon::{Busy, GiveBack, Given};
use entresol_devices::virtio::block::{Disk, DiskError};
use entresol_devices::virtio::entropy::Entropy;

/// Where the guest's memory starts, as on QEMU's `virt`.
pub const RAM: u64 = 0x4000_0000;
/// Its size in bytes.
pub const RAM_BYTES: u64 = 8 << 20;

/// Guest memory: one slot, whose last page is read-only, on a machine that can run out of memory.
pub struct Memory {
    bytes: Mutex<Vec<u8>>,
    /// Copies that succeed before every further one is [`MemoryError::OutOfMemory`]; negative for no end.
    pub copies_left: AtomicI64,
    /// They are [`MemoryError::Absent`] instead.
    pub absent: AtomicBool,
    /// The address of a page whose frame is bad.
    pub poisoned: AtomicU64,
    /// Copies so far.
    pub copies: AtomicUsize,
    /// Pieces of rings that were used since their queue's were forgotten: the ring, the first byte, how many.
    pub rings: Mutex<Vec<(Ring, u64, u64)>>,
}

impl Memory {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![0; RAM_BYTES as usize]),
            copies_left: AtomicI64::new(-1),
            absent: AtomicBool::new(false),
            poisoned: AtomicU64::new(u64::MAX),
            copies: AtomicUsize::new(0),
            rings: Mutex::default(),
        })
    }

    /// The index of the first byte, if all of `len` lie in the slot.
    fn locate(gpa: Gpa, len: usize) -> Result<usize, MemoryError> {
        let offset = gpa.get().checked_sub(RAM).filter(|offset| *offset < RAM_BYTES);
        let offset = offset.ok_or(MemoryError::Outside { gpa })?;
        if offset + len as u64 > RAM_BYTES {
            return Err(MemoryError::Outside { gpa: Gpa::new(RAM + RAM_BYTES) });
        }
        Ok(offset as usize)
    }

    fn sound(&self, gpa: Gpa, len: usize) -> Result<(), MemoryError> {
        let page = self.poisoned.load(Ordering::Relaxed);
        let meets = gpa.get() < page.saturating_add(PAGE_SIZE) && page < gpa.get() + len as u64;
        if meets { Err(MemoryError::Poisoned { gpa: Gpa::new(gpa.get().max(page)) }) } else { Ok(()) }
    }

    fn spend(&self) -> Result<(), MemoryError> {
        self.copies.fetch_add(1, Ordering::Relaxed);
        match self.copies_left.load(Ordering::Relaxed) {
            0 if self.absent.load(Ordering::Relaxed) => Err(MemoryError::Absent),
            0 => Err(MemoryError::OutOfMemory),
            left => {
                self.copies_left.store(if left > 0 { left - 1 } else { left }, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    fn remember(&self, ring: Ring, gpa: Gpa, len: usize) {
        self.rings.lock().unwrap().push((ring, gpa.get(), len as u64));
    }

    /// From the first to behind the last byte that was used of an area of queue `queue`; `None` if none is remembered.
    pub fn remembered(&self, queue: usize, area: Area) -> Option<(u64, u64)> {
        let rings = self.rings.lock().unwrap();
        let of = rings.iter().filter(|(ring, ..)| *ring == Ring { queue, area });
        of.map(|(_, gpa, len)| (*gpa, gpa + len)).reduce(|all, one| (all.0.min(one.0), all.1.max(one.1)))
    }

    /// The guest's own loads, which the machine's state does not stop.
    pub fn peek(&self, gpa: u64, len: usize) -> Vec<u8> {
        let at = Self::locate(Gpa::new(gpa), len).expect("the test stays inside memory");
        self.bytes.lock().unwrap()[at..at + len].to_vec()
    }

    /// The guest's own stores.
    pub fn poke(&self, gpa: u64, bytes: &[u8]) {
        let at = Self::locate(Gpa::new(gpa), bytes.len()).expect("the test stays inside memory");
        self.bytes.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

impl GuestMemory for Memory {
    fn read(&self, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError> {
        let at = Self::locate(gpa, to.len())?;
        self.sound(gpa, to.len())?;
        self.spend()?;
        to.copy_from_slice(&self.bytes.lock().unwrap()[at..at + to.len()]);
        Ok(())
    }

    fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        let at = Self::locate(gpa, from.len())?;
        let read_only = RAM_BYTES as usize - 4096;
        if at + from.len() > read_only {
            return Err(MemoryError::ReadOnly { gpa: Gpa::new(RAM + at.max(read_only) as u64) });
        }
        self.sound(gpa, from.len())?;
        self.spend()?;
        self.bytes.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }

    fn read_ring(&self, ring: Ring, gpa: Gpa, to: &mut [u8]) -> Result<(), MemoryError> {
        self.remember(ring, gpa, to.len());
        self.read(gpa, to)
    }

    fn write_ring(&self, ring: Ring, gpa: Gpa, from: &[u8]) -> Result<(), MemoryError> {
        self.remember(ring, gpa, from.len());
        self.write(gpa, from)
    }

    fn forget_rings(&self, queue: usize) {
        self.rings.lock().unwrap().retain(|(ring, ..)| ring.queue != queue);
    }
}

/// An interrupt line that counts its rising edges.
#[derive(Default)]
pub struct Line {
    pub high: AtomicBool,
    pub edges: AtomicUsize,
}

impl Interrupt for Line {
    fn set_level(&self, high: bool) {
        assert_ne!(self.high.swap(high, Ordering::Relaxed), high, "each call is a change");
        self.edges.fetch_add(usize::from(high), Ordering::Relaxed);
    }
}

/// A disk in memory that can fail.
pub struct RamDisk {
    pub bytes: Mutex<Vec<u8>>,
    pub read_only: bool,
    /// Every access answers with this.
    pub fault: Mutex<Option<DiskError>>,
    pub flushes: AtomicUsize,
}

impl RamDisk {
    /// A disk whose bytes tell where they lie.
    pub fn new(sectors: u64) -> Self {
        let bytes = (0..sectors * 512).map(|at| (at / 512 * 7 + at % 251) as u8).collect();
        Self { bytes: Mutex::new(bytes), read_only: false, fault: Mutex::new(None), flushes: AtomicUsize::new(0) }
    }

    pub fn content(&self, sector: u64, bytes: usize) -> Vec<u8> {
        self.bytes.lock().unwrap()[sector as usize * 512..][..bytes].to_vec()
    }

    fn check(&self) -> Result<(), DiskError> {
        self.fault.lock().unwrap().map_or(Ok(()), Err)
    }
}

impl Disk for RamDisk {
    fn sectors(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64 / 512
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, sector: u64, to: &mut [u8]) -> Result<(), DiskError> {
        self.check()?;
        assert!(to.len().is_multiple_of(512), "whole sectors");
        to.copy_from_slice(&self.content(sector, to.len()));
        Ok(())
    }

    fn write(&self, sector: u64, from: &[u8]) -> Result<(), DiskError> {
        self.check()?;
        assert!(!self.read_only && from.len().is_multiple_of(512));
        self.bytes.lock().unwrap()[sector as usize * 512..][..from.len()].copy_from_slice(from);
        Ok(())
    }

    fn flush(&self) -> Result<(), DiskError> {
        self.check()?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// A terminal that keeps what it is sent.
#[derive(Default)]
pub struct Screen {
    pub text: Mutex<Vec<u8>>,
    pub calls: AtomicUsize,
}

impl Terminal for Screen {
    fn put(&self, bytes: &[u8]) {
        self.text.lock().unwrap().extend_from_slice(bytes);
    }

    fn input_wanted(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }
}

/// A source of "random" bytes that counts them.
#[derive(Default)]
pub struct Counter(pub Mutex<u64>);

impl Entropy for Counter {
    fn fill(&self, to: &mut [u8]) {
        let mut next = self.0.lock().unwrap();
        for byte in to {
            *byte = (*next % 255) as u8 + 1;
            *next += 1;
        }
    }
}

/// Takes what a guest gives back: pages of [`RAM`] that were there, each once.
pub struct Taker {
    /// Whether each page of memory is there.
    pub there: Mutex<Vec<bool>>,
    /// Calls that are [`Busy`] before the next is served.
    pub busy: AtomicUsize,
    /// The most pages that one call has named.
    pub most: AtomicUsize,
    /// Calls so far.
    pub calls: AtomicUsize,
}

impl Taker {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            there: Mutex::new(vec![true; (RAM_BYTES / PAGE_SIZE) as usize]),
            busy: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            calls: AtomicUsize::new(0),
        })
    }

    /// Pages that are not there, by number from the start of memory.
    pub fn gone(&self) -> Vec<usize> {
        let there = self.there.lock().unwrap();
        (0..there.len()).filter(|page| !there[*page]).collect()
    }
}

impl GiveBack for Taker {
    fn give_back(&self, ranges: &[GfnRange]) -> Result<Given, Busy> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.busy.load(Ordering::Relaxed) != 0 {
            self.busy.fetch_sub(1, Ordering::Relaxed);
            return Err(Busy);
        }
        assert!(ranges.windows(2).all(|pair| pair[0].end() < pair[1].start()), "sorted, and apart: {ranges:x?}");
        let named: u64 = ranges.iter().map(|range| range.count()).sum();
        self.most.fetch_max(named as usize, Ordering::Relaxed);
        let mut there = self.there.lock().unwrap();
        let mut given = Given::default();
        for page in ranges.iter().flat_map(|range| range.start().get()..range.end().get()) {
            let place = page.checked_sub(RAM / PAGE_SIZE).and_then(|page| there.get_mut(page as usize));
            match place {
                Some(there) => given.frames += u64::from(std::mem::take(there)),
                None => given.refused += 1,
            }
        }
        Ok(given)
    }
}
