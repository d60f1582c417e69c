//! Single histories of machines on shadow tables, and one with threads.

use super::*;

/// One page of memory behind linear address 0, by tables 1 to 4.
fn one_page(host: &Host<FlatMachine>) -> Machinery<'_> {
    let mut words = std::vec![0; TABLES as usize * PLACES.len()];
    for table in 1..4u64 {
        words[(table as usize - 1) * PLACES.len()] = (table + 1) << 12 | 0x67;
    }
    words[3 * PLACES.len()] = 10 << 12 | 0x67;
    Machinery::new(host, 32, &words, [regime(Mode::Level4, Controls::WRITE_PROTECT | Controls::NO_EXECUTE); VCPUS])
}

const LOAD: Request = Request { kind: Kind::Read, user: false, by_leave: false };
const STORE: Request = Request { kind: Kind::Write, ..LOAD };

#[test]
fn a_log_names_what_is_written_through_shadow_entries() {
    plant(&[]);
    let host = host(256);
    let mut this = one_page(&host);
    this.store(0, 8, 1);
    this.own(Deed::Log(true));
    let mut log = [0];
    assert_eq!(this.vm.get_dirty_log(CPU, 0, &mut log), Ok(0));
    assert!(matches!(this.access(0, 0, LOAD), End::Read(_)));
    assert_eq!(this.vm.get_dirty_log(CPU, 0, &mut log), Ok(0), "a load writes nothing");
    this.store(0, 8, 2);
    this.vm.get_dirty_log(CPU, 0, &mut log).unwrap();
    assert_eq!(log, [1 << 10], "and no table, whose flags were set before");
    this.store(0, 8, 3);
    this.vm.get_dirty_log(CPU, 0, &mut log).unwrap();
    assert_eq!(log, [1 << 10], "again, for the entry was taken the permission away");
    assert_eq!(this.vm.audit_shadow(), Ok(()));
    this.end();
}

#[test]
fn a_table_whose_flags_are_set_for_the_guest_is_in_the_log() {
    plant(&[]);
    let host = host(256);
    let mut this = one_page(&host);
    this.edit(4 << 12, 10 << 12 | 0x07);
    this.load(0);
    this.own(Deed::Log(true));
    assert!(matches!(this.access(0, 0, STORE), End::Written(_)));
    let mut log = [0];
    this.vm.get_dirty_log(CPU, 0, &mut log).unwrap();
    assert_eq!(log, [1 << 10 | 1 << 4]);
    this.end();
}

#[test]
fn a_parent_on_shadow_tables_copies_what_it_writes() {
    plant(&[]);
    let host = host(256);
    let mut this = one_page(&host);
    this.store(0, 8, 1);
    this.own(Deed::Fork);
    this.store(0, 8, 2);
    assert_eq!(word(&this.vm, 10 << 12 | 8), Some(2));
    assert_eq!(word(&this.children[0].0, 10 << 12 | 8), Some(1));
    assert!(!this.children[0].0.is_shaded(), "whoever runs it gives it its own");
    this.end();
}

#[test]
fn what_cannot_be_shaded_says_why_and_stays_as_it_was() {
    plant(&[]);
    let host = host(64);
    let words = || Box::new(Words::new(46, None));
    let mut vm: Shaded<'_> = Vm::new(&host, CPU, Nested::new(46, None), OPTIONS).unwrap();
    let free = host.pool.free_frames();
    let few = entresol_shadow::CreateError::Frames { offered: 5, fewest: 6 };
    assert_eq!(vm.shade(CPU, words(), 5, 1), Err(ShadeError::Tables(few)));
    assert_eq!(vm.shade(CPU, words(), 100, 1), Err(ShadeError::OutOfMemory));
    assert_eq!((host.pool.free_frames(), vm.is_shaded()), (free, false));
    assert_eq!(vm.shade(CPU, words(), 8, 1), Ok(()));
    assert_eq!(vm.shade(CPU, words(), 8, 1), Err(ShadeError::Shaded));
    assert_eq!(host.pool.free_frames(), free - 8);
    vm.destroy(CPU);
    let incoherent = host_with(64, entresol_machine::Features { coherent_icache: false, ..coherent() });
    let mut vm: Shaded<'_> = Vm::new(&incoherent, CPU, Nested::new(46, None), OPTIONS).unwrap();
    assert_eq!(vm.shade(CPU, words(), 8, 1), Err(ShadeError::Incoherent));
    vm.destroy(CPU);
}

/// Two vCPUs on CPUs of their own make accesses and change their tables, while their owner withdraws memory, ages it, write-protects it for its log and
/// forks it. Whenever a range is withdrawn, no shadow entry leads there until it is given back (INV-3), and what a vCPU may store to is in the log (INV-4).
#[test]
fn nothing_that_is_withdrawn_is_reached_by_a_shadow_entry() {
    const ROUNDS: u64 = 40;
    plant(&[]);
    let host = host(512);
    let mut this = one_page(&host);
    // Pages 10 and 11 behind the first two addresses, and table 4 itself behind the third.
    this.edit((4 << 12) + 8, 11 << 12 | 0x67);
    this.edit((4 << 12) + 16, 4 << 12 | 0x67);
    (0..VCPUS).for_each(|vcpu| this.load(vcpu));
    this.own(Deed::Log(true));
    let (vm, regime, roots) = (&this.vm, this.regimes[0], this.roots);
    let rounds = std::sync::atomic::AtomicU64::new(0);
    let done = || rounds.load(std::sync::atomic::Ordering::SeqCst) >= ROUNDS;
    let walk_as = |vcpu: usize, linear: u64, request: Request| {
        let controls = Controls::WRITE_PROTECT | Controls::NO_EXECUTE;
        let hardware = Regime { root: roots[vcpu].base().get(), controls, physical_bits: 46, ..regime };
        walk(&mut Hardware(&vm.host().machine), &hardware, linear, request)
    };
    std::thread::scope(|scope| {
        for vcpu in 0..VCPUS {
            let (done, walk_as) = (&done, &walk_as);
            scope.spawn(move || {
                plant(&[]);
                let (mut turn, hint) = (vcpu as u64, Hint::new());
                while !done() {
                    turn += 1;
                    let (linear, request) = ((turn % 3) << 12, if turn % 2 == 0 { STORE } else { LOAD });
                    let pin = vm.host().epoch.pin(2 + vcpu);
                    if walk_as(vcpu, linear, request).is_err() {
                        let _ = vm.shadow_fault(&pin, &hint, vcpu, &regime, linear, request, false);
                    }
                    match turn % 7 {
                        0 => drop(vm.shadow_load(&pin, vcpu, &regime)),
                        3 => vm.shadow_invalidate_page(&pin, vcpu, &regime, linear),
                        _ => {}
                    }
                    drop(pin);
                    std::thread::yield_now();
                }
            });
        }
        for round in 0..ROUNDS {
            let (gfn, linear) = (Gfn::new(10 + round % 2), (round % 2) << 12);
            while (0..VCPUS).any(|vcpu| walk_as(vcpu, linear, LOAD).is_err()) {
                std::thread::yield_now();
            }
            let held = vm.invalidate_range_start(CPU, GfnRange::single(gfn)).unwrap();
            for vcpu in 0..VCPUS {
                let reached = walk_as(vcpu, linear, LOAD);
                assert!(reached.is_err(), "round {round}: vCPU {vcpu} reaches what is withdrawn");
            }
            vm.invalidate_range_end(held);
            vm.get_dirty_log(CPU, 0, &mut [0]).unwrap();
            vm.clear_young(CPU, GfnRange::new(Gfn::new(0), SECOND).unwrap()).unwrap();
            assert_eq!(vm.audit_shadow(), Ok(()), "round {round}");
            rounds.store(round + 1, std::sync::atomic::Ordering::SeqCst);
        }
    });
    let pin = vm.host().epoch.pin(CPU);
    for vcpu in 0..VCPUS {
        for page in 0..2 {
            if walk_as(vcpu, page << 12, STORE).is_ok() {
                assert_eq!(vm.is_dirty(&pin, Gfn::new(10 + page)), Some(true));
            }
        }
    }
    drop(pin);
    this.end();
}
