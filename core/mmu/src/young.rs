//! Access tracking: which pages were used since one last asked. Faults go on beside it: the access flag is cleared entry by
//! entry, in place, and no fault retries for it.
//!
//! An entry whose access flag is clear faults once at the next access ([`entresol_fault::Cause::AccessFlag`]), which makes
//! it young again without looking for its slot.
//!
//! A block counts once, and counts for a range that only touches it.

use entresol_addr::GfnRange;
use entresol_machine::Machine;
use entresol_table::Format;

use crate::InvalidateError;
use crate::vm::Vm;

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// Clears the access flag of the entries of `range` and flushes the TLBs; returns how many were young. `cpu` is the CPU
    /// that the caller runs on, and is not pinned.
    ///
    /// # Errors
    ///
    /// [`InvalidateError::Outside`]; nothing changed.
    pub fn clear_young(&self, cpu: usize, range: GfnRange) -> Result<u64, InvalidateError> {
        self.check_range(range)?;
        let _pin = self.host.epoch.pin(cpu);
        Ok(self.table.age(&self.host.machine, self.flushes(&self.stats.tlb_range), range))
    }

    /// Whether an entry of `range` is young. Changes nothing.
    ///
    /// # Errors
    ///
    /// [`InvalidateError::Outside`].
    pub fn test_young(&self, cpu: usize, range: GfnRange) -> Result<bool, InvalidateError> {
        self.check_range(range)?;
        let _pin = self.host.epoch.pin(cpu);
        Ok(self.table.test_young(&self.host.machine, range))
    }
}
