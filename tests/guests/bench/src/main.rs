//! One guest program for every hypervisor: operations between markers, counted by the `icount` plugin.
//!
//! Each operation is `movz xzr, #0xb000; op; movz xzr, #0xe000`, so an interval is the operation, all that it causes in
//! hypervisor and host, and nothing else. Stage-1 translation is off. Phases, in `bench=pages`:
//!
//! | phase | operation |
//! |---|---|
//! | 1 | first store to a 4 KiB page that was never touched |
//! | 2 | first store to a 4 KiB page that the VM's memory has but the second stage does not map |
//! | 4, 5 | load of PL011's FR, store to its IFLS: a device that is emulated |
//! | 6 | HVC: PSCI_VERSION |
//! | 7 | store to a page that is mapped: 1, what counting itself costs |
//! | 10 | store to a zone of coalesced MMIO ([`COALESCED`]), which has room |
//! | 11 | store to a doorbell ([`DOORBELL`]) that nobody waits for |
//! | 16 | first store to a 4 KiB page since a live fork of this machine, the copy of which sleeps |
//! | 8 | LDP of two of PL011's registers: no syndrome says what it is |
//! | 9 | DC CIVAC on memory that is mapped, where its owner lets it trap |
//! | 12 | `bench=log`: store to a page that the dirty log has write-protected |
//! | 13 | the same: fetching the log of 1 GiB with 16,384 dirty pages |
//! | 14 | `bench=split`: store to a write-protected block of 2 MiB |
//! | 15 | the same: store to another page of it |
//!
//! With the argument `private`, for a machine whose memory is that, also: the hypervisor, on request,
//!
//! | phase | operation |
//! |---|---|
//! | 18 | reads 64 bytes of a page through a window |
//! | 19 | reads them in place: in its own mapping for all CPUs, and out again |
//! | 20 | takes a lease of the page and releases it |
//! | 23 | checks a page-frame cache: the one of the vCPU's stolen time |
//!
//! With the argument `tags`, for a machine that has some, also: the hypervisor, on request,
//!
//! | phase | operation |
//! |---|---|
//! | 24 | packs the tags of a page, for the swap device |
//! | 25 | unpacks them into the page, when it comes back |
//!
//! In `bench=swap`, for a machine with a swap device: loads from pages that are out, each far from the next,
//!
//! | phase | operation |
//! |---|---|
//! | 21 | the first since it was written |
//! | 22 | since it came back, was read only, and left again |
//!
//! Phases 8, 9 and 16 with the argument `all` only: KVM refuses the first, lets the hardware do the second, and does not fork
//! machines.
//!
//! In `bench=blocks`, for a VM that may use blocks, phase 3: first store to a 2 MiB block as in phase 2; phase 17: as in phase 16,
//! where the owner has blocks copied whole.
//!
//! Populated but not mapped: the guest asks for the range's second-stage entries to be taken away. Our own hypervisor
//! has a vendor call for it; for others, `service=ADDRESS` names a register pair (address, then length) that a VMM
//! emulates; a third one takes coalesced writes.

#![no_std]
#![no_main]

use core::arch::asm;

use guest_rt::machine::{Machine, UART};
use guest_rt::smccc::{self, psci};
use guest_rt::{guest, memory, println, timer};

macro_rules! measured {
    ($operation:literal, $($operand:tt)*) => {
        // SAFETY: the operation's address is outside the image (checked where it is computed); markers do nothing.
        unsafe { asm!("movz xzr, #0xb000", $operation, "movz xzr, #0xe000", $($operand)*, options(nostack)) }
    };
}

mod dirty;
mod swap;

guest!(main);

const PAGE: u64 = 4 << 10;
const BLOCK: u64 = 2 << 20;
const PAGES: u64 = 16_384;
const BLOCKS: u64 = 160;
const CALLS: u64 = 8_192;
/// Takes a range's second-stage entries away; contents stay: X1 address, X2 length.
const UNMAP: u64 = 0xc600_0001;

/// Forks the caller, or asks whether that is done.
const FORK: u64 = 0xc600_0004;
/// Whether nobody else could run.
const ALONE: u64 = 0xc600_0006;
/// The first half of the machine's generation.
const GENERATION: u64 = 0x090d_0000;
/// Seconds that a copy sleeps.
const LONG: u64 = 100_000;
/// Reads 64 bytes at X1; has that done in place from now on, or not, by X1; leases the page at X1, and releases it.
const READ: u64 = 0xc600_0007;
const IN_PLACE: u64 = 0xc600_0008;
const LEASE: u64 = 0xc600_0009;
/// Checks the page-frame cache of the vCPU's stolen time, which it has once its record was asked for (PV_TIME_ST: DEN 0057, 3.2.2).
const CHECK: u64 = 0xc600_000c;
/// Packs the tags of the page at X1, X2 0, or unpacks some.
const TAGS: u64 = 0xc600_000d;
const STOLEN_TIME: u64 = 0xc500_0021;

/// Takes coalesced writes.
const DRAIN: u64 = 0xc600_0002;
/// Where whoever configures the machine puts a zone of coalesced MMIO and a doorbell of 4 bytes.
const COALESCED: u64 = 0x0c00_0000;
const DOORBELL: u64 = 0x0c00_1000;
/// Stores that every ring of coalesced writes has room for.
const ROOM: u64 = 128;

/// PL011 FR and IFLS (Arm DDI 0183, 3.3).
const FR: u64 = UART + 0x18;
const IFLS: u64 = UART + 0x34;

fn main(machine: &Machine) {
    match machine.argument("bench") {
        Some("log") => return dirty::log(machine),
        Some("split") => return dirty::split(machine),
        Some("swap") => return swap::swap(machine),
        _ => {}
    }
    let blocks = machine.argument("bench") == Some("blocks");
    let (count, size) = if blocks { (BLOCKS, BLOCK) } else { (PAGES, PAGE) };
    let free = machine.free();
    let start = free.start.next_multiple_of(BLOCK);
    assert!(start + count * size <= free.end, "this machine has too little memory");
    if machine.argument("private").is_some() {
        accesses(memory::image().end.next_multiple_of(PAGE));
        phase::<0xa001>();
    } else if !blocks {
        calls(machine);
        if machine.argument("tags").is_some() {
            tags(memory::image().end.next_multiple_of(PAGE));
        }
        phase::<0xa001>();
    } else {
        // Blocks are first touched outside any interval that counts.
        phase::<0xa000>();
    }
    touch(start, count, size);
    if unmap(machine, start, count * size) {
        if blocks {
            phase::<0xa003>();
        } else {
            phase::<0xa002>();
        }
        touch(start, count, size);
    } else {
        println!("SKIP populated faults: nobody takes second-stage entries away here");
    }
    if machine.argument("all").is_some() {
        copies(blocks, start, count, size);
    }
    println!("BENCH DONE");
}

/// What follows counts for this phase.
fn phase<const MARKER: u16>() {
    // SAFETY: moves to the zero register do nothing.
    unsafe { asm!("movz xzr, #{}", const MARKER, options(nomem, nostack)) };
}

fn touch(start: u64, count: u64, size: u64) {
    for index in 0..count {
        measured!("str {0}, [{0}]", in(reg) start + index * size);
    }
    // What was stored is still there: the hypervisor lost no page and mixed none up.
    for address in (0..count).map(|index| start + index * size) {
        assert_eq!(memory::load64(address), address, "a page has lost its content");
    }
}

fn calls(machine: &Machine) {
    phase::<0xa007>();
    let page = memory::image().end.next_multiple_of(PAGE);
    memory::store64(page, 0);
    for _ in 0..CALLS {
        measured!("str xzr, [{}]", in(reg) page);
    }
    phase::<0xa004>();
    for _ in 0..CALLS {
        measured!("ldr {:w}, [{}]", out(reg) _, in(reg) FR);
    }
    phase::<0xa005>();
    for _ in 0..CALLS {
        measured!("str {:w}, [{}]", in(reg) 0x12u32, in(reg) IFLS);
    }
    phase::<0xa006>();
    for _ in 0..CALLS {
        let mut answer = psci::VERSION;
        measured!("hvc #0", inout("x0") answer, out("x1") _, out("x2") _, out("x3") _, clobber_abi("C"));
        assert_ne!(answer as i64, psci::NOT_SUPPORTED, "this firmware has no PSCI_VERSION");
    }
    phase::<0xa00a>();
    for count in 0..CALLS {
        measured!("str {:w}, [{}]", in(reg) count, in(reg) COALESCED + 8);
        if count % ROOM == ROOM - 1 {
            drain(machine);
        }
    }
    phase::<0xa00b>();
    for count in 0..CALLS {
        measured!("str {:w}, [{}]", in(reg) count, in(reg) DOORBELL);
    }
    if machine.argument("all").is_some() {
        emulated(page);
    }
}

/// What the hypervisor does to reach private memory.
fn accesses(page: u64) {
    memory::store64(page, page);
    let ask = |function: u64, argument: u64| {
        assert_eq!(smccc::hvc([function, argument, 0, 0]), 0, "the hypervisor refuses {function:#x}");
    };
    ask(READ, page);
    phase::<0xa012>();
    repeat([READ, page, 0]);
    phase::<0xa000>();
    ask(IN_PLACE, 1);
    phase::<0xa013>();
    repeat([READ, page, 0]);
    phase::<0xa000>();
    ask(IN_PLACE, 0);
    phase::<0xa014>();
    repeat([LEASE, page, 0]);
    phase::<0xa000>();
    assert!(smccc::hvc([STOLEN_TIME, 0, 0, 0]) as i64 > 0, "no stolen time is told here");
    phase::<0xa017>();
    repeat([CHECK, page, 0]);
}

/// What the hypervisor does to a page's tags.
fn tags(page: u64) {
    memory::store64(page, page);
    phase::<0xa018>();
    repeat([TAGS, page, 0]);
    phase::<0xa019>();
    repeat([TAGS, page, 1]);
    phase::<0xa000>();
}

fn repeat([function, page, what]: [u64; 3]) {
    for _ in 0..CALLS {
        let mut answer = function;
        measured!("hvc #0", inout("x0") answer, inout("x1") page => _, inout("x2") what => _, out("x3") _, clobber_abi("C"));
        assert_eq!(answer, 0, "the hypervisor refuses {function:#x}");
    }
}

/// Has the coalesced writes taken. A register of the VMM's does it by the exit.
fn drain(machine: &Machine) {
    if let Some(service) = machine.number("service") {
        return memory::store64(service + 16, 0);
    }
    assert_eq!(smccc::hvc([DRAIN, 0, 0, 0]), ROOM, "coalesced writes were lost");
}

/// What only a hypervisor that reads instructions or traps maintenance does.
fn emulated(page: u64) {
    phase::<0xa009>();
    for _ in 0..CALLS {
        measured!("dc civac, {}", in(reg) page);
    }
    phase::<0xa008>();
    for _ in 0..CALLS {
        measured!("ldp {:w}, {:w}, [{}]", out(reg) _, out(reg) _, in(reg) FR);
    }
}

/// First stores to what a copy of this machine has too. The copy turns itself off long after: idle time costs nothing.
fn copies(blocks: bool, start: u64, count: u64, size: u64) {
    let generation = memory::load64(GENERATION);
    assert_eq!(smccc::hvc([FORK, 0, 0, 0]), 0, "this hypervisor does not fork");
    while smccc::hvc([FORK, u64::MAX, 0, 0]) != 0 {}
    if memory::load64(GENERATION) != generation {
        let wake = timer::now() + LONG * timer::frequency();
        timer::arm_virtual_at(wake);
        while timer::now() < wake {
            timer::wait_for_interrupt();
        }
        smccc::system_off();
    }
    while smccc::hvc([ALONE, 0, 0, 0]) == 0 {}
    if blocks {
        phase::<0xa011>();
    } else {
        phase::<0xa010>();
    }
    touch(start, count, size);
}

/// Whether the range's second-stage entries are gone.
fn unmap(machine: &Machine, start: u64, length: u64) -> bool {
    if smccc::hvc([UNMAP, start, length, 0]) == 0 {
        return true;
    }
    let Some(service) = machine.number("service") else { return false };
    memory::store64(service, start);
    memory::store64(service + 8, length);
    true
}
