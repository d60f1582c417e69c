//! INV-14: no two virtual machines share a current VMID, and none is reused without a flush between.
//!
//! Watches each CPU that begins to run a virtual machine.

use entresol_machine::Vmid;

use crate::machine::World;
use crate::machine::linear::SHADOWS;
use crate::machine::tlb::NEVER;

/// `vm` is about to run on some CPU under `vmid`.
pub fn load(world: &World, vm: usize, vmid: Vmid) -> Option<String> {
    let number = vmid.get();
    if number == 0 {
        return Some(format!("VM {vm} runs under VMID 0, which is the hypervisor's"));
    }
    let floor = world.tlb.floor_of_all(vmid);
    let mut others = world.tlb.residences().iter().filter(|one| one.vmid == vmid && one.vm % SHADOWS != vm);
    let other = others.find(|one| one.until == NEVER || one.until > floor)?;
    let how = if other.until == NEVER { "runs under it on" } else { "ran under it, with no flush since, on" };
    Some(format!("VM {vm} gets VMID {number}, and VM {} {how} CPU {}", other.vm, other.cpu))
}
