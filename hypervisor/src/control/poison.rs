//! Requests about frames that are bad: what a machine whose memory reports its errors would raise by itself.
//!
//! Protocol: [`entresol_mmu::Vm::poison`]'s: the frame is marked, every virtual machine withdraws it, it is sealed. A machine that is made
//! meanwhile cannot map it, because the mark comes first.

use crate::arch::cpu;
use entresol_addr::Gpa;
use entresol_backing::PoisonError as ObjectError;
use entresol_mmu::PoisonError;
use entresol_wire::Refusal;
use entresol_wire::control::{Code, Error, Poisoned};

use crate::vm::Vm;
use crate::{host, registry};

/// The frame behind the page around `gpa` is bad from now on.
///
/// # Errors
///
/// What the client is told; no frame became bad.
pub fn find(vm: &Vm, gpa: u64) -> Result<Poisoned, Error> {
    let (host, cpu) = (host::get(), cpu::index());
    let marked = vm.memory.poison(cpu, Gpa::new(gpa)).map_err(|error| match error {
        PoisonError::Object(ObjectError::OutOfMemory) => Error::new(Code::OutOfMemory, alloc::format!("{error}")),
        error => {
            Error::refused(Code::BadField, Refusal::new("gpa", format_args!("{gpa:#x}"), alloc::format!("{error}")))
        }
    })?;
    registry::for_each(|vm| vm.memory.withdraw(cpu, &marked));
    let frame = marked.finish(host);
    log::warn!("vm {}: frame {frame:#x}, behind {gpa:#x}, is bad and is never used again", vm.config.name);
    Ok(Poisoned { frame: frame.get(), private: host.pool.is_private(frame) })
}
