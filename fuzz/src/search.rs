//! The search: inputs that reach something new are kept and changed.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fastrand::Rng;

use crate::feedback::Feedback;

/// What is searched: runs an input, or says what does not hold.
pub type Subject = fn(&[u8]) -> Result<(), String>;

/// Bytes of the longest input.
const LONGEST: usize = 512;

/// What a search came to.
#[derive(Debug)]
pub struct Found {
    /// Runs until then.
    pub runs: u64,
    /// What does not hold.
    pub what: String,
    /// The shortest input that shows it.
    pub input: Vec<u8>,
}

/// A search under way.
pub struct Search {
    subject: Subject,
    rng: Rng,
    corpus: Vec<Vec<u8>>,
    reached: BTreeSet<u16>,
    runs: u64,
}

impl Search {
    /// A search of `subject` that the seed repeats.
    pub fn new(subject: Subject, seed: u64) -> Self {
        Self { subject, rng: Rng::with_seed(seed), corpus: vec![Vec::new()], reached: BTreeSet::new(), runs: 0 }
    }

    /// Runs so far.
    pub fn runs(&self) -> u64 {
        self.runs
    }

    /// Inputs kept, and transitions that they reach.
    pub fn reached(&self) -> (usize, usize) {
        (self.corpus.len(), self.reached.len())
    }

    /// One run of a changed input; what was found, if something was, made shorter.
    pub fn step(&mut self) -> Option<Found> {
        let input = self.changed();
        self.runs += 1;
        if let Err(what) = run(self.subject, &input) {
            return Some(self.shortened(input, what));
        }
        let before = self.reached.len();
        self.reached.extend(Feedback::here().reached());
        if self.reached.len() > before {
            self.corpus.push(input);
        }
        None
    }

    /// [`Self::step`] until something is found, at most `runs` times.
    pub fn within(&mut self, runs: u64) -> Option<Found> {
        (0..runs).find_map(|_| self.step())
    }

    /// An input of the corpus with a few changes.
    fn changed(&mut self) -> Vec<u8> {
        // What was found last leads further more often.
        let (first, second) = (self.rng.usize(..self.corpus.len()), self.rng.usize(..self.corpus.len()));
        let mut input = self.corpus[first.max(second)].clone();
        for _ in 0..self.rng.usize(1..6) {
            let at = self.rng.usize(..=input.len());
            match self.rng.u8(..6) {
                0 | 1 => {
                    let bytes: Vec<u8> = (0..self.rng.usize(1..12)).map(|_| self.rng.u8(..)).collect();
                    input.splice(at..at, bytes);
                }
                2 => {
                    let end = (at + self.rng.usize(1..12)).min(input.len());
                    input.drain(at..end);
                }
                3 => {
                    let other = self.rng.choice(&self.corpus).expect("the empty input is there").clone();
                    let from = self.rng.usize(..=other.len());
                    input.truncate(at);
                    input.extend(&other[from..]);
                }
                _ => {
                    if let Some(byte) = input.get_mut(at) {
                        *byte = if self.rng.bool() { self.rng.u8(..) } else { *byte ^ 1 << self.rng.u8(..8) };
                    }
                }
            }
        }
        input.truncate(LONGEST);
        input
    }

    /// Leaves out what the finding does not need: halves first, then less and less.
    fn shortened(&self, mut input: Vec<u8>, mut what: String) -> Found {
        let mut part = input.len();
        while part > 0 {
            let mut at = 0;
            while at < input.len() {
                let mut shorter = input.clone();
                shorter.drain(at..(at + part).min(input.len()));
                match run(self.subject, &shorter) {
                    Err(still) => (input, what) = (shorter, still),
                    Ok(()) => at += part,
                }
            }
            part /= 2;
        }
        Found { runs: self.runs, what, input }
    }
}

/// One run of `subject`; a panic is a finding like any other.
///
/// # Errors
///
/// What does not hold.
pub fn run(subject: Subject, input: &[u8]) -> Result<(), String> {
    let run = || Feedback::here().watch(|| catch_unwind(AssertUnwindSafe(|| subject(input))));
    run().unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(format!("panic: {}", text.unwrap_or_else(|| "without words".to_owned())))
    })
}
