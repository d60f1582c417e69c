//! VMX operation of a CPU.
//!
//! Sources: SDM 24.7 (enabling and entering VMX operation), 24.8 (restrictions on CR0 and CR4), appendix A.1, A.7, A.8.

use core::cell::UnsafeCell;

use x86_64::registers::control::{Cr0, Cr4};
use x86_64::registers::model_specific::Msr;

use super::instructions;
use super::{Controls, Lacks};
use crate::boot::MAX_CPUS;
use crate::cpu;
use crate::features::Missing;

/// IA32_FEATURE_CONTROL: locked, VMX without SMX.
const FEATURE_CONTROL: u32 = 0x3a;
const LOCKED: u64 = 1 << 0;
const ENABLED: u64 = 1 << 2;
/// IA32_VMX_BASIC: the revision, in bits 30:0; and that the true capability registers are there.
const BASIC: u32 = 0x480;
const REVISION: u64 = (1 << 31) - 1;
const TRUE_CONTROLS: u64 = 1 << 55;
/// Bits of CR0 and CR4 that must be one.
const CR0_ONES: u32 = 0x486;
const CR4_ONES: u32 = 0x488;
/// CR4.VMXE.
pub const CR4_VMXE: u64 = 1 << 13;

/// A page that the processor keeps something in.
#[repr(C, align(4096))]
pub struct Region([u8; 4096]);

impl Region {
    /// All zero.
    pub const ZERO: Self = Self([0; 4096]);

    /// Its physical address: the mapping is the identity.
    pub fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// Begins with the processor's revision, as each structure does.
    pub fn stamp(&mut self) {
        // SAFETY: the register is there with VMX.
        let revision = unsafe { Msr::new(BASIC).read() } & REVISION;
        self.0[..4].copy_from_slice(&(revision as u32).to_le_bytes());
    }

    /// The byte at `at`.
    pub fn byte(&mut self, at: usize) -> &mut u8 {
        &mut self.0[at]
    }
}

struct Regions(UnsafeCell<[Region; MAX_CPUS]>);

// SAFETY: each is written by its CPU before VMXON, and belongs to the processor after.
unsafe impl Sync for Regions {}

static REGIONS: Regions = Regions(UnsafeCell::new([const { Region::ZERO }; MAX_CPUS]));

/// What guests are told on this machine, which has VMX.
///
/// # Errors
///
/// [`Missing`]: firmware has locked it away, or it lacks something.
pub(crate) fn capabilities() -> Result<Controls, Missing> {
    // SAFETY: the registers are there with VMX; the second kind of capability registers is asked for first.
    let read = |register| unsafe { Msr::new(register).read() };
    let control = read(FEATURE_CONTROL);
    if control & LOCKED != 0 && control & ENABLED == 0 {
        return Err(Missing::Disabled);
    }
    if read(BASIC) & TRUE_CONTROLS == 0 {
        return Err(Missing::Vmx(Lacks { register: BASIC, bits: TRUE_CONTROLS }));
    }
    Controls::choose(read).map_err(Missing::Vmx)
}

/// Lets this CPU enter guests.
pub(crate) fn enable() {
    // SAFETY: `features` has found VMX; firmware that has not locked the register leaves it to us; the bits that VMX demands of CR0
    // and CR4 change nothing that we use.
    unsafe {
        let mut control = Msr::new(FEATURE_CONTROL);
        if control.read() & LOCKED == 0 {
            control.write(LOCKED | ENABLED);
        }
        Cr0::write_raw(Cr0::read_raw() | Msr::new(CR0_ONES).read());
        Cr4::write_raw(Cr4::read_raw() | Msr::new(CR4_ONES).read() | CR4_VMXE);
    }
    let region = REGIONS.0.get().cast::<Region>().wrapping_add(cpu::index());
    // SAFETY: this CPU's own, which nobody has a reference to, and which is not touched again.
    unsafe {
        (*region).stamp();
        instructions::on(region as u64);
    }
}
