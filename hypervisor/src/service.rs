//! Services for guests: what a private machine shares; and for those that their owner lets drive the hypervisor, measurements and
//! tests.
//!
//! Function identifiers are of the vendor-specific hypervisor range (Arm DEN 0028, 6.2); without private memory, or the policy, they
//! do not exist.

use core::hint::black_box;

use crate::arch::{cpu, map};
use entresol_addr::{GfnRange, Gpa, PAGE_SIZE};
use entresol_machine::{Machine as _, Tags};
use entresol_mmu::{Busy, CoalescedRing, ConvertError, CopyError, Discarded};
use entresol_slot::Hint;
use entresol_sync::atomic::{AtomicU64, Ordering};
use entresol_sync::{Mutex, Pin};
use entresol_wire::config::check_name;

use crate::control::Later;
use crate::host_work::{self, Work};
use crate::sched::{self, VcpuRef};
use crate::vm::{Alias, LogOptions};
use crate::{heap, host, registry, swap};

/// Takes the second-stage entries of a range away: X1 its first byte, X2 its length in bytes, both page-aligned. Contents
/// stay. Answers 0, or [`INVALID`].
const ZAP: u32 = 0xc600_0001;
/// Takes the coalesced writes that wait. Answers how many.
const DRAIN: u32 = 0xc600_0002;
/// Makes a slot that shows the machine's own memory a second time, or moves, changes or deletes the one of that number: X1 bits
/// 15:0 its number, 31:16 its flags, 63:32 the page of memory behind its first; X2 its address; X3 its bytes, 0 to delete.
/// Answers 0, or [`INVALID`].
const SLOT: u32 = 0xc600_0003;
/// The machine's dirty log: X1 0 ends it; 1 starts it; 2 fetches and clears that of slot X2, of at most 1 GiB, and answers how
/// many pages it named; 3 marks this moment; 4 forgets the mark. Answers 0 otherwise, or [`INVALID`].
const DIRTY: u32 = 0xc600_0010;
/// Forks the calling machine, soon: X1 ends the copy's name, or is all ones to ask only. The copy learns from its
/// generation that it is one. Answers 0; or [`INVALID`] while such a call waits to be carried out.
const FORK: u32 = 0xc600_0004;
/// Answers how many of something are free: X1 0 for frames, soon or now, 1 for bytes of the heap; or [`INVALID`].
const FREE: u32 = 0xc600_0005;
/// Answers 1 if no vCPU but the caller runs or could run, and, if X1 is 0, the hypervisor has nothing to do; else 0.
const ALONE: u32 = 0xc600_0006;
/// Reads 64 bytes of its memory at X1, as a device does. Answers 0, or [`INVALID`].
const READ: u32 = 0xc600_0007;
/// Has one-off accesses to private memory made in the hypervisor's own mapping (X1 not 0), or through windows (0). For all
/// virtual machines. Answers 0.
const IN_PLACE: u32 = 0xc600_0008;
/// Leases the page at X1, and releases it. Answers 0, or [`INVALID`].
const LEASE: u32 = 0xc600_0009;
/// Has X1 bytes of its memory, whole pages, put on the swap device, soon. Answers 0, or [`INVALID`] while such a call waits to be carried out, or there is
/// none; with 0 in X1 how many pages are out, or [`INVALID`] while some are leaving for such a call.
const RECLAIM: u32 = 0xc600_0011;
/// Of a machine with private memory, whatever its policy: shares the pages of a range with the hypervisor, or takes them back. X1 its
/// first byte, X2 its length in bytes, both page-aligned and in one slot of private memory, X3 1 to share and 0 to take back. What the
/// pages hold stays. Answers how many bytes from the first are done, at most [`CONVERTED_AT_ONCE`] pages: who wants more asks for the
/// rest; 0 where something else changes the range, who asks again. Or [`INVALID`], or [`NO_MEMORY`]: nothing has changed.
const CONVERT: u32 = 0xc600_000a;
/// Gives the pages of a range back, as a balloon does: X1 its first byte, X2 its length in bytes, both page-aligned, at most
/// [`CONVERTED_AT_ONCE`] pages. Answers X2, 0 where something else changes the range, or [`INVALID`].
const DISCARD: u32 = 0xc600_000b;
/// Checks the page-frame cache of the calling vCPU's stolen time. Answers 0 if it knows where that lies, or [`INVALID`].
const CHECK: u32 = 0xc600_000c;
/// Of a machine with tags, its page at X1, which it has touched: packs its tags as for the swap device, X2 0; or unpacks tags of 0 into it, as for a page
/// that comes back, X2 not 0. Answers 0, or [`INVALID`].
const TAGS: u32 = 0xc600_000d;
/// What one call converts at most, in pages.
const CONVERTED_AT_ONCE: u64 = 64;
/// What [`READ`] reads: the size of a few descriptors of a virtio queue.
const READ_BYTES: usize = 64;
/// An argument breaks a rule.
const INVALID: u64 = -2i64 as u64;
/// The machine has no frame for it.
const NO_MEMORY: u64 = -3i64 as u64;

/// The answer to a vendor call, or `None` if there is no such function.
#[cold]
pub fn call(vcpu: &VcpuRef, function: u32, [x1, x2, x3]: [u64; 3]) -> Option<u64> {
    if function == CONVERT && vcpu.vm.config.private {
        return Some(convert(vcpu, x1, x2, x3));
    }
    if !vcpu.vm.config.policies.services {
        return None;
    }
    match function {
        ZAP => Some(zap(vcpu, x1, x2)),
        DRAIN => Some(core::iter::from_fn(|| vcpu.vm.posted.take()).take(CoalescedRing::ROOM).count() as u64),
        SLOT => Some(slot(vcpu, x1, x2, x3)),
        DIRTY => Some(dirty(vcpu, x1, x2)),
        FORK => Some(fork(vcpu, x1)),
        FREE => Some(free(x1)),
        ALONE => Some((sched::is_alone(cpu::index()) && (x1 != 0 || !host_work::pending(host_work::CPU))).into()),
        READ => Some(answered(vcpu.vm.memory.read(&pin(), &Hint::new(), Gpa::new(x1), &mut [0; READ_BYTES]))),
        IN_PLACE => {
            host::get().pool.access_in_place(x1 != 0);
            Some(0)
        }
        RECLAIM if x1 == 0 => Some(if is_leaving() { INVALID } else { vcpu.vm.stored_frames() }),
        RECLAIM => Some(reclaim(vcpu, x1)),
        LEASE => Some(answered(lease(vcpu, x1))),
        DISCARD => Some(discard(vcpu, x1, x2)),
        TAGS => Some(tags(vcpu, x1, x2 != 0).map_or(INVALID, |()| 0)),
        CHECK => Some(if vcpu.vm.knows_record(vcpu.index) { 0 } else { INVALID }),
        _ => None,
    }
}

/// Who wants to be forked: one more than its place in the registry, above the number that ends the copy's name; or 0.
static WANTED: AtomicU64 = AtomicU64::new(0);

/// By its place: a share of the machine would keep it from ending.
fn fork(vcpu: &VcpuRef, ends: u64) -> u64 {
    if ends == u64::MAX {
        return if WANTED.load(Ordering::SeqCst) == 0 { 0 } else { INVALID };
    }
    let (Some(place), Ok(ends)) = (registry::number_of(&vcpu.vm.config.name), u32::try_from(ends)) else {
        return INVALID;
    };
    let wanted = (place as u64 + 1) << 32 | u64::from(ends);
    if WANTED.compare_exchange(0, wanted, Ordering::SeqCst, Ordering::SeqCst).is_err() {
        return INVALID;
    }
    host_work::raise_and_leave(Work::Service);
    0
}

/// Whose memory is to leave: one more than its place in the registry, above the number of pages; or 0.
static LEAVING: AtomicU64 = AtomicU64::new(0);
/// How that ends.
static LEFT: Mutex<Option<Later>> = Mutex::new(None);

fn is_leaving() -> bool {
    let mut left = LEFT.lock();
    if left.as_ref().is_some_and(|later| later.take().is_some()) {
        *left = None;
    }
    LEAVING.load(Ordering::SeqCst) != 0 || left.is_some()
}

fn reclaim(vcpu: &VcpuRef, bytes: u64) -> u64 {
    let pages = u32::try_from(bytes / PAGE_SIZE).ok().filter(|_| bytes.is_multiple_of(PAGE_SIZE));
    let (Some(place), Some(pages)) = (registry::number_of(&vcpu.vm.config.name), pages) else { return INVALID };
    let wanted = (place as u64 + 1) << 32 | u64::from(pages);
    if LEAVING.compare_exchange(0, wanted, Ordering::SeqCst, Ordering::SeqCst).is_err() {
        return INVALID;
    }
    host_work::raise_and_leave(Work::Service);
    0
}

/// Host's work: forks, and has memory reclaimed, for who asked for it.
pub fn carry_out() {
    let wanted = WANTED.load(Ordering::SeqCst);
    if wanted != 0 {
        fork_wanted(wanted);
        WANTED.store(0, Ordering::SeqCst);
    }
    let leaving = LEAVING.load(Ordering::SeqCst);
    let Some(place) = (leaving >> 32).checked_sub(1).map(|place| place as usize) else { return };
    let bytes = u64::from(leaving as u32) * PAGE_SIZE;
    if let Some(vm) = registry::find(place) {
        match swap::reclaim(place, &vm, bytes) {
            Ok(later) => *LEFT.lock() = Some(later),
            Err(refusal) => log::warn!("vm {}: {bytes} bytes do not leave: {refusal:?}", vm.config.name),
        }
    }
    LEAVING.store(0, Ordering::SeqCst);
}

fn fork_wanted(wanted: u64) {
    let Some((place, row)) = (wanted >> 32).checked_sub(1).and_then(|place| {
        let place = place as usize;
        Some((place, registry::row(place)?))
    }) else {
        return;
    };
    let name = alloc::format!("{}-{}", row.config.name, wanted as u32);
    // The registry waits for the last share.
    drop(row);
    let forked = check_name("name", &name).map_err(|refusal| alloc::format!("{refusal}"));
    let forked = forked.and_then(|()| {
        registry::fork(place, core::slice::from_ref(&name)).map_err(|refusal| alloc::format!("{refusal:?}"))
    });
    if let Err(refusal) = forked {
        log::warn!("no fork {name}: {refusal}");
    }
}

fn free(what: u64) -> u64 {
    match what {
        0 => host::get().pool.free_frames() + host::get().pool.deferred_frames(),
        1 => heap::free(),
        _ => INVALID,
    }
}

/// No grace period is pinned here: only memory aborts pin, and this is a call.
fn pin() -> Pin<'static> {
    host::get().epoch.pin(cpu::index())
}

fn answered(done: Result<(), CopyError>) -> u64 {
    if done.is_ok() { 0 } else { INVALID }
}

fn lease(vcpu: &VcpuRef, address: u64) -> Result<(), CopyError> {
    let lease = vcpu.vm.memory.lease(&pin(), &Hint::new(), Gpa::new(address))?;
    vcpu.vm.memory.release_lease(lease);
    Ok(())
}

fn slot(vcpu: &VcpuRef, which: u64, base: u64, size: u64) -> u64 {
    let alias = Alias {
        number: which as u32 & 0xffff,
        flags: (which >> 16) as u32 & 0xffff,
        offset: (which >> 32) * PAGE_SIZE,
        base,
        size,
    };
    match vcpu.vm.set_alias(&alias) {
        Ok(()) => 0,
        Err(error) => {
            log::debug!("vm {}: no slot: {error}", vcpu.vm.config.name);
            INVALID
        }
    }
}

fn dirty(vcpu: &VcpuRef, action: u64, slot: u64) -> u64 {
    let vm = &vcpu.vm;
    let done = match action {
        0 => vm.stop_log().map(|_| 0),
        1 => vm.start_log(LogOptions::default()).map(|()| 0),
        2 => vm.take_dirty_log(slot as u16),
        3 => vm.mark().map(|()| 0),
        4 => vm.unmark().map(|()| 0),
        _ => return INVALID,
    };
    done.unwrap_or_else(|error| {
        log::debug!("vm {}: dirty log: {error}", vm.config.name);
        INVALID
    })
}

/// Not pinned: see [`pin`].
fn convert(vcpu: &VcpuRef, start: u64, size: u64, shared: u64) -> u64 {
    let memory = &vcpu.vm.memory;
    if !start.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) || size == 0 || shared > 1 {
        return INVALID;
    }
    let range = GfnRange::new(Gpa::new(start).frame(), size / PAGE_SIZE);
    let Some(range) = range.filter(|range| memory.is_convertible(cpu::index(), *range)) else { return INVALID };
    let count = range.count().min(CONVERTED_AT_ONCE);
    let first = GfnRange::new(range.start(), count).expect("a part of a range");
    match memory.convert(cpu::index(), first, shared == 1) {
        Ok(_) => count * PAGE_SIZE,
        Err(ConvertError::Busy) => 0,
        Err(ConvertError::OutOfMemory) => NO_MEMORY,
        // Its slot has gone since.
        Err(ConvertError::NotPrivate) => INVALID,
    }
}

fn discard(vcpu: &VcpuRef, start: u64, size: u64) -> u64 {
    let pages = size / PAGE_SIZE;
    if !start.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) || pages > CONVERTED_AT_ONCE {
        return INVALID;
    }
    let Some(range) = GfnRange::new(Gpa::new(start).frame(), pages).filter(|range| !range.is_empty()) else {
        return INVALID;
    };
    match vcpu.vm.memory.discard(cpu::index(), &[range]) {
        Ok(Discarded { refused: 0, .. }) => size,
        Ok(_) => INVALID,
        Err(Busy) => 0,
    }
}

fn tags(vcpu: &VcpuRef, address: u64, restores: bool) -> Option<()> {
    let (host, pin) = (host::get(), pin());
    let object = host.objects.get(&pin, vcpu.vm.ram()).filter(|object| object.is_tagged())?;
    let (machine, frame) = (&host.machine, map::frame_of(Gpa::new(address))?);
    let page = object.present(&host.supply(pin.cpu()), frame).filter(|grant| grant.writable)?.frame(frame);
    if restores {
        machine.store_tags(page, &Tags::from_bytes(&black_box([0; Tags::BYTES])));
    } else {
        black_box(machine.load_tags(page).to_bytes());
    }
    Some(())
}

fn zap(vcpu: &VcpuRef, start: u64, size: u64) -> u64 {
    if !start.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
        return INVALID;
    }
    // No grace period is pinned here: only memory aborts pin, and this is a call.
    match GfnRange::new(Gpa::new(start).frame(), size / PAGE_SIZE).map(|range| vcpu.vm.memory.zap(cpu::index(), range))
    {
        Some(Ok(())) => 0,
        Some(Err(_)) | None => INVALID,
    }
}
