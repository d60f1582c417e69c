//! How the decisions of a schedule are made.
//!
//! Every decision is a number: 0 is the default. For a schedule it is which CPU goes next, for the hardware which
//! possibility comes true. Default for a schedule is to go on with the CPU that runs, or with the lowest that can when
//! it cannot; default for the hardware is the stalest.

use std::collections::HashMap;

use fastrand::Rng;

use super::trail::{Trail, Turn};

/// Makes decisions.
#[derive(Debug)]
pub enum Strategy {
    /// Depth-first through all of them, with a bound on how often a CPU that could go on is held up.
    Exhaustive(Search),
    /// Probabilistic concurrency testing: random priorities, changed at a few random points (Burckhardt and others,
    /// ASPLOS 2010).
    Pct(Pct),
    /// Another CPU with probability 1/8.
    Sticky(Rng),
    /// Decisions that were written down.
    Replay(Replay),
}

/// One decision of an exhaustive search.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Branch {
    /// Possibilities.
    pub of: u8,
    /// The one taken.
    pub taken: u8,
}

/// A depth-first search: the decisions of the schedule at hand.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// Decisions to repeat, then those made anew.
    pub branches: Vec<Branch>,
    at: usize,
    /// Preemptions left in this schedule; `None` is no bound.
    left: Option<u32>,
    bound: Option<u32>,
}

/// State of one PCT schedule.
#[derive(Debug)]
pub struct Pct {
    rng: Rng,
    priorities: Vec<u32>,
    changes: Vec<u64>,
    points: u64,
    lowest: u32,
}

/// Written decisions.
#[derive(Clone, Debug, Default)]
pub struct Replay {
    switches: HashMap<u64, u8>,
    picks: HashMap<u64, u8>,
}

impl Search {
    /// The first schedule of a search.
    pub fn new(bound: Option<u32>) -> Self {
        Self { branches: Vec::new(), at: 0, left: bound, bound }
    }

    /// The next schedule, or `false` if there is none. `keep` decisions at the beginning stay as they are.
    pub fn advance(&mut self, keep: usize) -> bool {
        (self.at, self.left) = (0, self.bound);
        while self.branches.len() > keep {
            if let Some(last) = self.branches.last_mut() {
                if last.taken + 1 < last.of {
                    last.taken += 1;
                    return true;
                }
                self.branches.pop();
            }
        }
        false
    }

    fn decide(&mut self, of: usize) -> usize {
        let taken = match self.branches.get(self.at) {
            Some(branch) => branch.taken,
            None => {
                self.branches.push(Branch { of: of as u8, taken: 0 });
                0
            }
        };
        self.at += 1;
        // A repeated prefix has the same possibilities unless the scenario is not deterministic.
        assert_eq!(usize::from(self.branches[self.at - 1].of), of, "a schedule did not repeat itself");
        usize::from(taken)
    }
}

impl Pct {
    /// `depth` is the number of ordering constraints that a bug may need; `points` an estimate of how many decisions a
    /// schedule has.
    pub fn new(seed: u64, cpus: usize, depth: u32, points: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let mut priorities: Vec<u32> = (0..cpus as u32).map(|cpu| depth + cpu).collect();
        rng.shuffle(&mut priorities);
        let changes = (1..depth).map(|_| rng.u64(0..points.max(1))).collect();
        Self { rng, priorities, changes, points: 0, lowest: depth }
    }

    fn next(&mut self, current: usize, ready: &[usize]) -> usize {
        if self.changes.contains(&self.points) {
            self.lowest -= 1;
            self.priorities[current] = self.lowest;
        }
        self.points += 1;
        *ready.iter().max_by_key(|cpu| self.priorities[**cpu]).expect("somebody can go on")
    }
}

impl Replay {
    /// Those of a trail.
    pub fn new(trail: &Trail) -> Self {
        let mut replay = Self::default();
        for turn in &trail.turns {
            match turn {
                Turn::Switch { step, cpu } => replay.switches.insert(*step, *cpu),
                Turn::Pick { number, taken } => replay.picks.insert(*number, *taken),
            };
        }
        replay
    }
}

impl Strategy {
    /// Which CPU goes next. `ready` can, in ascending order; `current` is among them if `free` is false, and then goes on
    /// by default. `shared` says whether the operation is one that matters.
    pub fn next_cpu(&mut self, step: u64, current: usize, ready: &[usize], free: bool, shared: bool) -> usize {
        let default = if free { ready[0] } else { current };
        if let Self::Replay(replay) = self {
            return replay
                .switches
                .get(&step)
                .map(|cpu| usize::from(*cpu))
                .filter(|cpu| ready.contains(cpu))
                .unwrap_or(default);
        }
        if ready.len() == 1 || !shared && !free {
            return default;
        }
        match self {
            Self::Exhaustive(search) if free => ready[search.decide(ready.len())],
            Self::Exhaustive(search) => {
                if search.left == Some(0) {
                    return current;
                }
                let taken = search.decide(ready.len());
                if taken == 0 {
                    return current;
                }
                search.left = search.left.map(|left| left - 1);
                let mut others = ready.iter().filter(|cpu| **cpu != current);
                *others.nth(taken - 1).expect("one of the others")
            }
            Self::Pct(pct) => pct.next(current, ready),
            Self::Sticky(rng) => {
                if !free && rng.u8(0..8) != 0 {
                    return current;
                }
                ready[rng.usize(0..ready.len())]
            }
            Self::Replay(_) => default,
        }
    }

    /// Which of `of` possibilities comes true.
    pub fn pick(&mut self, number: u64, of: usize) -> usize {
        match self {
            Self::Exhaustive(search) => search.decide(of),
            Self::Pct(Pct { rng, .. }) | Self::Sticky(rng) => {
                // Stale half of the time: bugs are about that.
                if rng.bool() { 0 } else { rng.usize(0..of) }
            }
            Self::Replay(replay) => replay.picks.get(&number).map_or(0, |taken| usize::from(*taken)).min(of - 1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves(bound: Option<u32>, steps: usize) -> Vec<Vec<usize>> {
        let mut all = Vec::new();
        let mut strategy = Strategy::Exhaustive(Search::new(bound));
        loop {
            let mut current = 0;
            let mut path = Vec::new();
            for step in 0..steps {
                current = strategy.next_cpu(step as u64, current, &[0, 1], false, true);
                path.push(current);
            }
            all.push(path);
            let Strategy::Exhaustive(search) = &mut strategy else { unreachable!() };
            if !search.advance(0) {
                return all;
            }
        }
    }

    #[test]
    fn without_a_bound_every_order_comes_once() {
        let mut all = leaves(None, 4);
        assert_eq!(all.len(), 16);
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 16);
    }

    #[test]
    fn a_bound_counts_preemptions() {
        let all = leaves(Some(1), 4);
        assert_eq!(all.len(), 5, "none, or one at each of four points");
        assert!(all.iter().all(|path| std::iter::once(&0).chain(path).zip(path).filter(|(a, b)| a != b).count() <= 1));
    }
}
