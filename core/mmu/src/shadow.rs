//! Virtual machines whose guests run on shadow tables.
//!
//! Purpose: a processor without a second stage walks one set of tables, which says both what the guest's own tables say and where
//! its memory is. [`entresol_shadow`] keeps that set; here it comes together with slots, objects and everything else that a virtual
//! machine has.
//!
//! # Protocol
//!
//! **Shadow tables are a TLB of the second stage.** The machine keeps its second-stage tables, filled by [`Vm::handle`] as for every
//! other guest, though no hardware walks them. Where the hardware would walk both stages, [`Vm::shadow_fault`] does: it reads the guest's
//! tables through second-stage entries, and copies the last one's frame and permission into a shadow entry. What is missing on the way
//! is a fault of the second stage like any other, with the guest physical address that misses. So copies on write, dirty logs, ageing,
//! merging, swap, forks and slot updates need to know nothing of shadow tables.
//!
//! What they do need is that shadow entries go when TLB entries go. Every invalidation of the second stage passes one place, after its
//! words have changed ([`entresol_table::VmidSource::forget`]), and there the shadow entries of the same guest frames are dropped and
//! their own translations flushed. Entries are made under the lock that this takes, and the second stage is read under it. Whoever
//! read an entry before it changed has published before the drop, which takes that away; who comes later reads the new one. So neither the
//! notifier's sequence nor the slots' generation is asked again for a shadow entry: it stands or falls with the second-stage entry, for which
//! [`Vm::handle`] has asked.
//!
//! A store by the walk to the guest's tables (accessed and dirty flags) is made under the lock too, through a second-stage entry that permits
//! stores: whoever takes that permission away waits for it, as for the store of a guest. So a log names the page (INV-4).
//!
//! *No memory*: no second-stage entry says so. The slots are asked under the pin; the shadow entry keeps the whole generation beside its
//! word, so none repeats ([`Vm::set_slot`] needs no crossing for them). An access that such an entry refuses is answered by it while that
//! generation is current and no update in progress (INV-8).
//!
//! A fork starts without shadow tables of its own: whoever runs the child gives it some ([`Vm::shade`]). Its parent's are dropped with its
//! second stage, and come back by faults (D3).
//!
//! Stores by the hypervisor for the guest ([`Vm::write`]) make a table that they hit unsynced, after the bytes: what is compared from then on
//! has them.
//!
//! Invariants: INV-2 to INV-4 and INV-7 to INV-9 with a shadow entry in the place of a translation. Lock order: the lock of the shadow tables
//! is a leaf; under it are walks, single words and flushes, and a flush may wait for a CPU to leave its guest, which holds no lock.
//!
//! # Known holes
//!
//! One lock for all faults of a machine. Memory that is not [`Memory::Normal`] has no shadow entry: [`Reason::BadObject`]. Frames outside the
//! hypervisor's mapping cannot be read as tables: such machines are not to be shaded. A store through a page-frame cache to a guest's table goes unseen.

use alloc::boxed::Box;
use alloc::vec::Vec;

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SIZE, Pfn};
use entresol_backing::Order;
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::{Machine, TlbOp, Word};
use entresol_shadow::{
    Answer, Backing, Beaten, Counts, GuestMemory, GuestTables, GuestWords, Regime, Shadow, ShadowFormat, Stop,
};
use entresol_slot::{Hint, Place};
use entresol_sync::{Mutex, Pin, planted};
use entresol_table::{Entry, Format, LEAF_LEVEL, Leaf, Memory};

use crate::access;
use crate::outcome::{Outcome, Reason};
use crate::vm::Vm;
use crate::{MmioCounts, OutOfHeap, VmVmid};

/// How the processor that walks shadow tables reads their words.
pub type ShadowWords = Box<dyn ShadowFormat + Send + Sync>;

/// Most second-stage faults of one access: its page, and a table on each level that is read or written.
const TRIES: usize = 16;

/// The shadow tables of a virtual machine.
pub(crate) struct Shade(Mutex<Shadow<ShadowWords>>);

impl Shade {
    /// The second stage has changed where `op` says.
    #[cold]
    #[inline(never)]
    pub(crate) fn forget<M: Machine>(&self, machine: &M, vmid: &VmVmid, op: &TlbOp) {
        let mut tables = self.0.lock();
        if planted!(ZX7) {
            return;
        }
        match *op {
            TlbOp::Ipa { gfn, size, .. } => {
                tables.invalidate(machine, vmid.number(), GfnRange::block(gfn.align_down(size), size));
            }
            TlbOp::Range { range, .. } => tables.invalidate(machine, vmid.number(), range),
            TlbOp::Vmid(_) | TlbOp::All => tables.invalidate_all(machine, vmid.number()),
            // No translation of a guest's.
            TlbOp::Own(_) => {}
        }
    }
}

/// Why a virtual machine got no shadow tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShadeError {
    /// It has some.
    Shaded,
    /// The machine's caches are not coherent: what an entry permits would depend on who made it.
    Incoherent,
    /// The tables could not be made.
    Tables(entresol_shadow::CreateError),
    /// No frames for them.
    OutOfMemory,
    /// The heap has no room.
    OutOfHeap,
}

impl From<OutOfHeap> for ShadeError {
    fn from(OutOfHeap: OutOfHeap) -> Self {
        Self::OutOfHeap
    }
}

/// How a fault on shadow tables ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a fault that nobody acts on stops the guest"]
pub enum ShadowOutcome<G> {
    /// As [`Vm::handle`] says of the access of the second stage that comes with it.
    Memory(Outcome, Fault),
    /// The guest gets an exception: its own tables refuse the access.
    Guest(G),
    /// The vCPU runs on another root than its registers name: [`Vm::shadow_load`], then again.
    Unloaded,
}

/// Why the second stage has no word of guest memory for a walk, or no frame for its end.
enum Missing {
    /// As this fault says.
    Fault(Fault),
    /// Another CPU is changing it.
    Moving,
    /// It is no memory that shadow tables can show.
    Unfit(Gpa),
}

/// A virtual machine's memory as its second stage shows it now. Only while its shadow tables are held.
struct SecondStage<'v, M, F> {
    vm: &'v Vm<'v, M, F>,
    pin: &'v Pin<'v>,
}

impl<M, F> Clone for SecondStage<'_, M, F> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M, F> Copy for SecondStage<'_, M, F> {}

/// What the hardware would report.
fn fault(gpa: Gpa, write: bool, cause: Cause, walk: bool) -> Missing {
    let access = if write { Access::Write } else { Access::Read };
    let (cache_maintenance, transfer, syndrome) = (false, None, 0);
    Missing::Fault(Fault { gpa, access, cause, stage1_walk: walk, cache_maintenance, transfer, syndrome })
}

impl<M: Machine, F: Format> SecondStage<'_, M, F> {
    /// The entry for `gpa`, which is young by then; `None` if nothing is mapped there.
    #[inline]
    fn entry(&self, gpa: Gpa, write: bool, walk: bool) -> Result<Option<Leaf>, Missing> {
        let machine = &self.vm.host.machine;
        let Some(at) = self.vm.table.walk_to_page(machine, gpa.frame()) else {
            return Err(fault(gpa, write, Cause::Translation, walk));
        };
        let leaf = match at.entry {
            Entry::Leaf(leaf) => leaf,
            Entry::Vacant => return Ok(None),
            Entry::Broken | Entry::Table(_) => return Err(Missing::Moving),
        };
        if leaf.memory != Memory::Normal {
            return Err(Missing::Unfit(gpa));
        }
        if write && !leaf.permissions.write {
            return Err(fault(gpa, true, Cause::Permission { level: LEAF_LEVEL }, walk));
        }
        if !leaf.young && self.vm.table.make_young(machine, gpa.frame()).is_err() {
            return Err(Missing::Moving);
        }
        Ok(Some(leaf))
    }

    /// The word of a guest's table at `at`.
    #[inline]
    fn word(&self, at: Gpa, write: bool) -> Result<Word, Missing> {
        match self.entry(at, write, true)? {
            Some(leaf) => Ok(Word::new(leaf.frame_of(at.frame()), (at.page_offset() / 8) as u16)),
            None => Err(fault(at, write, Cause::Translation, true)),
        }
    }
}

impl<M: Machine, F: Format> GuestWords for SecondStage<'_, M, F> {
    type Error = Missing;

    fn load(&mut self, at: Gpa) -> Result<u64, Missing> {
        Ok(self.vm.host.machine.load(self.word(at, false)?))
    }

    fn compare_exchange(&mut self, at: Gpa, current: u64, new: u64) -> Result<bool, Missing> {
        Ok(self.vm.host.machine.compare_exchange(self.word(at, true)?, current, new).is_ok())
    }
}

/// The same for the end of a walk; `hint` is the vCPU's.
struct Frames<'v, M, F> {
    stage: SecondStage<'v, M, F>,
    hint: &'v Hint,
}

impl<M: Machine, F: Format> GuestMemory for Frames<'_, M, F> {
    type Error = Missing;

    #[inline]
    fn backing(&mut self, gfn: Gfn, write: bool) -> Result<Backing, Missing> {
        let SecondStage { vm, pin } = self.stage;
        if let Some(leaf) = self.stage.entry(gfn.base(), write, false)? {
            return Ok(Backing::Frame { pfn: leaf.frame_of(gfn), writable: leaf.permissions.write });
        }
        // Nearly always there is memory, which the hint knows.
        if vm.slots.find(pin, gfn, self.hint).is_some() {
            return Err(fault(gfn.base(), write, Cause::Translation, false));
        }
        match vm.slots.place(pin, gfn) {
            Place::Slot(_) => Err(fault(gfn.base(), write, Cause::Translation, false)),
            Place::Leaving => Err(Missing::Moving),
            Place::Nothing(_) => Ok(Backing::Nothing),
        }
    }

    fn generation(&self) -> Option<u64> {
        // In the pin in which `backing` looked: a slot that was made since is still in progress.
        let now = self.stage.vm.slots.generation();
        (!now.in_progress() || planted!(ZC8)).then(|| now.count())
    }
}

/// How a walk of the guest's tables ended, for [`Vm::shadow_fault`].
fn stopped<G, E: Into<Stop<G, Missing>>>(error: E) -> Result<ShadowOutcome<G>, Missing> {
    match error.into() {
        Stop::Guest(exception) => Ok(ShadowOutcome::Guest(exception)),
        Stop::Contended => Err(Missing::Moving),
        Stop::Words(missing) => Err(missing),
    }
}

impl<M: Machine, F: Format> Vm<'_, M, F> {
    /// Its guest, which does not run yet, is to run on shadow tables: at most `tables` of them, for `vcpus` vCPUs. `cpu` is the CPU
    /// that the caller runs on.
    ///
    /// # Errors
    ///
    /// [`ShadeError`]; nothing is left behind.
    pub fn shade(&mut self, cpu: usize, words: ShadowWords, tables: usize, vcpus: usize) -> Result<(), ShadeError> {
        let features = self.host.features();
        if self.shade.is_some() {
            return Err(ShadeError::Shaded);
        }
        if !features.forced_write_back || !features.coherent_icache {
            return Err(ShadeError::Incoherent);
        }
        let mut frames: Vec<Pfn> = Vec::new();
        frames.try_reserve_exact(tables).map_err(|_| OutOfHeap)?;
        let give = |frames: &[Pfn]| frames.iter().for_each(|frame| self.host.pool.give(cpu, *frame, Order::PAGE));
        for _ in 0..tables {
            match self.host.pool.take(cpu, Order::PAGE) {
                Ok(frame) => frames.push(frame),
                Err(entresol_backing::OutOfMemory) => {
                    give(&frames);
                    return Err(ShadeError::OutOfMemory);
                }
            }
        }
        match Shadow::new(words, frames.into_boxed_slice(), vcpus) {
            Ok(shadow) => self.shade = Some(Shade(Mutex::new(shadow))),
            Err((error, frames)) => {
                give(&frames);
                return Err(ShadeError::Tables(error));
            }
        }
        Ok(())
    }

    /// Gives the frames of the shadow tables back. No vCPU runs on them any more.
    pub(crate) fn unshade(&mut self, cpu: usize) {
        if let Some(Shade(tables)) = self.shade.take() {
            let frames = tables.into_inner().destroy();
            // A CPU may have kept entries that lead through them, for as long as its VMID is this one.
            self.stats.tlb_vmid.bump();
            self.host.machine.tlb(TlbOp::Vmid(self.vmid.number()));
            self.host.machine.complete();
            frames.iter().for_each(|frame| self.host.pool.give(cpu, *frame, Order::PAGE));
        }
    }

    /// Whether its guest runs on shadow tables.
    pub fn is_shaded(&self) -> bool {
        self.shade.is_some()
    }

    /// The shadow tables.
    ///
    /// # Panics
    ///
    /// If there are none: whoever runs the guest knows what it runs on.
    fn shadow(&self) -> &Mutex<Shadow<ShadowWords>> {
        &self.shade.as_ref().expect("its owner has shaded it").0
    }

    /// What the guest's tables are to `regime`; only while the shadow tables are held.
    fn second_stage<'v>(&'v self, pin: &'v Pin<'v>) -> SecondStage<'v, M, F> {
        SecondStage { vm: self, pin }
    }

    /// `vcpu` loads its root, or flushes everything; `regime` is what its registers say by then. Returns the table that the hardware
    /// is to walk.
    ///
    /// # Panics
    ///
    /// If there are no shadow tables, or not for this vCPU.
    pub fn shadow_load<R: Regime>(&self, pin: &Pin<'_>, vcpu: usize, regime: &R) -> Pfn {
        let mut tables = self.shadow().lock();
        let mut guest = regime.tables(self.second_stage(pin));
        tables.load(&self.host.machine, self.vmid.number(), vcpu, &mut guest);
        tables.root(vcpu).expect("it was loaded")
    }

    /// `vcpu` flushes the page at `linear` (INVLPG).
    ///
    /// # Panics
    ///
    /// As [`Vm::shadow_load`].
    pub fn shadow_invalidate_page<R: Regime>(&self, pin: &Pin<'_>, vcpu: usize, regime: &R, linear: u64) {
        let mut tables = self.shadow().lock();
        let mut guest = regime.tables(self.second_stage(pin));
        tables.invalidate_page(&self.host.machine, self.vmid.number(), vcpu, &mut guest, linear);
    }

    /// How accesses of `vcpu` to what is no memory were answered; `None` if it runs on no shadow tables.
    pub fn shadow_mmio_counts(&self, vcpu: usize) -> Option<MmioCounts> {
        let counts = self.shade.as_ref()?.0.lock().counts(vcpu)?;
        let Counts { cached, walked, refreshed, made } = counts;
        Some(MmioCounts { cached, walked, refreshed, made })
    }

    /// Handles a fault of `vcpu` on its shadow tables, at `linear`. `refused`: the hardware reports a word that it refuses. `hint` is
    /// the vCPU's.
    ///
    /// # Panics
    ///
    /// As [`Vm::shadow_load`].
    #[allow(clippy::too_many_arguments, reason = "the vCPU, its registers and its access")]
    pub fn shadow_fault<R: Regime>(
        &self,
        pin: &Pin<'_>,
        hint: &Hint,
        vcpu: usize,
        regime: &R,
        linear: u64,
        request: R::Request,
        refused: bool,
    ) -> ShadowOutcome<R::Fault> {
        let mut beaten = None;
        for _ in 0..TRIES {
            let missing = match self.shadow_once(pin, hint, vcpu, regime, linear, request, refused, &mut beaten) {
                Ok(outcome) => return outcome,
                Err(missing) => missing,
            };
            let fault = match missing {
                Missing::Fault(fault) if fault.stage1_walk => fault,
                Missing::Fault(fault) => Fault { gpa: Gpa::new(fault.gpa.get() + linear % PAGE_SIZE), ..fault },
                Missing::Moving => return ShadowOutcome::Memory(self.retry(), at(Gpa::new(0))),
                Missing::Unfit(gpa) => {
                    return ShadowOutcome::Memory(self.refused(Outcome::Exit(Reason::BadObject)), at(gpa));
                }
            };
            match self.handle(pin, hint, &fault) {
                Outcome::Resume => {}
                outcome => return ShadowOutcome::Memory(outcome, fault),
            }
        }
        // Others take away what is brought: the access begins again (INV-15).
        ShadowOutcome::Memory(self.retry(), at(Gpa::new(0)))
    }

    /// One walk of both stages. `beaten`: what the one before has found.
    #[inline]
    #[allow(clippy::too_many_arguments, reason = "as above")]
    fn shadow_once<R: Regime>(
        &self,
        pin: &Pin<'_>,
        hint: &Hint,
        vcpu: usize,
        regime: &R,
        linear: u64,
        request: R::Request,
        refused: bool,
        beaten: &mut Option<Beaten>,
    ) -> Result<ShadowOutcome<R::Fault>, Missing> {
        let mut tables = self.shadow().lock();
        let mut memory = Frames { stage: self.second_stage(pin), hint };
        let mut guest = regime.tables(memory.stage);
        let (machine, vmid) = (&self.host.machine, self.vmid.number());
        let answer = if refused {
            tables.refused(machine, vmid, vcpu, &mut guest, &mut memory, linear, request, beaten)
        } else {
            tables.fault(machine, vmid, vcpu, &mut guest, &mut memory, linear, request, beaten)
        };
        match answer {
            Answer::Resume => Ok(ShadowOutcome::Memory(Outcome::Resume, at(Gpa::new(0)))),
            Answer::Mmio(gpa) => {
                let access = match (guest.fetches(request), guest.writes(request)) {
                    (true, _) => Access::Fetch,
                    (false, true) => Access::Write,
                    (false, false) => Access::Read,
                };
                let fault = Fault { access, ..at(gpa) };
                Ok(ShadowOutcome::Memory(self.refused(access::outside(&fault)), fault))
            }
            Answer::Unloaded => Ok(ShadowOutcome::Unloaded),
            Answer::Memory(missing) => Err(missing),
            Answer::Guest(error) => stopped(error),
        }
    }

    /// The hypervisor has stored to `gfn` for the guest: a table that is there may have changed.
    #[inline]
    pub(crate) fn shadow_written(&self, gfn: Gfn) {
        if let Some(Shade(tables)) = &self.shade {
            tables.lock().unsync(gfn);
        }
    }

    /// Whether the shadow tables' invariants hold, and each entry is covered by one of the second stage; what does not.
    ///
    /// # Errors
    ///
    /// A sentence.
    pub fn audit_shadow(&self) -> Result<(), &'static str> {
        let Some(Shade(tables)) = &self.shade else { return Ok(()) };
        let machine = &self.host.machine;
        let mut tables = tables.lock();
        tables.audit(machine)?;
        tables.each_leaf(|gfn, pfn, writes| match self.table.walk(machine, gfn).map(|at| at.entry) {
            Some(Entry::Leaf(leaf)) if leaf.frame_of(gfn) == pfn && (leaf.permissions.write || !writes) => Ok(()),
            _ => Err("a shadow entry shows what the second stage does not"),
        })
    }
}

/// An access whose address is all that is known of it.
fn at(gpa: Gpa) -> Fault {
    let (access, cause) = (Access::Read, Cause::Translation);
    Fault { gpa, access, cause, stage1_walk: false, cache_maintenance: false, transfer: None, syndrome: 0 }
}
