//! Where an access meets the edge of a page: half in memory, half in a device; half in a device, half in nothing.
//!
//! All through a Normal Non-cacheable mapping, since stage 1 refuses what is not aligned on Device memory. The page that is
//! mapped first is [`FIRST`], the other one follows it.

use guest_rt::machine::{GICD, RTC, VIRTIO};
use guest_rt::memory::{load32, load64, store64};
use guest_rt::mmu::{self, Kind, Space};
use guest_rt::report::Report;
use guest_rt::trap::{class, status};

use crate::bench;
use crate::cases::{State, V, Wrong, X, registers};
use crate::code;
use crate::run::{Code, Registers, run};

/// Pairs of pages in virtual addresses, 64 KiB apart.
const FIRST: u64 = 0x28_0000_0000;
const APART: u64 = 0x1_0000;
const PAGE: u64 = 0x1000;
/// Nothing is there.
const HOLE: u64 = 0x0c10_0000;
/// The first word of a virtio transport: "virt" (virtio 1.2, 4.2.2).
const MAGIC: u64 = 0x7472_6976;
/// The last word of a PrimeCell's page: its cell identification.
const CELL: u64 = 0xb1;

/// Maps `first` and, if there is one, `second` behind it, as pair `number`; where they meet.
fn pair(space: &mut Space, number: u64, first: u64, second: Option<u64>) -> u64 {
    let at = FIRST + number * APART;
    space.map(at, first, PAGE, Kind::NonCacheable, true);
    if let Some(second) = second {
        space.map(at + PAGE, second, PAGE, Kind::NonCacheable, true);
    }
    at + PAGE
}

/// The places where pages meet.
struct Seams {
    memory_device: u64,
    device_memory: u64,
    devices: u64,
    memory_hole: u64,
    device_hole: u64,
    device_unmapped: u64,
    /// The memory's page, through the same attributes.
    memory: u64,
}

/// What memory holds at both ends.
const HEAD: u64 = 0x1122_3344_5566_7788;
const TAIL: u64 = 0x99aa_bbcc_ddee_ff00;

/// Accesses across pages, in `space`, which is active; `memory` is a page of nobody's. `holes`: nothing answers at [`HOLE`],
/// and a hypervisor emulates the devices.
pub fn all(report: &mut Report, space: &mut Space, memory: u64, holes: bool) {
    let seams = Seams {
        memory_device: pair(space, 0, memory, Some(VIRTIO.0)),
        device_memory: pair(space, 1, RTC, Some(memory)),
        devices: pair(space, 2, RTC, Some(VIRTIO.0)),
        memory_hole: pair(space, 3, memory, Some(HOLE)),
        device_hole: pair(space, 4, RTC, Some(HOLE)),
        device_unmapped: pair(space, 5, RTC, None),
        memory: FIRST,
    };
    mmu::invalidate_tlb();
    unaligned(report);
    loads(report, &seams);
    stores(report, &seams);
    if holes {
        aborts(report, &seams);
        zero_block(report);
    }
}

fn fill(seams: &Seams) {
    store64(seams.memory, HEAD);
    store64(seams.memory + PAGE - 8, TAIL);
}

/// Runs `code` at `base`, and compares X, V and the base's movement.
fn check(report: &mut Report, name: &str, code: Code, base: u64, expect: impl Fn(&mut State)) -> Registers {
    bench::set(&bench::BEFORE);
    let after = run(code, &registers(base, 0), false);
    let mut expected = State::BEFORE;
    expect(&mut expected);
    let moved = after.base.wrapping_sub(base) as i64;
    let found = State { x: after.x, v: after.v, moved, devices: bench::get() };
    let result = if after.taken == 0 { expected.same(&found) } else { Err(Wrong::taken(&after)) };
    report.check(name, result);
    after
}

/// Inside one page, aligned to less than their size: parts as large as alignment allows, each once.
fn unaligned(report: &mut Report) {
    let magic = crate::ALIAS + VIRTIO.0;
    let version = u64::from(load32(VIRTIO.0 + 4));
    let device = u64::from(load32(VIRTIO.0 + 8));
    // Two words: the transport answers words only, so that a wrong split shows.
    check(report, "unaligned: ldr x0, [x9, #4]", code!("ldr x0, [x9, #4]"), magic, |s| {
        s.x[0] = device << 32 | version;
    });
    check(report, "unaligned: ldr d0, [x9, #4]!", code!("ldr d0, [x9, #4]!"), magic, |s| {
        (s.v[0], s.moved) = ([device << 32 | version, 0], 4);
    });
    check(report, "unaligned: str d0, [x9, #4]", code!("str d0, [x9, #4]"), crate::ALIAS + bench::ROUTERS, |s| {
        let [first, second, ..] = &mut s.devices.routers;
        *first = *first & 0xffff_ffff | (V[0][0] & 0xff) << 32;
        *second = *second & !0xffff_ffff | V[0][0] >> 32;
    });
}

fn loads(report: &mut Report, seams: &Seams) {
    fill(seams);
    let tail = TAIL >> 32;
    check(report, "memory, device: ldr x0", code!("ldur x0, [x9, #-4]"), seams.memory_device, |s| {
        s.x[0] = MAGIC << 32 | tail;
    });
    check(report, "memory, device: ldp w0, w1", code!("ldp w0, w1, [x9, #-4]!"), seams.memory_device, |s| {
        (s.x[0], s.x[1], s.moved) = (tail, MAGIC, -4);
    });
    check(report, "memory, device: ldr d0", code!("ldur d0, [x9, #-4]"), seams.memory_device, |s| {
        s.v[0] = [MAGIC << 32 | tail, 0];
    });
    check(report, "device, memory: ldr x0", code!("ldur x0, [x9, #-4]"), seams.device_memory, |s| {
        s.x[0] = HEAD << 32 | CELL;
    });
    check(report, "device, memory: ldp w0, w1", code!("ldp w0, w1, [x9, #-4]"), seams.device_memory, |s| {
        (s.x[0], s.x[1]) = (CELL, HEAD & 0xffff_ffff);
    });
    check(report, "device, memory: ldr x0 post", code!("ldr x0, [x9], #-8"), seams.device_memory - 4, |s| {
        (s.x[0], s.moved) = (HEAD << 32 | CELL, -8);
    });
    check(report, "device, device: ldp w0, w1", code!("ldp w0, w1, [x9, #-4]"), seams.devices, |s| {
        (s.x[0], s.x[1]) = (CELL, MAGIC);
    });
    check(report, "device, device: ldr x0", code!("ldur x0, [x9, #-4]"), seams.devices, |s| {
        s.x[0] = MAGIC << 32 | CELL;
    });
}

/// The device's half goes to a register that ignores it; memory's half must be there, and nothing else.
fn stores(report: &mut Report, seams: &Seams) {
    let kept = |report: &mut Report, name: &str, head: u64, tail: u64| {
        let found = (load64(seams.memory), load64(seams.memory + PAGE - 8));
        let with = |(head, tail)| State { x: [head, tail, 0, 0], ..State::BEFORE };
        report.check(name, with((head, tail)).same(&with(found)));
    };
    fill(seams);
    check(report, "memory, device: str x0", code!("stur x0, [x9, #-4]"), seams.memory_device, |_| {});
    kept(report, "memory, device: str x0, memory", HEAD, TAIL & 0xffff_ffff | X[0] << 32);
    fill(seams);
    check(report, "device, memory: stp w0, w1", code!("stp w0, w1, [x9, #-4]!"), seams.device_memory, |s| {
        s.moved = -4;
    });
    kept(report, "device, memory: stp w0, w1, memory", HEAD & !0xffff_ffff | X[1] & 0xffff_ffff, TAIL);
    fill(seams);
    check(report, "device, memory: str q0", code!("stur q0, [x9, #-8]"), seams.device_memory, |_| {});
    kept(report, "device, memory: str q0, memory", V[0][1], TAIL);
}

/// An abort of the second half cancels all: registers, base and memory are as before, and it names the second page.
fn aborts(report: &mut Report, seams: &Seams) {
    let unmapped = status::TRANSLATION_3;
    for (name, code, seam, expected) in [
        ("device, nothing: ldp", code!("ldp w0, w1, [x9, #-4]!"), seams.device_hole, status::EXTERNAL),
        ("memory, nothing: ldr post", code!("ldr x0, [x9], #8"), seams.memory_hole - 4, status::EXTERNAL),
        ("memory, nothing: stp", code!("stp w0, w1, [x9, #-4]!"), seams.memory_hole, status::EXTERNAL),
        ("memory, nothing: str q0", code!("str q0, [x9, #-4]!"), seams.memory_hole, status::EXTERNAL),
        ("device, unmapped: ldp", code!("ldp w0, w1, [x9, #-4]!"), seams.device_unmapped, unmapped),
        ("device, unmapped: str", code!("str x0, [x9, #-4]!"), seams.device_unmapped, unmapped),
    ] {
        fill(seams);
        let before = registers(seam, 0);
        // Those that do not subtract 4 begin there.
        let page = seam.next_multiple_of(PAGE);
        let after = run(code, &before, false);
        let memory = (load64(seams.memory), load64(seams.memory + PAGE - 8));
        let same = Registers { taken: after.taken, esr: after.esr, far: after.far, ..before } == after;
        let kind = after.esr >> 26 == class::DATA_ABORT && after.esr & 0x3f == expected;
        let right = after.taken == 5 && same && kind && after.far == page && memory == (HEAD, TAIL);
        report.check(name, if right { Ok(()) } else { Err(Wrong::taken(&after)) });
    }
}

/// DC ZVA on Normal memory that is a device: the block of routers becomes zero. How large its stores are is a machine's
/// own: QEMU's are bytes, which routers do not take.
fn zero_block(report: &mut Report) {
    let block = guest_rt::memory::zero_block();
    assert!((32..=512).contains(&block), "the window is aligned to 512 bytes and 32 of it are looked at");
    check(report, "dc zva, x9", code!("dc zva, x9"), crate::ALIAS + bench::ROUTERS, |s| s.devices.routers = [0; 4]);
}

/// What the distributor's page is reached by.
pub const MAPPED: [u64; 2] = [GICD & !0x1f_ffff, 64 << 20];
