//! Touches its memory bit by bit, keeps a pattern in it, and reads it all back, as arm64's guest `toucher` does, with the same words on
//! its command line but `tags`, of which there are none here, and `whole`: all memory behind the image is free.
#![no_std]
#![no_main]

#[path = "../../../toucher/src/work.rs"]
mod work;

use guest_x86_rt::memory::{load64, store64};
use guest_x86_rt::{Machine, guest, println};

guest!(main);

fn main(machine: &Machine) {
    work::run(machine, machine.free(), None);
}
