//! What the guest's processor says that it is: CPUID and model-specific registers, by the tables of `entresol_arch_x86`.
//!
//! Known holes: there is no XSAVE, since only FXSAVE's registers are moved ([`entresol_metal_x86::switch::fp`]).

use core::arch::x86_64::__cpuid_count;

use entresol_arch_x86::cpuid::{self, Words};
use entresol_arch_x86::msr::{self, Part, Rule};
use entresol_metal_x86::switch::Guest;
use entresol_metal_x86::timer;

use super::{GENERAL_PROTECTION, Next, inject, shadow, skip};
use crate::devices::VCPU;
use crate::vm::{End, Vm};

const CR4_OSXSAVE: u64 = 1 << 18;
const PAT: u32 = 0x277;

/// CPUID.
pub fn cpuid(vm: &mut Vm) -> Next {
    let physical_bits = vm.memory.ipa_bits();
    let shadow = vm.memory.is_shaded();
    let guest = &mut *vm.vcpu.guest;
    let osxsave = guest.cr4() & CR4_OSXSAVE != 0;
    let vcpu =
        cpuid::Vcpu { id: VCPU as u8, count: 1, physical_bits, osxsave, xcr0: 1, states: 0, clock: true, shadow };
    let answer = cpuid::answer(*guest.rax() as u32, guest.registers.rcx as u32, &vcpu, machine);
    *guest.rax() = answer.eax.into();
    let registers = &mut guest.registers;
    (registers.rbx, registers.rcx, registers.rdx) = (answer.ebx.into(), answer.ecx.into(), answer.edx.into());
    skip(guest, 2)
}

fn machine(leaf: u32, subleaf: u32) -> Words {
    let own = __cpuid_count(leaf, subleaf);
    Words { eax: own.eax, ebx: own.ebx, ecx: own.ecx, edx: own.edx }
}

/// The guest's time stamp counter.
pub fn guest_time(guest: &mut Guest) -> u64 {
    timer::now().wrapping_add(*guest.time_offset())
}

/// RDMSR.
pub fn read_register(vm: &mut Vm) -> Next {
    let guest = &mut *vm.vcpu.guest;
    let (register, now) = (guest.registers.rcx as u32, guest_time(guest));
    let value = match msr::rule(register, true) {
        Rule::Constant(value) => Some(value),
        Rule::Emulate(Part::Efer) => Some(guest.efer()),
        Rule::Emulate(Part::Tsc) => Some(now),
        Rule::Emulate(Part::Apic) => vm.devices.apic.read_msr(VCPU, register, now).ok(),
        Rule::Pass if register == PAT => Some(*guest.pat()),
        Rule::Emulate(Part::SystemTime) => Some(vm.clock.system_time()),
        Rule::Emulate(Part::WallClock) => Some(vm.clock.wall_clock()),
        // The others that pass do not come here.
        Rule::Refuse | Rule::Pass => None,
    };
    let Some(value) = value else { return inject(guest, GENERAL_PROTECTION, Some(0)) };
    *guest.rax() = value & 0xffff_ffff;
    guest.registers.rdx = value >> 32;
    skip(guest, 2)
}

/// WRMSR.
pub fn write_register(cpu: usize, vm: &mut Vm) -> Next {
    let guest = &mut *vm.vcpu.guest;
    let (register, now) = (guest.registers.rcx as u32, guest_time(guest));
    let value = *guest.rax() & 0xffff_ffff | guest.registers.rdx << 32;
    let taken = match msr::rule(register, true) {
        Rule::Constant(_) => Some(()),
        Rule::Emulate(Part::Efer) => {
            let efer = msr::efer(guest.efer(), value, guest.cr0()).ok();
            match efer {
                Some(efer) if guest.control_registers().is_some() => match shadow::set_efer(cpu, vm, efer) {
                    Ok(()) => return skip(&mut vm.vcpu.guest, 2),
                    Err(crash) => return Next::End(End::Crash(crash)),
                },
                efer => efer.map(|efer| guest.set_efer(efer)),
            }
        }
        Rule::Emulate(Part::Tsc) => {
            let offset = value.wrapping_sub(timer::now());
            let delta = offset.wrapping_sub(core::mem::replace(guest.time_offset(), offset));
            vm.clock.moved(cpu, &vm.memory, delta).ok()
        }
        // The one vCPU is out of its guest, and looks before it goes on.
        Rule::Emulate(Part::Apic) => vm.devices.apic.write_msr(VCPU, register, value, now).map(|_kicked| ()).ok(),
        Rule::Pass if register == PAT => is_pat(value).then(|| *guest.pat() = value),
        Rule::Emulate(Part::SystemTime) => vm.clock.set_system_time(cpu, &vm.memory, value).ok(),
        Rule::Emulate(Part::WallClock) => vm.clock.set_wall_clock(cpu, &vm.memory, value).ok(),
        Rule::Refuse | Rule::Pass => None,
    };
    match taken {
        Some(()) => skip(guest, 2),
        None => inject(guest, GENERAL_PROTECTION, Some(0)),
    }
}

/// Each byte is a memory type: 0, 1, 4, 5, 6 or 7 (APM 7.8.1).
fn is_pat(value: u64) -> bool {
    value.to_le_bytes().into_iter().all(|kind| matches!(kind, 0 | 1 | 4..=7))
}
