//! Pages whose frames turn out to be bad: each touch is a synchronous external abort, everything else goes on.
//!
//! Writes a pattern to pages and reads it back, round after round. A page that aborts must do so for a load, a store and a fetch, with the
//! right syndrome and address, and from then on in every round; every second one is given back, and must be zero and work again then. Runs
//! on a machine that may use the hypervisor's services, until it is killed.
//!
//! Command line: `pages=N` (at most 64). Prints `PAGES n at ADDRESS`, then `ROUND n: good G bad B anew A ESR` now and then, and whenever a
//! number has changed; a page that is neither right nor aborts as it should is `FAILED`.

#![no_std]
#![no_main]

use guest_rt::machine::Machine;
use guest_rt::smccc::call;
use guest_rt::trap::{Fault, class, probe, status};
use guest_rt::{guest, memory, println};

guest!(main);

const PAGE: u64 = 4096;
/// So that the pages lie in one block where their owner has blocks.
const BLOCK: u64 = 2 << 20;
const MOST: usize = 64;
/// The hypervisor's service that gives memory back.
const DISCARD: u64 = 0xc600_000b;
/// Rounds from line to line, if nothing changes.
const QUIET: u64 = 256;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// As it was written.
    Good,
    /// It aborts.
    Bad,
    /// It was bad, was given back, and works again.
    Anew,
}

/// Why the guest gives up.
enum Wrong {
    Value(u64),
    Fault(Fault),
    NoFault,
    Answer(u64),
}

fn main(machine: &Machine) {
    let count = machine.number("pages").unwrap_or(16).min(MOST as u64) as usize;
    let base = machine.free().start.next_multiple_of(BLOCK);
    let address = |index: usize| base + index as u64 * PAGE;
    (0..count).for_each(|index| memory::store64(address(index), pattern(address(index))));
    println!("PAGES {count} at {base:#x}");
    let mut states = [State::Good; MOST];
    let mut esr = 0;
    for round in 1u64.. {
        let before = states;
        for (index, state) in states.iter_mut().enumerate().take(count) {
            match look(address(index), *state, index % 2 == 1) {
                Ok((now, syndrome)) => {
                    *state = now;
                    esr = syndrome.unwrap_or(esr);
                }
                Err(wrong) => return fail(index, &wrong),
            }
        }
        if states != before || round % QUIET == 1 {
            let of = |which| states[..count].iter().filter(|state| **state == which).count();
            let [good, bad, anew] = [State::Good, State::Bad, State::Anew].map(of);
            println!("ROUND {round}: good {good} bad {bad} anew {anew} ESR {esr:#x}");
        }
    }
}

fn pattern(address: u64) -> u64 {
    address.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn fail(index: usize, wrong: &Wrong) {
    match wrong {
        Wrong::Value(found) => println!("FAILED: page {index} reads {found:#x}"),
        Wrong::Fault(fault) => println!("FAILED: page {index}: {fault}"),
        Wrong::NoFault => println!("FAILED: page {index} is bad, and does not abort"),
        Wrong::Answer(answer) => println!("FAILED: page {index} is not given back: {answer:#x}"),
    }
}

/// Loads the page's word. What the page is now, and the syndrome if it aborts for the first time.
fn look(address: u64, state: State, gives_back: bool) -> Result<(State, Option<u64>), Wrong> {
    match (probe::load64(address, 0), state) {
        (Ok(_), State::Bad) => Err(Wrong::NoFault),
        (Ok(found), _) if found == pattern(address) => Ok((state, None)),
        (Ok(found), _) => Err(Wrong::Value(found)),
        (Err(fault), _) => {
            let esr = aborted(Err(fault), class::DATA_ABORT, address)?;
            aborted(probe::store64(address, 1), class::DATA_ABORT, address)?;
            aborted(probe::call(address), class::INSTRUCTION_ABORT, address)?;
            if !gives_back {
                return Ok((State::Bad, Some(esr)));
            }
            anew(address)?;
            Ok((State::Anew, Some(esr)))
        }
    }
}

/// The syndrome of an external abort of this class at this address.
fn aborted(result: Result<u64, Fault>, expected: u64, address: u64) -> Result<u64, Wrong> {
    let Err(fault) = result else { return Err(Wrong::NoFault) };
    let right = fault.serror == 0 && fault.class() == expected && fault.status() == status::EXTERNAL;
    if right && fault.far == address { Ok(fault.esr) } else { Err(Wrong::Fault(fault)) }
}

/// Gives the page back, and writes it again.
fn anew(address: u64) -> Result<(), Wrong> {
    let answer = loop {
        match call([DISCARD, address, PAGE, 0]) {
            0 => core::hint::spin_loop(),
            answer => break answer,
        }
    };
    if answer != PAGE {
        return Err(Wrong::Answer(answer));
    }
    match (0..PAGE).step_by(8).map(|offset| memory::load64(address + offset)).find(|word| *word != 0) {
        Some(found) => Err(Wrong::Value(found)),
        None => {
            memory::store64(address, pattern(address));
            Ok(())
        }
    }
}
