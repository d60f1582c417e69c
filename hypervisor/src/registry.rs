//! The virtual machines that there are, from start to end.
//!
//! Protocol: only host's work (the boot CPU, no vCPU loaded) makes, ends or replaces one. Others look one up and get a share of
//! it, which may outlive its place here for a moment.
//!
//! Lock order: registry → status → scheduler.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::arch::{power, timer};
use entresol_sync::{Mutex, Once};
use entresol_wire::bundle::{Bundle, FileIndex};
use entresol_wire::config::{self, MAX_VMS};

use crate::console::Terminal;
use crate::host_work::{self, Work};
use crate::vm::build::{self, Built};
use crate::vm::{BuildError, FlashMemory, ForkError, Hold, Media, OutOfHeap, Overlay, Status, Stop, Vm};
use crate::{console, control, merge, report, sched, snapshot};

/// A place for a virtual machine.
struct Place {
    config: config::Vm<FileIndex>,
    media: Media,
    vm: Option<Arc<Vm>>,
    /// How the one that was here ended.
    ended: Option<Status>,
    /// It is in no configuration: when it has ended, its place and its name may become another's.
    forked: bool,
}

impl Place {
    fn status(&self) -> Status {
        match (&self.vm, self.ended) {
            (Some(vm), _) => vm.status(),
            (None, Some(ended)) => ended,
            (None, None) => Status::Stopped(Stop::Killed),
        }
    }
}

static PLACES: Mutex<Vec<Place>> = Mutex::new(Vec::new());
static BUNDLE: Once<Bundle<'static>> = Once::new();

/// What is known of a virtual machine, running or not.
pub struct Row {
    /// Its configuration.
    pub config: config::Vm<FileIndex>,
    /// Where it is in its life.
    pub status: Status,
    /// It, if it exists.
    pub vm: Option<Arc<Vm>>,
}

/// Builds every virtual machine of `bundle`, and then starts those that want to be started.
///
/// # Errors
///
/// The name of the first that cannot be built, and why. Nothing is started then.
pub fn init(bundle: Bundle<'static>) -> Result<(), (String, BuildError)> {
    let bundle = BUNDLE.call_once(|| bundle);
    merge::init(if bundle.config().vms.iter().any(|vm| vm.merge) {
        bundle.config().outer.merge_pages_per_second
    } else {
        0
    });
    let mut built: Vec<(Place, Built)> = Vec::new();
    for (number, config) in bundle.config().vms.iter().enumerate() {
        let named = |error: BuildError| (config.name.clone(), error);
        let media = media(config, bundle).map_err(named)?;
        let terminal = console::terminal(number).ok_or_else(|| named(OutOfHeap.into()))?;
        let new = build::build(config, bundle, &terminal, &media).map_err(named)?;
        let place = Place { config: config.clone(), media, vm: Some(new.vm.clone()), ended: None, forked: false };
        built.push((place, new));
    }
    let mut places = PLACES.lock();
    let mut starts = Vec::new();
    for (place, new) in built {
        places.push(place);
        starts.push(new);
    }
    drop(places);
    for Built { vm, boot } in starts {
        if vm.config.autostart { vm.start(boot) } else { vm.start_paused(boot) }
    }
    Ok(())
}

/// The disks and the flash of a virtual machine, as its files have them.
fn media(config: &config::Vm<FileIndex>, bundle: &Bundle<'static>) -> Result<Media, BuildError> {
    let image = |file| bundle.file(file).map_or(&[][..], |file| file.data);
    let mut disks = Vec::new();
    disks.try_reserve_exact(config.disks.len()).map_err(|_| OutOfHeap)?;
    for disk in &config.disks {
        disks.push(Overlay::new(image(disk.file), disk.read_only));
    }
    let flash = config.flash.map(|file| FlashMemory::new(image(file), config.mte)).transpose()?;
    Ok(Media { disks, flash })
}

/// Forks virtual machine `number`, once for each of `names`: all of them, or none.
///
/// # Errors
///
/// [`ForkRefusal`]; nothing changed.
pub fn fork(number: usize, names: &[String]) -> Result<(), ForkRefusal> {
    if FORKED.lock().as_ref().is_some_and(|forked| forked.number != number) {
        tell_of_fork();
    }
    let ended = || ForkRefusal::Status(status(number).unwrap_or(Status::Stopped(Stop::Killed)));
    let parent = find(number).ok_or_else(ended)?;
    let numbers = places_for(names)?;
    PLACES.lock().try_reserve(names.len()).map_err(|_| OutOfHeap)?;
    console::reserve(names.len())?;
    let since = timer::now();
    let held = parent.hold();
    let status = parent.status();
    if !matches!(status, Status::Running | Status::Paused(_)) {
        return Err(ForkRefusal::Status(status));
    }
    let mut children = Vec::new();
    children.try_reserve_exact(names.len()).map_err(|_| OutOfHeap)?;
    for (name, place) in names.iter().zip(numbers) {
        children.push((place, Child::of(&held, &parent, number, name, place)?));
    }
    // The parent's vCPUs are the first to get a CPU again.
    drop(held);
    let ticks = timer::now() - since;
    note_fork(Forked { number, times: names.len(), ticks });
    host_work::raise(Work::Reclaim);
    for (_, Child { vm, .. }) in &children {
        vm.equip().map_err(ForkRefusal::Failed)?;
    }
    for (number, Child { vm, media, terminal }) in children {
        settle_in(number, vm, terminal, media, status);
    }
    Ok(())
}

/// Forks of one virtual machine: how many, and the longest time that it was held.
struct Forked {
    number: usize,
    times: usize,
    ticks: u64,
}

/// The last ones, until they are told: a console takes longer for a line than a fork for a machine, which would wait for it.
static FORKED: Mutex<Option<Forked>> = Mutex::new(None);

fn note_fork(new: Forked) {
    let mut forked = FORKED.lock();
    let before = forked.take().filter(|forked| forked.number == new.number);
    let (times, ticks) = before.map_or((0, 0), |before| (before.times, before.ticks));
    *forked = Some(Forked { times: new.times + times, ticks: new.ticks.max(ticks), ..new });
}

fn tell_of_fork() {
    let Some(Forked { number, times, ticks }) = FORKED.lock().take() else { return };
    let name = PLACES.lock().get(number).map(|place| place.config.name.clone()).unwrap_or_default();
    log::info!("vm {name}: {times} times forked, held for at most {} us", micros(ticks));
}

/// A copy of a virtual machine that is in no place: for its state.
pub struct Copy {
    /// It; it never runs.
    pub vm: Arc<Vm>,
    /// Its disks.
    pub disks: Vec<Arc<Overlay>>,
    /// Where the original was in its life.
    pub status: Status,
    /// How long the original stood still, in counts.
    pub pause: u64,
}

impl Copy {
    /// Gives it back: the machine before its disks.
    pub fn discard(self) {
        drop(self.vm);
        drop(self.disks);
    }
}

/// Copies virtual machine `number` as it is now.
///
/// # Errors
///
/// [`ForkRefusal`]; nothing changed.
pub fn copy(number: usize) -> Result<Copy, ForkRefusal> {
    let ended = || ForkRefusal::Status(status(number).unwrap_or(Status::Stopped(Stop::Killed)));
    let original = find(number).ok_or_else(ended)?;
    let begun = timer::now();
    let held = original.hold();
    let status = original.status();
    if !matches!(status, Status::Running | Status::Paused(_)) {
        return Err(ForkRefusal::Status(status));
    }
    let Child { vm, media: Media { disks, .. }, .. } =
        Child::of(&held, &original, number, &original.config.name, number)?;
    drop(held);
    let pause = timer::now() - begun;
    host_work::raise(Work::Reclaim);
    Ok(Copy { vm, disks, status, pause })
}

/// The bundle that this machine was started with.
pub fn bundle() -> Option<&'static Bundle<'static>> {
    BUNDLE.get()
}

/// That a virtual machine called `name` could be made now.
///
/// # Errors
///
/// [`ForkRefusal`].
pub fn check_free(name: &str) -> Result<(), ForkRefusal> {
    places_for(&[String::from(name)]).map(drop)
}

/// Takes in the virtual machine that `make` makes on a terminal of its own, as `config` says and with these media, and lets it go
/// on. Its number.
///
/// # Errors
///
/// Why there is no place for it, or what `make` says; nothing changed.
pub fn adopt(
    config: &config::Vm<FileIndex>,
    media: &Media,
    make: impl FnOnce(&Arc<Terminal>) -> Result<(Arc<Vm>, Status), String>,
) -> Result<usize, Result<ForkRefusal, String>> {
    let numbers = places_for(core::slice::from_ref(&config.name)).map_err(Ok)?;
    let number = numbers.first().copied().ok_or(Ok(ForkRefusal::Full))?;
    let no_room = |_| Ok(ForkRefusal::from(OutOfHeap));
    PLACES.lock().try_reserve(1).map_err(|_| no_room(()))?;
    console::reserve(1).map_err(|OutOfHeap| no_room(()))?;
    let terminal = Terminal::new(number).map_err(|OutOfHeap| no_room(()))?;
    let (vm, status) = make(&terminal).map_err(Err)?;
    settle_in(number, vm, terminal, media.clone(), status);
    Ok(number)
}

/// Gives a virtual machine that was just made its place, and lets it follow `status`.
fn settle_in(number: usize, vm: Arc<Vm>, terminal: Arc<Terminal>, media: Media, status: Status) {
    console::set(vm.config.name.clone(), terminal);
    let place = Place { config: vm.config.clone(), media, vm: Some(vm.clone()), ended: None, forked: true };
    let mut places = PLACES.lock();
    match places.get_mut(number) {
        Some(before) => *before = place,
        None => places.push(place),
    }
    drop(places);
    vm.follow(status);
}

fn micros(ticks: u64) -> u64 {
    ticks.saturating_mul(1_000_000) / timer::frequency()
}

/// Why nothing was forked.
#[derive(Debug)]
pub enum ForkRefusal {
    /// The parent is no longer there to be forked.
    Status(Status),
    /// A name is another's, which runs or is in the configuration.
    Taken(String),
    /// There are as many virtual machines as there may be.
    Full,
    /// It could not be made.
    Failed(ForkError),
}

impl From<OutOfHeap> for ForkRefusal {
    fn from(OutOfHeap: OutOfHeap) -> Self {
        Self::Failed(ForkError::OutOfHeap)
    }
}

/// A child that is in no place yet. Dropping it gives everything back: the virtual machine first, then its disks.
struct Child {
    vm: Arc<Vm>,
    media: Media,
    terminal: Arc<Terminal>,
}

impl Child {
    fn of(held: &Hold<'_>, parent: &Vm, number: usize, name: &str, place: usize) -> Result<Self, ForkRefusal> {
        let media = PLACES.lock().get(number).map(|place| place.media.clone());
        let Media { disks: originals, flash: original } = media.unwrap_or_default();
        let mut disks = Vec::new();
        disks.try_reserve_exact(originals.len()).map_err(|_| OutOfHeap)?;
        for disk in &originals {
            disks.push(disk.fork().map_err(|error| ForkRefusal::Failed(ForkError::Disk(error)))?);
        }
        let terminal = Terminal::new(place)?;
        let config = config::Vm { name: String::from(name), ..parent.config.clone() };
        let flash = original.as_ref().map(|original| original.like());
        let both = original.as_deref().zip(flash.as_ref());
        let vm = parent.fork(held, config, &terminal, &disks, both).map_err(ForkRefusal::Failed)?;
        Ok(Self { vm, media: Media { disks, flash }, terminal })
    }
}

/// Numbers for virtual machines of these names: the place of an ended fork of that name, a new one, or that of any ended fork.
fn places_for(names: &[String]) -> Result<Vec<usize>, ForkRefusal> {
    let places = PLACES.lock();
    let mut numbers: Vec<usize> = Vec::new();
    numbers.try_reserve_exact(names.len()).map_err(|_| OutOfHeap)?;
    let is_free = |number: usize| {
        places.get(number).is_some_and(|place| place.forked && place.vm.is_none()) && !control::is_attached(number)
    };
    let mut new = places.len();
    for name in names {
        let named = places.iter().position(|place| place.config.name == *name);
        if named.is_some_and(|number| !is_free(number)) {
            return Err(ForkRefusal::Taken(name.clone()));
        }
        // Another of these names may have the place already that was last this one's.
        let named = named.filter(|number| !numbers.contains(number));
        let number = named.or_else(|| (new < MAX_VMS).then_some(new));
        let number = number.or_else(|| (0..places.len()).find(|number| is_free(*number) && !numbers.contains(number)));
        let number = number.ok_or(ForkRefusal::Full)?;
        new += usize::from(number == new);
        numbers.push(number);
    }
    Ok(numbers)
}

/// Tells of the last fork, and takes some of the tables apart that forks have left. True if none are left.
pub fn reclaim(cpu: usize) -> bool {
    /// Table pages of one virtual machine in one go.
    const AT_ONCE: u64 = 16;
    tell_of_fork();
    let count = PLACES.lock().len();
    let mut done = true;
    for vm in (0..count).filter_map(find) {
        done &= vm.memory.reclaim(cpu, AT_ONCE);
    }
    done
}

/// Virtual machine `number`, if it exists.
pub fn find(number: usize) -> Option<Arc<Vm>> {
    PLACES.lock().get(number)?.vm.clone()
}

/// Calls `act` with every virtual machine that exists. Host's work.
pub fn for_each(act: impl Fn(&Vm)) {
    let count = PLACES.lock().len();
    (0..count).filter_map(find).for_each(|vm| act(&vm));
}

/// The number of the virtual machine called `name`.
pub fn number_of(name: &str) -> Option<usize> {
    PLACES.lock().iter().position(|place| place.config.name == name)
}

/// Where virtual machine `number` is in its life, or how it ended. Takes no heap.
pub fn status(number: usize) -> Option<Status> {
    PLACES.lock().get(number).map(Place::status)
}

/// What is known of virtual machine `number`.
pub fn row(number: usize) -> Option<Row> {
    let places = PLACES.lock();
    let place = places.get(number)?;
    Some(Row { config: place.config.clone(), status: place.status(), vm: place.vm.clone() })
}

/// Takes apart every virtual machine that has ended, makes those anew that asked for a reset, and turns the machine off when
/// none is left.
pub fn settle() {
    let count = PLACES.lock().len();
    for number in 0..count {
        let Some(vm) = find(number) else { continue };
        let status = vm.status();
        if matches!(status, Status::Stopped(_) | Status::Crashed(_)) {
            remove(number, vm, status);
        }
    }
    if PLACES.lock().iter().all(|place| place.vm.is_none()) {
        tell_of_fork();
        log::info!("no virtual machine is left: power off");
        control::farewell();
        power::off();
    }
}

fn remove(number: usize, vm: Arc<Vm>, status: Status) {
    sched::withdraw(&vm);
    report::ended(&vm, status);
    snapshot::kept::forget(number);
    control::state_changed(&vm);
    let mut media = Media::default();
    {
        let mut places = PLACES.lock();
        let place = &mut places[number];
        place.vm = None;
        place.ended = Some(status);
        if status != Status::Stopped(Stop::Reset) {
            // It does not come back, and nobody reads what it has written.
            media = core::mem::take(&mut place.media);
        }
    }
    // A device on another CPU may hold it for the length of a copy.
    while Arc::strong_count(&vm) != 1 {
        core::hint::spin_loop();
    }
    drop(vm);
    // After the devices that used them.
    drop(media);
    if status == Status::Stopped(Stop::Reset) {
        restart(number);
    }
}

fn restart(number: usize) {
    let (config, media) = {
        let places = PLACES.lock();
        (places[number].config.clone(), places[number].media.clone())
    };
    if config.policies.on_guest_reset == config::OnReset::Stop {
        return;
    }
    let (Some(bundle), Some(terminal)) = (BUNDLE.get(), console::terminal(number)) else { return };
    match build::build(&config, bundle, &terminal, &media) {
        Ok(Built { vm, boot }) => {
            PLACES.lock()[number].vm = Some(vm.clone());
            vm.start(boot);
            control::state_changed(&vm);
        }
        Err(error) => log::error!("vm {}: not restarted: {error}", config.name),
    }
}
