//! Which CPU has to forget translations of the hypervisor's own mapping, and when it has.
//!
//! Purpose: a frame that left the own mapping is absent when no CPU translates it any more (INV-10). No instruction reaches another
//! CPU's translations, so each is asked and each answers.
//!
//! Protocol: who took an entry away counts [`Shootdowns::ask`] up, forgets by itself, and waits in [`Shootdowns::complete`] until every
//! CPU that takes part has answered. `kick` is a non-maskable interrupt; its handler does [`Shootdowns::answer`] and nothing else that
//! waits: it reads the count, forgets all that the CPU translates for the hypervisor (CR3 is loaded with what it holds; no entry is
//! global), and says up to which count it has.
//!
//! Why nobody waits for ever: the kick is taken wherever the CPU is.
//! - In the hypervisor, whatever it does: RFLAGS.IF is no matter to it. So who waits here answers others, and so does who waits for a
//!   lock that somebody here holds.
//! - In HLT, or just before it: it comes out, and does not go in (`interrupts::after_nmi`).
//! - In a guest: the intercept ends the guest's turn, the interrupt stays pending (APM 15.13.2) until STGI, a few instructions later.
//!   In between the CPU uses nothing of the mapping but its own text, stack and vCPU, which never leave it.
//! - In the handler: one more is kept pending until its IRET (APM 8.2.3). If the handler had read the count already, that one answers.
//!
//! Why an answer means what it says: the entry is gone before the count goes up, and the handler reads the count before it forgets;
//! loading CR3 is serialising. A CPU that takes part from a moment on ([`Shootdowns::join`]) forgets after it was seen to: whoever did
//! not wait for it had taken its entry away before.
//!
//! A CPU's own answers overlap: the interrupt may come in the middle of one that it gives by itself. So `seen` only grows.
//!
//! Lock order: none is taken. `complete` may be called with any lock held.
//!
//! Sources: APM 5.5.2 (translations and their invalidation), 8.2.3 (NMI), 15.13.2 (its intercept), 15.17 (GIF).
//!
//! Known holes: everything of the mapping is forgotten, whatever was asked.

use entresol_sync::atomic::{AtomicU64, Ordering};

/// Up to which count a CPU has answered.
struct Cpu {
    seen: AtomicU64,
    /// The count at its own last question, until it was waited for; 0: none. Nobody else looks at it.
    asked: AtomicU64,
}

/// Of a CPU that takes no part: it has answered whatever comes.
const APART: u64 = u64::MAX;

/// The shootdowns of `N` CPUs.
pub struct Shootdowns<const N: usize> {
    wanted: AtomicU64,
    cpus: [Cpu; N],
}

impl<const N: usize> Shootdowns<N> {
    /// Nobody takes part, nothing was asked.
    pub const fn new() -> Self {
        let cpus = [const { Cpu { seen: AtomicU64::new(APART), asked: AtomicU64::new(0) } }; N];
        Self { wanted: AtomicU64::new(0), cpus }
    }

    /// CPU `cpu` takes part from now on: it can be kicked. `forget` is that of [`Self::answer`].
    pub fn join(&self, cpu: usize, forget: impl FnOnce()) {
        self.cpus[cpu].seen.store(0, Ordering::SeqCst);
        self.answer(cpu, forget);
    }

    /// CPU `cpu` forgets what it knew, by `forget`.
    pub fn answer(&self, cpu: usize, forget: impl FnOnce()) {
        let wanted = self.wanted.load(Ordering::SeqCst);
        forget();
        self.cpus[cpu].seen.fetch_max(wanted, Ordering::SeqCst);
    }

    /// Entries were taken away: all CPUs are to forget them. The asking CPU `own` does by itself.
    pub fn ask(&self, own: usize) {
        let count = self.wanted.fetch_add(1, Ordering::SeqCst) + 1;
        self.cpus[own].asked.store(count, Ordering::Relaxed);
    }

    /// Waits, on CPU `own`, until all others have forgotten what it asked for. `kick` makes a CPU answer, and is called once for each that
    /// has not; stores before it are visible to the CPU that it reaches. `turn` is what the CPU does while it waits.
    #[inline]
    pub fn complete(&self, own: usize, kick: impl Fn(usize), turn: impl Fn()) {
        if self.cpus[own].asked.load(Ordering::Relaxed) != 0 {
            self.wait(own, kick, turn);
        }
    }

    #[cold]
    fn wait(&self, own: usize, kick: impl Fn(usize), turn: impl Fn()) {
        let wanted = self.cpus[own].asked.swap(0, Ordering::Relaxed);
        let stale = |index: usize| index != own && self.cpus[index].seen.load(Ordering::SeqCst) < wanted;
        // All at once, so that they answer beside each other.
        (0..N).filter(|index| stale(*index)).for_each(kick);
        for index in 0..N {
            while stale(index) {
                turn();
            }
        }
    }
}

impl<const N: usize> Default for Shootdowns<N> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::{Cell, RefCell};
    use std::sync::atomic::AtomicBool;
    use std::vec::Vec;

    #[test]
    fn who_asks_waits_for_those_that_take_part() {
        let shootdowns = Shootdowns::<3>::new();
        let kicked = RefCell::new(Vec::new());
        let kick = |cpu| {
            kicked.borrow_mut().push(cpu);
            shootdowns.answer(cpu, || ());
        };
        shootdowns.join(0, || ());
        shootdowns.ask(0);
        shootdowns.complete(0, kick, || ());
        assert!(kicked.borrow().is_empty(), "nobody else takes part");
        let joined = Cell::new(false);
        shootdowns.join(2, || joined.set(true));
        assert!(joined.get(), "who joins forgets");
        shootdowns.complete(0, kick, || ());
        assert!(kicked.borrow().is_empty(), "nothing was asked");
        shootdowns.ask(0);
        shootdowns.ask(0);
        shootdowns.complete(0, kick, || ());
        assert_eq!(kicked.take(), [2], "once for both");
        shootdowns.complete(0, kick, || ());
        assert!(kicked.borrow().is_empty());
        shootdowns.ask(2);
        shootdowns.complete(2, kick, || ());
        assert_eq!(kicked.take(), [0]);
    }

    #[test]
    fn an_answer_inside_an_answer_is_not_taken_back() {
        let shootdowns = Shootdowns::<2>::new();
        shootdowns.join(0, || ());
        shootdowns.join(1, || ());
        // CPU 1 is answering when CPU 0 asks, and is interrupted by the kick.
        shootdowns.answer(1, || {
            shootdowns.ask(0);
            shootdowns.complete(0, |cpu| shootdowns.answer(cpu, || ()), || ());
        });
        shootdowns.ask(0);
        let kicked = Cell::new(0);
        shootdowns.complete(
            0,
            |cpu| {
                kicked.set(kicked.get() + 1);
                shootdowns.answer(cpu, || ());
            },
            || (),
        );
        assert_eq!(kicked.get(), 1);
        assert_eq!(shootdowns.cpus[1].seen.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn what_was_read_before_a_question_is_no_answer_to_it() {
        let shootdowns = Shootdowns::<2>::new();
        shootdowns.join(0, || ());
        shootdowns.join(1, || ());
        let late = Cell::new(false);
        // CPU 1 has read the count and forgotten when CPU 0 takes an entry away: its answer is to what was before.
        shootdowns.answer(1, || shootdowns.ask(0));
        shootdowns.complete(
            0,
            |cpu| {
                late.set(true);
                shootdowns.answer(cpu, || ());
            },
            || (),
        );
        assert!(late.get(), "it is kicked");
    }

    /// CPUs as threads: each takes entries of its own away while it holds a lock that all want, and answers wherever it waits, as an
    /// interrupt that cannot be masked makes it. No CPU keeps a translation past the end of its shootdown, and all end.
    #[test]
    fn cpus_that_ask_each_other_all_get_their_answers() {
        const CPUS: usize = 3;
        const ROUNDS: u64 = 300;
        struct Machine {
            shootdowns: Shootdowns<CPUS>,
            kicked: [AtomicBool; CPUS],
            /// Per CPU the version of its entry: odd while it is mapped.
            entries: [AtomicU64; CPUS],
            /// What each CPU translates of each entry: a version, or 0.
            cached: [[AtomicU64; CPUS]; CPUS],
            lock: AtomicBool,
        }
        impl Machine {
            fn forget(&self, cpu: usize) {
                self.cached[cpu].iter().for_each(|known| known.store(0, Ordering::SeqCst));
            }
            /// What may happen to a CPU at any moment: the interrupt, and a walk of any entry.
            fn moment(&self, cpu: usize, turn: u64) {
                if self.kicked[cpu].swap(false, Ordering::SeqCst) {
                    self.shootdowns.answer(cpu, || self.forget(cpu));
                }
                let entry = turn as usize % CPUS;
                let version = self.entries[entry].load(Ordering::SeqCst);
                if version % 2 == 1 {
                    self.cached[cpu][entry].store(version, Ordering::SeqCst);
                }
            }
            fn wait(&self, cpu: usize, turn: u64) {
                self.moment(cpu, turn);
                std::thread::yield_now();
            }
            fn run(&self, cpu: usize) {
                for round in 0..ROUNDS {
                    while self.lock.swap(true, Ordering::SeqCst) {
                        self.wait(cpu, round);
                    }
                    let gone = self.entries[cpu].fetch_add(1, Ordering::SeqCst);
                    self.shootdowns.ask(cpu);
                    self.forget(cpu);
                    let kick = |other: usize| self.kicked[other].store(true, Ordering::SeqCst);
                    self.shootdowns.complete(cpu, kick, || self.wait(cpu, round));
                    for (other, cached) in self.cached.iter().enumerate() {
                        let known = cached[cpu].load(Ordering::SeqCst);
                        assert_ne!(known, gone, "CPU {other} translates what CPU {cpu} took away");
                    }
                    self.lock.store(false, Ordering::SeqCst);
                    self.entries[cpu].fetch_add(1, Ordering::SeqCst);
                    self.moment(cpu, round);
                }
            }
        }
        let machine = Machine {
            shootdowns: Shootdowns::new(),
            kicked: [const { AtomicBool::new(false) }; CPUS],
            entries: [const { AtomicU64::new(1) }; CPUS],
            cached: [const { [const { AtomicU64::new(0) }; CPUS] }; CPUS],
            lock: AtomicBool::new(false),
        };
        let running = AtomicU64::new(CPUS as u64);
        (0..CPUS).for_each(|cpu| machine.shootdowns.join(cpu, || machine.forget(cpu)));
        std::thread::scope(|scope| {
            for cpu in 0..CPUS {
                let (machine, running) = (&machine, &running);
                scope.spawn(move || {
                    machine.run(cpu);
                    running.fetch_sub(1, Ordering::SeqCst);
                    // Idle, it answers still.
                    while running.load(Ordering::SeqCst) != 0 {
                        machine.wait(cpu, 0);
                    }
                });
            }
        });
        assert_eq!(machine.shootdowns.wanted.load(Ordering::SeqCst), ROUNDS * CPUS as u64);
    }
}
