//! Memory slots that come, go and move while the guest uses them, and what cache maintenance does to each kind.
//!
//! The owner's policy `services` lets the guest make slots that show its own memory a second time ([`windows`]). Command line:
//!
//! | argument | what |
//! |---|---|
//! | `table` | every cache maintenance operation on every kind of target ([`table`]); `ivac=abort` or `clean` is the policy |
//! | `device=ADDRESS` | of the table: a slot of a device, of at least a page |
//! | `soak=SECONDS` | random updates by one CPU, random accesses by all others ([`soak`]); `seed=N` |
//!
//! Accesses outside the slots must end in aborts (policy `unclaimed_mmio`).

#![no_std]
#![no_main]

mod soak;
mod table;
mod windows;

use guest_rt::guest;
use guest_rt::machine::Machine;
use guest_rt::report::Report;

guest!(main);

fn main(machine: &Machine) {
    let mut report = Report::default();
    if machine.argument("table").is_some() {
        table::all(&mut report, machine);
    }
    if let Some(seconds) = machine.number("soak") {
        soak::all(&mut report, machine, seconds);
    }
    report.end();
}
