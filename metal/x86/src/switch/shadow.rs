//! A guest that runs on shadow tables, without the processor's second stage.
//!
//! Purpose: CR3 names tables of ours, so the guest's own control registers are kept apart ([`ControlRegisters`]), and it comes back for all that
//! reads or changes them, for INVLPG, and for every page fault, of which its owner passes on those that are its own.
//!
//! Protocol: [`Guest::shade`] after [`Guest::start`]; then [`Guest::run_on`] before it runs, and whenever its root or its registers change.
//! The processor's translations of the root before are flushed then, as a load of CR3 would have: an entry flushes nothing by itself.
//!
//! Sources: APM 15.5 (VMRUN), 15.8 (intercepts of control registers), 15.12.15 (page faults), 15.16 (TLB control).

use entresol_addr::Pfn;
use entresol_arch_x86::control::ControlRegisters;
use entresol_arch_x86::paging::Mode;
use entresol_arch_x86::svm;

use super::Guest;
use super::vmcb::EFER_SVME;
use super::vmcb::first;
use crate::cpu;

/// CR0, CR3 and CR4, to be read and to be written.
const CONTROL_REGISTERS: u32 = 0b1_1001 | 0b1_1001 << 16;
const PAGE_FAULT: u32 = 1 << 14;

/// The root of a guest outside long mode lies above 4 GiB, where its CR3 does not reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RootTooHigh;

impl Guest {
    /// It is to run on shadow tables, from the state in which it was started.
    pub fn shade(&mut self) {
        let (cr0, cr3, cr4, efer) = (self.cr0(), self.cr3(), self.cr4(), self.efer());
        self.own = Some(ControlRegisters { cr0, cr3, cr4, efer, pointers: [0; 4] });
        let control = self.control();
        control.nested = 0;
        control.intercepts.control_registers |= CONTROL_REGISTERS;
        control.intercepts.exceptions |= PAGE_FAULT;
        control.intercepts.first |= first::INVLPG;
    }

    /// What it believes of its control registers, if it runs on shadow tables.
    #[inline]
    pub fn control_registers(&self) -> Option<ControlRegisters> {
        self.own
    }

    /// It believes `own` from now on, and translates as before.
    pub fn set_control_registers(&mut self, own: ControlRegisters) {
        let hardware = own.hardware();
        let state = self.state();
        (state.cr0, state.cr4, state.efer) = (hardware.cr0, hardware.cr4, hardware.efer | EFER_SVME);
        self.own = Some(own);
    }

    /// It runs on the table at `root` from now on, on CPU `cpu`, which we are on.
    ///
    /// # Errors
    ///
    /// [`RootTooHigh`]; nothing has changed.
    pub fn run_on(&mut self, cpu: usize, root: Pfn) -> Result<(), RootTooHigh> {
        let long = self.own.is_some_and(|own| matches!(own.mode(), Mode::Level4 | Mode::Level5));
        let root = root.base().get();
        if !long && root >> 32 != 0 {
            return Err(RootTooHigh);
        }
        self.state().cr3 = root;
        cpu::flush_of(cpu).forget();
        Ok(())
    }

    /// The page fault that it came back with last, if it was one: the address, and the processor's error code.
    #[inline]
    pub fn page_fault(&self) -> Option<(u64, u32)> {
        let control = &self.vmcb.control;
        svm::is_page_fault(control.exit_code).then_some((control.exit_info_2, control.exit_info_1 as u32))
    }
}
