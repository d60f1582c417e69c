//! A guest's virtual addresses, translated by its own stage 1.
//!
//! AT walks the guest's tables through the second stage, and cannot take a fault there: tables whose pages the second stage
//! does not have (they were never walked, or were taken away) are brought in first, as the fault of a walk would have done.
//! Then AT is asked again; tables that are taken away in between make the guest try again.

use entresol_addr::Gpa;
use entresol_arch_arm64::inject::Status;
use entresol_arch_arm64::stage1::Regime;
use entresol_fault::{Access, Cause, Fault};
use entresol_metal_arm64::exit::{self as hardware, Rights, Translated};
use entresol_metal_arm64::{cpu, live};
use entresol_mmu::{Outcome, Reason};

use crate::arch::State;
use crate::host;
use crate::sched::VcpuRef;

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untranslated {
    /// The guest's own fault.
    Fault(Status),
    /// No frame for a page of its tables.
    OutOfMemory,
    /// A page of its tables is in a store.
    Absent {
        /// Where.
        gpa: Gpa,
    },
    /// Its tables left the second stage meanwhile.
    Again,
}

/// Translates `address` for the loaded vCPU.
///
/// # Errors
///
/// [`Untranslated`].
pub fn translate(vcpu: &VcpuRef, state: &State, address: u64, rights: Rights) -> Result<Translated, Untranslated> {
    match hardware::translate(address, rights) {
        Ok(translated) => Ok(translated),
        Err(par) => match Status::of_par(par) {
            Some(status) => Err(Untranslated::Fault(status)),
            None => with_tables(vcpu, state, address, rights),
        },
    }
}

#[cold]
fn with_tables(vcpu: &VcpuRef, state: &State, address: u64, rights: Rights) -> Result<Translated, Untranslated> {
    let mut stopped = Ok(());
    regime().walk(address, |gpa, level| match bring(vcpu, state, gpa, level) {
        Ok(descriptor) => Some(descriptor),
        Err(reason) => {
            stopped = Err(reason);
            None
        }
    });
    stopped?;
    hardware::translate(address, rights)
        .map_err(|par| Status::of_par(par).map_or(Untranslated::Again, Untranslated::Fault))
}

/// What the loaded vCPU's stage 1 is now.
fn regime() -> Regime {
    Regime { tcr: live::tcr_el1(), ttbr: live::ttbrs_el1(), big_endian: live::sctlr_el1() & SCTLR_EE != 0 }
}

/// What a walk of `address` reports that found no memory in the page of `table`: an external abort, at the level of the
/// descriptor that lies there as the tables stand now.
#[cold]
pub fn abort(vcpu: &VcpuRef, state: &State, address: u64, table: Gpa) -> Status {
    let mut status = Status::External;
    regime().walk(address, |gpa, level| {
        if gpa.frame() == table.frame() {
            status = Status::ExternalOnWalk(level);
            return None;
        }
        let mut descriptor = [0; 8];
        let pin = host::get().epoch.pin(cpu::index());
        vcpu.vm.memory.read(&pin, &state.hint, gpa, &mut descriptor).ok().map(|()| descriptor)
    });
    status
}

/// SCTLR_EL1.EE: EL1's data and the tables are big-endian.
const SCTLR_EE: u64 = 1 << 25;

/// Maps the page of the descriptor of `level` at `gpa`, as the fault of a walk that reads it; the descriptor.
fn bring(vcpu: &VcpuRef, state: &State, gpa: Gpa, level: i8) -> Result<[u8; 8], Untranslated> {
    let walk = Fault {
        gpa,
        access: Access::Read,
        cause: Cause::Translation,
        stage1_walk: true,
        cache_maintenance: false,
        transfer: None,
        syndrome: 0,
    };
    let pin = host::get().epoch.pin(cpu::index());
    match vcpu.vm.memory.touch(&pin, &state.hint, &walk) {
        Outcome::Resume => {}
        Outcome::Retry => return Err(Untranslated::Again),
        Outcome::Exit(Reason::OutOfMemory) => return Err(Untranslated::OutOfMemory),
        Outcome::Exit(Reason::Stored { .. }) => return Err(Untranslated::Absent { gpa }),
        // No memory is there.
        _ => return Err(Untranslated::Fault(Status::ExternalOnWalk(level))),
    }
    let mut descriptor = [0; 8];
    match vcpu.vm.memory.read(&pin, &state.hint, gpa, &mut descriptor) {
        Ok(()) => Ok(descriptor),
        Err(_) => Err(Untranslated::Again),
    }
}
