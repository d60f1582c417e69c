//! What the guest's processor says that it is: CPUID and model-specific registers, by the tables of `entresol_arch_x86`.
//!
//! Known holes: there is no XSAVE, since only FXSAVE's registers are moved ([`entresol_metal_x86::switch::fp`]).

use core::arch::x86_64::__cpuid_count;

use entresol_arch_x86::cpuid::{self, Words};
use entresol_arch_x86::msr::{self, Part, Rule};
use entresol_devices::pc::Time as _;

use super::{GENERAL_PROTECTION, inject};
use crate::arch::State;
use crate::exit::Next;
use crate::sched::VcpuRef;

const CR4_OSXSAVE: u64 = 1 << 18;
const PAT: u32 = 0x277;

/// CPUID.
pub fn cpuid(vcpu: &VcpuRef, state: &mut State) -> Next {
    let guest = &mut state.guest;
    let seen = cpuid::Vcpu {
        id: vcpu.index as u8,
        count: vcpu.vm.vcpus() as u8,
        physical_bits: vcpu.vm.memory.ipa_bits(),
        osxsave: guest.cr4() & CR4_OSXSAVE != 0,
        xcr0: 1,
        states: 0,
        clock: true,
        shadow: vcpu.vm.memory.is_shaded(),
    };
    let answer = cpuid::answer(*guest.rax() as u32, guest.registers.rcx as u32, &seen, machine);
    *guest.rax() = answer.eax.into();
    let registers = &mut guest.registers;
    (registers.rbx, registers.rcx, registers.rdx) = (answer.ebx.into(), answer.ecx.into(), answer.edx.into());
    guest.skip(2);
    Next::Again
}

fn machine(leaf: u32, subleaf: u32) -> Words {
    let own = __cpuid_count(leaf, subleaf);
    Words { eax: own.eax, ebx: own.ebx, ecx: own.ecx, edx: own.edx }
}

/// RDMSR.
pub fn read_register(vcpu: &VcpuRef, state: &mut State) -> Next {
    let (now, pc) = (state.now(), vcpu.vm.board.pc());
    let guest = &mut state.guest;
    let register = guest.registers.rcx as u32;
    let value = match msr::rule(register, true) {
        Rule::Constant(value) => Some(value),
        Rule::Emulate(Part::Efer) => Some(guest.efer()),
        Rule::Emulate(Part::Tsc) => Some(now.tsc()),
        Rule::Emulate(Part::Apic) => pc.read_msr(vcpu.index, register, &now).ok(),
        Rule::Pass if register == PAT => Some(*guest.pat()),
        Rule::Emulate(Part::SystemTime) => Some(state.clock.system_time()),
        Rule::Emulate(Part::WallClock) => Some(state.clock.wall_clock()),
        // The others that pass do not come here.
        Rule::Refuse | Rule::Pass => None,
    };
    let Some(value) = value else { return inject(state, GENERAL_PROTECTION, Some(0)) };
    let guest = &mut state.guest;
    *guest.rax() = value & 0xffff_ffff;
    guest.registers.rdx = value >> 32;
    guest.skip(2);
    Next::Again
}

/// WRMSR.
pub fn write_register(cpu: usize, vcpu: &VcpuRef, state: &mut State) -> Next {
    let (now, pc) = (state.now(), vcpu.vm.board.pc());
    let deadline = pc.deadline(vcpu.index);
    let guest = &mut state.guest;
    let register = guest.registers.rcx as u32;
    let value = *guest.rax() & 0xffff_ffff | guest.registers.rdx << 32;
    let taken = match msr::rule(register, true) {
        Rule::Constant(_) => Some(()),
        Rule::Emulate(Part::Efer) => {
            let efer = msr::efer(guest.efer(), value, guest.cr0()).ok();
            if let Some(efer) = efer {
                if guest.control_registers().is_some() {
                    super::shadow::set_efer(cpu, vcpu, state, efer);
                } else {
                    guest.set_efer(efer);
                }
            }
            efer.map(drop)
        }
        Rule::Emulate(Part::Tsc) => {
            *guest.time_offset() = value.wrapping_sub(now.tsc().wrapping_sub(now.offset));
            state.clock.stale = true;
            super::clock::refresh(cpu, vcpu, state);
            Some(())
        }
        Rule::Emulate(Part::Apic) => {
            let written = pc.write_msr(vcpu.index, register, value, &now);
            super::interrupts::lead(vcpu, state);
            written.ok()
        }
        Rule::Pass if register == PAT => is_pat(value).then(|| *guest.pat() = value),
        Rule::Emulate(Part::SystemTime) => super::clock::set_system_time(cpu, vcpu, state, value).ok(),
        Rule::Emulate(Part::WallClock) => super::clock::set_wall_clock(cpu, vcpu, state, value).ok(),
        Rule::Refuse | Rule::Pass => None,
    };
    if taken.is_none() {
        return inject(state, GENERAL_PROTECTION, Some(0));
    }
    state.guest.skip(2);
    // Its timer is due at another moment.
    if pc.deadline(vcpu.index) == deadline { Next::Again } else { Next::Look }
}

/// Each byte is a memory type: 0, 1, 4, 5, 6 or 7 (APM 7.8.1).
fn is_pat(value: u64) -> bool {
    value.to_le_bytes().into_iter().all(|kind| matches!(kind, 0 | 1 | 4..=7))
}
