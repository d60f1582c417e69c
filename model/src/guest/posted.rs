//! Stores that nobody answers: they wait in a ring until their owner takes them.
//!
//! What the hypervisor does around the core's ring, a lock and one operation, is done here the same way; addresses are
//! numbers, so that order and loss are seen.

use entresol_addr::Gpa;
use entresol_mmu::CoalescedWrite;

use super::stage::Stage;
use crate::check::Check;
use crate::lab;
use crate::litmus::outcome::Value;

/// The vCPU makes `count` stores. Returns how many the ring took: it would exit for the others.
pub fn post(stage: &Stage<'_>, count: u64) -> Value {
    let mut taken = 0;
    for _ in 0..count {
        let mut ring = stage.ring.lock();
        let number = lab::with(|lab| lab.posted.number());
        let accepted = ring.push(CoalescedWrite::new(Gpa::new(number * 8), 8, number)).is_ok();
        lab::with(|lab| {
            let wrong = lab.posted.put(accepted);
            lab.found(Check::Coalesced, wrong);
        });
        drop(ring);
        lab::settle();
        taken += u64::from(accepted);
    }
    Value::Word(taken)
}

/// The owner takes what waits. Returns how many there were.
pub fn drain(stage: &Stage<'_>) -> Value {
    let mut taken = 0;
    loop {
        let mut ring = stage.ring.lock();
        let write = ring.pop();
        lab::with(|lab| {
            let wrong = lab.posted.took(write.map(|write| write.gpa().get() / 8));
            lab.found(Check::Coalesced, wrong);
        });
        drop(ring);
        lab::settle();
        if write.is_none() {
            return Value::Word(taken);
        }
        taken += 1;
    }
}
