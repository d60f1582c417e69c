//! The lab: the core on a model of the machine, every interleaving, every bug put back.
//!
//! Purpose: Entresol's core is small enough to be run, unchanged, on an executable model of an arm64 machine: caches that
//! lag behind, translation caches that remember, instruction caches that nobody told, several CPUs. An explorer decides
//! which CPU goes before each operation and which of its freedoms the hardware takes, tries all of that or a large sample
//! of it, and checkers watch what the core promises. What it promises is worth something only if a broken core is found,
//! so the zoo plants every mistake that was made before, one by one, and shows that it is.
//!
//! Rooms: [`machine`] is the hardware; [`guest`] what CPUs do; [`lab`] joins them to the core; [`explore`] decides;
//! [`check`] watches, a file for each invariant; [`litmus`] reads scenarios; [`zoo`] plants bugs; [`report`] shows.
//!
//! Protocol of one schedule: the machine is switched on, the scenario's setup runs alone, its CPUs run as the schedule
//! says, the frames are counted, the outcome is judged. The same scenario, machine and decisions give the same schedule.
//!
//! Known holes: memory is sequentially consistent; a page is one cache line. See the parts for theirs.
#![forbid(unsafe_code)]

pub mod check;
pub mod explore;
pub mod guest;
pub mod lab;
pub mod litmus;
pub mod machine;
pub mod report;
pub mod zoo;
