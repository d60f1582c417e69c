//! Guests that turn their caches on or off with maintenance by set and way.
//!
//! Purpose: by set/way a guest means all of its memory. Where the second stage forces write-back its caches hide nothing, and
//! nothing is done. Elsewhere everything that is mapped is cleaned and invalidated: once for each time that the vCPU's
//! caches go on or off, not once for each of the thousands of operations that such a guest makes ("stage2-faults", cache work).
//!
//! Protocol: the first operation cleans and begins to watch (HCR_EL2.TVM): from then on operations do nothing, and a write of
//! SCTLR_EL1 that turns the caches on or off cleans again. The watch ends when they are on. Other writes that trap are made for the
//! guest, as it would have made them.
//!
//! Invariants: the watch is the vCPU's, goes where it goes ([`resume`]), and ends when the vCPU is powered on anew.

use entresol_arch_arm64::policy::TranslationRegister;
use entresol_metal_arm64::features::{self, Feature};
use entresol_metal_arm64::live;

use crate::arch::State;
use crate::counters::Reason;
use crate::sched::VcpuRef;

/// SCTLR_EL1.M and C: translation and with it caches are on.
const CACHES: u64 = 1 << 0 | 1 << 2;

/// DC ISW, CSW or CISW.
pub fn set_way(vcpu: &VcpuRef, state: &mut State) {
    if features::has(Feature::FORCED_WRITE_BACK) || state.watched {
        return;
    }
    clean(vcpu);
    state.watched = true;
    resume(vcpu, state);
}

/// A write of `value` that trapped.
pub fn write(vcpu: &VcpuRef, state: &mut State, register: TranslationRegister, value: u64) {
    let on = |control: u64| control & CACHES == CACHES;
    let before = on(live::sctlr_el1());
    make(register, value);
    let after = on(live::sctlr_el1());
    if before != after {
        clean(vcpu);
    }
    if after {
        state.watched = false;
        resume(vcpu, state);
    }
}

fn make(register: TranslationRegister, value: u64) {
    use TranslationRegister as Register;
    match register {
        Register::SctlrEl1 => live::set_sctlr_el1(value),
        Register::Ttbr0El1 => live::set_ttbr0_el1(value),
        Register::Ttbr1El1 => live::set_ttbr1_el1(value),
        Register::TcrEl1 => live::set_tcr_el1(value),
        Register::Afsr0El1 => live::set_afsr0_el1(value),
        Register::Afsr1El1 => live::set_afsr1_el1(value),
        Register::EsrEl1 => live::set_esr_el1(value),
        Register::FarEl1 => live::set_far_el1(value),
        Register::MairEl1 => live::set_mair_el1(value),
        Register::AmairEl1 => live::set_amair_el1(value),
        Register::ContextidrEl1 => live::set_contextidr_el1(value),
    }
}

/// The loaded vCPU is watched or not, as it was.
pub fn resume(vcpu: &VcpuRef, state: &State) {
    vcpu.vm.board.watch_translation(state.watched);
}

fn clean(vcpu: &VcpuRef) {
    vcpu.vm.counters.bump(Reason::CacheToggle);
    vcpu.vm.clean_everything();
}
