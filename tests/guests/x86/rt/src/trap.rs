//! Exceptions: none is expected but where a test says so.

use core::arch::{asm, global_asm};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::{halt, println};

const VECTORS: usize = 32;
const STUB: u64 = 16;

global_asm!(
    r#"
    .text
    // Vectors 8, 10 to 14, 17, 21, 29 and 30 push an error code themselves.
    .balign 16
    .global guest_stubs
guest_stubs:
    .set    vector, 0
    .rept   32
    .balign 16
    .if (0x60227d00 >> vector) & 1
    .else
    push    0
    .endif
    push    vector
    jmp     guest_save
    .set    vector, vector + 1
    .endr

guest_save:
    push    rax
    push    rcx
    push    rdx
    push    rsi
    push    rdi
    push    r8
    push    r9
    push    r10
    push    r11
    cld
    mov     rdi, rsp
    sub     rsp, 8
    call    guest_trap
    add     rsp, 8
    pop     r11
    pop     r10
    pop     r9
    pop     r8
    pop     rdi
    pop     rsi
    pop     rdx
    pop     rcx
    pop     rax
    add     rsp, 16
    iretq
    "#
);

unsafe extern "C" {
    static guest_stubs: u8;
}

#[repr(C)]
struct Frame {
    general: [u64; 9],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

struct Table(UnsafeCell<[[u64; 2]; VECTORS]>);

// SAFETY: one CPU; written once, before any exception.
unsafe impl Sync for Table {}

static TABLE: Table = Table(UnsafeCell::new([[0; 2]; VECTORS]));
/// Where the instruction that may fault goes on, and the vector that it came with, one more; 0: none.
static RESUME: AtomicU64 = AtomicU64::new(0);
static SEEN: AtomicU64 = AtomicU64::new(0);

/// Makes exceptions come here.
pub(crate) fn install() {
    /// Present, an interrupt gate, code selector 8.
    const GATE: u64 = 0x8e00 << 32 | 8 << 16;
    let stubs = &raw const guest_stubs as u64;
    let gate = |vector: usize| {
        let to = stubs + vector as u64 * STUB;
        [to & 0xffff | GATE | (to >> 16 & 0xffff) << 48, to >> 32]
    };
    let pointer = [0xffff_u16; 5];
    let (limit, base) = ((VECTORS * 16 - 1) as u16, TABLE.0.get() as u64);
    let mut pointer = pointer;
    pointer[0] = limit;
    for (index, part) in pointer[1..].iter_mut().enumerate() {
        *part = (base >> (16 * index)) as u16;
    }
    // SAFETY: one CPU, and the table is a static; every gate leads to a stub.
    unsafe {
        *TABLE.0.get() = core::array::from_fn(gate);
        asm!("lidt [{}]", in(reg) pointer.as_ptr(), options(readonly, nostack, preserves_flags));
    }
}

#[unsafe(no_mangle)]
extern "C" fn guest_trap(frame: &mut Frame) {
    let resume = RESUME.swap(0, Ordering::Relaxed);
    if resume == 0 {
        println!("GUEST STOPPED: exception {} at {:#x}, error code {:#x}", frame.vector, frame.rip, frame.error);
        halt();
    }
    SEEN.store(frame.vector + 1, Ordering::Relaxed);
    frame.rip = resume;
}

/// Runs `action`, which may take one exception. It is given the address of a word, in which it puts where to go on, the moment before the
/// instruction that may fault. Returns the exception's vector.
pub fn around(action: impl FnOnce(*mut u64)) -> Option<u64> {
    SEEN.store(0, Ordering::Relaxed);
    action(RESUME.as_ptr());
    RESUME.store(0, Ordering::Relaxed);
    SEEN.swap(0, Ordering::Relaxed).checked_sub(1)
}
