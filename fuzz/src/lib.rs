//! Sequences of operations on the unchanged core, found by the code that they reach, judged by a naive reference.
//!
//! Purpose: the lab's litmus files are few and interleaved; here one CPU does many things after each other: slot updates,
//! faults, invalidations, ageing, dirty logs and rings, cache maintenance, content that is made and taken away, owners'
//! mistakes, and requests for frames that are refused. An input is bytes ([`input`]), so that changing one anywhere gives
//! another sequence.
//!
//! Protocol of a run ([`subject`]): each operation goes to the core on a [`FlatMachine`] and to [`reference`], which is
//! lists and maps. After each, every translation in the tables is judged by the reference; at the end everything is
//! given back, and every frame must be there.
//!
//! Protocol of the search ([`search`]): inputs that reach something new are kept and changed. What a run reached is told
//! by the facade of `entresol-sync`, which names the place in the source of each operation on an atomic or a lock, and by
//! how operations ended ([`feedback`]). So the search is guided without an instrumented build, and a seed repeats it.
//!
//! A second subject, [`interrupts`], is the interrupt controllers of an x86-64 machine, with a reference of its own.
//!
//! Checked: INV-3, 4, 5, 7, 11, 13, 15 as far as one CPU shows them; no panic, no wait for ever.
//!
//! Known holes: one CPU and one virtual machine. A flat machine has no caches and no stale translations: those are the
//! lab's. Only the first word of a page is judged.
//!
//! [`FlatMachine`]: entresol_machine::flat::FlatMachine
#![forbid(unsafe_code)]

pub mod feedback;
pub mod input;
pub mod interrupts;
pub mod reference;
pub mod search;
pub mod subject;
