//! SPIs: where they are routed, and who has them.
//!
//! Purpose: state behind the distributor's lock. A word of SPIs is a [`Bank`] with routes: for each vCPU the SPIs that
//! target it, and the SPIs that it owns because they are in its list registers or active there.
//!
//! Invariants: an SPI is in at most one `targets` and at most one `owned`; resident ⇒ owned. An active SPI that nobody
//! owns was made active by software while it was routed to nobody.
//!
//! Lock order: everything here is called with the distributor's lock held and takes no other.

use alloc::vec::Vec;

use entresol_sync::atomic::Ordering;
use serde::{Deserialize, Serialize};

use super::bank::{Bank, Groups, bits};
use super::frame::BankRegister;
use super::lr::ListRegister;
use super::{Cpu, FIRST_SPI, GicError, Kick, MAX_SPIS, MAX_VCPUS};
use crate::saved::{BadState, check};

/// `GICD_IROUTER.Interrupt_Routing_Mode`: any one participating PE.
const ROUTER_ONE_OF_N: u64 = 1 << 31;
/// Bits of `GICD_IROUTER` that exist: Aff3, the mode, Aff2–Aff0.
const ROUTER_MASK: u64 = 0x0000_00ff_80ff_ffff;
const ROUTER_AFFINITY: u64 = 0x0000_00ff_00ff_ffff;

/// The word and the bit of an SPI.
pub(super) const fn place(intid: u16) -> (usize, u32) {
    let index = intid as usize - FIRST_SPI as usize;
    (index / 32, 1 << (index % 32))
}

/// One word of SPIs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SpiWord {
    pub(super) bank: Bank,
    router: [u64; 32],
    one_of_n: u32,
    targets: [u32; MAX_VCPUS],
    owned: [u32; MAX_VCPUS],
}

impl SpiWord {
    /// After reset: everything routed to 0.0.0.0, vCPU 0.
    fn new() -> Self {
        let mut targets = [0; MAX_VCPUS];
        targets[0] = u32::MAX;
        Self { bank: Bank::shared(), router: [0; 32], one_of_n: 0, targets, owned: [0; MAX_VCPUS] }
    }

    /// Whether a word that was read, of a controller with so many vCPUs, may be used.
    fn check(&self, vcpus: usize) -> Result<(), BadState> {
        self.bank.check(false)?;
        check(
            self.router.iter().all(|router| router & !ROUTER_MASK == 0),
            "gic.router",
            "must have the bits that exist",
        )?;
        let bit = |index: usize| u32::from(self.router[index] & ROUTER_ONE_OF_N != 0) << index;
        check(
            self.one_of_n == (0..32).fold(0, |all, index| all | bit(index)),
            "gic.one_of_n",
            "must be as the routers say",
        )?;
        for words in [&self.targets, &self.owned] {
            let mut seen = 0;
            for (vcpu, word) in words.iter().enumerate() {
                check(word & seen == 0 && (vcpu < vcpus || *word == 0), "gic.targets", "must be one vCPU that exists")?;
                seen |= word;
            }
        }
        let owned = self.owned.iter().fold(0, |all, word| all | word);
        check(owned & !self.bank.active() == 0, "gic.owned", "must be active")
    }

    fn set_target(&mut self, bit: u32, vcpu: Option<usize>) {
        for (index, targets) in self.targets.iter_mut().enumerate() {
            if Some(index) == vcpu { *targets |= bit } else { *targets &= !bit }
        }
    }

    /// The SPIs that target `vcpu`.
    pub(super) fn targets(&self, vcpu: usize) -> u32 {
        self.targets[vcpu]
    }

    /// The SPIs that are active on `vcpu`, in a list register or not.
    pub(super) fn active_on(&self, vcpu: usize) -> u32 {
        self.bank.active() & self.owned[vcpu]
    }

    /// Writes a register of the bank and keeps ownership in step.
    pub(super) fn write(&mut self, register: BankRegister, value: u32) -> u32 {
        let changed = self.bank.write(register, value);
        self.settle_ownership();
        changed
    }

    /// What is neither active nor resident has no owner; what software made active belongs to its target.
    fn settle_ownership(&mut self) {
        let held = self.bank.active() | self.bank.resident();
        let owned = self.owned.iter().fold(0, |all, owned| all | owned);
        for (owned_here, targets) in self.owned.iter_mut().zip(&self.targets) {
            *owned_here = (*owned_here | targets & !owned) & held;
        }
    }

    /// Loads an SPI into a list register of `vcpu`.
    pub(super) fn load(&mut self, vcpu: usize, index: u32, intid: u16, may_wait: bool, groups: Groups) -> ListRegister {
        let bit = 1 << index;
        self.owned[vcpu] |= bit;
        self.bank.load(index, intid, may_wait && self.targets[vcpu] & bit != 0, groups)
    }

    /// Takes an SPI back from a list register of `vcpu`.
    fn unload(&mut self, vcpu: usize, index: u32, register: ListRegister) {
        if self.owned[vcpu] >> index & 1 == 1 {
            self.bank.unload(index, register);
            self.settle_ownership();
        }
    }
}

/// All SPIs of one controller.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Spis {
    words: Vec<SpiWord>,
    vcpus: usize,
    /// Whose turn it is for a 1-of-N interrupt.
    turn: usize,
}

impl Spis {
    pub(super) fn new(vcpus: usize, spis: usize) -> Result<Self, GicError> {
        if spis == 0 || spis > MAX_SPIS || !spis.is_multiple_of(32) {
            return Err(GicError::Spis(spis));
        }
        let mut words = Vec::new();
        words.try_reserve_exact(spis / 32).map_err(|_| GicError::OutOfMemory)?;
        words.resize(spis / 32, SpiWord::new());
        Ok(Self { words, vcpus, turn: 0 })
    }

    /// Whether what was read, for a controller of so many vCPUs and SPIs, may be used.
    pub(super) fn check(&self, vcpus: usize, spis: usize) -> Result<(), BadState> {
        let fits = self.vcpus == vcpus && self.words.len() * 32 == spis && self.turn < vcpus;
        check(fits, "gic.spis", "must be as many as the machine has")?;
        self.words.iter().try_for_each(|word| word.check(vcpus))
    }

    /// The same state once more.
    pub(super) fn fork(&self) -> Result<Self, GicError> {
        let mut words = Vec::new();
        words.try_reserve_exact(self.words.len()).map_err(|_| GicError::OutOfMemory)?;
        words.extend_from_slice(&self.words);
        Ok(Self { words, vcpus: self.vcpus, turn: self.turn })
    }

    /// Everything but the wires.
    pub(super) fn reset(&mut self) {
        for word in &mut self.words {
            word.bank.reset();
            *word = SpiWord { bank: word.bank.clone(), ..SpiWord::new() };
        }
        self.turn = 0;
    }

    /// One past the last INTID.
    pub(super) fn limit(&self) -> u32 {
        FIRST_SPI + 32 * self.words.len() as u32
    }

    pub(super) fn word(&mut self, word: usize) -> &mut SpiWord {
        &mut self.words[word]
    }

    /// The word of a guest's choice, if it exists.
    pub(super) fn get(&mut self, word: usize) -> Option<&mut SpiWord> {
        self.words.get_mut(word)
    }

    pub(super) fn len(&self) -> usize {
        self.words.len()
    }

    /// The word and bit of an INTID of a guest's choice, if it is an SPI.
    pub(super) fn find(&self, intid: u32) -> Option<(usize, u32)> {
        (FIRST_SPI..self.limit()).contains(&intid).then(|| place(intid as u16))
    }

    pub(super) fn router(&self, word: usize, index: usize) -> u64 {
        self.words[word].router[index]
    }

    /// Routes an SPI. Affinity 0.0.0.`n` is vCPU `n`; any other is nobody. Returns the SPI if it may have changed.
    pub(super) fn route(&mut self, word: usize, index: usize, value: u64, cpus: &[Cpu]) -> u32 {
        let bit = 1 << index;
        let value = value & ROUTER_MASK;
        let target = if value & ROUTER_ONE_OF_N != 0 {
            Some(self.next_participant(cpus))
        } else {
            usize::try_from(value & ROUTER_AFFINITY).ok().filter(|&vcpu| vcpu < self.vcpus)
        };
        let spis = &mut self.words[word];
        spis.router[index] = value;
        spis.one_of_n = if value & ROUTER_ONE_OF_N != 0 { spis.one_of_n | bit } else { spis.one_of_n & !bit };
        spis.set_target(bit, target);
        bit
    }

    /// The next vCPU, in turn, that is awake; if all sleep, the next in turn.
    fn next_participant(&mut self, cpus: &[Cpu]) -> usize {
        let first = (self.turn + 1) % self.vcpus;
        let mut in_turn = (0..self.vcpus).map(|step| (first + step) % self.vcpus);
        self.turn = in_turn.find(|&vcpu| !cpus[vcpu].asleep.load(Ordering::Relaxed)).unwrap_or(first);
        self.turn
    }

    /// Chooses who gets the 1-of-N interrupts of `mask` that are to be delivered. Not done when one comes back from a list
    /// register: it would wander.
    pub(super) fn choose(&mut self, word: usize, mask: u32, cpus: &[Cpu], groups: Groups) {
        let spis = &self.words[word];
        for index in bits(spis.bank.deliverable(groups) & spis.one_of_n & mask) {
            let vcpu = self.next_participant(cpus);
            self.words[word].set_target(1 << index, Some(vcpu));
        }
    }

    /// After a change of `changed` in `word`: finds out whom it concerns.
    pub(super) fn refresh(&mut self, word: usize, changed: u32, cpus: &[Cpu], groups: Groups) -> Kick {
        let spis = &self.words[word];
        let deliverable = spis.bank.deliverable(groups);
        let mut kick = Kick::NONE;
        for (vcpu, cpu) in cpus.iter().enumerate() {
            let concerns = deliverable & spis.targets[vcpu] | spis.owned[vcpu];
            if concerns & changed != 0 {
                kick |= Kick::one(vcpu);
            }
            let words = cpu.spi_words.load(Ordering::Relaxed);
            let updated = words & !(1 << word) | u32::from(concerns != 0) << word;
            if updated != words {
                cpu.spi_words.store(updated, Ordering::Release);
            }
        }
        kick
    }

    /// After a change that concerns every SPI.
    pub(super) fn refresh_all(&mut self, cpus: &[Cpu], groups: Groups) -> Kick {
        (0..self.words.len()).fold(Kick::NONE, |kick, word| kick | self.refresh(word, u32::MAX, cpus, groups))
    }

    /// Gives 1-of-N interrupts that wait for `vcpu` to others.
    pub(super) fn give_away(&mut self, vcpu: usize, cpus: &[Cpu], groups: Groups) -> Kick {
        (0..self.words.len()).fold(Kick::NONE, |kick, word| {
            let waiting = self.words[word].one_of_n & self.words[word].targets[vcpu];
            self.choose(word, waiting, cpus, groups);
            kick | self.refresh(word, waiting, cpus, groups)
        })
    }

    /// Who has an SPI of `word` in a list register.
    pub(super) fn holders(&self, word: usize) -> Kick {
        let spis = &self.words[word];
        spis.owned.iter().enumerate().fold(Kick::NONE, |kick, (vcpu, owned)| {
            if owned & spis.bank.resident() == 0 { kick } else { kick | Kick::one(vcpu) }
        })
    }

    /// Takes an SPI back from a list register of `vcpu`. An INTID that never was there changes nothing.
    pub(super) fn unload(
        &mut self,
        vcpu: usize,
        intid: u16,
        register: ListRegister,
        cpus: &[Cpu],
        groups: Groups,
    ) -> Kick {
        let Some((word, bit)) = self.find(intid.into()) else { return Kick::NONE };
        self.words[word].unload(vcpu, bit.trailing_zeros(), register);
        self.refresh(word, bit, cpus, groups)
    }

    /// Deactivates an SPI.
    pub(super) fn deactivate(&mut self, intid: u16, cpus: &[Cpu], groups: Groups) -> Kick {
        let Some((word, bit)) = self.find(intid.into()) else { return Kick::NONE };
        // Before ownership is settled: who holds it in a list register has to be told.
        let changed = self.words[word].bank.clear_active(bit);
        self.words[word].settle_ownership();
        self.refresh(word, changed, cpus, groups)
    }
}
