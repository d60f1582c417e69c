//! What a person reads: the events of one schedule, as text and as a page of HTML.

pub mod html;
pub mod text;

use entresol_addr::Gfn;

use crate::machine::World;
use crate::machine::descriptor::Descriptor;

/// One thing that happened.
#[derive(Clone, Debug)]
pub struct Event {
    /// After so many operations.
    pub step: u64,
    /// Where; `None` before and after the CPUs ran.
    pub cpu: Option<usize>,
    /// What.
    pub what: String,
    /// Which line of the core did it.
    pub place: Option<String>,
    /// The watched pages afterwards.
    pub pages: Vec<PageState>,
}

/// One guest page at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageState {
    /// Whose.
    pub vm: usize,
    /// Which.
    pub gfn: Gfn,
    /// The entry that decides about it.
    pub entry: String,
    /// The first word as the cache shows it, if the entry leads to memory.
    pub cached: Option<u64>,
    /// The line is dirty.
    pub dirty: bool,
    /// The first word as memory holds it.
    pub memory: Option<u64>,
    /// Stale translations of it that some TLB may still hold.
    pub stale: usize,
}

/// The events of one schedule.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// In order.
    pub events: Vec<Event>,
    /// Guest pages whose state is kept with each event.
    pub watched: Vec<(usize, Gfn)>,
}

impl Event {
    /// An entry in words.
    pub fn entry(descriptor: Descriptor) -> String {
        match descriptor {
            Descriptor::Invalid => "invalid".to_owned(),
            Descriptor::Refused => "one that the hardware refuses".to_owned(),
            Descriptor::Table(frame) => format!("table {frame:#x}"),
            Descriptor::Leaf(leaf) => {
                let bit = |set: bool, letter: char| if set { letter } else { '-' };
                let (r, w, x) = (bit(leaf.read, 'r'), bit(leaf.write, 'w'), bit(leaf.execute, 'x'));
                let young = if leaf.accessed { "" } else { " old" };
                format!("{r}{w}{x} frame {:#x}{young}", leaf.pfn)
            }
        }
    }
}

impl Trace {
    /// A trace that keeps the state of these pages.
    pub fn new(watched: Vec<(usize, Gfn)>) -> Self {
        Self { events: Vec::new(), watched }
    }

    /// Something happened.
    pub fn add(&mut self, event: Event, world: &World) {
        let pages = self.watched.iter().map(|(vm, gfn)| page(world, *vm, *gfn)).collect();
        self.events.push(Event { pages, ..event });
    }
}

fn page(world: &World, vm: usize, gfn: Gfn) -> PageState {
    let (descriptor, _) = world.tables.current(vm, gfn);
    let frame = match descriptor {
        Descriptor::Leaf(leaf) => world.frame(leaf.pfn.offset(gfn.since(gfn.align_down(leaf.size)))),
        _ => None,
    };
    let mut stale = 0;
    let range = entresol_addr::GfnRange::single(gfn);
    world.tables.each_seen(&world.tlb, Some(vm), Some(range), |seen| stale += usize::from(seen.stale));
    PageState {
        vm,
        gfn,
        entry: Event::entry(descriptor),
        cached: frame.map(|frame| frame.line().get(0)),
        dirty: frame.is_some_and(|frame| frame.is_dirty()),
        memory: frame.map(|frame| frame.in_memory(0)),
        stale,
    }
}
