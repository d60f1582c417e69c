//! Who runs: the CPUs of one schedule, and the decision before each operation.

use entresol_sync::lab::Site;

use super::access::{Accesses, Sites};
use super::strategy::Strategy;
use super::trail::{Trail, Turn};

/// Rounds in which every CPU looks again and finds nothing changed, before the schedule counts as stuck. More than one,
/// because a CPU's own work (giving frames back) may help it the next time.
const ROUNDS: u32 = 3;

/// What a CPU does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ready,
    /// In a waiting loop, until another CPU changes something that it read.
    Waiting(Site),
    /// Before a lock that another CPU holds.
    Blocked(usize, Site),
    Done,
}

/// What the CPU that asked does now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Go {
    /// It goes on.
    On,
    /// Another goes: it suspends itself.
    Away,
    /// Nobody can go on.
    Stuck,
}

/// One schedule in the making.
#[derive(Debug)]
pub struct Schedule {
    strategy: Strategy,
    statuses: Vec<Status>,
    current: usize,
    /// Operations so far.
    pub steps: u64,
    /// Of these, each CPU's.
    own: [u64; crate::machine::config::MAX_CPUS],
    picks: u64,
    /// Decisions that mattered so far: what PCT spreads its changes over.
    pub points: u64,
    rounds: u32,
    /// CPUs run; before and after that nothing is decided.
    pub running: bool,
    /// Decisions that were not the default.
    pub trail: Trail,
    accesses: Accesses,
    /// Places of the source.
    pub sites: Sites,
}

impl Schedule {
    /// No CPUs yet.
    pub fn new() -> Self {
        Self {
            strategy: Strategy::Replay(Default::default()),
            statuses: Vec::new(),
            current: 0,
            steps: 0,
            own: Default::default(),
            picks: 0,
            points: 0,
            rounds: 0,
            running: false,
            trail: Trail::default(),
            accesses: Accesses::new(0),
            sites: Sites::default(),
        }
    }

    /// Begins a schedule of `cpus` CPUs.
    pub fn begin(&mut self, cpus: usize, strategy: Strategy) {
        self.strategy = strategy;
        self.statuses.clear();
        self.statuses.resize(cpus, Status::Ready);
        (self.current, self.steps, self.picks, self.points, self.rounds) = (0, 0, 0, 0, 0);
        self.own = Default::default();
        self.running = false;
        self.trail.turns.clear();
        self.accesses.clear(cpus);
    }

    /// The CPUs start; returns the first.
    pub fn start(&mut self) -> usize {
        self.running = true;
        self.choose(true, true);
        self.current
    }

    /// Gives the strategy back.
    pub fn end(&mut self) -> Strategy {
        self.running = false;
        std::mem::replace(&mut self.strategy, Strategy::Replay(Default::default()))
    }

    /// The CPU that runs.
    pub fn current(&self) -> usize {
        self.current
    }

    /// Operations of all CPUs but the one that runs.
    pub fn others(&self) -> u64 {
        self.own.iter().sum::<u64>() - self.own[self.current]
    }

    /// The CPU that runs is about to use `address`: may it?
    pub fn access(&mut self, address: usize, write: bool, site: Site) -> Go {
        if !self.running {
            return Go::On;
        }
        self.steps += 1;
        let number = self.sites.number(site);
        let shared = self.sites.is_shared_at(number, address);
        let me = self.current;
        self.choose(false, shared);
        // The operation happens when this CPU goes again; its order among the others is then that of `touch`.
        if self.current == me {
            self.touch(address, write, number);
            return Go::On;
        }
        Go::Away
    }

    /// The operation that was put off happens now.
    pub fn access_now(&mut self, address: usize, write: bool, site: Site) {
        let number = self.sites.number(site);
        self.touch(address, write, number);
    }

    fn touch(&mut self, address: usize, write: bool, site: u16) {
        let cpu = self.current;
        self.own[cpu] += 1;
        self.accesses.note(&mut self.sites, cpu, address, write, site, self.steps);
        if write {
            for other in 0..self.statuses.len() {
                if matches!(self.statuses[other], Status::Waiting(_)) && self.accesses.has_read(other, address) {
                    self.wake(other);
                }
            }
        }
    }

    fn wake(&mut self, cpu: usize) {
        self.statuses[cpu] = Status::Ready;
        self.accesses.forget_reads(cpu);
    }

    /// The CPU that runs waits for a change of what it read.
    pub fn spin(&mut self, site: Site) -> Go {
        if !self.running {
            return Go::Stuck;
        }
        self.steps += 1;
        let me = self.current;
        if self.accesses.moved_on(me) {
            self.accesses.forget_reads(me);
            return Go::On;
        }
        self.statuses[me] = Status::Waiting(site);
        self.elsewhere(me)
    }

    /// The CPU that runs waits for a lock.
    pub fn blocked(&mut self, address: usize, site: Site) -> Go {
        if !self.running {
            return Go::Stuck;
        }
        self.steps += 1;
        let me = self.current;
        self.statuses[me] = Status::Blocked(address, site);
        self.elsewhere(me)
    }

    /// A lock is free.
    pub fn released(&mut self, address: usize) {
        for status in &mut self.statuses {
            if matches!(status, Status::Blocked(at, _) if *at == address) {
                *status = Status::Ready;
            }
        }
    }

    /// The CPU that runs has finished. Returns whether another goes on.
    pub fn finished(&mut self) -> Go {
        self.statuses[self.current] = Status::Done;
        if self.all_done() {
            return Go::On;
        }
        self.steps += 1;
        self.elsewhere(self.current)
    }

    /// Whether every CPU has finished.
    pub fn all_done(&self) -> bool {
        self.statuses.iter().all(|status| *status == Status::Done)
    }

    /// Something was achieved, so waiting was not in vain.
    pub fn progress(&mut self) {
        self.rounds = 0;
    }

    fn elsewhere(&mut self, me: usize) -> Go {
        if !self.statuses.contains(&Status::Ready) {
            self.rounds += 1;
            if self.rounds > ROUNDS {
                return Go::Stuck;
            }
            for cpu in 0..self.statuses.len() {
                if matches!(self.statuses[cpu], Status::Waiting(_)) {
                    self.wake(cpu);
                }
            }
            if !self.statuses.contains(&Status::Ready) {
                return Go::Stuck;
            }
        }
        self.choose(true, true);
        if self.current == me { Go::On } else { Go::Away }
    }

    /// Who goes next. `free`: the CPU that runs cannot go on, or none runs yet.
    fn choose(&mut self, free: bool, shared: bool) {
        let mut ready = arrayvec::ArrayVec::<usize, { crate::machine::config::MAX_CPUS }>::new();
        ready.extend((0..self.statuses.len()).filter(|cpu| self.statuses[*cpu] == Status::Ready));
        if ready.len() > 1 && (free || shared) {
            self.points += 1;
        }
        let default = if free { ready[0] } else { self.current };
        let next = self.strategy.next_cpu(self.steps, self.current, &ready, free, shared);
        if next != default {
            self.trail.turns.push(Turn::Switch { step: self.steps, cpu: next as u8 });
        }
        self.current = next;
    }

    /// Which of `of` possibilities the hardware makes true.
    pub fn pick(&mut self, of: usize) -> usize {
        self.picks += 1;
        let taken = self.strategy.pick(self.picks, of);
        if taken != 0 {
            self.trail.turns.push(Turn::Pick { number: self.picks, taken: taken as u8 });
        }
        taken
    }

    /// Hardware decisions so far.
    pub fn picks(&self) -> u64 {
        self.picks
    }

    /// What each CPU waits for, for a report.
    pub fn waits(&self) -> String {
        let texts = self.statuses.iter().enumerate().filter_map(|(cpu, status)| match status {
            Status::Waiting(site) => Some(format!("CPU {cpu} waits at {}:{}", site.file(), site.line())),
            Status::Blocked(_, site) => Some(format!("CPU {cpu} wants the lock at {}:{}", site.file(), site.line())),
            Status::Ready | Status::Done => None,
        });
        texts.collect::<Vec<_>>().join("; ")
    }
}

impl Default for Schedule {
    fn default() -> Self {
        Self::new()
    }
}
