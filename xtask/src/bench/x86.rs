//! The hypervisor on x86-64: the guest `bench` under SVM with nested paging, on a processor that TCG emulates.
//!
//! What KVM takes for the same was measured in the same machine with Debian's kernel 6.1 (`kvm-amd`, nested paging): the references in
//! [`table`](super::table).

use anyhow::{Result, ensure};
use entresol_wire::config::{Arch, LargestEntry, Paging, WrittenPolicies, WrittenVm};

use super::machine::{counted, execute};
use super::table::Rows;
use super::{operations, plugin, work_folder};
use crate::outer::{Model, Outer};
use crate::{bundle, fetch, guests, image};

/// Key of the results and the guest's phase.
const OPERATIONS: [(&str, u8); 8] = [
    ("x86_fault_populated_4k", 2),
    ("x86_fault_fresh_4k", 1),
    ("x86_mmio_read", 4),
    ("x86_mmio_write", 5),
    ("x86_hypercall", 6),
    ("x86_port_write", 24),
    ("x86_dirty_log_fault", 12),
    ("x86_get_dirty_log_16384", 13),
];
/// The same guest on shadow tables.
const SHADOW: [(&str, u8); 1] = [("x86_shadow_fault_populated_4k", 2)];
/// A store that is no operation at all: the phase that says whether counts are instructions.
const CALIBRATION: (&str, u8) = ("calibration", 7);

/// Measures all operations.
///
/// # Errors
/// When something does not build, the machine does not come to its end, or counts are not instructions.
pub fn measure() -> Result<Rows> {
    let (qemu, work) = (fetch::qemu_x86()?, work_folder()?);
    let (plugin, hypervisor) = (plugin::build(&work)?, image::build_x86()?);
    let kernel = guests::x86("guest-x86-bench")?;
    let mut rows = Rows::default();
    for (name, paging, measured) in [("x86", Paging::Nested, &OPERATIONS[..]), ("x86-shadow", Paging::Shadow, &SHADOW)]
    {
        let page_size = LargestEntry::Page4K;
        let policies = WrittenPolicies { page_size, services: true, paging, ..WrittenPolicies::default() };
        let vm = WrittenVm { memory: "128M".into(), policies, ..bundle::program("bench", &kernel, "") };
        let packed = work.join(format!("{name}.bundle"));
        let mut written = bundle::written("1G", 1, vec![vm]);
        written.outer.arch = Some(Arch::X86);
        bundle::pack(&bundle::check(written)?, &packed)?;
        let outcome = execute(&work, name, operations::DONE, |counts| {
            let extra = counted(&plugin, counts).to_vec();
            let (initrd, model) = (Some(packed.clone()), Model::of(Arch::X86));
            Outer { cpus: 1, memory: 1 << 30, initrd, extra, ..Outer::new(model, &hypervisor) }.command(&qemu)
        })?;
        let stores = &operations::each(&[CALIBRATION], &outcome.counts)?[0].1;
        ensure!(stores.median == 1, "a store counts as {} instructions: the counts mean nothing", stores.median);
        rows.add(operations::each(measured, &outcome.counts)?, None);
    }
    Ok(rows)
}
