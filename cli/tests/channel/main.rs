//! The program `entresol` on the control channel of a fake hypervisor.

mod commands;
mod console;
mod fake;
