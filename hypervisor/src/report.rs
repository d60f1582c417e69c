//! What the hypervisor says of a virtual machine when it ends.

use entresol_addr::PageSize;

use crate::counters::Reason;
use crate::vm::{Status, Stop, Vm};

/// One line for people and tests: how it ended, what it had mapped, and how often it reached for what is not there.
pub fn ended(vm: &Vm, status: Status) {
    let census = vm.memory.census();
    let stats = &vm.memory.stats;
    let how = match status {
        Status::Stopped(Stop::PowerOff) => "powered off",
        Status::Stopped(Stop::Reset) => "reset",
        Status::Stopped(Stop::Killed) => "killed",
        Status::Crashed(_) => "crashed",
        Status::Running | Status::Paused(_) => "still there",
    };
    log::info!(
        "vm {}: {how}: {} faults ({} fresh, {} populated), {} entries of 4 KiB, {} of 2 MiB, {} of 1 GiB, {} frames resident, \
         {} accesses unclaimed",
        vm.config.name,
        stats.translation.get(),
        stats.fresh.get(),
        stats.populated.get(),
        census.of(PageSize::Size4K),
        census.of(PageSize::Size2M),
        census.of(PageSize::Size1G),
        vm.resident_frames(),
        vm.unclaimed.get(),
    );
    let cleaned = vm.counters.get(Reason::CacheToggle);
    if cleaned != 0 {
        log::info!("vm {}: all of its memory was cleaned {cleaned} times: its caches went on or off", vm.config.name);
    }
}
