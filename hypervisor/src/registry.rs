//! The virtual machines that there are, from start to end.
//!
//! Protocol: only host's work (the boot CPU, no vCPU loaded) makes, ends or replaces one. Others look one up and get a share of
//! it, which may outlive its place here for a moment.
//!
//! Lock order: registry → status → scheduler.

use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use entresol_metal_arm64::power;
use entresol_sync::{Mutex, Once};
use entresol_wire::bundle::{Bundle, FileIndex};
use entresol_wire::config;

use crate::vm::build::{self, Built};
use crate::vm::{BuildError, FlashMemory, Media, OutOfHeap, Overlay, Status, Stop, Vm};
use crate::{console, control, report, sched};

/// A place for a virtual machine.
struct Place {
    config: config::Vm<FileIndex>,
    media: Media,
    vm: Option<Arc<Vm>>,
    /// How the one that was here ended.
    ended: Option<Status>,
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
    let mut built: Vec<(Place, Built)> = Vec::new();
    for (number, config) in bundle.config().vms.iter().enumerate() {
        let named = |error: BuildError| (config.name.clone(), error);
        let media = media(config, bundle).map_err(named)?;
        let terminal = console::terminal(number).ok_or_else(|| named(OutOfHeap.into()))?;
        let new = build::build(config, bundle, &terminal, &media).map_err(named)?;
        let place = Place { config: config.clone(), media, vm: Some(new.vm.clone()), ended: None };
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
    let flash = config.flash.map(|file| FlashMemory::new(image(file))).transpose()?;
    Ok(Media { disks, flash })
}

/// Virtual machine `number`, if it exists.
pub fn find(number: usize) -> Option<Arc<Vm>> {
    PLACES.lock().get(number)?.vm.clone()
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
        log::info!("no virtual machine is left: power off");
        control::farewell();
        power::off();
    }
}

fn remove(number: usize, vm: Arc<Vm>, status: Status) {
    sched::withdraw(&vm);
    report::ended(&vm, status);
    control::state_changed(&vm);
    {
        let mut places = PLACES.lock();
        let place = &mut places[number];
        place.vm = None;
        place.ended = Some(status);
    }
    // A device on another CPU may hold it for the length of a copy.
    while Arc::strong_count(&vm) != 1 {
        core::hint::spin_loop();
    }
    drop(vm);
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
