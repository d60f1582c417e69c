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

use super::{GENERAL_PROTECTION, Next, PAGE_FAULT, UNDEFINED, go_on, inject, memory, mmio};
use crate::devices::VCPU;
use crate::vm::{Crash, End, Vm};

const RFLAGS_AC: u64 = 1 << 18;
/// What of CR0 and CR4 decides where addresses lead: PG, WP, PE; PSE, PAE, PGE, SMEP, SMAP.
const CR0_PAGING: u64 = 1 << 31 | 1 << 16 | 1 << 0;
const CR4_PAGING: u64 = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 20 | 1 << 21;

/// A page fault at `linear`, with the processor's error code.
#[inline(never)]
pub fn page_fault(cpu: usize, vm: &mut Vm, linear: u64, code: u32) -> Next {
    let vcpu = &mut vm.vcpu;
    let Some(regime) = &vcpu.regime else { return Next::End(End::Crash(Crash::Unexpected(vcpu.guest.exit()))) };
    let code = PageFault::from_bits_truncate(code);
    let user = code.contains(PageFault::USER);
    let kind = match () {
        () if code.contains(PageFault::FETCH) => Kind::Fetch,
        () if code.contains(PageFault::WRITE) => Kind::Write,
        () => Kind::Read,
    };
    // What the processor does for itself at user level is no instruction's own access.
    let by_leave = *vcpu.guest.rflags() & RFLAGS_AC != 0 && (user || vcpu.guest.privilege() != 3);
    let request = Request { kind, user, by_leave };
    let refused = code.contains(PageFault::RESERVED);
    let outcome = {
        let pin = vm.memory.host().epoch.pin(cpu);
        vm.memory.shadow_fault(&pin, &vcpu.hint, VCPU, regime, linear, request, refused)
    };
    match outcome {
        ShadowOutcome::Memory(Outcome::Resume | Outcome::Retry, _) => Next::Again,
        ShadowOutcome::Memory(outcome, fault) => memory::conclude(cpu, vm, &fault, outcome),
        ShadowOutcome::Guest(Exception::Page(code)) => {
            vm.vcpu.guest.set_cr2(linear);
            inject(&mut vm.vcpu.guest, PAGE_FAULT, Some(code.bits()))
        }
        ShadowOutcome::Guest(Exception::NonCanonical) => inject(&mut vm.vcpu.guest, GENERAL_PROTECTION, Some(0)),
        ShadowOutcome::Unloaded => answer(load(cpu, vm), Next::Again),
    }
}

/// Loads the root that the vCPU's registers name: it runs on nothing that its guest has changed before.
///
/// # Errors
///
/// The processor cannot run on it.
pub fn load(cpu: usize, vm: &mut Vm) -> Result<(), Crash> {
    let Some(own) = vm.vcpu.guest.control_registers() else { return Ok(()) };
    let regime = own.regime(vm.memory.ipa_bits(), features::get().giant_pages);
    let root = vm.memory.shadow_load(&vm.memory.host().epoch.pin(cpu), VCPU, &regime);
    vm.vcpu.regime = Some(regime);
    vm.vcpu.guest.set_control_registers(own);
    vm.vcpu.guest.run_on(cpu, root).map_err(|_| Crash::RootTooHigh(root))
}

fn answer(done: Result<(), Crash>, next: Next) -> Next {
    done.map_or_else(|crash| Next::End(End::Crash(crash)), |()| next)
}

/// Why a control register was not stored to.
enum Stop {
    /// The guest gets a general-protection fault.
    Refused,
    Crash(Crash),
}

impl From<Refused> for Stop {
    fn from(Refused: Refused) -> Self {
        Self::Refused
    }
}

/// An instruction that reads or changes control registers, or flushes a page.
#[cold]
pub fn instruction(cpu: usize, vm: &mut Vm) -> Next {
    let (privileged, next, size) = match mmio::privileged(cpu, vm) {
        Ok(Ok(read)) => read,
        // Another CPU of the guest changes its code.
        Ok(Err(Unsupported::NoMemory)) => return Next::Again,
        Ok(Err(_)) => return inject(&mut vm.vcpu.guest, UNDEFINED, None),
        Err(stop) => return mmio::stopped(vm, stop),
    };
    let Some(own) = vm.vcpu.guest.control_registers() else {
        return Next::End(End::Crash(Crash::Unexpected(vm.vcpu.guest.exit())));
    };
    let long_code = size == CodeSize::Bits64;
    let done = match privileged {
        Privileged::ReadControl { register, general } => {
            let value = match register {
                0 => own.cr0,
                // QEMU's emulation exits for these two as well.
                2 => vm.vcpu.guest.cr2(),
                3 => own.cr3,
                4 => own.cr4,
                8 => vm.vcpu.guest.priority().into(),
                _ => return inject(&mut vm.vcpu.guest, UNDEFINED, None),
            };
            *vm.vcpu.guest.general(general) = if long_code { value } else { value & 0xffff_ffff };
            Ok(())
        }
        Privileged::StoreStatus { general, bytes } => {
            let place = vm.vcpu.guest.general(general);
            *place = match bytes {
                2 => *place & !0xffff | own.cr0 & 0xffff,
                4 => own.cr0 & 0xffff_ffff,
                _ => own.cr0,
            };
            Ok(())
        }
        Privileged::WriteControl { register: 0, value } => store(cpu, vm, false, |own| own.set_cr0(value, long_code)),
        Privileged::WriteControl { register: 3, value } => {
            let bits = vm.memory.ipa_bits();
            store(cpu, vm, true, |own| own.set_cr3(value, bits))
        }
        Privileged::WriteControl { register: 4, value } => store(cpu, vm, false, |own| own.set_cr4(value)),
        Privileged::WriteControl { register: 2, value } => {
            vm.vcpu.guest.set_cr2(value);
            Ok(())
        }
        Privileged::WriteControl { register: 8, value: value @ 0..16 } => {
            vm.devices.apic.set_tpr(VCPU, (value as u8) << 4);
            Ok(())
        }
        Privileged::WriteControl { register: 8, .. } => Err(Stop::Refused),
        Privileged::WriteControl { .. } => return inject(&mut vm.vcpu.guest, UNDEFINED, None),
        Privileged::ClearTaskSwitched => store(cpu, vm, false, |own| {
            own.clear_task_switched();
            Ok(())
        }),
        Privileged::LoadStatus(status) => store(cpu, vm, false, |own| own.set_cr0(own.with_status(status), long_code)),
        Privileged::InvalidatePage(linear) => {
            if let Some(regime) = &vm.vcpu.regime {
                let pin = vm.memory.host().epoch.pin(cpu);
                vm.memory.shadow_invalidate_page(&pin, VCPU, regime, linear);
            }
            Ok(())
        }
    };
    match done {
        Ok(()) => go_on(&mut vm.vcpu.guest, next),
        Err(Stop::Refused) => inject(&mut vm.vcpu.guest, GENERAL_PROTECTION, Some(0)),
        Err(Stop::Crash(crash)) => Next::End(End::Crash(crash)),
    }
}

/// A store to EFER, of a value that the guest may have.
pub fn set_efer(cpu: usize, vm: &mut Vm, efer: u64) -> Result<(), Crash> {
    let Some(own) = vm.vcpu.guest.control_registers() else { return Ok(()) };
    vm.vcpu.guest.set_control_registers(ControlRegisters { efer, ..own });
    load(cpu, vm)
}

/// Stores to a control register by `change`.
fn store(
    cpu: usize,
    vm: &mut Vm,
    by_cr3: bool,
    change: impl FnOnce(&mut ControlRegisters) -> Result<(), Refused>,
) -> Result<(), Stop> {
    let Some(before) = vm.vcpu.guest.control_registers() else { return Ok(()) };
    let mut own = before;
    change(&mut own)?;
    if own.needs_pointers(&before, by_cr3) {
        own.set_pointers(pointers(cpu, vm, own.pointers_at()), vm.memory.ipa_bits())?;
    }
    vm.vcpu.guest.set_control_registers(own);
    let moved = (own.cr0 ^ before.cr0) & CR0_PAGING != 0 || (own.cr4 ^ before.cr4) & CR4_PAGING != 0;
    if by_cr3 || moved { load(cpu, vm).map_err(Stop::Crash) } else { Ok(()) }
}

/// The page-directory pointers at `at`; where there is no memory they are absent.
fn pointers(cpu: usize, vm: &Vm, at: u64) -> [u64; 4] {
    const BYTES: usize = 32;
    const _: () = assert!(PAGE_SIZE.is_multiple_of(BYTES as u64), "aligned, they lie in one page");
    let (mut bytes, pin) = ([0; BYTES], vm.memory.host().epoch.pin(cpu));
    if vm.memory.read(&pin, &vm.vcpu.hint, Gpa::new(at), &mut bytes).is_err() {
        return [0; 4];
    }
    let word = |index: usize| bytes[8 * index..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    [word(0), word(1), word(2), word(3)]
}
