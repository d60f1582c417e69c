//! Machine, objects and virtual machines of a scenario, put up with the production core, and its scripts run on them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use entresol_addr::{Gpa, Hpa, PageSize, Pfn, PfnRange};
use entresol_backing::{FrameMeta, FramePool, Lease, ObjectHandle, Objects, Policy, Spec};
use entresol_machine::Vmid;
use entresol_machine::model::Modelled;
use entresol_mmu::{CoalescedRing, Host, Invalidation, Kept, MmioCache, Options, Vm};
use entresol_slot::Hint;
use entresol_sync::Mutex;

use super::context::Context;
use super::format::LabFormat;
use super::swap::Swap;
use super::vcpu::{self, Attempt};
use super::{dirty, owner, poison, posted, private, relatives, shadowed};
use crate::check::inv07::{self, Account};
use crate::check::inv11::Oracle;
use crate::check::{Check, inv14};
use crate::lab::{self, Hardware};
use crate::litmus::outcome::{Registers, Value};
use crate::litmus::step::Step;
use crate::litmus::{GuestPolicy, Object, Scenario};
use crate::machine::FIRST;
use crate::machine::content::Content;
use crate::machine::tlb::NEVER;
use crate::machine::walk::Walker;

/// The first frame of a device: no memory is there.
const DEVICE: u64 = 0x8_0000;

/// The machine that the core runs on.
pub type LabHost = Host<Modelled<Hardware>>;
/// A virtual machine on it.
pub type LabVm<'h> = Vm<'h, Modelled<Hardware>, LabFormat>;

/// Everything that the CPUs of a scenario share.
pub struct Stage<'h> {
    /// The machine, its frames, its objects.
    pub host: &'h LabHost,
    /// Virtual machines, by number; those that a fork makes are not there before.
    vms: Vec<RefCell<Option<Rc<LabVm<'h>>>>>,
    /// Objects, by number; the same.
    objects: Vec<Cell<Option<ObjectHandle>>>,
    /// For each object what it is made of.
    pub kinds: Vec<Kind>,
    /// For each object whether it is made of blocks.
    pub blocks: Vec<bool>,
    private: bool,
    /// Guests run on shadow tables.
    pub shadowed: bool,
    /// Frames that were found to be bad.
    pub poisoned: RefCell<Vec<Pfn>>,
    /// What the owner decided about guests.
    pub policy: GuestPolicy,
    /// The swap device.
    pub swap: Option<Swap>,
    /// Coalesced writes; who shares a ring locks it.
    pub ring: Mutex<CoalescedRing>,
    /// Results.
    pub registers: RefCell<Registers>,
}

/// What an object of a scenario is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Memory.
    Ram,
    /// Memory that guests may not change.
    Rom,
    /// Addresses of a device.
    Device,
}

/// One CPU of a scenario.
#[derive(Debug)]
pub struct Actor {
    /// Its number.
    pub cpu: usize,
    /// Its vCPU's.
    pub hint: Hint,
    /// Its vCPU's, of the virtual machine that it runs.
    pub cache: MmioCache,
    /// Its vCPU's registers.
    pub context: Context,
    /// Its vCPU's own translation is off.
    pub mmu_off: bool,
    /// The virtual machine that it runs, and under which VMID.
    pub runs: Option<(usize, Vmid)>,
    /// Invalidations that it has started and not ended.
    pub invalidations: Vec<(usize, Invalidation)>,
    /// What it has leased and not released, each with the byte in its page.
    pub leases: Vec<(Lease, u64)>,
    /// What its page-frame cache is for: whose, and where.
    pub cached: Option<(usize, Gpa)>,
    /// The word that it keeps: whose, since when, and where.
    pub kept: Option<(usize, Kept, Hpa)>,
}

impl Actor {
    /// CPU `cpu`, which runs nothing yet.
    pub fn new(cpu: usize) -> Self {
        Self {
            cpu,
            hint: Hint::new(),
            cache: MmioCache::new(),
            context: Context::default(),
            mmu_off: false,
            runs: None,
            invalidations: Vec::new(),
            leases: Vec::new(),
            cached: None,
            kept: None,
        }
    }
}

/// The machine of a scenario, switched on. The thread's laboratory is open.
///
/// # Panics
///
/// If the host's heap is exhausted, or the scenario's pool is too small for what it begins with.
pub fn host(scenario: &Scenario) -> LabHost {
    let frames = scenario.machine.frames;
    let meta: Box<[FrameMeta]> = (0..frames).map(|_| FrameMeta::new()).collect();
    let first = Pfn::new(FIRST);
    let pool = FramePool::new(first, meta, scenario.cpus.len()).expect("the host has a heap");
    pool.add(PfnRange::new(first, frames).expect("a small number")).expect("an empty pool");
    let objects = Objects::with_capacity(scenario.objects.len() + 2).expect("the host has a heap");
    Host::new(Modelled(Hardware), pool, objects).expect("the host has a heap")
}

impl<'h> Stage<'h> {
    /// The objects and virtual machines of a scenario, and its setup done.
    ///
    /// # Panics
    ///
    /// As [`host`].
    pub fn new(host: &'h LabHost, scenario: &Scenario) -> Self {
        let mut rom = FIRST + scenario.machine.frames;
        let forks = || scenario.steps().filter_map(Step::forks);
        let made = |object: usize| forks().any(|(_, by_fork)| by_fork == object);
        let objects = scenario.objects.iter().enumerate().map(|(number, object)| {
            let handle = (!made(number)).then(|| create(host, object, &mut rom));
            Cell::new(handle)
        });
        let objects = objects.collect();
        let initial = scenario.objects.iter().map(|object| object.rom.unwrap_or(0)).collect();
        lab::with(|lab| lab.oracle = Oracle::new(initial));
        let forked = |vm: usize| forks().any(|(by_fork, _)| by_fork == vm);
        let vms = (0..scenario.vms.len()).map(|number| {
            let vm = (!forked(number)).then(|| Rc::new(switch_on(host, scenario, number)));
            RefCell::new(vm)
        });
        let kinds = scenario.objects.iter().map(kind).collect();
        let blocks = scenario.objects.iter().map(|object| object.blocks).collect();
        let private = scenario.objects.iter().any(|object| object.private);
        let (policy, registers) = (scenario.policy, RefCell::default());
        let vms = vms.collect();
        let (swap, ring) = (Swap::of(host, scenario), Mutex::default());
        let stage = Self {
            host,
            vms,
            objects,
            kinds,
            blocks,
            private,
            shadowed: scenario.machine.is_shadowed(),
            policy,
            swap,
            ring,
            registers,
            poisoned: RefCell::default(),
        };
        let mut actor = Actor::new(0);
        for step in &scenario.setup {
            stage.run(&mut actor, step);
            if let Some((child, _)) = step.forks() {
                assert!(stage.is_there(child), "frames for the scenario's fork");
                relatives::reclaim(&stage, 0);
            }
        }
        stage.leave(&mut actor);
        stage
    }

    /// Whether some of its memory is private.
    pub fn has_private(&self) -> bool {
        self.private
    }

    /// Virtual machine `vm`, which is there.
    pub fn vm(&self, vm: usize) -> Rc<LabVm<'h>> {
        Rc::clone(self.vms[vm].borrow().as_ref().expect("a step of a machine that is there"))
    }

    /// Whether virtual machine `vm` is there.
    pub fn is_there(&self, vm: usize) -> bool {
        self.vms[vm].borrow().is_some()
    }

    /// Those that are there.
    pub fn vms(&self) -> Vec<Rc<LabVm<'h>>> {
        self.vms.iter().filter_map(|vm| vm.borrow().clone()).collect()
    }

    /// Virtual machine `vm` is there from now on, or not.
    pub fn set_vm(&self, vm: usize, is: Option<Rc<LabVm<'h>>>) {
        *self.vms[vm].borrow_mut() = is;
    }

    /// Takes virtual machine `vm` away, if it is there and nobody is using it.
    pub fn take_vm(&self, vm: usize) -> Option<LabVm<'h>> {
        let runs = lab::with(|lab| lab.world.tlb.residences().iter().any(|one| one.vm == vm && one.until == NEVER));
        let taken = self.vms[vm].borrow_mut().take().filter(|_| !runs)?;
        Rc::try_unwrap(taken).map_err(|used| self.set_vm(vm, Some(used))).ok()
    }

    /// Object `object`, if it is there.
    pub fn object(&self, object: usize) -> Option<ObjectHandle> {
        self.objects[object].get()
    }

    /// Object `object` is there from now on, or not.
    pub fn set_object(&self, object: usize, is: Option<ObjectHandle>) {
        self.objects[object].set(is);
    }

    /// Runs the script of one CPU.
    pub fn script(&self, cpu: usize, steps: &[Step]) {
        let mut actor = Actor::new(cpu);
        for step in steps {
            self.run(&mut actor, step);
            lab::with(|lab| lab.schedule.progress());
        }
        while !actor.leases.is_empty() {
            private::release(self, &mut actor);
        }
        private::uncache(self, &mut actor);
        self.leave(&mut actor);
    }

    fn run(&self, actor: &mut Actor, step: &Step) {
        if step.vm().is_some_and(|vm| !self.is_there(vm)) {
            owner::refused(true);
            return self.answer(step.result(), Value::Refused);
        }
        match step {
            Step::Guest { vm, what, gpa, to } => {
                let vmid = self.enter(actor, *vm);
                let walker = Walker { cpu: actor.cpu, vm: *vm, vmid };
                let (gpa, what, mmu_off) = (*gpa, *what, actor.mmu_off);
                let result = vcpu::access(self, actor, *vm, Attempt { walker, gpa, what, mmu_off });
                self.result(to, result);
            }
            Step::Mmu { on } => actor.mmu_off = !on,
            // See `operation`: nothing that the second stage keeps goes by it.
            Step::Tlbi if self.shadowed => {
                if let Some((vm, vmid)) = actor.runs {
                    shadowed::load(self, actor.cpu, vm, vmid, shadowed::root(actor.cpu));
                }
            }
            Step::Cr3 { vm, root } => {
                let vmid = self.enter(actor, *vm);
                shadowed::load(self, actor.cpu, *vm, vmid, *root);
            }
            Step::Tlbi => lab::with(|lab| lab.log(None, || "guest TLBI: stage 1 only".to_owned())),
            Step::Invlpg { vm, linear } => {
                self.enter(actor, *vm);
                shadowed::invlpg(self, actor, *vm, *linear);
            }
            Step::Post { count, to } => self.result(to, posted::post(self, *count)),
            Step::Drain { to } => self.result(to, posted::drain(self)),
            Step::Leave => self.leave(actor),
            other => owner::run(self, actor, other),
        }
    }

    /// A step has a result.
    pub fn result(&self, to: &Option<String>, value: Value) {
        self.answer(to.as_deref(), value);
    }

    fn answer(&self, to: Option<&str>, value: Value) {
        if let Some(register) = to {
            self.registers.borrow_mut().insert(register.to_owned(), value);
        }
    }

    /// The CPU runs `vm` from now on.
    fn enter(&self, actor: &mut Actor, vm: usize) -> Vmid {
        if let Some((_, vmid)) = actor.runs.filter(|(running, _)| *running == vm) {
            return vmid;
        }
        self.leave(actor);
        actor.cache.forget();
        let memory = self.vm(vm);
        memory.enter(actor.cpu, actor.cpu as u32).expect("scripts are too short to fill a ring");
        let vmid = memory.load(actor.cpu);
        lab::with(|lab| {
            let wrong = inv14::load(&lab.world, vm, vmid);
            lab.found(Check::Inv14, wrong);
            lab.world.load_vm(actor.cpu, vm, vmid);
            lab.log(None, || format!("VM {vm} runs under VMID {}", vmid.get()));
        });
        lab::settle();
        if self.shadowed {
            shadowed::load(self, actor.cpu, vm, vmid, shadowed::ROOT);
        }
        actor.runs = Some((vm, vmid));
        vmid
    }

    /// The CPU runs nothing from now on.
    pub fn leave(&self, actor: &mut Actor) {
        if let Some((vm, _)) = actor.runs.take() {
            lab::with(|lab| lab.world.put_vm(actor.cpu));
            let memory = self.vm(vm);
            memory.put(actor.cpu);
            memory.leave(actor.cpu);
        }
    }

    /// The VMID that a table operation of the owner flushes: the last that `vm` ran under.
    pub fn vmid(&self, vm: usize) -> Vmid {
        lab::with(|lab| {
            let ran = lab.world.tlb.residences().iter().rev().find(|one| one.vm == vm);
            ran.map_or(Vmid::new(0), |one| one.vmid)
        })
    }

    /// All scripts have ended: frames that waited become free, and everything is accounted for (INV-7).
    pub fn balance(&self) {
        relatives::settled(self);
        dirty::settled(self);
        let pool = &self.host.pool;
        let vms = self.vms();
        vms.iter().for_each(|vm| assert!(vm.reclaim(0, u64::MAX), "nobody is pinned any more"));
        while self.host.supply(0).reclaim(usize::MAX) != 0 {}
        while pool.deferred_frames() != 0 && pool.reap(&self.host.epoch, 0, usize::MAX) != 0 {}
        if self.private {
            while self.host.supply(0).scrub(usize::MAX) != 0 {}
            private::settled(self);
        }
        let root = |vm: &LabVm<'_>| vm.table().root().count().next_power_of_two();
        let shown = |vm: &LabVm<'_>| if vm.is_shaded() { shadowed::TABLES as u64 } else { 0 };
        let tables = vms.iter().map(|vm| vm.census().tables + root(vm) + shown(vm)).sum();
        let pin = self.host.epoch.pin(0);
        let live: Vec<_> =
            self.objects.iter().filter_map(|handle| self.host.objects.get(&pin, handle.get()?)).collect();
        // What relatives share is there once.
        let mut frames = std::collections::BTreeSet::new();
        live.iter().for_each(|object| object.visit_frames(&self.host.machine, &mut |pfn| frames.extend([pfn.get()])));
        let hidden = frames.iter().filter(|pfn| pool.is_private(Pfn::new(**pfn))).count() as u64;
        let account = Account {
            total: pool.total_frames(),
            free: pool.free_frames(),
            private: pool.private_frames() - hidden,
            quarantined: poison::quarantined(self, &frames),
            tables,
            objects: frames.len() as u64,
            logs: vms.iter().map(|vm| vm.log_frames(&pin)).sum(),
        };
        lab::with(|lab| lab.found(Check::Inv7, inv07::balance(&account)));
    }

    /// Destroys everything; afterwards every frame is free (INV-7).
    pub fn destroy(self) {
        let Self { host, vms, objects, swap, poisoned, .. } = self;
        for (number, vm) in vms.into_iter().enumerate() {
            let vm = vm.into_inner().and_then(Rc::into_inner);
            if let Some(vm) = vm {
                let wrong = vm.audit_shadow();
                lab::with(|lab| {
                    lab.world.tables.uproot(number);
                    lab.world.tables.uproot_shadows(number);
                    lab.found(Check::Shadow, wrong.err().map(str::to_owned));
                });
                vm.destroy(0);
            }
        }
        for handle in objects.into_iter().filter_map(Cell::into_inner) {
            // One that is still held was held twice: the balance shows it.
            if host.objects.destroy(&host.supply(0), &host.epoch, handle).is_err() {
                lab::with(|lab| {
                    lab.found(Check::Inv7, Some("an object is still held by a slot that is gone".to_owned()))
                });
            }
        }
        while host.pool.deferred_frames() != 0 && host.pool.reap(&host.epoch, 0, usize::MAX) != 0 {}
        while host.pool.dirty_frames() != 0 && host.supply(0).scrub(usize::MAX) != 0 {}
        let (total, free) = (host.pool.total_frames(), host.pool.free_frames());
        let (private, quarantined) = poison::left(host, &poisoned.borrow());
        let account = Account { total, free, private, quarantined, ..Account::default() };
        let places = swap.map_or(0, |swap| swap.references(host));
        lab::with(|lab| {
            lab.found(Check::Inv7, inv07::balance(&account));
            lab.found(Check::Inv7, inv07::places(places));
        });
    }
}

/// Virtual machine `number` of a scenario.
fn switch_on<'h>(host: &'h LabHost, scenario: &Scenario, number: usize) -> LabVm<'h> {
    let machine = scenario.machine;
    let options = Options {
        ipa_bits: machine.ipa_bits,
        slots: 8,
        largest: PageSize::Size1G,
        read_only_ivac: scenario.policy.read_only_ivac.into(),
        tags: machine.tags,
    };
    let mut vm = Vm::new(host, 0, LabFormat::of(&machine), options).expect("frames for the scenario's tables");
    vm.make_caches(scenario.cpus.len()).expect("the host has a heap");
    if machine.is_shadowed() {
        let words = shadowed::words(machine.physical_bits);
        vm.shade(0, words, shadowed::TABLES, scenario.cpus.len()).expect("frames for the scenario's shadow tables");
    }
    let (level, root) = (vm.table().geometry().root_level(), vm.table().root());
    lab::with(|lab| lab.world.add_root(number, level, root));
    vm
}

fn kind(object: &Object) -> Kind {
    match (object.device, object.rom) {
        (true, _) => Kind::Device,
        (false, Some(_)) => Kind::Rom,
        (false, None) => Kind::Ram,
    }
}

fn create(host: &LabHost, object: &Object, rom: &mut u64) -> ObjectHandle {
    let frames = object.frames;
    let spec = match (kind(object), object.rom) {
        (Kind::Device, _) => Spec::Device { first: Pfn::new(DEVICE), frames },
        (_, Some(value)) => {
            let first = Pfn::new(*rom);
            *rom += frames;
            for pfn in (0..frames).map(|offset| first.offset(offset)) {
                lab::with(|lab| lab.world.frame_mut(pfn).preset(Content::filled(value)));
            }
            Spec::Rom { first, frames, owned: false }
        }
        (_, None) if object.private => {
            Spec::Private { frames, policy: if object.blocks { Policy::Blocks } else { Policy::Pages } }
        }
        (_, None) => Spec::Anonymous {
            frames,
            policy: if object.blocks { Policy::Blocks } else { Policy::Pages },
            tagged: host.features().tags,
        },
    };
    host.objects.create(&host.supply(0), spec).expect("frames for the scenario's objects")
}
