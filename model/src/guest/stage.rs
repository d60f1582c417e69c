//! Machine, objects and virtual machines of a scenario, put up with the production core, and its scripts run on them.

use std::cell::RefCell;

use entresol_addr::{PageSize, Pfn, PfnRange};
use entresol_arch_arm64::stage2::Stage2;
use entresol_backing::{FrameMeta, FramePool, ObjectHandle, Objects, Policy, Spec};
use entresol_machine::Vmid;
use entresol_machine::model::Modelled;
use entresol_mmu::{CoalescedRing, Host, Invalidation, Options, Vm};
use entresol_slot::Hint;
use entresol_sync::Mutex;

use super::context::Context;
use super::record::SlotRecord;
use super::vcpu::{self, Attempt};
use super::{owner, posted};
use crate::check::inv07::{self, Account};
use crate::check::inv11::Oracle;
use crate::check::{Check, inv14};
use crate::lab::{self, Hardware};
use crate::litmus::outcome::{Registers, Value};
use crate::litmus::step::Step;
use crate::litmus::{GuestPolicy, Object, Scenario};
use crate::machine::FIRST;
use crate::machine::content::Content;
use crate::machine::walk::Walker;

/// The first frame of a device: no memory is there.
const DEVICE: u64 = 0x8_0000;

/// The machine that the core runs on.
pub type LabHost = Host<Modelled<Hardware>>;
/// A virtual machine on it.
pub type LabVm<'h> = Vm<'h, Modelled<Hardware>, Stage2>;

/// Everything that the CPUs of a scenario share.
pub struct Stage<'h> {
    /// The machine, its frames, its objects.
    pub host: &'h LabHost,
    /// Virtual machines, by number.
    pub vms: Vec<LabVm<'h>>,
    /// Objects, by number.
    pub objects: Vec<ObjectHandle>,
    /// For each object what it is made of.
    pub kinds: Vec<Kind>,
    /// What the owner decided about guests.
    pub policy: GuestPolicy,
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
    /// Its vCPU's registers.
    pub context: Context,
    /// Its vCPU's own translation is off.
    pub mmu_off: bool,
    /// The virtual machine that it runs, and under which VMID.
    pub runs: Option<(usize, Vmid)>,
    /// Invalidations that it has started and not ended.
    pub invalidations: Vec<(usize, Invalidation)>,
}

impl Actor {
    /// CPU `cpu`, which runs nothing yet.
    pub fn new(cpu: usize) -> Self {
        Self {
            cpu,
            hint: Hint::new(),
            context: Context::default(),
            mmu_off: false,
            runs: None,
            invalidations: Vec::new(),
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
        let objects = scenario.objects.iter().map(|object| create(host, object, &mut rom)).collect();
        let initial = scenario.objects.iter().map(|object| object.rom.unwrap_or(0)).collect();
        lab::with(|lab| lab.oracle = Oracle::new(initial));
        let machine = scenario.machine;
        let vms = (0..scenario.vms.len()).map(|number| {
            let options = Options {
                ipa_bits: machine.ipa_bits,
                slots: 8,
                largest: PageSize::Size1G,
                read_only_ivac: scenario.policy.read_only_ivac.into(),
                tags: machine.tags,
            };
            let vm = Vm::new(host, 0, Stage2 { fwb: machine.fwb }, options).expect("frames for the scenario's tables");
            let (level, root) = (vm.table().geometry().root_level(), vm.table().root());
            lab::with(|lab| lab.world.add_root(number, level, root));
            vm
        });
        let kinds = scenario.objects.iter().map(kind).collect();
        let (policy, registers) = (scenario.policy, RefCell::default());
        let mut stage = Self { host, vms: vms.collect(), objects, kinds, policy, ring: Mutex::default(), registers };
        let mut actor = Actor::new(0);
        for step in &scenario.setup {
            match step {
                Step::Fork { vm, child, object } => {
                    // The lab believes that a running CPU may still reach what hangs from no root any more.
                    stage.leave(&mut actor);
                    stage.fork(*vm, *child, *object);
                }
                step => stage.run(&mut actor, step),
            }
        }
        stage.leave(&mut actor);
        stage
    }

    /// Makes `child`, which has no slot, a fork of `vm`, whose slots show one object; the copy gets number `object`.
    ///
    /// # Panics
    ///
    /// If the scenario's pool is too small for it.
    fn fork(&mut self, vm: usize, child: usize, object: usize) {
        let host = self.host;
        let forked = self.vms[vm].fork(0).expect("frames for the scenario's fork");
        // The lab follows entries in every table that is one still, whether a root leads to it or not.
        assert!(self.vms[vm].reclaim(0, u64::MAX), "nobody is pinned");
        let handle = {
            let pin = host.epoch.pin(0);
            forked.slots().iter(&pin).next().map(|slot| ObjectHandle::from_raw(slot.object.get()))
        };
        let unused = std::mem::replace(&mut self.objects[object], handle.expect("the parent has a slot"));
        host.objects.destroy(&host.supply(0), &host.epoch, unused).expect("nothing shows it yet");
        lab::with(|lab| {
            lab.world.tables.uproot(child);
            lab.world.add_root(child, forked.table().geometry().root_level(), forked.table().root());
            let slots: Vec<_> = lab.records.of(vm).cloned().collect();
            for slot in slots {
                lab.oracle.fork(slot.object, object);
                let (id, at) = (slot.id, slot.range.start());
                lab.records.begin_create(SlotRecord { vm: child, object, ..slot });
                lab.records.end(child, id, Some(at), lab.world.now());
            }
        });
        std::mem::replace(&mut self.vms[child], forked).destroy(0);
    }

    /// Runs the script of one CPU.
    pub fn script(&self, cpu: usize, steps: &[Step]) {
        let mut actor = Actor::new(cpu);
        for step in steps {
            self.run(&mut actor, step);
            lab::with(|lab| lab.schedule.progress());
        }
        self.leave(&mut actor);
    }

    fn run(&self, actor: &mut Actor, step: &Step) {
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
            Step::Tlbi => lab::with(|lab| lab.log(None, || "guest TLBI: stage 1 only".to_owned())),
            Step::Post { count, to } => self.result(to, posted::post(self, *count)),
            Step::Drain { to } => self.result(to, posted::drain(self)),
            Step::Leave => self.leave(actor),
            other => owner::run(self, actor, other),
        }
    }

    /// A step has a result.
    pub fn result(&self, to: &Option<String>, value: Value) {
        if let Some(register) = to {
            self.registers.borrow_mut().insert(register.clone(), value);
        }
    }

    /// The CPU runs `vm` from now on.
    fn enter(&self, actor: &mut Actor, vm: usize) -> Vmid {
        if let Some((_, vmid)) = actor.runs.filter(|(running, _)| *running == vm) {
            return vmid;
        }
        self.leave(actor);
        self.vms[vm].enter(actor.cpu, actor.cpu as u32).expect("scripts are too short to fill a ring");
        let vmid = self.vms[vm].load(actor.cpu);
        lab::with(|lab| {
            let wrong = inv14::load(&lab.world, vm, vmid);
            lab.found(Check::Inv14, wrong);
            lab.world.load_vm(actor.cpu, vm, vmid);
            lab.log(None, || format!("VM {vm} runs under VMID {}", vmid.get()));
        });
        lab::settle();
        actor.runs = Some((vm, vmid));
        vmid
    }

    /// The CPU runs nothing from now on.
    pub fn leave(&self, actor: &mut Actor) {
        if let Some((vm, _)) = actor.runs.take() {
            lab::with(|lab| lab.world.put_vm(actor.cpu));
            self.vms[vm].put(actor.cpu);
            self.vms[vm].leave(actor.cpu);
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
        let pool = &self.host.pool;
        while self.host.supply(0).reclaim(usize::MAX) != 0 {}
        while pool.deferred_frames() != 0 && pool.reap(&self.host.epoch, 0, usize::MAX) != 0 {}
        let root = |vm: &LabVm<'_>| vm.table().root().count().next_power_of_two();
        let tables = self.vms.iter().map(|vm| vm.census().tables + root(vm)).sum();
        let pin = self.host.epoch.pin(0);
        let live: Vec<_> = self.objects.iter().filter_map(|handle| self.host.objects.get(&pin, *handle)).collect();
        // What relatives share is there once.
        let mut frames = std::collections::BTreeSet::new();
        live.iter().for_each(|object| object.visit_frames(&self.host.machine, &mut |pfn| frames.extend([pfn.get()])));
        let account = Account {
            total: pool.total_frames(),
            free: pool.free_frames(),
            tables,
            objects: frames.len() as u64,
            logs: self.vms.iter().map(|vm| vm.log_frames(&pin)).sum(),
        };
        lab::with(|lab| lab.found(Check::Inv7, inv07::balance(&account)));
    }

    /// Destroys everything; afterwards every frame is free (INV-7).
    pub fn destroy(self) {
        let Self { host, vms, objects, .. } = self;
        for (number, vm) in vms.into_iter().enumerate() {
            lab::with(|lab| lab.world.tables.uproot(number));
            vm.destroy(0);
        }
        for handle in objects {
            // One that is still held was held twice: the balance shows it.
            if host.objects.destroy(&host.supply(0), &host.epoch, handle).is_err() {
                lab::with(|lab| {
                    lab.found(Check::Inv7, Some("an object is still held by a slot that is gone".to_owned()))
                });
            }
        }
        while host.pool.deferred_frames() != 0 && host.pool.reap(&host.epoch, 0, usize::MAX) != 0 {}
        let (total, free) = (host.pool.total_frames(), host.pool.free_frames());
        let account = Account { total, free, ..Account::default() };
        lab::with(|lab| lab.found(Check::Inv7, inv07::balance(&account)));
    }
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
        (_, None) => Spec::Anonymous {
            frames,
            policy: if object.blocks { Policy::Blocks } else { Policy::Pages },
            tagged: host.features().tags,
        },
    };
    host.objects.create(&host.supply(0), spec).expect("frames for the scenario's objects")
}
