//! kvm-clock: the guest's record of how its time stamp counter counts, and the wall clock.
//!
//! Known holes: nobody has read the machine's clock, so the wall clock says that the guest started in 1970.

use entresol_addr::Gpa;
use entresol_arch_x86::msr::Refused;
use entresol_arch_x86::pvclock::{self, Clock, Record, Scale};
use entresol_metal_x86::timer;
use entresol_mmu::CopyError;
use entresol_slot::Hint;

use crate::vm::Made;

/// Slowest rate that a clock is made for, in place of one that cannot be.
const SLOWEST: u64 = 1_000;

/// What the guest was told, and where.
pub struct KvmClock {
    record: Record,
    /// The MSRs as the guest stored them.
    system_time: u64,
    wall_clock: u64,
}

impl KvmClock {
    /// A clock that shows 0 when the guest's counter is `now`, and that nobody reads.
    pub fn new(now: u64) -> Self {
        let scale = Scale::of(timer::frequency().max(SLOWEST)).expect("a rate that is not below the slowest");
        let clock = Clock { tsc: now, nanoseconds: 0, scale };
        Self { record: Record { clock, version: 0 }, system_time: 0, wall_clock: 0 }
    }

    /// The record's MSR.
    pub fn system_time(&self) -> u64 {
        self.system_time
    }

    /// The wall clock's.
    pub fn wall_clock(&self) -> u64 {
        self.wall_clock
    }

    /// A store to the record's MSR.
    ///
    /// # Errors
    ///
    /// A value that the MSR does not take, or that names no memory.
    pub fn set_system_time(&mut self, cpu: usize, memory: &Made, value: u64) -> Result<(), Refused> {
        if let Some(at) = pvclock::system_time(value)? {
            self.tell(cpu, memory, at)?;
        }
        self.system_time = value;
        Ok(())
    }

    /// A store to the wall clock's.
    ///
    /// # Errors
    ///
    /// As [`Self::set_system_time`].
    pub fn set_wall_clock(&mut self, cpu: usize, memory: &Made, value: u64) -> Result<(), Refused> {
        const VERSION: u32 = 2;
        let at = pvclock::wall_clock(value)?;
        put(cpu, memory, at, &Clock::wall_clock(VERSION, 0, 0)).map_err(|_| Refused)?;
        self.wall_clock = value;
        Ok(())
    }

    /// The guest's counter was moved by `delta`, and shows the same time all the same.
    ///
    /// # Errors
    ///
    /// The record's memory has gone.
    pub fn moved(&mut self, cpu: usize, memory: &Made, delta: u64) -> Result<(), Refused> {
        self.record.clock.tsc = self.record.clock.tsc.wrapping_add(delta);
        match pvclock::system_time(self.system_time)? {
            Some(at) => self.tell(cpu, memory, at),
            None => Ok(()),
        }
    }

    fn tell(&mut self, cpu: usize, memory: &Made, at: Gpa) -> Result<(), Refused> {
        let stores = self.record.stores();
        for store in stores.in_order() {
            let at = at.checked_add(store.offset as u64).ok_or(Refused)?;
            put(cpu, memory, at, store.bytes).map_err(|_| Refused)?;
        }
        self.record.version = stores.version;
        Ok(())
    }
}

fn put(cpu: usize, memory: &Made, at: Gpa, bytes: &[u8]) -> Result<(), CopyError> {
    let pin = memory.host().epoch.pin(cpu);
    memory.write(&pin, &Hint::new(), at, bytes)
}
