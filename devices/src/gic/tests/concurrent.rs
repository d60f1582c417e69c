//! vCPUs on real threads: what is sent arrives, whoever sends and whenever.
//!
//! A mailbox stands behind each interrupt: the sender posts, then raises; the handler acknowledges, then empties it. A
//! lost interrupt leaves mail behind and its vCPU idle, so the threads never finish and the watchdog fails the test.

use super::super::{SgiRegister, Spi, Vgic};
use super::cpu::Cpu;
use super::{std, vgic};
use entresol_sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const VCPUS: usize = 4;
const LETTERS: u64 = 4_000;
const EDGE: u32 = 40;
const LEVEL: u32 = 41;

struct World {
    vgic: Vgic,
    /// Letters for each vCPU by SGI 0.
    sgi: [AtomicU64; VCPUS],
    /// Letters behind the edge-triggered SPI.
    edge: AtomicU64,
    /// The device behind the level-sensitive SPI: its line is high while it has letters.
    level: Mutex<u64>,
    read: AtomicU64,
    done: AtomicUsize,
    level_spi: Spi,
    deadline: Instant,
}

impl World {
    fn new() -> Self {
        let vgic = vgic(VCPUS, 32);
        let _ = vgic.dist_write(0, 4, 2);
        let _ = vgic.dist_write(0x84, 4, u64::from(u32::MAX)) | vgic.dist_write(0x104, 4, u64::from(u32::MAX));
        let _ = vgic.dist_write(0xc08, 4, 2 << (2 * (EDGE - 32)));
        for frame in 0..VCPUS {
            let _ = vgic.redist_write(frame, 0x1_0080, 4, u64::from(u32::MAX));
            let _ = vgic.redist_write(frame, 0x1_0100, 4, 1) | vgic.redist_write(frame, 0x14, 4, 0);
        }
        Self {
            level_spi: vgic.spi(LEVEL).expect("it exists"),
            vgic,
            sgi: [const { AtomicU64::new(0) }; VCPUS],
            edge: AtomicU64::new(0),
            level: Mutex::new(0),
            read: AtomicU64::new(0),
            done: AtomicUsize::new(0),
            deadline: Instant::now() + Duration::from_secs(60),
        }
    }

    fn handle(&self, vcpu: usize, intid: u32) {
        let letters = match intid {
            0 => self.sgi[vcpu].swap(0, Ordering::AcqRel),
            EDGE => self.edge.swap(0, Ordering::AcqRel),
            LEVEL => {
                let mut device = self.level.lock();
                let _ = self.vgic.set_spi(self.level_spi, false);
                core::mem::take(&mut *device)
            }
            other => panic!("nobody sent {other}"),
        };
        self.read.fetch_add(letters, Ordering::AcqRel);
    }

    /// Posts one letter by each way, and sends the SPIs elsewhere now and then. The flags are the kicks: every thread looks.
    fn send(&self, from: usize, letter: u64) {
        let to = (from as u64 + letter) as usize % VCPUS;
        self.sgi[to].fetch_add(1, Ordering::AcqRel);
        let _ = self.vgic.sgi(from, SgiRegister::Sgi1r, 1 << to);
        self.edge.fetch_add(1, Ordering::AcqRel);
        let _ = self.vgic.dist_write(0x40, 4, EDGE.into());
        {
            let mut device = self.level.lock();
            *device += 1;
            let _ = self.vgic.set_spi(self.level_spi, true);
        }
        if letter % 16 == from as u64 {
            let route = if letter.is_multiple_of(3) { 1 << 31 } else { to as u64 };
            let _ = self.vgic.dist_write(0x6000 + 8 * u64::from(EDGE), 8, route);
            let _ = self.vgic.dist_write(0x6000 + 8 * u64::from(LEVEL), 8, letter % VCPUS as u64);
        }
        if letter % 64 == from as u64 {
            let _ = self.vgic.dist_write(0x184, 4, 1 << (EDGE - 32));
            let _ = self.vgic.dist_write(0x104, 4, 1 << (EDGE - 32));
        }
    }

    fn run(&self, vcpu: usize) {
        let mut cpu = Cpu::new(vcpu, 1 + vcpu % 4, false);
        let mut sent = 0;
        let total = 3 * LETTERS * VCPUS as u64;
        while self.read.load(Ordering::Acquire) < total {
            if self.vgic.needs_sync(vcpu) || cpu.maintenance() {
                let _ = cpu.flush(&self.vgic);
            }
            if let Some(intid) = cpu.acknowledge() {
                self.handle(vcpu, intid);
                cpu.end(intid);
            } else if sent < LETTERS {
                self.send(vcpu, sent);
                sent += 1;
            } else {
                assert!(Instant::now() < self.deadline, "mail was never read: an interrupt is lost");
                std::thread::yield_now();
            }
        }
        self.done.fetch_add(1, Ordering::AcqRel);
    }
}

#[test]
fn nothing_is_lost_between_threads() {
    let world = World::new();
    std::thread::scope(|scope| {
        for vcpu in 0..VCPUS {
            let world = &world;
            scope.spawn(move || world.run(vcpu));
        }
    });
    assert_eq!(world.done.load(Ordering::Acquire), VCPUS);
    assert_eq!(world.read.load(Ordering::Acquire), 3 * LETTERS * VCPUS as u64, "no letter is read twice");
}
