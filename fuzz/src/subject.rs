//! One run: operations on the core and on the reference, judged after each.

mod audit;
mod discard;
mod fork;
mod guest;
mod mistakes;
mod owner;

use std::collections::BTreeSet;

use entresol_addr::{Gfn, GfnRange, PageSize, Pfn, PfnRange};
use entresol_arch_arm64::stage2::Stage2;
use entresol_backing::{FrameMeta, FramePool, Objects, Policy, Spec};
use entresol_machine::Features;
use entresol_machine::flat::FlatMachine;
use entresol_mmu::{Host, Invalidation, Options, ReadOnlyIvac, Vm};
use entresol_slot::Hint;

use crate::feedback::Feedback;
use crate::input::Input;
use crate::reference::{Behind, Object, Reference};

const CPU: usize = 0;
const CPUS: usize = 2;
const FIRST: Pfn = Pfn::new(0x1000);
/// Frames of the pool: one block that is free as a whole, and what pages and tables need.
const FRAMES: u64 = 1024;
const ROM: u64 = 4;
/// Slots are numbered below this.
const SLOTS: u32 = 4;
/// The guest frames that slots are near to.
const RAM: u64 = 0x4_0000;
const WINDOW: u64 = 2048;
/// Operations of one run: each is followed by an audit.
const MOST: usize = 200;

/// The core under test, and what it must be like.
struct Subject<'h> {
    host: &'h Host<FlatMachine>,
    vm: Vm<'h, FlatMachine, Stage2>,
    hint: Hint,
    reference: Reference,
    relative: Option<Relative<'h>>,
    invalidations: Vec<Invalidation>,
    feedback: &'static Feedback,
}

/// The other machine, after a fork.
struct Relative<'h> {
    vm: Vm<'h, FlatMachine, Stage2>,
    hint: Hint,
    reference: Reference,
}

/// Runs an input.
///
/// # Errors
///
/// What does not hold, and after which operation.
pub fn run(bytes: &[u8]) -> Result<(), String> {
    let mut input = Input::new(bytes);
    let features = Features {
        forced_write_back: input.bit(),
        coherent_icache: input.bit(),
        physical_bits: 44,
        vmid_bits: input.one_of(&[8, 16]),
        tags: true,
    };
    let options = Options {
        ipa_bits: 40,
        slots: SLOTS,
        largest: input.one_of(&[PageSize::Size1G, PageSize::Size4K]),
        read_only_ivac: input.one_of(&[ReadOnlyIvac::Abort, ReadOnlyIvac::Clean]),
        tags: false,
    };
    let host = host(features);
    let mut reference = Reference::default();
    for (behind, spec) in specs() {
        let handle = host.objects.create(&host.supply(CPU), spec).map_err(|error| format!("create: {error}"))?;
        let frames = match spec {
            Spec::Anonymous { frames, .. }
            | Spec::Private { frames, .. }
            | Spec::Device { frames, .. }
            | Spec::Rom { frames, .. } => frames,
        };
        reference.objects.push(Object { number: handle.raw(), behind, frames });
    }
    let vm = Vm::new(&host, CPU, Stage2 { fwb: features.forced_write_back }, options);
    let vm = vm.map_err(|error| format!("a machine cannot be made: {error:?}"))?;
    vm.load(CPU);
    let feedback = Feedback::here();
    let mut subject =
        Subject { host: &host, vm, hint: Hint::new(), reference, relative: None, invalidations: Vec::new(), feedback };
    for number in 0..MOST {
        if input.is_empty() {
            break;
        }
        let what = subject.step(&mut input);
        what.and_then(|()| subject.audit()).map_err(|what| format!("operation {number}: {what}"))?;
    }
    subject.end()
}

fn host(features: Features) -> Host<FlatMachine> {
    let meta = (0..FRAMES + ROM).map(|_| FrameMeta::new()).collect();
    let pool = FramePool::new(FIRST, meta, CPUS).expect("the heap has room");
    pool.add(PfnRange::new(FIRST, FRAMES).expect("a range")).expect("frames of nobody else");
    let machine = FlatMachine::new(FIRST, FRAMES + ROM, features);
    Host::new(machine, pool, Objects::with_capacity(8).expect("the heap has room")).expect("the heap has room")
}

fn specs() -> [(Behind, Spec); 4] {
    [
        (Behind::Memory, Spec::anonymous(40, Policy::Pages)),
        (Behind::Memory, Spec::anonymous(520, Policy::Blocks)),
        (Behind::Rom, Spec::Rom { first: FIRST.offset(FRAMES), frames: ROM, owned: false }),
        (Behind::Device, Spec::Device { first: Pfn::new(0x900), frames: 4 }),
    ]
}

impl Subject<'_> {
    fn step(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let kind = input.below(27);
        self.feedback.note(kind as u32);
        self.feedback.refuse_after(0);
        match kind {
            0 | 1 => self.load(input),
            2..=4 => self.store(input),
            5 => self.fetch(input),
            6 => self.odd_fault(input),
            7 => self.maintain(input),
            8 | 9 => self.set_slot(input),
            10 => self.change_slot(input),
            11 => self.copy(input),
            12 => self.start(input),
            13 => self.finish(input),
            14 => self.zap(input),
            15 => self.age(input),
            16 => self.punch(input),
            17 => self.populate(input),
            18 => self.get_log(input),
            19 => self.clear_log(input),
            20 => self.split_ahead(input),
            21 => self.rings(input),
            22 => self.mistake(input),
            23 => self.fork(input),
            24 | 25 => self.switch(input),
            _ => self.starved(input),
        }
    }

    /// The next operation, with one of its requests for a frame refused.
    fn starved(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        let requests = input.below(8) as u32 + 1;
        let kind = input.below(9);
        self.feedback.note(100 + kind as u32);
        self.feedback.refuse_after(requests);
        match kind {
            0 | 1 => self.store(input),
            2 => self.load(input),
            3 => self.set_slot(input),
            4 => self.copy(input),
            5 => self.punch(input),
            6 => self.populate(input),
            7 => self.fork(input),
            _ => self.split_ahead(input),
        }
    }

    /// Whether an operation may say that memory is out.
    fn may_be_out(&self) -> bool {
        // Tables of one fault, and a block's worth that is not in one piece.
        self.feedback.has_refused() || self.host.pool.free_frames() < 8
    }

    /// A guest frame in a slot or beside one.
    fn gfn(&self, input: &mut Input<'_>) -> u64 {
        let place = input.below(8);
        let offset = input.byte();
        match self.reference.slots.values().nth((place % 4) as usize) {
            // Near the beginning, near the end, and in the middle.
            Some(slot) if place < 6 => {
                let ends = [u64::from(offset % 16), slot.count.saturating_sub(u64::from(offset % 16))];
                slot.base + if offset >= 192 { slot.count / 2 } else { ends[usize::from(offset >= 96)] }
            }
            _ => RAM + u64::from(offset) * 4,
        }
    }

    fn range(&self, input: &mut Input<'_>) -> GfnRange {
        let gfn = self.gfn(input);
        let count = input.one_of(&[1, 1, 4, 16, 600]);
        GfnRange::new(Gfn::new(gfn), count).expect("far from the end")
    }

    /// Whether a guest frame is being invalidated.
    fn is_excluded(&self, range: GfnRange) -> bool {
        self.invalidations.iter().any(|invalidation| invalidation.range().overlaps(range))
    }

    /// Gives everything back, and misses nothing (INV-7).
    fn end(mut self) -> Result<(), String> {
        self.feedback.refuse_after(0);
        self.finish_all();
        self.compare()?;
        self.switch(&mut Input::new(&[]))?;
        self.compare()?;
        self.vm.leave(CPU);
        self.vm.put(CPU);
        let Self { host, vm, reference, relative, .. } = self;
        let mut objects: BTreeSet<u32> = reference.objects.iter().map(|object| object.number).collect();
        vm.destroy(CPU);
        if let Some(relative) = relative {
            objects.extend(relative.reference.objects.iter().map(|object| object.number));
            relative.vm.destroy(CPU);
        }
        for number in objects {
            let handle = entresol_backing::ObjectHandle::from_raw(number);
            let destroyed = host.objects.destroy(&host.supply(CPU), &host.epoch, handle);
            destroyed.map_err(|error| format!("destroy: {error}"))?;
        }
        while host.pool.reap(&host.epoch, CPU, 64) != 0 {}
        // The page of zeros, once it is made, stays the pool's own.
        let zero = (0..FRAMES).filter(|frame| host.pool.is_zero_page(FIRST.offset(*frame))).count() as u64;
        let (free, deferred) = (host.pool.free_frames() + zero, host.pool.deferred_frames());
        if (free, deferred) != (FRAMES, 0) {
            return Err(format!("INV-7: of {FRAMES} frames {free} are free at the end, and {deferred} wait"));
        }
        Ok(())
    }
}
