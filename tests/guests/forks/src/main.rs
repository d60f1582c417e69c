//! What a live fork costs: a guest with two vCPUs that writes its memory, asks to be forked again and again, and measures.
//!
//! Both vCPUs execute `movz xzr, #0xc000 + number` over and over while a fork is made, so that the plugin `icount` hears when
//! each of them stops and when it is at work again; `0xb102` and `0xe000` are around it. Copies look at their generation
//! and sleep: what they add is read off the hypervisor's free memory, printed as `FREE frames=N heap=N` before the
//! second fork and after the last.
//!
//! Arguments: `mib=N` of memory to write before the first fork, `forks=N`, `back-to-back`: a second fork follows each as soon
//! as the first copy sleeps, before what the first fork left was taken apart. Phases: 13 the forks, 14 those that follow at once.
//!
//! The vCPUs are fair to an emulator that runs one CPU at a time: YIELD lets the other one go on.

#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

use guest_rt::machine::Machine;
use guest_rt::{guest, memory, println, smccc, smp, timer};

guest!(main);

const PAGE: u64 = 4 << 10;
/// Of our hypervisor's services: forks the caller (X1 ends the copy's name, or asks whether that is done), tells what is free (X1 0 frames, 1 bytes of the
/// heap), tells whether no other vCPU could run (X1 0: and the hypervisor has nothing to do).
const FORK: u64 = 0xc600_0004;
const FREE: u64 = 0xc600_0005;
const ALONE: u64 = 0xc600_0006;
/// The first half of the machine's generation.
const GENERATION: u64 = 0x090d_0000;
/// Seconds that a copy sleeps.
const LONG: u64 = 100_000;
/// Signs of life that are given before and after a fork.
const SIGNS: u64 = 64;

/// What the second vCPU does.
static ORDER: AtomicU64 = AtomicU64::new(WORK);
const WORK: u64 = 0;
const IDLE: u64 = 1;
const END: u64 = 2;

fn main(machine: &Machine) {
    let (mib, forks) = (machine.number("mib").unwrap_or(16), machine.number("forks").unwrap_or(1));
    let pages = Pages::of(machine, mib << 8);
    // SAFETY: a move to the zero register does nothing.
    unsafe { asm!("movz xzr, #0xa00d", options(nomem, nostack)) };
    let mut name = 0;
    for number in 0..forks {
        pages.write(number);
        if number == 1 {
            print_free();
        }
        fork(name);
        name += 1;
        if machine.argument("back-to-back").is_some() {
            // A copy that faults keeps grace periods open, and its CPU may not have its turn for long.
            while smccc::hvc([ALONE, 1, 0, 0]) == 0 {
                relax();
            }
            // SAFETY: as above.
            unsafe { asm!("movz xzr, #0xa00e", options(nomem, nostack)) };
            fork(name);
            name += 1;
            // SAFETY: as above.
            unsafe { asm!("movz xzr, #0xa00d", options(nomem, nostack)) };
        }
        while smccc::hvc([ALONE, 0, 0, 0]) == 0 {
            relax();
        }
        pages.check(number);
    }
    print_free();
    println!("FORKS DONE");
}

/// The pages behind the image, but for those of the device tree.
struct Pages {
    start: u64,
    count: u64,
    tree: core::ops::Range<u64>,
}

impl Pages {
    fn of(machine: &Machine, count: u64) -> Self {
        let tree = machine.device_tree.start & !(PAGE - 1)..machine.device_tree.end.next_multiple_of(PAGE);
        let pages = Self { start: memory::image().end.next_multiple_of(PAGE), count, tree };
        assert!(pages.address(count) <= machine.end(), "this machine has too little memory");
        pages
    }

    fn address(&self, index: u64) -> u64 {
        let address = self.start + index * PAGE;
        if address < self.tree.start { address } else { address + (self.tree.end - self.tree.start) }
    }

    /// Writes every page the first time, and one later, so that what a copy adds stays in sight.
    fn write(&self, round: u64) {
        let count = if round == 0 { self.count } else { 1 };
        (0..count).map(|page| self.address(page)).for_each(|address| memory::store64(address, address ^ round));
    }

    fn check(&self, round: u64) {
        for page in (0..self.count).step_by(509) {
            let address = self.address(page);
            let written = if page == 0 { address ^ round } else { address };
            assert_eq!(memory::load64(address), written, "a fork has changed the original's memory");
        }
    }
}

/// Asks for a fork while both vCPUs work, and returns in the original only, alone.
fn fork(name: u64) {
    ORDER.store(WORK, Ordering::SeqCst);
    smp::on(1, second).expect("the second vCPU is off");
    signs();
    let generation = memory::load64(GENERATION);
    let answer: u64;
    // SAFETY: moves to the zero register do nothing; the call changes no memory of ours, and at most X0 to X17.
    unsafe {
        asm!("movz xzr, #0xb102", "hvc #0", "movz xzr, #0xc000", inlateout("x0") FORK => answer, inlateout("x1") name => _,
            clobber_abi("C"), options(nostack));
    }
    signs();
    while smccc::hvc([FORK, u64::MAX, 0, 0]) != 0 {
        signs();
    }
    if memory::load64(GENERATION) != generation {
        ORDER.store(IDLE, Ordering::SeqCst);
        idle();
    }
    // SAFETY: as above.
    unsafe { asm!("movz xzr, #0xe000", options(nomem, nostack)) };
    assert_eq!(answer, 0, "this hypervisor does not fork");
    ORDER.store(END, Ordering::SeqCst);
    while smp::state(1) != 1 {
        relax();
    }
}

fn signs() {
    for _ in 0..SIGNS {
        // SAFETY: a move to the zero register, and a hint.
        unsafe { asm!("movz xzr, #0xc000", "yield", options(nomem, nostack)) };
    }
}

fn second(_cpu: usize) {
    loop {
        // SAFETY: as above.
        unsafe { asm!("movz xzr, #0xc001", "yield", options(nomem, nostack)) };
        match ORDER.load(Ordering::Relaxed) {
            WORK => {}
            IDLE => idle(),
            _ => return,
        }
    }
}

fn relax() {
    // SAFETY: a hint.
    unsafe { asm!("yield", options(nomem, nostack)) };
}

/// Sleeps until long after the original has ended, then turns the copy off: the machine ends with its last guest. Where idle
/// time is skipped this takes none.
fn idle() -> ! {
    let wake = timer::now() + LONG * timer::frequency();
    timer::arm_virtual_at(wake);
    while timer::now() < wake {
        timer::wait_for_interrupt();
    }
    smccc::system_off()
}

fn print_free() {
    let free = |what| smccc::hvc([FREE, what, 0, 0]);
    println!("FREE frames={} heap={}", free(0), free(1));
}
