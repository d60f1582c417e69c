//! What an x86-64 machine does not have, of what a configuration may ask for.
//!
//! One configuration serves both architectures: names, memory, vCPUs, kernel, initrd, command line, disks, limits, merging, the
//! balloon, private memory and most policies mean the same on either. The rest is arm64's, and refused by name where
//! `outer.arch` says otherwise: an owner hears it before anything starts, and nothing is left out in silence.

use alloc::format;
use core::fmt;

use serde::{Deserialize, Serialize};

use super::{CacheMaintenance, KernelFormat, Paging, PrivateIo, ReadOnlyIvac, ReadOnlyStore, Vm};
use crate::Refusal;

/// The architecture of the outer machine, which is its guests' too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Arch {
    /// 64-bit Arm, at EL2 of a machine like QEMU's `virt`.
    #[default]
    #[serde(rename = "arm64")]
    Arm64,
    /// x86-64 with AMD SVM or Intel VMX.
    #[serde(rename = "x86_64")]
    X86,
}

/// The rule that all of these break, before its reason.
fn refused(field: &str, value: impl fmt::Display, rule: &str, reason: &str) -> Refusal {
    Refusal::new(field, value, format!("{rule} where outer.arch = \"x86_64\": {reason}"))
}

/// That `vm` asks for nothing that its machine has not.
pub(super) fn check<F: fmt::Display>(arch: Arch, at: &str, vm: &Vm<F>) -> Result<(), Refusal> {
    match arch {
        Arch::Arm64 => by_second_stage(at, vm),
        Arch::X86 => {
            features(at, vm)?;
            places(at, vm)?;
            policies(at, vm)?;
            shadow(at, vm)
        }
    }
}

fn by_second_stage<F>(at: &str, vm: &Vm<F>) -> Result<(), Refusal> {
    if vm.policies.paging == Paging::Shadow {
        let rule = "must be \"nested\" where outer.arch = \"arm64\": every processor there has a second stage";
        return Err(Refusal::new(format!("{at}.policies.paging"), "\"shadow\"", rule));
    }
    Ok(())
}

/// What a guest on shadow tables cannot have.
fn shadow<F>(at: &str, vm: &Vm<F>) -> Result<(), Refusal> {
    if vm.private && vm.policies.paging == Paging::Shadow {
        let rule = "must be false where policies.paging = \"shadow\": tables in private memory cannot be read";
        return Err(Refusal::new(format!("{at}.memory.private"), "true", rule));
    }
    Ok(())
}

fn features<F: fmt::Display>(at: &str, vm: &Vm<F>) -> Result<(), Refusal> {
    if vm.mte {
        return Err(refused(&format!("{at}.mte"), true, "must be false", "memory tagging is FEAT_MTE2 of arm64"));
    }
    let format = match vm.kernel_format {
        KernelFormat::Auto => return bounces(at, vm),
        KernelFormat::Flat => "\"flat\"",
        KernelFormat::Firmware => "\"firmware\"",
    };
    let reason = "a kernel is a bzImage or an ELF file with a PVH entry";
    Err(refused(&format!("{at}.kernel_format"), format, "must be \"auto\"", reason))
}

fn bounces<F>(at: &str, vm: &Vm<F>) -> Result<(), Refusal> {
    if vm.private_io == PrivateIo::Bounce {
        let reason = "the window that devices reach is told by a device tree";
        return Err(refused(&format!("{at}.memory.io"), "\"bounce\"", "must be \"lease\"", reason));
    }
    Ok(())
}

/// What arm64 has below the start of memory, at addresses that are memory here.
fn places<F: fmt::Display>(at: &str, vm: &Vm<F>) -> Result<(), Refusal> {
    let lists = [
        ("roms", vm.roms.len()),
        ("coalesced_mmio", vm.coalesced_mmio.len()),
        ("doorbells", vm.doorbells.len()),
        ("pass_through", vm.pass_through.len()),
    ];
    let reason = "there is memory at the addresses that arm64 has for it";
    if let Some((name, count)) = lists.into_iter().find(|(_, count)| *count != 0) {
        return Err(refused(&format!("{at}.{name}"), format_args!("{count} entries"), "must be empty", reason));
    }
    match &vm.flash {
        Some(file) => {
            Err(refused(&format!("{at}.flash"), format_args!("{:?}", format!("{file}")), "must be absent", reason))
        }
        None => Ok(()),
    }
}

fn policies<F>(at: &str, vm: &Vm<F>) -> Result<(), Refusal> {
    let it = &vm.policies;
    let no_abort = "there is no abort to take";
    let asked = [
        (it.cache_maintenance == CacheMaintenance::Trap, "cache_maintenance", "trap", "direct", "caches are coherent"),
        (it.read_only_ivac == ReadOnlyIvac::Clean, "read_only_ivac", "clean", "abort", "there is no DC IVAC"),
        (it.read_only_store == ReadOnlyStore::Abort, "read_only_store", "abort", "ignore", no_abort),
    ];
    match asked.into_iter().find(|(asked, ..)| *asked) {
        Some((_, name, value, instead, reason)) => {
            let (field, value) = (format!("{at}.policies.{name}"), format!("\"{value}\""));
            Err(refused(&field, value, &format!("must be \"{instead}\""), reason))
        }
        None => Ok(()),
    }
}
