//! Operations between markers on x86-64, counted by the `icount` plugin (`bench/icount.c`).
//!
//! Each operation is `marker b000; op; marker e000`, so an interval is the operation, all that it causes in the hypervisor, and nothing
//! else. The guest's own tables map everything by 2 MiB. Phases have the numbers of the arm64 guest's, where it has the same:
//!
//! | phase | operation |
//! |---|---|
//! | 1 | first store to a 4 KiB page that was never touched |
//! | 2 | first store to a 4 KiB page that the VM's memory has but the second stage does not map |
//! | 4, 5 | load, store of 32 bits where neither memory nor a device is |
//! | 6 | VMMCALL: nothing |
//! | 7 | store to a page that is mapped: 1, what counting itself costs |
//! | 12 | store to a page that the dirty log has write-protected |
//! | 13 | fetching the log with 16,384 dirty pages |
//! | 24 | OUT to a register of the serial port that is emulated |
#![no_std]
#![no_main]

use core::arch::asm;

use guest_x86_rt::{Machine, call, guest, println};

/// A NOP with this displacement above its own number: no compiler pads with it.
macro_rules! marker {
    ($number:literal) => {
        concat!(".byte 0x0f, 0x1f, 0x84, 0x00; .long 0x454e0000 + ", $number)
    };
}

macro_rules! measured {
    ($operation:literal, $($operand:tt)*) => {
        // SAFETY: the operation's address is memory that nothing else uses, or a port; markers do nothing.
        unsafe { asm!(marker!("0xb000"), $operation, marker!("0xe000"), $($operand)*, options(nostack)) }
    };
}

macro_rules! phase {
    ($number:literal) => {
        // SAFETY: a marker does nothing.
        unsafe { asm!(marker!($number), options(nomem, nostack, preserves_flags)) }
    };
}

guest!(main);

const PAGE: u64 = 4096;
const START: u64 = 16 << 20;
const PAGES: u64 = 16_384;
const CALLS: u64 = 8_192;

const NOTHING: u64 = 0xc600_0000;
const ZAP: u32 = 0xc600_0001;
const DIRTY: u32 = 0xc600_0010;

/// Where nothing is.
const NOWHERE: u64 = 0xd800_0000;

/// COM1's scratch register.
const SCRATCH: u16 = 0x3ff;

fn main(_machine: &Machine) {
    calls();
    phase!("0xa001");
    touch();
    assert!(call(ZAP, START, PAGES * PAGE) == 0, "the hypervisor must take second-stage entries away");
    phase!("0xa002");
    touch();
    phase!("0xa007");
    touch();
    log();
    println!("BENCH DONE");
}

/// A store to each page.
fn touch() {
    for page in 0..PAGES {
        measured!("mov qword ptr [{}], 1", in(reg) START + page * PAGE);
    }
}

fn calls() {
    phase!("0xa006");
    for _ in 0..CALLS {
        measured!("vmmcall", inout("rax") NOTHING => _);
    }
    phase!("0xa004");
    for _ in 0..CALLS {
        measured!("mov eax, [{}]", in(reg) NOWHERE, out("eax") _);
    }
    phase!("0xa005");
    for _ in 0..CALLS {
        measured!("mov [{}], eax", in(reg) NOWHERE, in("eax") 0);
    }
    phase!("0xa018");
    for _ in 0..CALLS {
        measured!("out dx, al", in("dx") SCRATCH, in("al") 0u8);
    }
}

fn log() {
    assert!(call(DIRTY, 1, 0) == 0, "the hypervisor must start a dirty log");
    // Everything is protected by the first fetch at the latest.
    call(DIRTY, 2, 0);
    phase!("0xa00c");
    touch();
    phase!("0xa00d");
    let named: u64;
    // RBX is the compiler's own: it is exchanged around the markers.
    // SAFETY: the call changes RAX only; markers do nothing.
    unsafe {
        asm!(
            "xchg rbx, {action}", marker!("0xb000"), "vmmcall", marker!("0xe000"), "xchg rbx, {action}",
            action = inout(reg) 2u64 => _, inout("rax") u64::from(DIRTY) => named, in("rcx") 0u64, options(nostack)
        );
    }
    assert!(named >= PAGES, "{named} pages are too few");
}
