//! When the hypervisor looks for equal pages, and what that costs.
//!
//! Protocol: host's work, on the boot CPU. Virtual machines whose configuration says `merge` are scanned one after the other,
//! a step at a time; when the last is at its end a round is over. Between two steps as much time goes by as the
//! configuration's rate asks for, so the boot CPU spends a bounded share of its time on it: the rate times what a page
//! costs, which [`status`] reports. What a step gave back it also frees, as far as grace periods are over. An owner may ask for rounds at once: then the steps follow each other, with a turn of
//! the CPU's vCPU in between.
//!
//! Invariants: no lock is held but this module's own while the core works; nobody but host's work takes it.

use crate::arch::timer;
use entresol_mmu::Scan;
use entresol_sync::Mutex;
use entresol_sync::atomic::{AtomicU64, Ordering};
use entresol_wire::control::MergeStatus;

use crate::host_work::{self, Work};
use crate::{entropy, host, registry};

/// Pages of a step that nobody waits for: a span of the core's.
const STEP: u64 = 512;
/// Pages of a step that its owner waits for.
const STEP_AT_ONCE: u64 = 4096;
/// The most rounds that may be asked for at once.
pub const MOST_ROUNDS: u32 = 1000;

/// When the next step is due, as a count of the timer; never, if nobody takes part.
static DUE: AtomicU64 = AtomicU64::new(u64::MAX);

struct Progress {
    /// Pages a second.
    rate: u32,
    /// The virtual machine that is scanned.
    number: usize,
    rounds: u64,
    rounds_left: u32,
    scanned: u64,
    given_back: u64,
    ticks: u64,
}

static PROGRESS: Mutex<Progress> =
    Mutex::new(Progress { rate: 0, number: 0, rounds: 0, rounds_left: 0, scanned: 0, given_back: 0, ticks: 0 });

/// Before the first virtual machine is made: it will be scanned `rate` pages a second, if it takes part.
pub fn init(rate: u32) {
    let key = entropy::seeds().map_or_else(timer::now, |(_, seed)| seed);
    let host = host::get();
    host.merging.set_key(key);
    // Made now, so that the count of frames stays what it is when untouched memory is read.
    if let Err(error) = host.pool.zero_page(&host.machine, host_work::CPU) {
        log::warn!("no page of zeros yet: {error}");
    }
    PROGRESS.lock().rate = rate;
    if rate != 0 {
        DUE.store(0, Ordering::Relaxed);
    }
}

/// Whether CPU `cpu` has a step to do.
#[inline]
pub fn is_due(cpu: usize) -> bool {
    deadline(cpu).is_some_and(|due| due <= timer::now())
}

/// When CPU `cpu` has one.
#[inline]
pub fn deadline(cpu: usize) -> Option<u64> {
    let due = DUE.load(Ordering::Relaxed);
    (cpu == host_work::CPU && due != u64::MAX).then_some(due)
}

/// Does a step.
pub fn run(cpu: usize) {
    let mut progress = PROGRESS.lock();
    let at_once = progress.rounds_left != 0;
    let began = timer::now();
    let scan = progress.step(cpu, if at_once { STEP_AT_ONCE } else { STEP });
    let given_back = scan.joined + scan.vacated;
    // As many as this step deferred, and as many again of what steps before it did: none pile up.
    let reap = usize::try_from(2 * given_back).unwrap_or(usize::MAX);
    host::get().pool.reap(&host::get().epoch, cpu, reap);
    let now = timer::now();
    progress.ticks += now - began;
    progress.scanned += scan.pages;
    progress.given_back += given_back;
    if progress.rounds_left != 0 {
        host_work::raise(Work::Merge);
    }
    let rate = u64::from(progress.rate);
    // The end of a round is no work, but does not follow at once.
    let wait = (scan.cost().max(STEP / 16) * timer::frequency()).checked_div(rate);
    DUE.store(wait.map_or(u64::MAX, |wait| now + wait), Ordering::Relaxed);
}

/// So many rounds more shall be made at once.
pub fn request(rounds: u32) {
    PROGRESS.lock().rounds_left = rounds;
    host_work::raise(Work::Merge);
}

/// How far it is.
pub fn status() -> MergeStatus {
    let vms = (0..).map_while(registry::row).filter(|row| row.vm.is_some() && row.config.merge).count();
    let progress = PROGRESS.lock();
    let nanoseconds = u128::from(progress.ticks) * 1_000_000_000 / u128::from(timer::frequency());
    MergeStatus {
        vms: vms as u32,
        rounds: progress.rounds,
        rounds_left: progress.rounds_left,
        pages_per_second: progress.rate,
        scanned: progress.scanned,
        given_back: progress.given_back,
        nanoseconds: u64::try_from(nanoseconds).unwrap_or(u64::MAX),
        held_frames: host::get().merging.held_frames(),
    }
}

impl Progress {
    /// Scans on in the virtual machine whose turn it is, or ends the round.
    fn step(&mut self, cpu: usize, budget: u64) -> Scan {
        while let Some(row) = registry::row(self.number) {
            let Some(vm) = row.vm.filter(|_| row.config.merge) else {
                self.number += 1;
                continue;
            };
            let scan = vm.memory.merge_scan(cpu, budget);
            self.number += usize::from(scan.round_over);
            return scan;
        }
        self.number = 0;
        self.rounds += 1;
        self.rounds_left = self.rounds_left.saturating_sub(1);
        host::get().merging.next_round();
        Scan::default()
    }
}
