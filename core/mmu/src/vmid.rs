//! VMIDs with rollover.
//!
//! Purpose: translations of different virtual machines stand side by side in one TLB because each carries a number.
//! There are 255 or 65,535 of them, and more virtual machines may have lived than that.
//!
//! Protocol: an identifier is `generation | number`; 0 is nobody's. A CPU that loads a vCPU asks [`Vmids::load`] with
//! the VM's identifier. A current generation is the fast path. Otherwise, under the lock, the VM keeps its number if
//! some CPU still runs on it or if it is free in the new generation, or takes a free one. When none is free a new
//! generation begins: the bitmap is cleared but for the numbers that CPUs run on, and one broadcast invalidation of
//! everything is completed before any number is given out again.
//!
//! Invariants: INV-14. Two VMs never share a number that is current, because a number in the bitmap is owned by one VM
//! for a whole generation; none is reused without a flush between, because numbers leave the bitmap only at rollover.
//! A CPU announces its number before it leaves the lock, and withdraws it when the vCPU is put.
//! Lock order: the lock is a leaf.

use alloc::boxed::Box;
use alloc::vec::Vec;

use entresol_machine::{Machine, TlbOp, Vmid};
use entresol_sync::atomic::{AtomicU64, Ordering, fence};
use entresol_sync::epoch::MAX_CPUS;
use entresol_sync::{Mutex, ordering, planted};
use entresol_table::VmidSource;

use crate::OutOfHeap;

const NUMBER_BITS: u32 = 16;
const NUMBER_MASK: u64 = (1 << NUMBER_BITS) - 1;
const FIRST_GENERATION: u64 = 1 << NUMBER_BITS;

/// A virtual machine's identifier, as it was given last.
#[derive(Debug, Default)]
pub struct VmVmid(AtomicU64);

impl VmVmid {
    /// None given yet.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// The number, for invalidations. Before the first load it is 0, which no guest's translations carry.
    #[inline]
    pub fn number(&self) -> Vmid {
        number(self.0.load(Ordering::Acquire))
    }
}

impl VmidSource for VmVmid {
    #[inline]
    fn vmid(&self) -> Vmid {
        self.number()
    }
}

const fn number(identifier: u64) -> Vmid {
    Vmid::new((identifier & NUMBER_MASK) as u16)
}

struct Used {
    /// A bit for each number.
    bitmap: Box<[u64]>,
    /// Identifiers that CPUs ran on when the generation began.
    reserved: [u64; MAX_CPUS],
    next: u64,
}

/// The allocator of one machine.
pub struct Vmids {
    generation: AtomicU64,
    active: [AtomicU64; MAX_CPUS],
    used: Mutex<Used>,
    numbers: u64,
}

impl Vmids {
    /// An allocator for identifiers of `bits` (8 or 16) bits.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`] if the bitmap cannot be allocated.
    pub fn new(bits: u8) -> Result<Self, OutOfHeap> {
        let numbers = 1u64 << bits.clamp(1, NUMBER_BITS as u8);
        let words = numbers.div_ceil(64) as usize;
        let mut bitmap = Vec::new();
        bitmap.try_reserve_exact(words).map_err(|_| OutOfHeap)?;
        bitmap.resize(words, 0);
        bitmap[0] = 1;
        let used = Used { bitmap: bitmap.into_boxed_slice(), reserved: [0; MAX_CPUS], next: 1 };
        Ok(Self {
            generation: AtomicU64::new(FIRST_GENERATION),
            active: [const { AtomicU64::new(0) }; MAX_CPUS],
            used: Mutex::new(used),
            numbers,
        })
    }

    /// CPU `cpu` is about to run a vCPU of the VM that owns `vm`: its number, valid until [`Vmids::put`].
    pub fn load<M: Machine>(&self, machine: &M, cpu: usize, vm: &VmVmid) -> Vmid {
        let mut used = self.used.lock();
        let generation = self.generation.load(Ordering::Relaxed);
        let mut identifier = vm.0.load(Ordering::Relaxed);
        if identifier & !NUMBER_MASK != generation {
            identifier = self.renew(machine, &mut used, identifier);
            vm.0.store(identifier, Ordering::Release);
        }
        self.active[cpu].store(identifier, Ordering::Release);
        // The other half of a table operation's barrier: it changes a word, then asks for the number. Either it sees
        // this number, or what runs under it sees the word.
        fence(ordering!(VmidLoad, SeqCst, AcqRel));
        number(identifier)
    }

    /// CPU `cpu` has put the vCPU; its number is free to go at the next rollover.
    pub fn put(&self, cpu: usize) {
        self.active[cpu].store(0, Ordering::Release);
    }

    /// Generations begun, for statistics.
    pub fn rollovers(&self) -> u64 {
        (self.generation.load(Ordering::Relaxed) >> NUMBER_BITS) - 1
    }

    fn renew<M: Machine>(&self, machine: &M, used: &mut Used, old: u64) -> u64 {
        let generation = self.generation.load(Ordering::Relaxed);
        let old_number = old & NUMBER_MASK;
        if old_number != 0 {
            let kept = generation | old_number;
            let mut held = false;
            for reserved in used.reserved.iter_mut().filter(|reserved| **reserved == old) {
                *reserved = kept;
                held = true;
            }
            if held || !Self::test_and_set(&mut used.bitmap, old_number) {
                return kept;
            }
        }
        if let Some(free) = self.take_free(used) {
            return generation | free;
        }
        self.roll_over(machine, used);
        let generation = self.generation.load(Ordering::Relaxed);
        // At most MAX_CPUS numbers are held back and every allocator has at least 256, less than that in no machine.
        let free = self.take_free(used).unwrap_or_else(|| unreachable_no_vmid(self.numbers));
        generation | free
    }

    fn take_free(&self, used: &mut Used) -> Option<u64> {
        let words = used.bitmap.len() as u64;
        let first = used.next / 64;
        let index =
            (0..words).map(|step| (first + step) % words).find(|word| used.bitmap[*word as usize] != u64::MAX)?;
        let bit = u64::from(used.bitmap[index as usize].trailing_ones());
        used.bitmap[index as usize] |= 1 << bit;
        used.next = index * 64 + bit;
        Some(used.next)
    }

    fn roll_over<M: Machine>(&self, machine: &M, used: &mut Used) {
        let generation = self.generation.load(Ordering::Relaxed) + FIRST_GENERATION;
        self.generation.store(generation, Ordering::Release);
        used.bitmap.fill(0);
        used.bitmap[0] = 1;
        for (cpu, active) in self.active.iter().enumerate() {
            let identifier = active.load(Ordering::Acquire);
            used.reserved[cpu] = identifier;
            if identifier != 0 {
                Self::test_and_set(&mut used.bitmap, identifier & NUMBER_MASK);
            }
        }
        used.next = 1;
        if planted!(ZF5) {
            return;
        }
        machine.tlb(TlbOp::All);
        machine.complete();
    }

    fn test_and_set(bitmap: &mut [u64], number: u64) -> bool {
        let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
        let was = bitmap[word] & bit != 0;
        bitmap[word] |= bit;
        was
    }
}

#[cold]
fn unreachable_no_vmid(numbers: u64) -> u64 {
    panic!("all {numbers} VMIDs are held by running CPUs: the machine has more CPUs than VMIDs")
}

#[cfg(test)]
mod tests {
    use super::*;
    use entresol_addr::Pfn;
    use entresol_machine::flat::{Event, FlatMachine};
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn machine() -> FlatMachine {
        FlatMachine::coherent(Pfn::new(0), 1)
    }

    fn flushes(machine: &FlatMachine) -> usize {
        machine.events().iter().filter(|event| **event == Event::Tlb(TlbOp::All)).count()
    }

    #[test]
    fn a_number_is_kept_within_a_generation() {
        let (machine, vmids) = (machine(), Vmids::new(8).unwrap());
        let vm = VmVmid::new();
        let first = vmids.load(&machine, 0, &vm);
        assert_ne!(first.get(), 0);
        vmids.put(0);
        assert_eq!(vmids.load(&machine, 1, &vm), first);
        assert_eq!(flushes(&machine), 0);
    }

    #[test]
    fn exhaustion_flushes_once_and_spares_who_runs() {
        for bits in [8, 16] {
            let (machine, vmids) = (machine(), Vmids::new(bits).unwrap());
            let running = VmVmid::new();
            let held = vmids.load(&machine, 3, &running);
            let others: Vec<_> = (0..1u32 << bits).map(|_| VmVmid::new()).collect();
            for vm in &others {
                assert_ne!(vmids.load(&machine, 0, vm), held, "{bits} bits");
                vmids.put(0);
            }
            assert_eq!(flushes(&machine), 1, "{bits} bits");
            assert_eq!(vmids.load(&machine, 1, &running), held, "a second vCPU joins the first, {bits} bits");
        }
    }

    proptest! {
        /// INV-14 against the naive statement: whoever runs owns its number alone, and a number changes hands only
        /// with a flush between.
        #[test]
        fn numbers_are_never_shared(steps in prop::collection::vec((0usize..4, 0usize..600, any::<bool>()), 1..2000)) {
            let (machine, vmids) = (machine(), Vmids::new(8).unwrap());
            let vms: Vec<_> = (0..600).map(|_| VmVmid::new()).collect();
            let mut running: [Option<usize>; 4] = [None; 4];
            let mut last_owner: HashMap<u16, usize> = HashMap::new();
            for (cpu, vm, put) in steps {
                if running[cpu].take().is_some() {
                    vmids.put(cpu);
                }
                if put {
                    continue;
                }
                let number = vmids.load(&machine, cpu, &vms[vm]).get();
                if flushes(&machine) > 0 {
                    // Those that run refill the TLB with their own number.
                    last_owner.retain(|_, owner| running.contains(&Some(*owner)));
                }
                running[cpu] = Some(vm);
                prop_assert_ne!(number, 0);
                prop_assert_eq!(*last_owner.entry(number).or_insert(vm), vm);
            }
        }
    }
}
