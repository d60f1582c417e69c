//! The end of an emulated access: what it owes its vCPU, paid once.
//!
//! Purpose: an access that no memory serves leaves the core as [`Outcome::Mmio`](crate::Outcome::Mmio) and is answered elsewhere: by a
//! device, by the owner, or by nobody. What its instruction then does to the vCPU is decided here, apart from what a vCPU is.
//!
//! Protocol: a [`Completion`] begins owing nothing ([`Completion::pending`]); answers are added in the order in which they come; it is
//! settled at the vCPU's re-entry, and is gone. Exactly one of these is what a vCPU sees:
//!
//! | answered | register | PC | exception |
//! |---|---|---|---|
//! | a load's value | written | advanced | – |
//! | a store is done | – | advanced | – |
//! | an abort, before or after any other answer | – | – | taken |
//! | nothing: memory is there by now | – | – | – |
//!
//! Invariants: nobody settles twice, because settling consumes; an abort is final, so that data which came before it, or comes after,
//! reaches no register. The lab's checker `completion` watches both.
//!
//! Known holes: the instructions that the hypervisor decodes (pairs, writeback, SIMD) have their own last step there.

use entresol_sync::planted;

/// The instruction that made an access, on its vCPU.
pub trait Instruction {
    /// Writes what was loaded, in the low bytes of `value` in the guest's byte order, to the instruction's register.
    fn load(&mut self, value: u64);
    /// Steps over the instruction.
    fn advance(&mut self);
    /// The vCPU takes the abort that the access deserves, in place of the instruction.
    fn abort(&mut self);
}

/// How the instruction ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It is executed again.
    Again,
    /// It is done.
    Retired,
    /// It is an abort.
    Aborted,
}

/// What an emulated access owes its vCPU.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "an access that is never settled is executed again"]
pub struct Completion {
    loaded: Option<u64>,
    end: End,
}

impl Completion {
    /// Nothing is answered yet. Settled so, the instruction is executed again.
    #[inline]
    pub const fn pending() -> Self {
        Self { loaded: None, end: End::Again }
    }

    /// A load has its value.
    #[inline]
    pub fn loaded(self, value: u64) -> Self {
        Self { loaded: Some(value), ..self }.stored()
    }

    /// A store is done.
    #[inline]
    pub fn stored(self) -> Self {
        Self { end: if self.end == End::Aborted { End::Aborted } else { End::Retired }, ..self }
    }

    /// The access is an abort, whatever else was answered or will be.
    #[inline]
    pub fn aborted(self) -> Self {
        Self { end: End::Aborted, ..self }
    }

    /// Does to the instruction what it is owed.
    #[inline]
    pub fn settle(self, instruction: &mut impl Instruction) {
        let cancelled = self.end == End::Aborted && !planted!(ZB5);
        if let Some(value) = self.loaded.filter(|_| !cancelled) {
            instruction.load(value);
        }
        match self.end {
            End::Again => {}
            End::Retired => {
                instruction.advance();
                if planted!(ZB5) {
                    instruction.advance();
                }
            }
            End::Aborted => instruction.abort(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use entresol_sync::zoo::{Bug, plant};

    use super::*;

    #[derive(Debug, PartialEq, Eq)]
    enum Effect {
        Load(u64),
        Advance,
        Abort,
    }

    impl Instruction for Vec<Effect> {
        fn load(&mut self, value: u64) {
            self.push(Effect::Load(value));
        }

        fn advance(&mut self) {
            self.push(Effect::Advance);
        }

        fn abort(&mut self) {
            self.push(Effect::Abort);
        }
    }

    fn settled(completion: Completion) -> Vec<Effect> {
        let mut effects = Vec::new();
        completion.settle(&mut effects);
        effects
    }

    #[test]
    fn each_answer_has_its_effects_once() {
        assert_eq!(settled(Completion::pending()), []);
        assert_eq!(settled(Completion::pending().loaded(7)), [Effect::Load(7), Effect::Advance]);
        assert_eq!(settled(Completion::pending().stored()), [Effect::Advance]);
        assert_eq!(settled(Completion::pending().aborted()), [Effect::Abort]);
    }

    /// Every order of up to three answers: the abort alone, wherever it stands; else one step, and the last value.
    #[test]
    fn an_abort_cancels_what_came_before_and_what_comes_after() {
        let apply = |completion: Completion, answer: u32| match answer {
            0 => completion,
            1 => completion.loaded(7),
            2 => completion.stored(),
            _ => completion.aborted(),
        };
        for code in 0..64 {
            let answers = [code & 3, code >> 2 & 3, code >> 4];
            let effects = settled(answers.into_iter().fold(Completion::pending(), apply));
            let expected = if answers.contains(&3) {
                [Effect::Abort].into()
            } else if answers.contains(&1) {
                [Effect::Load(7), Effect::Advance].into()
            } else if answers.contains(&2) {
                [Effect::Advance].into()
            } else {
                Vec::new()
            };
            assert_eq!(effects, expected, "{answers:?}");
        }
    }

    /// Z-B5: with the plant, an instruction is skipped, and an aborted load has its value.
    #[test]
    fn the_plant_breaks_both_promises() {
        plant(&[Bug::ZB5]);
        let (stored, aborted) =
            (settled(Completion::pending().stored()), settled(Completion::pending().loaded(7).aborted()));
        plant(&[]);
        assert_eq!(stored, [Effect::Advance, Effect::Advance]);
        assert_eq!(aborted, [Effect::Load(7), Effect::Abort]);
    }
}
