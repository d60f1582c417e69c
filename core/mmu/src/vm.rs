//! One virtual machine's memory: its slots, its tables, its notifier.

use alloc::collections::VecDeque;

use entresol_addr::{GfnRange, Gpa, PAGE_SHIFT, PageSize, PfnRange};
use entresol_machine::{Machine, TlbOp, Vmid};
use entresol_slot::Slots;
use entresol_sync::{Mutex, planted};
use entresol_table::{Census, Format, PageWork, Table, VmidSource};

use crate::dirty::Logs;
use crate::fork::Retiring;
use crate::pfncache::Caches;
use crate::shadow::Shade;
use crate::{Counter, Host, Notifier, ReadOnlyIvac, Stats, Switches, VmVmid};

/// What an owner decides about a virtual machine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Bits of a guest physical address, 32–48.
    pub ipa_bits: u8,
    /// The most slots it may have at once.
    pub slots: u32,
    /// No entry is larger than this.
    pub largest: PageSize,
    /// What DC IVAC does to read-only memory.
    pub read_only_ivac: ReadOnlyIvac,
    /// Its guest may use allocation tags: its memory must have valid ones.
    pub tags: bool,
}

/// The memory of one virtual machine.
pub struct Vm<'h, M, F> {
    pub(crate) host: &'h Host<M>,
    pub(crate) slots: Slots,
    pub(crate) table: Table<F>,
    pub(crate) notifier: Notifier,
    pub(crate) vmid: VmVmid,
    pub(crate) logs: Logs,
    pub(crate) caches: Caches,
    /// What its guest runs on, if not on the second stage itself.
    pub(crate) shade: Option<Shade>,
    pub(crate) options: Options,
    /// How memory is copied on write.
    pub switches: Switches,
    /// Held by whoever forks this machine.
    pub(crate) forking: Mutex<()>,
    /// What forks detached and nobody has taken apart yet, the oldest first.
    pub(crate) detached: Mutex<VecDeque<Retiring>>,
    /// What happened so far.
    pub stats: Stats,
}

impl<'h, M: Machine, F: Format> Vm<'h, M, F> {
    /// The host it lives on.
    pub fn host(&self) -> &'h Host<M> {
        self.host
    }

    /// Its slots, for lookups.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Its tables, for the hardware's base register and for audits.
    pub fn table(&self) -> &Table<F> {
        &self.table
    }

    /// Entries by size and table pages, now.
    pub fn census(&self) -> Census {
        self.table.census()
    }

    /// Bits of a guest physical address.
    pub fn ipa_bits(&self) -> u8 {
        self.options.ipa_bits
    }

    /// CPU `cpu` is about to run one of its vCPUs: the VMID to run under, until [`Vm::put`].
    pub fn load(&self, cpu: usize) -> Vmid {
        self.host.vmids.load(&self.host.machine, cpu, &self.vmid)
    }

    /// CPU `cpu` has put the vCPU.
    pub fn put(&self, cpu: usize) {
        self.host.vmids.put(cpu);
    }

    /// One past the last guest physical address of this virtual machine.
    #[inline]
    pub(crate) fn limit(&self) -> Gpa {
        Gpa::new(1 << self.options.ipa_bits)
    }

    /// One past the last guest physical address that any virtual machine here can have.
    #[inline]
    pub(crate) fn machine_limit(&self) -> Gpa {
        Gpa::new(1 << self.host.features().physical_bits)
    }

    /// Every guest frame.
    pub(crate) fn everything(&self) -> GfnRange {
        GfnRange::new(entresol_addr::Gfn::new(0), 1 << (u32::from(self.options.ipa_bits) - PAGE_SHIFT))
            .expect("starts at 0")
    }

    /// Its VMID at the moment of a flush, counted in `counter`.
    #[inline]
    pub(crate) fn flushes<'v>(&'v self, counter: &'v Counter) -> Flushes<'v> {
        Flushes { vmid: &self.vmid, counter, shade: self.shade.as_ref() }
    }
}

/// Counts the flushes of a table operation: it asks for the VMID once for each.
pub(crate) struct Flushes<'v> {
    vmid: &'v VmVmid,
    counter: &'v Counter,
    shade: Option<&'v Shade>,
}

impl VmidSource for Flushes<'_> {
    #[inline]
    fn vmid(&self) -> Vmid {
        self.counter.bump();
        self.vmid.number()
    }

    #[inline]
    fn forget<M: Machine>(&self, machine: &M, op: &TlbOp) {
        if let Some(shade) = self.shade {
            shade.forget(machine, self.vmid, op);
        }
    }
}

/// Cache work before an entry is seen (INV-1, INV-6), by the table "Cache work" of the specification.
pub(crate) struct Prepare<'m, M> {
    pub machine: &'m M,
    pub frames: PfnRange,
    /// Clean and invalidate to the point of coherency: a new cacheable entry without forced write-back.
    pub clean: bool,
    /// Invalidate the instruction caches: the entry becomes executable and they are not coherent.
    pub icache: bool,
    /// What is mapped there gives way.
    pub replace: bool,
}

impl<M: Machine> PageWork for Prepare<'_, M> {
    #[inline]
    fn must_prepare(&self) -> bool {
        self.clean | self.icache
    }

    #[inline]
    fn may_replace(&self) -> bool {
        self.replace
    }

    fn prepare(&mut self) {
        if self.clean {
            let first = PfnRange::single(self.frames.start());
            self.machine.clean_invalidate_to_poc(if planted!(ZA11) { first } else { self.frames });
        }
        if self.icache {
            self.machine.invalidate_icache(self.frames);
        }
        self.machine.complete();
    }
}
