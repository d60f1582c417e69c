//! Between the interrupts' state and a vCPU's list registers.
//!
//! Protocol: `sync` empties the image into the state; `flush` does the same and then refills it. Refilling always starts
//! from an empty image, so there is one way in and one way out, and withdrawing what was disabled, rerouted or dropped is
//! the same as not loading it again.
//!
//! Which interrupts get the list registers: if all fit, all. Otherwise the most urgent pending one always gets one, then
//! active ones, then pending ones, each in order of priority. Active ones that found no room end through `EOIcount`; the
//! guest ends in order of priority, so it ends those that have room first.

use entresol_sync::MutexGuard;
use entresol_sync::atomic::Ordering;

use super::bank::{Bank, Groups, bits};
use super::frame::{BankRegister, Field};
use super::lr::{Group, ListRegisters, State};
use super::select::{Candidate, MostUrgent};
use super::spis::{self, Spis};
use super::{Cpu, FIRST_SPI, Flag, Kick, Vgic};

/// What a flush left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flush {
    /// How many list registers, from the first, to write to hardware (with `ICH_HCR_EL2`).
    pub write: usize,
    /// Pending interrupts did not fit; `ICH_HCR_EL2` asks for a maintenance interrupt when there is room.
    pub underflow: bool,
    /// Active interrupts did not fit; `ICH_HCR_EL2` asks for a maintenance interrupt when one of them ends.
    pub overflow: bool,
    /// Other vCPUs that get what this one gave back. Never names the flushed vCPU.
    pub kick: Kick,
}

/// The locks that a vCPU's interrupts need, taken in order.
struct Held<'a> {
    vcpu: usize,
    cpus: &'a [Cpu],
    groups: Groups,
    /// Nothing if no SPI concerns the vCPU.
    spis: Option<MutexGuard<'a, Spis>>,
    private: MutexGuard<'a, Bank>,
}

impl Vgic {
    /// Whether the vCPU must be flushed before it enters its guest. One atomic load, sequentially consistent.
    ///
    /// # Panics
    ///
    /// If there is no such vCPU; so all calls here that name one.
    #[inline]
    pub fn needs_sync(&self, vcpu: usize) -> bool {
        self.sync_flag(vcpu).is_up()
    }

    /// The same question, to be asked often of one vCPU.
    pub fn sync_flag(&self, vcpu: usize) -> Flag<'_> {
        Flag::new(&self.cpus[vcpu].needs_sync)
    }

    /// Takes every interrupt back from the image, which is empty afterwards.
    pub fn sync(&self, vcpu: usize, image: &mut ListRegisters) -> Kick {
        if image.live() == 0 {
            return Kick::NONE;
        }
        let kick = self.hold(vcpu, image).drain(image);
        self.publish(kick | Kick::one(vcpu)).without(vcpu)
    }

    /// Takes every interrupt back, and loads the image with what the guest must see now.
    pub fn flush(&self, vcpu: usize, image: &mut ListRegisters) -> Flush {
        // Before anything is looked at: a change after this sets the flag again.
        self.cpus[vcpu].needs_sync.swap(false, Ordering::SeqCst);
        let before = image.live();
        let mut held = self.hold(vcpu, image);
        let kick = held.drain(image).without(vcpu);
        let (underflow, overflow) = held.refill(image);
        drop(held);
        Flush { write: before.max(image.live()), underflow, overflow, kick: self.publish(kick) }
    }

    /// Whether an interrupt waits that the guest's CPU interface would signal if it were handling none: whether `WFI`
    /// must not sleep. `image` is synced, or as hardware left it and [`Self::needs_sync`] is false.
    pub fn deliverable(&self, vcpu: usize, image: &ListRegisters) -> bool {
        let vmcr = image.control();
        if image.iter().any(|(_, lr)| lr.state == State::Pending && vmcr.signals(lr.group, lr.priority)) {
            return true;
        }
        let mut waiting = false;
        self.hold(vcpu, image).each_pending(|bank, index, _| {
            waiting |= vmcr.signals(bank.group(index), bank.priority(index));
        });
        waiting
    }

    /// A write to `ICC_DIR_EL1` that trapped. Syncs the image. Without split deactivation (`EOImode` 0) the architecture
    /// leaves the effect open: none here.
    pub fn deactivate(&self, vcpu: usize, image: &mut ListRegisters, intid: u64) -> Kick {
        let mut kick = self.sync(vcpu, image);
        let Ok(intid) = u16::try_from(intid & 0x00ff_ffff) else { return kick };
        if image.control().splits_deactivation() {
            kick |= if u32::from(intid) < FIRST_SPI {
                self.change_private(vcpu, |bank| bank.write(BankRegister::Bits(Field::ClearActive), 1 << intid))
            } else {
                let mut spis = self.spis.lock();
                let kick = spis.deactivate(intid, &self.cpus, self.groups());
                self.publish(kick)
            };
        }
        kick
    }

    fn hold(&self, vcpu: usize, image: &ListRegisters) -> Held<'_> {
        let cpu = &self.cpus[vcpu];
        let concerned = image.holds_spis() || cpu.spi_words.load(Ordering::Acquire) != 0;
        let spis = concerned.then(|| self.spis.lock());
        let private = cpu.private.lock();
        Held { vcpu, cpus: &self.cpus, groups: self.groups(), spis, private }
    }
}

impl Held<'_> {
    fn drain(&mut self, image: &mut ListRegisters) -> Kick {
        let mut kick = Kick::NONE;
        for _ in 0..image.take_ended() {
            kick |= self.end_overflowed();
        }
        for (intid, register) in image.iter() {
            if u32::from(intid) < FIRST_SPI {
                self.private.unload(intid.into(), register);
            } else if let Some(spis) = &mut self.spis {
                kick |= spis.unload(self.vcpu, intid, register, self.cpus, self.groups);
            }
        }
        image.clear();
        kick
    }

    /// The guest ended an active interrupt that was in no list register: the most urgent of those.
    fn end_overflowed(&mut self) -> Kick {
        let mut overflowed = MostUrgent::default();
        self.each_active(|bank, index, intid| {
            if bank.resident() >> index & 1 == 0 {
                overflowed.offer(Candidate::new(intid, bank.acknowledged_priority(index), false));
            }
        });
        let Some(intid) = overflowed.first(1).next() else { return Kick::NONE };
        if u32::from(intid) < FIRST_SPI {
            self.private.clear_active(1 << intid);
        } else if let Some(spis) = &mut self.spis {
            return spis.deactivate(intid, self.cpus, self.groups);
        }
        Kick::NONE
    }

    /// Loads an empty image. Returns whether pending, and whether active interrupts did not fit.
    fn refill(&mut self, image: &mut ListRegisters) -> (bool, bool) {
        let vmcr = image.control();
        let (mut active, mut pending) = (MostUrgent::default(), MostUrgent::default());
        self.each_active(|bank, index, intid| {
            active.offer(Candidate::new(intid, bank.acknowledged_priority(index), false));
        });
        let disabled = [Group::Zero, Group::One].map(|group| !vmcr.is_enabled(group));
        self.each_pending(|bank, index, intid| {
            let masked = if bank.group_zero(1 << index) != 0 { disabled[0] } else { disabled[1] };
            pending.offer(Candidate::new(intid, bank.priority(index), masked));
        });
        let room = image.implemented();
        let for_pending = pending.total().min(room.saturating_sub(active.total()).max(1));
        let for_active = active.total().min(room - for_pending);
        let (underflow, overflow) = (pending.total() > for_pending, active.total() > for_active);
        for intid in active.first(for_active).chain(pending.first(for_pending)) {
            self.load(image, intid, !underflow);
        }
        image.finish(underflow, overflow);
        (underflow, overflow)
    }

    fn load(&mut self, image: &mut ListRegisters, intid: u16, may_wait: bool) {
        let groups = self.groups;
        if u32::from(intid) < FIRST_SPI {
            image.push(intid, self.private.load(intid.into(), intid, may_wait, groups));
        } else if let Some(spis) = &mut self.spis {
            let (word, bit) = spis::place(intid);
            image.push(intid, spis.word(word).load(self.vcpu, bit.trailing_zeros(), intid, may_wait, groups));
        }
    }

    /// Calls `visit` with every interrupt that is active on this vCPU.
    fn each_active(&mut self, mut visit: impl FnMut(&Bank, u32, u16)) {
        self.each(Bank::active, |spis, vcpu| spis.active_on(vcpu), &mut visit);
    }

    /// Calls `visit` with every interrupt that could be loaded as pending.
    fn each_pending(&mut self, mut visit: impl FnMut(&Bank, u32, u16)) {
        let groups = self.groups;
        self.each(
            |bank| bank.deliverable(groups),
            |spis, vcpu| spis.bank.deliverable(groups) & spis.targets(vcpu),
            &mut visit,
        );
    }

    /// Calls `visit` with the interrupts that `private` and `shared` select.
    fn each(
        &mut self,
        private: impl Fn(&Bank) -> u32,
        shared: impl Fn(&spis::SpiWord, usize) -> u32,
        visit: &mut impl FnMut(&Bank, u32, u16),
    ) {
        for index in bits(private(&self.private)) {
            visit(&self.private, index, index as u16);
        }
        let Some(spis) = &mut self.spis else { return };
        for word in bits(self.cpus[self.vcpu].spi_words.load(Ordering::Relaxed)) {
            let spis = spis.word(word as usize);
            for index in bits(shared(spis, self.vcpu)) {
                visit(&spis.bank, index, (FIRST_SPI + 32 * word + index) as u16);
            }
        }
    }
}
