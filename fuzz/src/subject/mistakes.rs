//! Mistakes of an owner: each is refused with a reason, and changes nothing that the audit or the end would see.

use entresol_addr::{Gfn, GfnRange, Pfn, PfnRange};
use entresol_backing::{ObjectHandle, Objects, Policy, Spec};
use entresol_slot::Slots;

use super::owner::told;
use super::{CPU, FIRST, FRAMES, Subject};
use crate::input::Input;

impl Subject<'_> {
    pub(super) fn mistake(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let (host, pool) = (self.host, &self.host.pool);
        let specs = [
            Spec::anonymous(0, Policy::Pages),
            Spec::anonymous(u64::MAX, Policy::Blocks),
            Spec::Device { first: FIRST, frames: 4 },
            Spec::Device { first: Pfn::new(0x900), frames: 0 },
            Spec::Rom { first: FIRST, frames: 1, owned: false },
            Spec::Rom { first: FIRST.offset(FRAMES), frames: u64::MAX, owned: true },
        ];
        let slot = self.reference.slots.values().next().copied();
        match input.below(16) {
            0..6 => {
                let spec = input.one_of(&specs);
                refused(host.objects.create(&host.supply(CPU), spec))
            }
            6 => refused(host.objects.destroy(&host.supply(CPU), &host.epoch, ObjectHandle::from_raw(0xbad))),
            7 => match slot {
                Some(slot) => {
                    let held = ObjectHandle::from_raw(slot.object);
                    refused(host.objects.destroy(&host.supply(CPU), &host.epoch, held))
                }
                None => Ok(()),
            },
            8 => refused(host.objects.release(ObjectHandle::from_raw(0x1_0007))),
            9 => refused(Objects::with_capacity(input.one_of(&[0, 1 << 20]))),
            10 => refused(Slots::with_capacity(input.one_of(&[0, 1 << 20]), 1)),
            11 => refused(pool.add(PfnRange::new(FIRST.offset(3), 2).expect("a range"))),
            12 => refused(pool.add(PfnRange::new(Pfn::new(1), 2).expect("a range"))),
            13 => refused(self.vm.enable_dirty_rings(1, 100)),
            14 => refused(self.vm.enable_dirty_rings(0, 128)),
            _ => {
                let outside = GfnRange::new(Gfn::new((1 << 28) - 1), 2).expect("a range");
                match self.vm.zap(CPU, outside) {
                    Err(_) if self.vm.clear_young(CPU, outside).is_err() => Ok(()),
                    other => Err(format!("outside the address space: {other:?}")),
                }
            }
        }
    }
}

fn refused<T, E: std::error::Error>(result: Result<T, E>) -> Result<(), String> {
    match result {
        Ok(_) => Err("a mistake was accepted".to_owned()),
        Err(error) => told(&error),
    }
}
