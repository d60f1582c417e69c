//! The controller against a model of the hardware's CPU interface and a naive controller that scans everything.
//!
//! `cpu` is the hardware: acknowledge, priority drop, deactivation and maintenance conditions on list registers. `oracle`
//! is the specification, one plain struct an interrupt. `lockstep` compares the two after random operations, `concurrent`
//! runs vCPUs on real threads, `registers` checks the maps, `saved` the form outside, `scenario` names single cases.

extern crate std;

mod concurrent;
mod cpu;
mod lockstep;
mod oracle;
mod registers;
mod saved;
mod scenario;

use super::{Config, Vgic};

fn vgic(vcpus: usize, spis: usize) -> Vgic {
    Vgic::new(Config { vcpus, spis }).expect("a valid configuration")
}

/// `ICH_VTR_EL2` of hardware with this many list registers.
fn vtr(list_registers: usize) -> u64 {
    list_registers as u64 - 1
}
