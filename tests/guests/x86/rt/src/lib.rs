//! What a guest of x86-64 stands on: from a PVH loader's jump to `main` in long mode, a console, exceptions, the machine's end.
//!
//! Protocol: a guest says `guest!(main)`, where `main` takes a [`Machine`]. The first 4 GiB are mapped where they are, by pages of
//! 2 MiB that may be written and executed. When `main` returns, the machine is turned off; an exception that nobody expected prints
//! `GUEST STOPPED` and halts it for good.
//!
//! It knows the map of the machine from its loader's description only where a test needs it; COM1 and the sleep register are those of
//! `entresol_loader::x86::map`.
#![no_std]

mod entry;
pub mod memory;
#[path = "../../../rt/src/rng.rs"]
pub mod rng;
pub mod trap;

use core::arch::asm;
use core::fmt;

/// COM1: data, and line status with its bit for an empty transmitter.
const COM1: u16 = 0x3f8;
const LINE_STATUS: u16 = COM1 + 5;
const EMPTY: u8 = 1 << 5;
/// ACPI's sleep control register, and soft off.
const POWER: u16 = 0x600;
const OFF: u8 = 1 << 5 | 5 << 2;

/// What the loader said.
pub struct Machine {
    cmdline: &'static str,
    /// Where the memory that the image is in ends.
    end: u64,
}

impl Machine {
    /// The value of `key=value` on the command line, or an empty one for `key` alone.
    pub fn argument(&self, key: &str) -> Option<&'static str> {
        self.cmdline.split_ascii_whitespace().find_map(|word| {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            (name == key).then_some(value)
        })
    }

    /// The number that `key=` names, decimal or from `0x` on.
    pub fn number(&self, key: &str) -> Option<u64> {
        let text = self.argument(key)?;
        match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        }
    }

    /// Memory behind the image, from the next 2 MiB on: what the loader left lies before it.
    pub fn free(&self) -> core::ops::Range<u64> {
        memory::image().end.next_multiple_of(2 << 20)..self.end
    }
}

/// OUT of a byte.
pub fn out8(port: u16, value: u8) {
    // SAFETY: a port of the guest's machine; no memory of ours depends on it.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// IN of a byte.
pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// IN of 32 bits.
pub fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Whether the processor is Intel's, where calls are another instruction.
pub fn is_intel() -> bool {
    // EDX of "GenuineIntel".
    core::arch::x86_64::__cpuid(0).edx == u32::from_le_bytes(*b"ineI")
}

/// VMMCALL, or VMCALL.
pub fn call(function: u32, first: u64, second: u64) -> u64 {
    let answer;
    let intel = u64::from(is_intel());
    // SAFETY: RBX is put back; the hypervisor changes RAX only.
    unsafe {
        asm!(
            "test {intel}, {intel}",
            "xchg rbx, {first}",
            "jz 2f", "vmcall", "jmp 3f", "2:", "vmmcall", "3:",
            "xchg rbx, {first}",
            first = inout(reg) first => _, intel = in(reg) intel,
            in("rcx") second, inout("rax") u64::from(function) => answer,
            options(nostack)
        );
    }
    answer
}

/// Turns the machine off.
pub fn power_off() -> ! {
    out8(POWER, OFF);
    halt()
}

/// Stops for good.
pub fn halt() -> ! {
    loop {
        // SAFETY: no interrupt comes.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// The console.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            while in8(LINE_STATUS) & EMPTY == 0 {}
            out8(COM1, byte);
        }
        Ok(())
    }
}

/// Prints a line.
#[macro_export]
macro_rules! println {
    ($($text:tt)*) => {{
        use core::fmt::Write;
        // The console takes everything.
        let _infallible = write!($crate::Console, "{}\r\n", format_args!($($text)*));
    }};
}

/// Names the guest's `fn(&Machine)`.
#[macro_export]
macro_rules! guest {
    ($main:path) => {
        #[unsafe(no_mangle)]
        fn guest_main(machine: &$crate::Machine) {
            $main(machine)
        }
    };
}

unsafe extern "Rust" {
    fn guest_main(machine: &Machine);
}

/// First Rust code: long mode, the first 4 GiB mapped, `start_info` as the loader gave it.
#[unsafe(no_mangle)]
extern "C" fn guest_boot(start_info: *const u64) -> ! {
    trap::install();
    // SAFETY: hvm_start_info (Xen, start_info.h): cmdline_paddr is its fourth word; the loader ends the text with a zero.
    let cmdline = unsafe {
        let text = start_info.add(3).read() as *const core::ffi::c_char;
        if text.is_null() { "" } else { core::ffi::CStr::from_ptr(text).to_str().unwrap_or("") }
    };
    // SAFETY: memmap_paddr and memmap_entries are the sixth word and half of the seventh; a range has three words: address, size, type.
    let ranges = unsafe {
        let (first, count) = (start_info.add(5).read(), start_info.add(6).read() as u32);
        core::slice::from_raw_parts(first as *const [u64; 3], count as usize)
    };
    let own = |range: &&[u64; 3]| (range[0]..range[0] + range[1]).contains(&memory::image().start);
    let end = ranges.iter().find(own).map_or(memory::image().end, |range| range[0] + range[1]);
    // SAFETY: `guest!` defines it with this type.
    unsafe { guest_main(&Machine { cmdline, end }) };
    power_off()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    println!("GUEST STOPPED: {info}");
    halt()
}
