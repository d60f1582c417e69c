//! A guest that attacks whatever runs it: addresses outside its memory, wild system registers, calls, tables, interrupt
//! controller and devices, at random and without end, on every CPU.
//!
//! A hypervisor has won when it still runs, its other guests do too, and this one can be killed. This program only has to
//! survive itself: every operation is an [`attempt`](guest_rt::trap::attempt), what would stop its own CPU is left out
//! (each attack says what), and [`Attacker::repair`] puts back what the next attack needs.
//!
//! Command line: `seed=N` (default 1), `rounds=N` (default: for ever), `only=NAME` for one kind of attack. Each CPU
//! prints a progress line every [`PROGRESS`] rounds, so that one can see it live; a seed replays a CPU's operations.

#![no_std]
#![no_main]

mod branches;
mod calls;
mod flash;
mod interrupts;
mod outside;
mod registers;
mod tables;
mod virtio;

use core::ops::Range;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use guest_rt::entry::MAX_CPUS;
use guest_rt::machine::Machine;
use guest_rt::rng::Rng;
use guest_rt::trap::{self, Fault};
use guest_rt::{console, gic, guest, memory, println, smp, sysreg_read, sysreg_write};

guest!(main);

/// Rounds between two lines of one CPU.
const PROGRESS: u64 = 200;
/// Operations of one attack in one round.
const BATCH: u64 = 16;
/// Memory of each CPU: a page of code, pages of tables, the rest data and rings.
const SCRATCH: u64 = 2 << 20;

/// One kind of attack: one operation.
type Attack = fn(&mut Attacker);

const ATTACKS: [(&str, Attack); 8] = [
    ("outside", outside::attack),
    ("registers", registers::attack),
    ("calls", calls::attack),
    ("tables", tables::attack),
    ("interrupts", interrupts::attack),
    ("virtio", virtio::attack),
    ("branches", branches::attack),
    ("flash", flash::attack),
];

static SEED: AtomicU64 = AtomicU64::new(1);
static ROUNDS: AtomicU64 = AtomicU64::new(0);
static END_OF_MEMORY: AtomicU64 = AtomicU64::new(0);
static SCRATCH_START: AtomicU64 = AtomicU64::new(0);
/// An index of [`ATTACKS`], or its length for all.
static ONLY: AtomicUsize = AtomicUsize::new(ATTACKS.len());

/// What one CPU attacks with.
pub struct Attacker {
    /// Where its randomness comes from.
    pub rng: Rng,
    /// Its own memory.
    pub scratch: Range<u64>,
    /// Where the machine's memory ends.
    pub end: u64,
    operations: u64,
    exceptions: u64,
}

fn main(machine: &Machine) {
    SEED.store(machine.number("seed").unwrap_or(1), Ordering::Relaxed);
    ROUNDS.store(machine.number("rounds").unwrap_or(u64::MAX), Ordering::Relaxed);
    END_OF_MEMORY.store(machine.end(), Ordering::Relaxed);
    if let Some(name) = machine.argument("only") {
        let Some(index) = ATTACKS.iter().position(|(known, _)| *known == name) else {
            return println!("HOSTILE: there is no attack named {name}");
        };
        ONLY.store(index, Ordering::Relaxed);
    }
    let free = machine.free();
    let cpus = machine.cpus.min(MAX_CPUS);
    assert!(free.end - free.start >= cpus as u64 * SCRATCH, "this machine has too little memory");
    SCRATCH_START.store(free.start, Ordering::Release);
    println!("HOSTILE seed={} cpus={cpus}", SEED.load(Ordering::Relaxed));
    gic::init_distributor();
    trap::on_interrupt(interrupt);
    for other in 1..cpus {
        if let Err(status) = smp::on(other, run) {
            println!("HOSTILE: CPU_ON of {other} is {status}");
        }
    }
    run(0);
    println!("HOSTILE DONE");
}

fn run(cpu: usize) {
    let start = SCRATCH_START.load(Ordering::Acquire) + cpu as u64 * SCRATCH;
    let seed = SEED.load(Ordering::Relaxed);
    let mut attacker = Attacker {
        rng: Rng::new(seed.wrapping_mul(31).wrapping_add(cpu as u64 + 1)),
        scratch: start..start + SCRATCH,
        end: END_OF_MEMORY.load(Ordering::Relaxed),
        operations: 0,
        exceptions: 0,
    };
    gic::init_cpu();
    let normal = Normal::read();
    for round in 1..=ROUNDS.load(Ordering::Relaxed) {
        attacker.round(&normal);
        if round % PROGRESS == 0 {
            let Attacker { operations, exceptions, .. } = attacker;
            console::init();
            println!("HOSTILE cpu {cpu}: round {round}, {operations} operations, {exceptions} exceptions");
        }
    }
}

/// The registers without which this program does not run.
struct Normal {
    sctlr: u64,
    vbar: u64,
}

impl Normal {
    fn read() -> Self {
        Self { sctlr: sysreg_read!("sctlr_el1"), vbar: sysreg_read!("vbar_el1") }
    }
}

impl Attacker {
    fn round(&mut self, normal: &Normal) {
        let only = ONLY.load(Ordering::Relaxed);
        let index = if only < ATTACKS.len() { only } else { self.rng.below(ATTACKS.len() as u64) as usize };
        for _ in 0..BATCH {
            ATTACKS[index].1(self);
        }
        self.repair(normal);
    }

    /// Puts back what the next attack needs.
    fn repair(&mut self, normal: &Normal) {
        trap::interrupts(false);
        sysreg_write!("sctlr_el1", normal.sctlr);
        sysreg_write!("vbar_el1", normal.vbar);
        // FP for EL1, SVE and SME trapped.
        sysreg_write!("cpacr_el1", 3 << 20);
        sysreg_write!("mdscr_el1", 0);
        guest_rt::timer::stop_virtual();
        guest_rt::timer::stop_physical();
    }

    /// Counts one operation and what became of it.
    pub fn note(&mut self, result: Result<u64, Fault>) -> Option<u64> {
        self.operations += 1;
        match result {
            Ok(value) => Some(value),
            Err(_) => {
                self.exceptions += 1;
                None
            }
        }
    }

    /// Runs one instruction with X0 to X17 set, at the start of this CPU's memory. It must neither branch, nor change
    /// SP or X19, nor write memory but where X0 to X17 say.
    pub fn execute(&mut self, instruction: u32, registers: &[u64; 18]) -> Option<u64> {
        let code = self.scratch.start;
        let values = code + 2048;
        for (index, value) in registers.iter().enumerate() {
            memory::store64(values + 8 * index as u64, *value);
        }
        let mut at = code;
        // LDP X(n), X(n+1), [X0, #8n], from the last pair to the first, which replaces the base.
        for first in (0..18).step_by(2).rev() {
            memory::store32(at, 0xa940_0000 | first << 15 | (first + 1) << 10 | first);
            at += 4;
        }
        memory::store32(at, instruction);
        memory::store32(at + 4, 0xd65f_03c0);
        memory::publish_code(code..at + 8);
        // SAFETY: leaf code in this CPU's own memory; the caller keeps to the conditions above.
        let result = unsafe { trap::attempt(code, [values, 0, 0]) };
        self.note(result)
    }

    /// An address of no memory: anywhere, near a device, a single bit, at memory's edge.
    pub fn outside(&mut self) -> u64 {
        const DEVICES: [u64; 8] =
            [0x0800_0000, 0x0808_0000, 0x080a_0000, 0x0900_0000, 0x0901_0000, 0x0902_0000, 0x0a00_0000, 0x0c00_0000];
        loop {
            let random = self.rng.draw();
            let address = match self.rng.below(6) {
                0 => random & 0xff_ffff_ffff,
                1 => random,
                2 => self.rng.pick(&DEVICES).wrapping_add(random & 0xffff).wrapping_sub(random >> 32 & 0x3f),
                3 => (1 << (random & 63)) + (random >> 8 & 8),
                4 => self.end + (random & 0x1f_ffff),
                _ => random & 0x3fff_ffff,
            };
            if !self.is_memory(address) {
                return address;
            }
        }
    }

    /// An address for a device or a table: outside, this CPU's memory, across memory's end, or about to wrap.
    pub fn anywhere(&mut self) -> u64 {
        match self.rng.below(4) {
            0 => self.outside(),
            1 => self.end - self.rng.below(64),
            2 => u64::MAX - self.rng.below(4096),
            _ => self.data(),
        }
    }

    /// An address of this CPU's data.
    pub fn data(&mut self) -> u64 {
        self.scratch.start + SCRATCH / 2 + self.rng.below(SCRATCH / 2 - 4096)
    }

    /// Whether an access of up to 64 bytes there could touch memory; stage 1 is off, so high bits are ignored nowhere.
    pub fn is_memory(&self, address: u64) -> bool {
        address > guest_rt::machine::RAM - 64 && address < self.end
    }
}

/// Whatever came: taken and ended, and then held back, because its source may never let go.
fn interrupt() {
    let intid = gic::acknowledge();
    if intid != gic::SPURIOUS {
        gic::end(intid);
    }
    gic::mask_below(0);
}
