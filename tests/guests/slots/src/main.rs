//! Memory slots that come, go and move while the guest uses them, and what cache maintenance does to each kind.
//!
//! The owner's policy `services` lets the guest make slots that show its own memory a second time ([`windows`]). Command line:
//!
//! | argument | what |
//! |---|---|
//! | `table` | every cache maintenance operation on every kind of target ([`table`]); `ivac=abort` or `clean` is the policy |
//! | `device=ADDRESS` | of the table: a slot of a device, of at least a page |
//! | `watch=ADDRESS` | waits until its owner shows its memory there, read-only, and until that has gone again |
//! | `soak=SECONDS` | random updates by one CPU, random accesses by all others ([`soak`]); `seed=N` |
//!
//! Accesses outside the slots, and stores to read-only ones, must end in aborts (policies `unclaimed_mmio`, `read_only_store`).

#![no_std]
#![no_main]

mod soak;
mod table;
mod windows;

use guest_rt::machine::Machine;
use guest_rt::memory::store64;
use guest_rt::report::Report;
use guest_rt::trap::probe;
use guest_rt::{guest, println};

guest!(main);

/// A slot that comes and goes by the owner's doing; each step is said.
fn watch(report: &mut Report, machine: &Machine, address: u64) {
    const PATTERN: u64 = 0x0b5e_55ed_0b5e_55ed;
    let memory = machine.free().start + (1 << 20);
    store64(memory, PATTERN);
    println!("WATCH {:#x}", memory - guest_rt::machine::RAM);
    let seen = loop {
        if let Ok(value) = probe::load64(address, 0) {
            break value;
        }
    };
    report.check("what is seen is what was stored", if seen == PATTERN { Ok(()) } else { Err("it is not") });
    let refused = probe::store64(address, 1).is_err() && guest_rt::memory::load64(memory) == PATTERN;
    report.check("no store goes through", if refused { Ok(()) } else { Err("one did") });
    println!("SEEN");
    while probe::load64(address, 0).is_ok() {}
    println!("GONE");
}

fn main(machine: &Machine) {
    let mut report = Report::default();
    if machine.argument("table").is_some() {
        table::all(&mut report, machine);
    }
    if let Some(address) = machine.number("watch") {
        watch(&mut report, machine, address);
    }
    if let Some(seconds) = machine.number("soak") {
        soak::all(&mut report, machine, seconds);
    }
    report.end();
}
