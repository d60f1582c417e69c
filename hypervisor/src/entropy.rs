//! Randomness for guests: the CPU's generator (FEAT_RNG). A machine without it offers no entropy device.

use entresol_devices::virtio::entropy::Entropy;
use entresol_metal_arm64::random;

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
