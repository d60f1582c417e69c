//! Logs and rings on a flat machine: single cases, a naive reference under random steps, and a copy that is made of a
//! memory that changes meanwhile.

mod cases;
mod migrate;
mod naive;
mod ways;

use std::vec::Vec;

use entresol_addr::{Gfn, PAGE_SIZE, PageSize};
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::Machine;
use entresol_slot::Hint;
use entresol_table::{Entry, Format, Memory};

use super::bitmap::PAGES;
use crate::tests::{RAM, fault};
use crate::{Outcome, Reason, Vm};

const FIRST: u64 = RAM / PAGE_SIZE;

/// The leaf behind a page of the first slot.
fn entry<M: Machine, F: Format>(vm: &Vm<'_, M, F>, page: u64) -> Entry {
    vm.table().walk(&vm.host().machine, Gfn::new(FIRST + page)).unwrap().entry
}

fn is_writable<M: Machine, F: Format>(vm: &Vm<'_, M, F>, page: u64) -> bool {
    matches!(entry(vm, page), Entry::Leaf(leaf) if leaf.permissions.write && leaf.young)
}

/// What the hardware reports for a store to `page`, unless it goes through.
fn store_fault<M: Machine, F: Format>(vm: &Vm<'_, M, F>, page: u64) -> Option<Fault> {
    let cause = match entry(vm, page) {
        Entry::Leaf(leaf) if !leaf.young => Cause::AccessFlag,
        Entry::Leaf(leaf) if leaf.permissions.write => return None,
        Entry::Leaf(_) => Cause::Permission { level: 3 },
        _ => Cause::Translation,
    };
    Some(Fault { cause, ..fault(RAM + page * PAGE_SIZE, Access::Write) })
}

/// CPU `cpu` stores to `page`; returns after how many traps.
fn store<M: Machine, F: Format>(vm: &Vm<'_, M, F>, cpu: usize, page: u64) -> usize {
    for traps in 0.. {
        let Some(fault) = store_fault(vm, page) else { return traps };
        let outcome = vm.handle(&vm.host().epoch.pin(cpu), &Hint::new(), &fault);
        // A store that fills a ring is done.
        let expected = [Outcome::Resume, Outcome::Retry, Outcome::Exit(Reason::DirtyRingFull)];
        assert!(expected.contains(&outcome), "{outcome:?}");
    }
    unreachable!()
}

/// The pages that words name.
fn pages(words: &[u64]) -> Vec<u64> {
    (0..words.len() as u64 * PAGES).filter(|page| words[(page / PAGES) as usize] >> (page % PAGES) & 1 != 0).collect()
}

/// INV-4, for the first `count` pages of a slot that logs: a writable entry is a page, and its bit is set.
fn check_writable<M: Machine, F: Format>(vm: &Vm<'_, M, F>, cpu: usize, count: u64) {
    for page in 0..count {
        let Entry::Leaf(leaf) = entry(vm, page) else { continue };
        if leaf.permissions.write && leaf.memory == Memory::Normal {
            assert_eq!(leaf.size, PageSize::Size4K, "page {page}");
            let dirty = vm.is_dirty(&vm.host().epoch.pin(cpu), Gfn::new(FIRST + page));
            assert_eq!(dirty, Some(true), "page {page} is writable");
        }
    }
}
