//! Stores to zones of coalesced MMIO and to doorbells: done before the fault is looked at as one of memory.
//!
//! Protocol: [`described`] is asked first about every data abort in the window of such places, and takes what the
//! hardware describes whole. What only the instruction tells comes from [`super::emulate`], and is taken if it is one store: a
//! pair has no single answer when the ring has room for its first half only.
//!
//! Invariants: a store that is not done has not advanced the PC; it is made again when its owner lets the guest go on.

use entresol_arch_arm64::abort;

use super::{Next, mmio, park};
use crate::arch::State;
use crate::counters::Reason;
use crate::sched::VcpuRef;
use crate::vm::{Pause, Store};

/// Carries out the store behind the data abort `esr`, if it is one for here.
#[inline(never)]
pub fn described(vcpu: &VcpuRef, state: &mut State, esr: u64, far: u64, hpfar: u64) -> Option<Next> {
    let vm = &*vcpu.vm;
    let store = abort::described_store(esr, far, hpfar)?;
    if !mmio::begins_there(store.gpa, store.size, far) {
        return None;
    }
    let value = mmio::order(state, state.read(store.register), store.size);
    let done = vm.posted.store(store.gpa, store.size, value);
    if done == Store::Elsewhere {
        return None;
    }
    vm.counters.bump(Reason::Posted);
    if done == Store::Full {
        return Some(park(vm, Pause::CoalescedFull));
    }
    state.skip(esr);
    Some(if done == Store::Signalled { Next::Look } else { Next::Again })
}
