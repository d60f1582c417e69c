//! Single histories of shadow tables that a specification or a mistake is about.

use entresol_shadow::{CreateError, MOST_VCPUS};
use entresol_sync::zoo::Bug;

use super::*;

/// A page of memory behind one entry of a four-level guest, and then none.
fn remap() -> (Machinery, u64) {
    let mut words = std::vec![0u64; (MEMORY * 512) as usize];
    for table in 1..4 {
        words[table * 512] = (table as u64 + 1) << 12 | 0x67;
    }
    words[4 * 512] = 21 << 12 | 0x67;
    let vcpu = regime(Mode::Level4, Controls::WRITE_PROTECT, 0);
    let mut this = Machinery::new(32, words, [vcpu; 2]);
    this.memory.absent.insert(21);
    (this, 0)
}

const LOAD: Request = Request { kind: Kind::Read, user: false, by_leave: false };

/// Race 1 of the specification: the old MMIO is legal until the flush, and not after it.
#[test]
fn a_remapped_device_is_gone_after_invlpg() {
    plant(&[]);
    let (mut this, linear) = remap();
    assert_eq!(this.access(0, linear, LOAD), End::Mmio(Gpa::new(21 << 12)));
    this.edit(4, 0, 12 << 12 | 0x67);
    assert_eq!(this.access(0, linear, LOAD), End::Mmio(Gpa::new(21 << 12)), "a stale translation may be used");
    this.flush_pages(0);
    assert!(matches!(this.access(0, linear, LOAD), End::Done(_)));
}

/// Z-C5: found by that very history.
#[test]
fn a_flush_that_leaves_an_mmio_entry_is_found() {
    let (mut this, linear) = remap();
    assert_eq!(this.access(0, linear, LOAD), End::Mmio(Gpa::new(21 << 12)));
    this.edit(4, 0, 12 << 12 | 0x67);
    plant(&[Bug::ZC5]);
    this.flush_pages(0);
    let agreed = this.compare(0, linear, LOAD);
    plant(&[]);
    assert!(!agreed);
}

/// Z-C1: found by a slot that is made where a device was.
#[test]
fn an_mmio_entry_that_outlives_its_generation_is_found() {
    for bug in [None, Some(Bug::ZC1)] {
        plant(&[]);
        let (mut this, linear) = remap();
        assert_eq!(this.access(0, linear, LOAD), End::Mmio(Gpa::new(21 << 12)));
        this.memory.absent.remove(&21);
        this.memory.generation += 1;
        plant(bug.as_slice());
        let agreed = this.compare(0, linear, LOAD);
        plant(&[]);
        assert_eq!(agreed, bug.is_none(), "{bug:?}");
    }
}

/// A guest that writes to a table through an address which that very table maps goes on.
#[test]
fn a_table_that_maps_itself_can_be_written() {
    plant(&[]);
    let (mut this, _) = remap();
    let store = Request { kind: Kind::Write, ..LOAD };
    this.edit(4, 1, 4 << 12 | 0x67);
    assert!(matches!(this.access(0, 0x1000, LOAD), End::Done(_)));
    assert!(this.tree.is_synced(Gfn::new(4)) || this.stale[0]);
    this.load(0);
    assert!(this.tree.is_synced(Gfn::new(4)));
    assert!(matches!(this.access(0, 0x1000, store), End::Done(_)));
    assert!(!this.tree.is_synced(Gfn::new(4)), "it is the guest's to write, and compared at the next flush");
    this.tree.audit(&this.machine).unwrap();
}

/// The second access to a device asks neither the guest's tables nor the slots.
#[test]
fn the_second_access_to_a_device_walks_nothing() {
    plant(&[]);
    let (mut this, linear) = remap();
    assert_eq!(this.access(0, linear, LOAD), End::Mmio(Gpa::new(21 << 12)));
    // The guest's tables say something else by now, and nobody looks.
    let stale = core::mem::take(&mut this.memory.words[4 * 512]);
    assert_eq!(this.access(0, linear | 8, LOAD), End::Mmio(Gpa::new(21 << 12 | 8)));
    this.memory.words[4 * 512] = stale;
    this.memory.absent.remove(&21);
    this.memory.generation += 1;
    assert!(matches!(this.access(0, linear, LOAD), End::Done(_)), "a slot was created: the entry is old");
}

/// Another CPU of the guest: it changes a table between the walk and the moment in which the table is protected.
struct Faster<'m> {
    memory: &'m RefCell<Memory>,
    change: Option<(usize, u64)>,
}

impl Tables for &RefCell<Memory> {
    type Error = ();

    fn load(&mut self, at: Gpa, width: Width) -> Result<u64, ()> {
        self.borrow_mut().load(at, width)
    }

    fn compare_exchange(&mut self, at: Gpa, width: Width, current: u64, new: u64) -> Result<bool, ()> {
        self.borrow_mut().compare_exchange(at, width, current, new)
    }
}

impl GuestMemory for Faster<'_> {
    type Error = ();

    fn backing(&mut self, gfn: Gfn, write: bool) -> Result<Backing, ()> {
        if let Some((word, value)) = self.change.take() {
            self.memory.borrow_mut().words[word] = value;
        }
        self.memory.borrow_mut().backing(gfn, write)
    }

    fn generation(&self) -> Option<u64> {
        self.memory.borrow().generation()
    }
}

#[test]
fn what_changes_before_a_table_is_protected_is_seen() {
    plant(&[]);
    let (mut this, linear) = remap();
    this.edit(4, 0, 12 << 12 | 0x67);
    this.load(0);
    let shared = RefCell::new(this.memory.clone());
    let mut memory = Faster { memory: &shared, change: Some((4 * 512, 13 << 12 | 0x67)) };
    let mut guest = Guest { tables: &shared, regime: this.vcpus[0] };
    let answer = this.tree.fault(&this.machine, VMID, 0, &mut guest, &mut memory, linear, LOAD, &mut None);
    assert!(matches!(answer, Answer::Resume), "{answer:?}");
    assert!(this.tree.is_synced(Gfn::new(4)));
    this.memory = shared.into_inner();
    this.load(0);
    assert!(this.compare(0, linear, LOAD), "a table that is protected is not compared: it must be right");
}

/// As above, but the walk that comes after leads nowhere: what the earlier one has read must not be linked.
#[test]
fn a_link_is_not_made_of_what_was_read_before_the_table_was_protected() {
    plant(&[]);
    let (mut this, linear) = remap();
    this.edit(4, 0, 12 << 12 | 0x67);
    this.load(0);
    let shared = RefCell::new(this.memory.clone());
    let mut memory = Faster { memory: &shared, change: Some((3 * 512, 0)) };
    let mut guest = Guest { tables: &shared, regime: this.vcpus[0] };
    let answer = this.tree.fault(&this.machine, VMID, 0, &mut guest, &mut memory, linear, LOAD, &mut None);
    assert!(matches!(answer, Answer::Guest(_)), "{answer:?}");
    assert!(this.tree.is_synced(Gfn::new(3)));
    this.memory = shared.into_inner();
    this.load(0);
    assert!(this.compare(0, linear, LOAD), "a synced table is not compared, and faults go by its links");
}

#[test]
fn bad_requests_name_their_rule() {
    let new = |frames, vcpus| Tree::new(Shadow::new(46, None), pfns(frames), vcpus).err().map(|(error, _)| error);
    assert_eq!(new(16, 0), Some(CreateError::Vcpus { value: 0 }));
    assert_eq!(new(1000, MOST_VCPUS + 1), Some(CreateError::Vcpus { value: MOST_VCPUS + 1 }));
    assert_eq!(new(8, 4), Some(CreateError::Frames { offered: 8, fewest: 9 }));
    assert_eq!(new(9, 4), None);
    let (this, _) = remap();
    assert_eq!(this.tree.root(7), None);
    assert_eq!(this.tree.destroy(), pfns(32));
}

/// Tables 4 and 5 of pages; table 3 leads to 4.
fn two_tables() -> Machinery {
    plant(&[]);
    let (mut this, _) = remap();
    for (table, first) in [(4, 12), (5, 14)] {
        (0..2).for_each(|word| this.edit(table, word, (first + word as u64) << 12 | 0x67));
    }
    this.load(0);
    assert!(this.compare(0, 0, LOAD));
    this
}

const SECOND: u64 = 2 << 20;

/// Cached table entries go with a flush of whatever page, so what was not mapped before is found by the new ones.
#[test]
fn a_flush_of_any_page_drops_links_that_changed() {
    let mut this = two_tables();
    this.edit(3, 0, 5 << 12 | 0x67);
    this.edit(3, 1, 4 << 12 | 0x67);
    let mut guest = Guest { tables: &mut this.memory, regime: this.vcpus[0] };
    this.tree.invalidate_page(&this.machine, VMID, 0, &mut guest, 5 << 30);
    assert!(this.compare(0, SECOND | 0x1000, LOAD), "by table 4");
    assert!(this.compare(0, 0x1000, LOAD), "by table 5, and not by what table 4 has there now");
}

/// Other memory behind a table that is shown: no store of the guest's has made it unsynced.
#[test]
fn a_table_whose_memory_is_replaced_is_read_again() {
    for range in [GfnRange::single(Gfn::new(3)), GfnRange::new(Gfn::new(0), 1024).unwrap()] {
        let mut this = two_tables();
        this.memory.words[3 * 512] = 5 << 12 | 0x67;
        this.tree.invalidate(&this.machine, VMID, range);
        assert!(!this.tree.is_synced(Gfn::new(3)));
        assert!(this.compare(0, 0x1000, LOAD), "a fault goes by what the table says now");
    }
    let mut this = two_tables();
    this.tree.invalidate_all(&this.machine, VMID);
    assert!(!this.tree.is_synced(Gfn::new(3)));
}

#[test]
fn a_new_way_to_a_table_that_changed_shows_what_it_says_now() {
    // From the table above, and from one further up.
    for (table, word, linear) in [(3, 1, SECOND), (2, 1, 1 << 30)] {
        let mut this = two_tables();
        this.edit(4, 0, 13 << 12 | 0x67);
        this.edit(table, word, (table + 1) << 12 | 0x67);
        assert!(this.compare(0, linear, LOAD), "no TLB can hold anything of this address");
        assert!(this.tree.is_synced(Gfn::new(4)));
    }
}

#[test]
fn an_entry_goes_into_the_table_that_the_walk_came_by() {
    let mut this = two_tables();
    this.edit(3, 0, 5 << 12 | 0x67);
    this.edit(3, 1, 4 << 12 | 0x67);
    // The old link stands; nothing is behind it at this address.
    assert!(matches!(this.access(0, 0x1000, LOAD), End::Done(_)));
    this.load(0);
    assert!(this.compare(0, SECOND, LOAD), "links table 4 again");
    assert!(this.compare(0, SECOND | 0x1000, LOAD), "table 4 has its own page there");
    assert!(this.compare(0, 0x1000, LOAD));
}

/// Memory that is not there yet.
struct Later;

impl GuestMemory for Later {
    type Error = ();

    fn backing(&mut self, _gfn: Gfn, _write: bool) -> Result<Backing, ()> {
        Err(())
    }

    fn generation(&self) -> Option<u64> {
        Some(0)
    }
}

/// Z-X8: found by a guest that changes its table, and has that compared, between the two tries of a fault.
#[test]
fn a_second_try_believes_the_first_until_something_changes() {
    for (changes, bug) in [(false, None), (true, None), (true, Some(Bug::ZX8))] {
        let (mut this, mut beaten) = (two_tables(), None);
        let mut guest = Guest { tables: &mut this.memory, regime: this.vcpus[0] };
        let answer = this.tree.fault(&this.machine, VMID, 0, &mut guest, &mut Later, 0x1000, LOAD, &mut beaten);
        assert!(matches!(answer, Answer::Memory(())) && beaten.is_some(), "{answer:?}");
        if changes {
            this.edit(4, 1, 15 << 12 | 0x67);
            this.load(0);
        }
        plant(bug.as_slice());
        let mut memory = this.memory.clone();
        let mut guest = Guest { tables: &mut this.memory, regime: this.vcpus[0] };
        let answer = this.tree.fault(&this.machine, VMID, 0, &mut guest, &mut memory, 0x1000, LOAD, &mut beaten);
        plant(&[]);
        assert!(matches!(answer, Answer::Resume), "{answer:?}");
        assert_eq!(this.compare(0, 0x1000, LOAD), bug.is_none(), "{bug:?}");
    }
}
