//! What a first guest of x86-64 sees: memory that is zero until it is written, ports, its processor, the hypervisor's services.
//!
//! Command line: `mib=N` memory to work on (16), from 16 MiB on.
#![no_std]
#![no_main]

use core::arch::asm;
use core::arch::x86_64::__cpuid;

use guest_x86_rt::{Machine, call, guest, in8, in32, is_intel, println, trap};

guest!(main);

const PAGE: u64 = 4096;
const START: u64 = 16 << 20;
/// What a page is written with: its own address, turned around.
const fn pattern(page: u64) -> u64 {
    !page.rotate_left(7)
}

const NOTHING: u32 = 0xc600_0000;
const ZAP: u32 = 0xc600_0001;
const DIRTY: u32 = 0xc600_0010;
const MMIO: u32 = 0xc600_0012;
const UNKNOWN: u32 = 0xc600_00ff;
const INVALID: u64 = -2i64 as u64;
const NOT_SUPPORTED: u64 = -1i64 as u64;

const DEBUG: u64 = 1;
const UNDEFINED: u64 = 6;
const GENERAL_PROTECTION: u64 = 13;

fn main(machine: &Machine) {
    let mib = machine.argument("mib").and_then(|text| text.parse().ok()).unwrap_or(16);
    let end = START + (mib << 20);
    let services = machine.argument("services").is_some();
    let mut tally = Tally::default();
    tally.check("memory is zero, then what was written", memory(START, end));
    tally.check("ports without a device read as ones", in8(0x5555) == 0xff && in32(0x5554) == u32::MAX);
    tally.check("the processor hides what it cannot do here", processor());
    tally.check("a register that does not exist is refused", refused_register());
    tally.check("EFER keeps what it must", efer());
    tally.check("CR0.NE reads as it was written", error_reporting());
    tally.check("CR8 is its controller's task priority", task_priority());
    // QEMU's TCG takes the bit on AMD's processors, which have no such bit.
    if is_intel() {
        tally.check("CR4.VMXE is refused", vmxe());
    }
    tally.check("a debug exception comes to the guest", debug_exception());
    tally.check("SVM's own instructions are undefined", undefined_instruction());
    if services {
        tally.check("nobody answers: loads read ones, stores are ignored", nobody());
        tally.check("entries say where no memory is", entries(machine.argument("entries") != Some("none")));
        tally.check("code that touches devices is what memory says it is", code());
        tally.check("services answer, and refuse bad arguments", services_answer());
        tally.check("memory outlives its entries", outlives(START, end));
        tally.check("the log names each page that was written, once", log(START, end));
    } else {
        tally.check("services do not exist", no_services());
    }
    tally.end();
}

#[derive(Default)]
struct Tally {
    checks: u32,
    failed: u32,
}

impl Tally {
    fn check(&mut self, name: &str, good: bool) {
        self.checks += 1;
        self.failed += u32::from(!good);
        println!("{} {name}", if good { "PASS" } else { "FAIL" });
    }

    fn end(&self) {
        match self.failed {
            0 => println!("ALL PASS {}", self.checks),
            failed => println!("FAILED {failed} of {}", self.checks),
        }
    }
}

fn load(at: u64) -> u64 {
    // SAFETY: memory of the guest's that nothing else uses.
    unsafe { (at as *const u64).read_volatile() }
}

fn store(at: u64, value: u64) {
    // SAFETY: as above.
    unsafe { (at as *mut u64).write_volatile(value) };
}

fn pages(start: u64, end: u64) -> impl Iterator<Item = u64> {
    (start..end).step_by(PAGE as usize)
}

fn memory(start: u64, end: u64) -> bool {
    let zero = pages(start, end).all(|page| load(page) == 0 && load(page + PAGE - 8) == 0);
    pages(start, end).for_each(|page| store(page, pattern(page)));
    zero && intact(start, end)
}

fn intact(start: u64, end: u64) -> bool {
    pages(start, end).all(|page| load(page) == pattern(page) && load(page + 8) == 0)
}

fn processor() -> bool {
    let (basic, extended) = (__cpuid(1), __cpuid(0x8000_0001));
    let hypervisor = basic.ecx >> 31 & 1 == 1;
    let (xsave, svm, long) = (basic.ecx >> 26 & 1, extended.ecx >> 2 & 1, extended.edx >> 29 & 1);
    hypervisor && (xsave, svm, long) == (0, 0, 1) && __cpuid(0x8000_000a).ebx == 0
}

fn refused_register() -> bool {
    let (mut low, mut high) = (0u32, 0u32);
    trap::around(|resume| {
        // SAFETY: a register that does not exist; the exception goes on behind the instruction.
        unsafe {
            asm!(
                "lea {at}, [rip + 2f]", "mov [{resume}], {at}", "rdmsr", "2:",
                at = out(reg) _, resume = in(reg) resume, in("ecx") 0xdead_0000u32,
                inout("eax") low, inout("edx") high, options(nostack)
            );
        }
    }) == Some(GENERAL_PROTECTION)
        && (low, high) == (0, 0)
}

fn undefined_instruction() -> bool {
    trap::around(|resume| {
        // SAFETY: a guest may not have it; the exception goes on behind the instruction.
        unsafe {
            asm!(
                "lea {at}, [rip + 2f]", "mov [{resume}], {at}", "vmload rax", "2:",
                at = out(reg) _, resume = in(reg) resume, in("rax") 0u64, options(nostack)
            );
        }
    }) == Some(UNDEFINED)
}

/// INT1: #DB, which the hypervisor may see first.
fn debug_exception() -> bool {
    trap::around(|resume| {
        // SAFETY: the exception goes on behind the instruction.
        unsafe {
            asm!(
                "lea {at}, [rip + 2f]", "mov [{resume}], {at}", ".byte 0xf1", "2:",
                at = out(reg) _, resume = in(reg) resume, options(nostack)
            );
        }
    }) == Some(DEBUG)
}

fn no_services() -> bool {
    trap::around(|resume| {
        // SAFETY: as above.
        unsafe {
            asm!(
                "lea {at}, [rip + 2f]", "mov [{resume}], {at}",
                "test {intel}, {intel}", "jz 3f", "vmcall", "3:", "vmmcall", "2:",
                at = out(reg) _, resume = in(reg) resume, intel = in(reg) u64::from(is_intel()), in("eax") NOTHING,
                options(nostack)
            );
        }
    }) == Some(UNDEFINED)
}

/// EFER: long mode is active, SVME is not seen, and a store without a change is taken.
fn efer() -> bool {
    const EFER: u32 = 0xc000_0080;
    let (low, high): (u32, u32);
    // SAFETY: the same value is written back.
    unsafe {
        asm!("rdmsr", "wrmsr", in("ecx") EFER, out("eax") low, out("edx") high, options(nostack));
    }
    low & (1 << 8 | 1 << 10) == 1 << 8 | 1 << 10 && low & 1 << 12 == 0 && high == 0
}

/// CR0.NE, of which VMX demands that it is set: a guest does not see that.
fn error_reporting() -> bool {
    const NE: u64 = 1 << 5;
    let read = || {
        let cr0: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mov {}, cr0", out(reg) cr0, options(nomem, nostack, preserves_flags)) };
        cr0
    };
    let write = |cr0: u64| {
        // SAFETY: only NE changes, and no x87 instruction runs.
        unsafe { asm!("mov cr0, {}", in(reg) cr0, options(nostack)) };
    };
    let before = read();
    let kept = [before ^ NE, before, before | NE, before & !NE].into_iter().all(|cr0| {
        write(cr0);
        read() == cr0
    });
    write(before);
    kept && read() == before
}

/// CR8 is bits 7:4 of the local APIC's task priority, whichever of the two is written, in memory and as x2APIC; exits between them lose neither.
fn task_priority() -> bool {
    const APIC_BASE: u32 = 0x1b;
    const X2APIC_ENABLED: u64 = 1 << 10;
    const TPR: u32 = 0x808;
    let in_memory = 0xfee0_0080 as *mut u32;
    let cr8 = || {
        let cr8: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mov {}, cr8", out(reg) cr8, options(nomem, nostack, preserves_flags)) };
        cr8
    };
    // SAFETY: no interrupt is enabled here.
    let set_cr8 = |value: u64| unsafe { asm!("mov cr8, {}", in(reg) value, options(nostack, preserves_flags)) };
    let leave = || in8(0x5555) == 0xff;
    let follows = |write: &dyn Fn(u32), read: &dyn Fn() -> u32| {
        write(0x5a);
        let led = leave() && cr8() == 5 && read() == 0x5a;
        set_cr8(3);
        let followed = leave() && read() == 0x30 && cr8() == 3;
        write(0);
        led && followed && cr8() == 0
    };
    // SAFETY: the local APIC's registers are there, and mapped.
    let memory = follows(&|tpr| unsafe { in_memory.write_volatile(tpr) }, &|| unsafe { in_memory.read_volatile() });
    // SAFETY: the processor says that it has x2APIC, and nothing uses the APIC.
    unsafe { write_register(APIC_BASE, read_register(APIC_BASE) | X2APIC_ENABLED) };
    // SAFETY: x2APIC has just been enabled.
    let register = follows(&|tpr| unsafe { write_register(TPR, tpr.into()) }, &|| unsafe { read_register(TPR) as u32 });
    memory && register
}

/// # Safety
///
/// The register exists.
unsafe fn read_register(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: as the caller promises.
    unsafe { asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// # Safety
///
/// The register exists, the value is one that it may have, and nobody relies on what it had.
unsafe fn write_register(register: u32, value: u64) {
    // SAFETY: as the caller promises.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    };
}

/// CR4.VMXE of a processor that says it has no VMX.
fn vmxe() -> bool {
    const VMXE: u64 = 1 << 13;
    trap::around(|resume| {
        // SAFETY: a guest may not set it; the exception goes on behind the instruction.
        unsafe {
            asm!(
                "lea {at}, [rip + 2f]", "mov [{resume}], {at}",
                "mov {cr4}, cr4", "or {cr4}, {vmxe}", "mov cr4, {cr4}", "2:",
                at = out(reg) _, resume = in(reg) resume, cr4 = out(reg) _, vmxe = const VMXE, options(nostack)
            );
        }
    }) == Some(GENERAL_PROTECTION)
}

/// Where no memory is, and no device either.
const NOWHERE: u64 = 0xd800_0000;

fn nobody() -> bool {
    let at = NOWHERE as *mut u8;
    let (byte, word, extended): (u8, u32, u64);
    // SAFETY: no memory is there.
    unsafe {
        at.cast::<u32>().write_volatile(7);
        asm!("mov {}, [{}]", out(reg_byte) byte, in(reg) at, options(nostack, readonly));
        asm!("mov {:e}, [{}]", out(reg) word, in(reg) at, options(nostack, readonly));
        asm!("movsx {}, byte ptr [{}]", out(reg) extended, in(reg) at, options(nostack, readonly));
        asm!("or dword ptr [{}], 1", in(reg) at, options(nostack));
    }
    (byte, word, extended) == (u8::MAX, u32::MAX, u64::MAX)
}

/// How accesses were answered: by the cache, by a walk, the whole way again, entries made.
fn counts() -> [u64; 4] {
    core::array::from_fn(|index| call(MMIO, index as u64, 0))
}

/// The first access to a page leaves an entry. The next is known by the vCPU's cache; with another page in between, the entry is found
/// by a walk. A slot that changes makes the entry old. `none`: the processor has no bit to reserve for entries.
fn entries(some: bool) -> bool {
    let (one, other) = (NOWHERE + PAGE, NOWHERE + 2 * PAGE);
    let mut before = counts();
    let mut changed = |what: &str, wanted: [u64; 4]| {
        let after = counts();
        let change: [u64; 4] = core::array::from_fn(|index| after[index] - before[index]);
        before = after;
        let wanted = if some { wanted } else { [0; 4] };
        if change != wanted {
            println!("{what}: {change:?}, not {wanted:?}");
        }
        change == wanted
    };
    store(one, 1);
    let first = changed("the first access", [0, 0, 0, 1]);
    store(one + 8, 1);
    let second = changed("the second", [1, 0, 0, 0]);
    store(other, 1);
    let another = changed("another page", [0, 0, 0, 1]);
    store(one, 1);
    let third = changed("the first page again", [0, 1, 0, 0]);
    let log = call(DIRTY, 1, 0) == 0 && call(DIRTY, 0, 0) == 0;
    store(one, 1);
    let old = changed("after a change of slots", [0, 0, 1, 1]);
    first && second && another && third && log && old
}

/// Code that loads from where nobody answers, and what it returns: MOV EAX, [RDI]; MOV RAX, [RDI]; MOVZX EAX, byte ptr [RDI]; with RET.
const LOADS: [([u8; 4], u64); 3] = [
    ([0x8b, 0x07, 0xc3, 0x90], u32::MAX as u64),
    ([0x48, 0x8b, 0x07, 0xc3], u64::MAX),
    ([0x0f, 0xb6, 0x07, 0xc3], u8::MAX as u64),
];

/// Runs code at `at` twice.
fn loads(at: u64) -> [u64; 2] {
    // SAFETY: one of `LOADS` is there.
    let load: extern "C" fn(u64) -> u64 = unsafe { core::mem::transmute(at as *const ()) };
    [load(NOWHERE), load(NOWHERE)]
}

/// Code is changed where it is, and by the tables; its page's second-stage entry is taken away.
fn code() -> bool {
    const PLACE: u64 = 64 << 20;
    const OTHER: u64 = 66 << 20;
    let write = |at: u64, code: [u8; 4]| {
        // SAFETY: memory of the guest's that nothing else uses.
        unsafe { (at as *mut [u8; 4]).write_volatile(code) };
    };
    // Also across two words.
    let changed = [0, 6].iter().all(|offset| {
        LOADS.iter().all(|(code, value)| {
            write(PLACE + offset, *code);
            loads(PLACE + offset) == [*value; 2]
        })
    });
    let (first, second) = (LOADS[0], LOADS[2]);
    write(PLACE, first.0);
    write(OTHER, second.0);
    let mapped = [(PLACE, first.1), (OTHER, second.1), (PLACE, first.1)].iter().all(|(page, value)| {
        map(*page);
        loads(WINDOW) == [*value; 2]
    });
    map(WINDOW);
    let zapped = call(ZAP, PLACE, PAGE) == 0 && loads(PLACE) == [first.1; 2];
    changed && mapped && zapped
}

/// 2 MiB of addresses that are mapped elsewhere for a while.
const WINDOW: u64 = 96 << 20;

/// The window shows the memory at `page`.
fn map(page: u64) {
    const LARGE: u64 = 0x83;
    const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    let root: u64;
    // SAFETY: the tables are the runtime's, mapped where they are: a root, one of level 3, and those of 2 MiB pages; nothing of the window
    // is used meanwhile.
    unsafe {
        asm!("mov {}, cr3", out(reg) root, options(nomem, nostack, preserves_flags));
        let third = *((root & ADDRESS) as *const u64) & ADDRESS;
        let second = *(third as *const u64) & ADDRESS;
        ((second + (WINDOW >> 21) * 8) as *mut u64).write_volatile(page | LARGE);
        asm!("invlpg [{}]", in(reg) WINDOW, options(nostack, preserves_flags));
    }
}

fn services_answer() -> bool {
    call(NOTHING, 0, 0) == 0
        && call(UNKNOWN, 0, 0) == NOT_SUPPORTED
        && call(ZAP, 1, PAGE) == INVALID
        && call(ZAP, 0, !(PAGE - 1)) == INVALID
        && call(DIRTY, 2, 0) == INVALID
        && call(DIRTY, 9, 0) == INVALID
}

fn outlives(start: u64, end: u64) -> bool {
    call(ZAP, start, end - start) == 0 && intact(start, end)
}

/// Under the log, twice: what was written is named, and nothing of it a second time.
fn log(start: u64, end: u64) -> bool {
    let third = || pages(start, end).step_by(3);
    if call(DIRTY, 1, 0) != 0 || call(DIRTY, 2, 0) == INVALID {
        return false;
    }
    third().for_each(|page| store(page, pattern(page)));
    let named = call(DIRTY, 2, 0);
    let again = call(DIRTY, 2, 0);
    // The stack is written between two calls.
    let few = 8;
    let all = third().count() as u64;
    (all..all + few).contains(&named) && again < few && call(DIRTY, 0, 0) == 0 && intact(start, end)
}
