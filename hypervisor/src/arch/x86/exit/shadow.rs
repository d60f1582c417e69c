//! Guests on shadow tables: their page faults, and what they do to the registers and the flushes that page faults depend on.
//!
//! Protocol: a page fault is the core's ([`entresol_mmu::Vm::shadow_fault`]), which walks the guest's tables. What these refuse is the guest's own
//! exception; what memory does not serve ends as a fault of a second stage does ([`memory`](super::memory)). A store to CR0, CR3, CR4 or EFER that changes what
//! addresses mean loads the root anew: entries that the guest has changed before are gone after it.
//!
//! Invariants: the vCPU's `regime` is what its control registers say, and its root what that was loaded for.
//!
//! Known holes: an access that the processor makes for itself (to a descriptor table, a task state) while EFLAGS.AC is set cannot be told from
//! the instruction's own: under SMAP a guest that keeps those in pages of user code gets no fault and no progress.

use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_arch_x86::control::ControlRegisters;
use entresol_arch_x86::emulate::{CodeSize, Privileged, Unsupported};
use entresol_arch_x86::msr::Refused;
use entresol_arch_x86::paging::{Kind, PageFault, Request};
use entresol_arch_x86::shadow::Exception;
use entresol_metal_x86::features;
use entresol_mmu::{Outcome, ShadowOutcome};
use entresol_slot::Hint;

use super::{GENERAL_PROTECTION, PAGE_FAULT, UNDEFINED, inject, interrupts, memory, mmio};
use crate::arch::{Memory, State};
use crate::exit::{Next, crash};
use crate::host;
use crate::sched::VcpuRef;
use crate::vm::Crash;

const RFLAGS_AC: u64 = 1 << 18;
/// What of CR0 and CR4 decides where addresses lead: PG, WP, PE; PSE, PAE, PGE, SMEP, SMAP.
const CR0_PAGING: u64 = 1 << 31 | 1 << 16 | 1 << 0;
const CR4_PAGING: u64 = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 20 | 1 << 21;

/// A page fault at `linear`, with the processor's error code.
#[inline(never)]
pub fn page_fault(cpu: usize, vcpu: &VcpuRef, state: &mut State, linear: u64, code: u32) -> Next {
    let Some(regime) = &state.regime else { return crash(vcpu, Crash::Unexpected) };
    let code = PageFault::from_bits_truncate(code);
    let user = code.contains(PageFault::USER);
    let kind = match () {
        () if code.contains(PageFault::FETCH) => Kind::Fetch,
        () if code.contains(PageFault::WRITE) => Kind::Write,
        () => Kind::Read,
    };
    // What the processor does for itself at user level is no instruction's own access.
    let by_leave = *state.guest.rflags() & RFLAGS_AC != 0 && (user || state.guest.privilege() != 3);
    let request = Request { kind, user, by_leave };
    let refused = code.contains(PageFault::RESERVED);
    let outcome = {
        let pin = host::get().epoch.pin(cpu);
        vcpu.vm.memory.shadow_fault(&pin, &state.hint, vcpu.index, regime, linear, request, refused)
    };
    match outcome {
        ShadowOutcome::Memory(Outcome::Resume, _) => Next::Again,
        ShadowOutcome::Memory(outcome, fault) => memory::conclude(cpu, vcpu, state, &fault, outcome),
        ShadowOutcome::Guest(Exception::Page(code)) => {
            state.guest.set_cr2(linear);
            inject(state, PAGE_FAULT, Some(code.bits()))
        }
        ShadowOutcome::Guest(Exception::NonCanonical) => inject(state, GENERAL_PROTECTION, Some(0)),
        ShadowOutcome::Unloaded => {
            if load(cpu, vcpu, state) {
                Next::Again
            } else {
                Next::Look
            }
        }
    }
}

/// The vCPU was started anew: it is to run on shadow tables, if its virtual machine is.
pub fn shade(vcpu: &VcpuRef, state: &mut State) {
    if vcpu.vm.memory.is_shaded() {
        state.guest.shade();
    }
}

/// Loads the root that the vCPU's registers name: it runs on nothing that its guest has changed before. False: the processor cannot run on it, and
/// its virtual machine has ended.
pub fn load(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> bool {
    let (memory, Some(own)) = (&vcpu.vm.memory, state.guest.control_registers()) else { return true };
    let regime = own.regime(memory.ipa_bits(), features::get().giant_pages);
    let root = memory.shadow_load(&host::get().epoch.pin(cpu), vcpu.index, &regime);
    state.regime = Some(regime);
    state.guest.set_control_registers(own);
    let runs = state.guest.run_on(cpu, root).is_ok();
    if !runs {
        log::error!(
            "vm {}: the root of shadow tables {root:x?} is out of reach outside long mode",
            vcpu.vm.config.name
        );
        vcpu.vm.crash(Crash::InvalidState);
    }
    runs
}

/// Why a control register was not stored to.
enum Stop {
    /// The guest gets a general-protection fault.
    Refused,
    /// Its virtual machine has ended.
    Ended,
}

impl From<Refused> for Stop {
    fn from(Refused: Refused) -> Self {
        Self::Refused
    }
}

/// An instruction that reads or changes control registers, or flushes a page.
#[cold]
pub fn instruction(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Next {
    let (privileged, next, size) = match mmio::privileged(cpu, vcpu, state) {
        Ok(Ok(read)) => read,
        // Another CPU of the guest changes its code.
        Ok(Err(Unsupported::NoMemory)) => return Next::Again,
        Ok(Err(_)) => return inject(state, UNDEFINED, None),
        Err(stop) => return mmio::stopped(vcpu, state, stop),
    };
    let Some(own) = state.guest.control_registers() else { return crash(vcpu, Crash::Unexpected) };
    let long_code = size == CodeSize::Bits64;
    let done = match privileged {
        Privileged::ReadControl { register, general } => {
            let value = match register {
                0 => own.cr0,
                // QEMU's emulation exits for these two as well.
                2 => state.guest.cr2(),
                3 => own.cr3,
                4 => own.cr4,
                8 => state.guest.priority().into(),
                _ => return inject(state, UNDEFINED, None),
            };
            *state.guest.general(general) = if long_code { value } else { value & 0xffff_ffff };
            Ok(())
        }
        Privileged::StoreStatus { general, bytes } => {
            let place = state.guest.general(general);
            *place = match bytes {
                2 => *place & !0xffff | own.cr0 & 0xffff,
                4 => own.cr0 & 0xffff_ffff,
                _ => own.cr0,
            };
            Ok(())
        }
        Privileged::WriteControl { register: 0, value } => {
            store(cpu, vcpu, state, false, |own| own.set_cr0(value, long_code))
        }
        Privileged::WriteControl { register: 3, value } => {
            let bits = vcpu.vm.memory.ipa_bits();
            store(cpu, vcpu, state, true, |own| own.set_cr3(value, bits))
        }
        Privileged::WriteControl { register: 4, value } => store(cpu, vcpu, state, false, |own| own.set_cr4(value)),
        Privileged::WriteControl { register: 2, value } => {
            state.guest.set_cr2(value);
            Ok(())
        }
        Privileged::WriteControl { register: 8, value: value @ 0..16 } => {
            state.guest.set_priority(value as u8, false);
            interrupts::follow(vcpu, state);
            Ok(())
        }
        Privileged::WriteControl { register: 8, .. } => Err(Stop::Refused),
        Privileged::WriteControl { .. } => return inject(state, UNDEFINED, None),
        Privileged::ClearTaskSwitched => store(cpu, vcpu, state, false, |own| {
            own.clear_task_switched();
            Ok(())
        }),
        Privileged::LoadStatus(status) => {
            store(cpu, vcpu, state, false, |own| own.set_cr0(own.with_status(status), long_code))
        }
        Privileged::InvalidatePage(linear) => {
            if let Some(regime) = &state.regime {
                let pin = host::get().epoch.pin(cpu);
                vcpu.vm.memory.shadow_invalidate_page(&pin, vcpu.index, regime, linear);
            }
            Ok(())
        }
    };
    match done {
        Ok(()) => {
            state.guest.go_on(next);
            Next::Again
        }
        Err(Stop::Refused) => inject(state, GENERAL_PROTECTION, Some(0)),
        Err(Stop::Ended) => Next::Look,
    }
}

/// A store to EFER, of a value that the guest may have.
pub fn set_efer(cpu: usize, vcpu: &VcpuRef, state: &mut State, efer: u64) {
    if let Some(own) = state.guest.control_registers() {
        state.guest.set_control_registers(ControlRegisters { efer, ..own });
        load(cpu, vcpu, state);
    }
}

/// Stores to a control register by `change`.
fn store(
    cpu: usize,
    vcpu: &VcpuRef,
    state: &mut State,
    by_cr3: bool,
    change: impl FnOnce(&mut ControlRegisters) -> Result<(), Refused>,
) -> Result<(), Stop> {
    let Some(before) = state.guest.control_registers() else { return Ok(()) };
    let mut own = before;
    change(&mut own)?;
    if own.needs_pointers(&before, by_cr3) {
        let memory = &vcpu.vm.memory;
        own.set_pointers(pointers(cpu, memory, &state.hint, own.pointers_at()), memory.ipa_bits())?;
    }
    state.guest.set_control_registers(own);
    let moved = (own.cr0 ^ before.cr0) & CR0_PAGING != 0 || (own.cr4 ^ before.cr4) & CR4_PAGING != 0;
    if (by_cr3 || moved) && !load(cpu, vcpu, state) { Err(Stop::Ended) } else { Ok(()) }
}

/// The page-directory pointers at `at`; where there is no memory they are absent.
fn pointers(cpu: usize, memory: &Memory, hint: &Hint, at: u64) -> [u64; 4] {
    const BYTES: usize = 32;
    const _: () = assert!(PAGE_SIZE.is_multiple_of(BYTES as u64), "aligned, they lie in one page");
    let (mut bytes, pin) = ([0; BYTES], host::get().epoch.pin(cpu));
    if memory.read(&pin, hint, Gpa::new(at), &mut bytes).is_err() {
        return [0; 4];
    }
    let word = |index: usize| bytes[8 * index..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    [word(0), word(1), word(2), word(3)]
}
