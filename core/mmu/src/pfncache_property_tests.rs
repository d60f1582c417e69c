//! Page-frame caches against plain bytes: any sequence of uses and of what may happen to memory between them.

use std::vec::Vec;

use entresol_addr::{GfnRange, Gpa, PAGE_SIZE};
use entresol_backing::{ObjectHandle, Policy, Reach, Spec};
use entresol_machine::flat::FlatMachine;
use entresol_slot::{Hint, SlotFlags};
use proptest::prelude::*;

use crate::tests::{CPU, RAM, TestVm, host, slot, vm};
use crate::{CacheError, CopyError, Host};

/// Pages that anything happens to.
const PAGES: usize = 3;
const CACHES: usize = 4;

#[derive(Clone, Debug)]
enum Op {
    /// A cache is for a piece.
    Activate {
        cache: usize,
        page: usize,
        at: u64,
        len: u64,
        open: bool,
    },
    Deactivate {
        cache: usize,
    },
    /// Stores a byte some way into what a cache is for, or reads it; looked for again if need be.
    Write {
        cache: usize,
        at: u64,
        byte: u8,
    },
    Read {
        cache: usize,
        at: u64,
    },
    /// The guest's own store.
    Store {
        page: usize,
        at: u64,
        byte: u8,
    },
    Discard {
        page: usize,
    },
    Convert {
        page: usize,
        open: bool,
    },
    Zap {
        page: usize,
    },
    /// A copy is made, looked at, and ended.
    Fork,
    /// The slot logs, or does not.
    Log {
        on: bool,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let (cache, page, at) = (0..CACHES, 0..PAGES, 0..PAGE_SIZE);
    prop_oneof![
        4 => (cache.clone(), page.clone(), at.clone(), 1..=PAGE_SIZE, any::<bool>()).prop_map(
            |(cache, page, at, len, open)| Op::Activate { cache, page, at, len, open }
        ),
        1 => cache.clone().prop_map(|cache| Op::Deactivate { cache }),
        6 => (cache.clone(), at.clone(), any::<u8>()).prop_map(|(cache, at, byte)| Op::Write { cache, at, byte }),
        6 => (cache, at.clone()).prop_map(|(cache, at)| Op::Read { cache, at }),
        3 => (page.clone(), at, any::<u8>()).prop_map(|(page, at, byte)| Op::Store { page, at, byte }),
        1 => page.clone().prop_map(|page| Op::Discard { page }),
        2 => (page.clone(), any::<bool>()).prop_map(|(page, open)| Op::Convert { page, open }),
        1 => page.prop_map(|page| Op::Zap { page }),
        1 => Just(Op::Fork),
        1 => any::<bool>().prop_map(|on| Op::Log { on }),
    ]
}

/// What a cache is for.
#[derive(Clone, Copy)]
struct Piece {
    page: usize,
    at: u64,
    len: u64,
    open: bool,
}

/// The machine beside what it should hold.
struct World<'h> {
    host: &'h Host<FlatMachine>,
    vm: TestVm<'h>,
    object: ObjectHandle,
    private: bool,
    bytes: Vec<u8>,
    open: [bool; PAGES],
    caches: [Option<Piece>; CACHES],
    /// Pages written since the log was last read, if the slot logs.
    written: Option<u64>,
}

impl<'h> World<'h> {
    fn new(host: &'h Host<FlatMachine>, private: bool) -> Self {
        let (vm, frames) = (vm(host), PAGES as u64);
        let spec = match private {
            true => Spec::Private { frames, policy: Policy::Pages },
            false => Spec::anonymous(frames, Policy::Pages),
        };
        let object = host.objects.create(&host.supply(CPU), spec).unwrap();
        vm.set_slot(CPU, &slot(0, RAM, frames, object, SlotFlags::empty())).unwrap();
        vm.make_caches(CACHES).unwrap();
        let bytes = std::vec![0; PAGES * PAGE_SIZE as usize];
        Self { host, vm, object, private, bytes, open: [!private; PAGES], caches: [None; CACHES], written: None }
    }

    fn gpa(page: usize, at: u64) -> Gpa {
        Gpa::new(RAM + page as u64 * PAGE_SIZE + at)
    }

    fn range(page: usize) -> GfnRange {
        GfnRange::single(Self::gpa(page, 0).frame())
    }

    fn byte(&mut self, page: usize, at: u64) -> &mut u8 {
        &mut self.bytes[page * PAGE_SIZE as usize + at as usize]
    }

    fn wrote(&mut self, page: usize, at: u64, byte: u8) {
        *self.byte(page, at) = byte;
        self.written = self.written.map(|written| written | 1 << page);
    }

    /// Where `at` bytes, modulo its length, into what `cache` is for are, if its user may see them; it knows them, or does when it
    /// has looked again.
    fn look(&self, cache: usize, at: u64) -> Option<(usize, u64)> {
        let known = |gpa| self.vm.check_at(&self.host.epoch.pin(CPU), cache, gpa, 1).is_some();
        let Some(piece) = self.caches[cache] else {
            assert!(!known(Self::gpa(0, 0)));
            return None;
        };
        let at = piece.at + at % piece.len;
        let gpa = Self::gpa(piece.page, at);
        let in_reach = !piece.open || self.open[piece.page];
        if !in_reach {
            assert!(!known(gpa), "a private page is known to who sees open ones only");
            let refused = self.vm.refresh(CPU, cache);
            assert!(matches!(refused, Err(CacheError::Memory(CopyError::MemoryFault(_)))), "{refused:?}");
            return None;
        }
        if !known(gpa) {
            self.vm.refresh(CPU, cache).unwrap();
        }
        assert!(known(gpa));
        let pin = self.host.epoch.pin(CPU);
        for (beside, len) in [(piece.at.wrapping_sub(1), 1), (piece.at, piece.len + 1), (piece.at, 0)] {
            let gpa = Gpa::new(Self::gpa(piece.page, 0).get().wrapping_add(beside));
            assert!(self.vm.check_at(&pin, cache, gpa, len).is_none(), "not what the cache is for");
        }
        Some((piece.page, at))
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Activate { cache, page, at, len, open } => {
                let len = len.min(PAGE_SIZE - at);
                let reach = if open { Reach::Open } else { Reach::Everything };
                let done = self.vm.activate_as(CPU, cache, reach, Self::gpa(page, at), len);
                assert_eq!(done.is_ok(), !open || self.open[page], "{done:?}");
                self.caches[cache] = Some(Piece { page, at, len, open });
            }
            Op::Deactivate { cache } => {
                self.vm.deactivate(cache).unwrap();
                self.caches[cache] = None;
            }
            Op::Write { cache, at, byte } => {
                let Some((page, at)) = self.look(cache, at) else { return };
                let pin = self.host.epoch.pin(CPU);
                let piece = self.vm.check_at(&pin, cache, Self::gpa(page, at), 1).unwrap();
                self.vm.write_piece(&piece, &[byte, !byte]);
                drop(pin);
                self.wrote(page, at, byte);
            }
            Op::Read { cache, at } => {
                let Some((page, at)) = self.look(cache, at) else { return };
                let pin = self.host.epoch.pin(CPU);
                let piece = self.vm.check_at(&pin, cache, Self::gpa(page, at), 1).unwrap();
                let mut found = [0; 2];
                assert_eq!(self.vm.read_piece(&piece, &mut found), 1, "never past the piece");
                drop(pin);
                assert_eq!(found, [*self.byte(page, at), 0]);
            }
            Op::Store { page, at, byte } => {
                self.vm.write(&self.host.epoch.pin(CPU), &Hint::new(), Self::gpa(page, at), &[byte]).unwrap();
                self.wrote(page, at, byte);
            }
            Op::Discard { page } => {
                self.vm.discard(CPU, &[Self::range(page)]).unwrap();
                self.bytes[page * PAGE_SIZE as usize..][..PAGE_SIZE as usize].fill(0);
            }
            Op::Convert { page, open } => {
                let done = self.vm.convert(CPU, Self::range(page), open);
                assert_eq!(done.is_ok(), self.private);
                self.open[page] = open || !self.private;
            }
            Op::Zap { page } => self.vm.zap(CPU, Self::range(page)).unwrap(),
            Op::Fork => {
                let child = self.vm.fork(CPU).unwrap();
                self.holds(&child);
                let object = crate::fork_tests::child_object(&child);
                child.destroy(CPU);
                self.host.objects.destroy(&self.host.supply(CPU), &self.host.epoch, object).unwrap();
            }
            Op::Log { on } => {
                let flags = if on { SlotFlags::LOG_DIRTY } else { SlotFlags::empty() };
                self.vm.set_slot(CPU, &slot(0, RAM, PAGES as u64, self.object, flags)).unwrap();
                self.written = on.then_some(0);
            }
        }
    }

    fn holds(&self, vm: &TestVm<'_>) {
        let mut found = std::vec![0; self.bytes.len()];
        vm.read(&self.host.epoch.pin(CPU), &Hint::new(), Gpa::new(RAM), &mut found).unwrap();
        assert!(found == self.bytes, "memory holds something else");
    }

    /// Memory, log and mapping are as they should be.
    fn settled(&mut self) {
        self.holds(&self.vm);
        if let Some(written) = self.written.as_mut() {
            let mut words = [0];
            self.vm.get_dirty_log(CPU, 0, &mut words).unwrap();
            assert_eq!(words[0] & *written, *written, "a page was written, and the log does not say so");
            *written = 0;
        }
        let host = self.host;
        host.pool.reap(&host.epoch, CPU, usize::MAX);
        host.supply(CPU).scrub(usize::MAX);
        let audit = entresol_backing::audit(&host.supply(CPU), &host.objects, &host.epoch.pin(CPU));
        assert_eq!((audit.wrong, audit.stuck), (0, 0), "{audit:?}");
        assert!(audit.leased <= self.caches.iter().flatten().count() as u64, "{audit:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn caches_are_the_guests_memory_whatever_happens_to_it(private: bool, ops in prop::collection::vec(op(), 1..60)) {
        let host = host(8 * 512);
        let mut world = World::new(&host, private);
        for op in ops {
            world.step(op);
            world.settled();
        }
        (0..CACHES).for_each(|cache| world.step(Op::Deactivate { cache }));
        world.settled();
        world.vm.destroy(CPU);
        host.objects.destroy(&host.supply(CPU), &host.epoch, world.object).unwrap();
        host.pool.reap(&host.epoch, CPU, usize::MAX);
        host.supply(CPU).scrub(usize::MAX);
        assert_eq!(host.pool.private_frames(), 0);
    }
}
