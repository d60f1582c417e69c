//! Randomness for guests: the CPU's generator (FEAT_RNG). A machine without it offers no entropy device.

use crate::arch::{random, timer};
use entresol_devices::virtio::entropy::Entropy;
use entresol_devices::vmgenid::ID_BYTES;
use entresol_sync::atomic::{AtomicU64, Ordering};

/// The CPU's generator.
pub struct MachineEntropy(());

impl MachineEntropy {
    /// The generator, if this machine has one.
    pub fn of_this_machine() -> Option<Self> {
        random::is_implemented().then_some(Self(()))
    }
}

impl Entropy for MachineEntropy {
    fn fill(&self, to: &mut [u8]) {
        for chunk in to.chunks_mut(8) {
            chunk.copy_from_slice(&random::next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Seeds for a guest's kernel, if the machine has a generator.
pub fn seeds() -> Option<([u8; 32], u64)> {
    let source = MachineEntropy::of_this_machine()?;
    let mut seed = [0; 32];
    source.fill(&mut seed);
    Some((seed, random::next()))
}

/// How many generations were given a number.
static GENERATIONS: AtomicU64 = AtomicU64::new(0);

/// A number that no other generation of a virtual machine has: random, or without a generator the time and a count, which
/// are this machine's alone while it is up.
pub fn generation() -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    match MachineEntropy::of_this_machine() {
        Some(source) => source.fill(&mut id),
        None => {
            let (time, count) = id.split_at_mut(ID_BYTES / 2);
            time.copy_from_slice(&timer::now().to_le_bytes());
            count.copy_from_slice(&(GENERATIONS.fetch_add(1, Ordering::Relaxed) + 1).to_le_bytes());
        }
    }
    id
}
