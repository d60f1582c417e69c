//! kvm-clock: a vCPU's record of how its time stamp counter counts, and the wall clock.
//!
//! Protocol: the guest names a place for each by an MSR. The record is written then, and again when the counter was moved or the vCPU
//! goes on elsewhere ([`KvmClock::stale`]): nothing is done at the exits in between. It is written through the vCPU's page-frame cache
//! where it lies in one page, so what became of the page is asked anew each time.
//!
//! All vCPUs of a virtual machine count from the same moment, so their records agree.

use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_arch_x86::msr::Refused;
use entresol_arch_x86::pvclock::{self, Clock, RECORD_SIZE, Record, Scale};
use entresol_metal_x86::timer;
use entresol_slot::Hint;
use serde::{Deserialize, Serialize};

use crate::arch::{State, cpu};
use crate::host;
use crate::sched::VcpuRef;
use crate::vm::Vm;

/// Slowest rate that a clock is made for, in place of one that cannot be.
const SLOWEST: u64 = 1_000;

/// What the guest was told, and where.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvmClock {
    /// Of the record, as it was written last.
    version: u32,
    /// The MSRs as the guest stored them.
    system_time: u64,
    wall_clock: u64,
    /// The record says what is not so any more.
    pub stale: bool,
}

impl KvmClock {
    /// The record's MSR.
    pub fn system_time(&self) -> u64 {
        self.system_time
    }

    /// The wall clock's.
    pub fn wall_clock(&self) -> u64 {
        self.wall_clock
    }
}

/// A store to the record's MSR.
///
/// # Errors
///
/// A value that the MSR does not take, or that names no memory.
pub fn set_system_time(cpu: usize, vcpu: &VcpuRef, state: &mut State, value: u64) -> Result<(), Refused> {
    if let Some(at) = pvclock::system_time(value)? {
        tell(cpu, vcpu, state, at)?;
    }
    state.clock.system_time = value;
    Ok(())
}

/// A store to the wall clock's.
///
/// # Errors
///
/// As [`set_system_time`].
pub fn set_wall_clock(cpu: usize, vcpu: &VcpuRef, state: &mut State, value: u64) -> Result<(), Refused> {
    const VERSION: u32 = 2;
    let at = pvclock::wall_clock(value)?;
    let (_, unix) = vcpu.vm.board.epoch;
    put(cpu, vcpu, at, &Clock::wall_clock(VERSION, unix.saturating_mul(1_000_000_000), 0))?;
    state.clock.wall_clock = value;
    Ok(())
}

/// Writes the record again if it is stale. What cannot be written now is the next turn's.
pub fn refresh(cpu: usize, vcpu: &VcpuRef, state: &mut State) {
    if !state.clock.stale {
        return;
    }
    if let Ok(Some(at)) = pvclock::system_time(state.clock.system_time)
        && let Err(Refused) = tell(cpu, vcpu, state, at)
    {
        log::debug!("vm {}: vCPU {}: kvm-clock at {at:x?} is told later", vcpu.vm.config.name, vcpu.index);
        return;
    }
    state.clock.stale = false;
}

impl Vm {
    /// Whether the cache of vCPU `index`'s record knows where it lies.
    pub fn knows_record(&self, index: usize) -> bool {
        let pin = host::get().epoch.pin(cpu::index());
        self.memory.check(&pin, index, RECORD_SIZE as u64).is_some()
    }
}

fn tell(cpu: usize, vcpu: &VcpuRef, state: &mut State, at: Gpa) -> Result<(), Refused> {
    let scale = Scale::of(timer::frequency().max(SLOWEST)).expect("a rate that is not below the slowest");
    let tsc = vcpu.vm.board.epoch.0.wrapping_add(state.now().offset);
    let record = Record { clock: Clock { tsc, nanoseconds: 0, scale }, version: state.clock.version };
    let stores = record.stores();
    let cached = at.page_offset() + RECORD_SIZE as u64 <= PAGE_SIZE
        && vcpu.vm.memory.activate(cpu, vcpu.index, at, RECORD_SIZE as u64).is_ok();
    for store in stores.in_order() {
        let offset = store.offset as u64;
        if cached && through_cache(cpu, vcpu, at.get() + offset, store.bytes) {
            continue;
        }
        put(cpu, vcpu, at.checked_add(offset).ok_or(Refused)?, store.bytes)?;
    }
    state.clock.version = stores.version;
    Ok(())
}

/// Whether the vCPU's cache knew where to.
fn through_cache(cpu: usize, vcpu: &VcpuRef, at: u64, bytes: &[u8]) -> bool {
    let pin = host::get().epoch.pin(cpu);
    let piece = vcpu.vm.memory.check_at(&pin, vcpu.index, Gpa::new(at), bytes.len() as u64);
    if let Some(piece) = &piece {
        vcpu.vm.memory.write_piece(piece, bytes);
    }
    piece.is_some()
}

fn put(cpu: usize, vcpu: &VcpuRef, at: Gpa, bytes: &[u8]) -> Result<(), Refused> {
    let pin = host::get().epoch.pin(cpu);
    vcpu.vm.memory.write(&pin, &Hint::new(), at, bytes).map_err(|_| Refused)
}
