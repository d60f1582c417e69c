//! Other CPUs: on with a function to run, off when it returns.

use core::sync::atomic::{AtomicUsize, Ordering};

use crate::entry::{MAX_CPUS, cpu};
use crate::memory;
use crate::smccc::{call, psci};

static JOBS: [AtomicUsize; MAX_CPUS] = [const { AtomicUsize::new(0) }; MAX_CPUS];

/// Starts a CPU at `job`; it is turned off when `job` returns.
///
/// # Errors
/// PSCI's status, or [`psci::INVALID_PARAMETERS`] for a CPU that has no stack.
pub fn on(target: usize, job: fn(usize)) -> Result<(), i64> {
    let place = JOBS.get(target).ok_or(psci::INVALID_PARAMETERS)?;
    place.store(job as usize, Ordering::Release);
    memory::barrier();
    match call([psci::CPU_ON, target as u64, entry(), 0]) as i64 {
        psci::SUCCESS => Ok(()),
        status => Err(status),
    }
}

/// Where a CPU of this program starts.
pub fn entry() -> u64 {
    memory::address_of!(rt_secondary_entry)
}

/// AFFINITY_INFO of a CPU: 0 on, 1 off, 2 on its way, or a negative status.
pub fn state(target: usize) -> i64 {
    call([psci::AFFINITY_INFO, target as u64, 0, 0]) as i64
}

pub(crate) fn run_here() -> ! {
    let cpu = cpu();
    match JOBS[cpu].load(Ordering::Acquire) {
        0 => crate::trap::stop_all_of_it(format_args!("this CPU was started without a job")),
        // SAFETY: on() stored a function of this type.
        job => unsafe { core::mem::transmute::<usize, fn(usize)>(job)(cpu) },
    }
    off()
}

/// Turns this CPU off.
pub fn off() -> ! {
    let status = call([psci::CPU_OFF, 0, 0, 0]) as i64;
    crate::trap::stop_all_of_it(format_args!("CPU_OFF returned {status}"))
}
