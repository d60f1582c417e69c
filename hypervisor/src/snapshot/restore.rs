//! A virtual machine made from a file of the store.
//!
//! Protocol: the file's trailer names the one that it is the difference to, and so on; all their indexes are read and checked
//! before anything is made. Then disks are put together from the oldest to the newest, and memory that says where its pages are
//! ([`super::lazy`]); the machine is built around them as its configuration says, and goes on.

use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::arch::{cpu, map, timer};
use entresol_addr::PAGE_SIZE;
use entresol_backing::{ObjectHandle, Policy, Spec};
use entresol_wire::Refusal;
use entresol_wire::bundle::{Bundle, FileIndex};
use entresol_wire::config::{self, Config};
use entresol_wire::control::{Code, Error};
use entresol_wire::snapshot::{Index, Known, Shared, Trailer, check_part};
use entresol_wire::store::{Directory, File};

use super::lazy::{Pages, Source};
use super::{Image, Refused, kept, pages, shared};
use crate::store::change::Turn;
use crate::store::{self, file};
use crate::vm::{Media, Overlay, Saved, build};
use crate::{host, registry};

/// A file of the chain.
struct Link {
    pages: Pages,
    index: Index,
}

/// What [`begin`] has checked.
pub struct Wanted {
    file: String,
    name: Option<String>,
    turn: Turn,
}

/// Looks whether there is such a file. Nobody changes the store until the machine is made.
///
/// # Errors
///
/// [`Refused`].
pub fn begin(file: &str, name: Option<&str>) -> Result<Wanted, Refused> {
    let turn = Turn::take()?;
    store::directory()?.file(file)?;
    if let Some(name) = name {
        config::check_name("name", name).map_err(|refusal| Refused(Error::refused(Code::BadField, refusal)))?;
    }
    Ok(Wanted { file: file.into(), name: name.map(String::from), turn })
}

impl Wanted {
    /// Makes the machine, which goes on.
    ///
    /// # Errors
    ///
    /// [`Refused`]; nothing is left behind.
    pub async fn make(self) -> Result<(), Refused> {
        let begun = timer::now();
        let directory = store::directory()?;
        let bundle = registry::bundle().ok_or_else(|| Refused::because("there is no bundle"))?;
        let newest = directory.file(&self.file)?.clone();
        let (saved, trailer) = read_state(&newest).await?;
        let mut config = known_files(&saved, bundle, &self.file)?;
        if let Some(name) = &self.name {
            config.name.clone_from(name);
        }
        check_config(&config, bundle)?;
        registry::check_free(&config.name).map_err(|refusal| Refused(crate::control::fork_refused("", refusal)))?;
        let sizes = sizes(&config, bundle);
        let shared = read_shared(&newest, &trailer, &config).await?;
        let chain = read_chain(&directory, newest.clone(), trailer, &sizes).await?;
        check_tags(&config, &chain)?;
        let pages = chain.iter().map(|link| link.pages.clone());
        // What is fetched comes through frames that are mapped: private memory is read before the machine runs.
        let source = if config.private { None } else { Source::open(pages.collect())? };
        let made = self.start(saved, &config, bundle, (&chain, shared.as_ref()), source.as_deref()).await;
        // Nobody changes the store until its files are known to be read from.
        drop(self.turn);
        if let Err(refused) = made {
            if let Some(source) = source {
                source.abandon();
            }
            return Err(refused);
        }
        let milliseconds = (timer::now() - begun) * 1000 / timer::frequency();
        log::info!("restore {}: {} runs after {milliseconds} ms", self.file, config.name);
        if let Some(source) = source {
            source.begin(self.file, begun);
        }
        Ok(())
    }

    /// The machine from the files of `chain`, whose memory is read from `source`, and shares what `shared` says, or what it does at
    /// boot.
    async fn start(
        &self,
        saved: Saved,
        config: &config::Vm<FileIndex>,
        bundle: &Bundle<'static>,
        (chain, shared): (&[Link], Option<&Shared>),
        source: Option<&Source>,
    ) -> Result<(), Refused> {
        let parts = Parts::make(config, bundle, (chain, shared), source).await?;
        let image = Arc::new(Image::of(parts.ram.0, &parts.disks)?);
        let records = shared.is_some_and(shared::has_records);
        let number = parts.run(saved, config, bundle, (&self.file, records))?;
        if let Some(newest) = chain.last() {
            kept::keep(number, newest.pages.file.id, image);
        }
        Ok(())
    }
}

/// The machine's state, and where the rest is.
async fn read_state(file: &File) -> Result<(Saved, Trailer), Refused> {
    let trailer = read_trailer(file).await?;
    let (first, blocks) = trailer.state_place();
    let mut bytes = file::read(file, first, blocks).await?;
    bytes.truncate(trailer.state as usize);
    check_part("state", &bytes, trailer.state_checksum).map_err(|error| Refused::file(&file.name, &error))?;
    let saved = serde_json::from_slice(&bytes);
    let saved = saved.map_err(|error| Refused::because(alloc::format!("file {:?}: state: {error}", file.name)))?;
    Ok((saved, trailer))
}

async fn read_trailer(file: &File) -> Result<Trailer, Refused> {
    let blocks = file.blocks();
    let Some(last) = blocks.checked_sub(1) else {
        return Err(Refused::file(&file.name, &entresol_wire::snapshot::SnapshotError::NotASnapshot));
    };
    let bytes = file::read(file, last, 1).await?;
    let block = bytes.first_chunk().ok_or_else(|| Refused::because("a block is short"))?;
    let trailer = Trailer::decode(block, blocks).map_err(|error| Refused::file(&file.name, &error))?;
    if trailer.base != file.base {
        let text = alloc::format!("file {:?}: its trailer names another base than the store's directory", file.name);
        return Err(Refused::because(text));
    }
    Ok(trailer)
}

/// All files that are needed, oldest first. A base has a lower number than what needs it, so this ends.
async fn read_chain(
    directory: &Directory,
    newest: File,
    trailer: Trailer,
    sizes: &[u64],
) -> Result<Vec<Link>, Refused> {
    let mut chain = Vec::new();
    let (mut file, mut trailer) = (newest, trailer);
    loop {
        let (first, blocks) = trailer.index_place();
        let bytes = file::read(&file, first, blocks).await?;
        let index = Index::decode(&bytes, &trailer, sizes).map_err(|error| Refused::file(&file.name, &error))?;
        let base = trailer.base;
        let pages = Pages { file, checksums: index.checksums.clone(), tagged: trailer.tagged };
        chain.push(Link { pages, index });
        if base == 0 {
            break;
        }
        let next = directory.by_id(base).ok_or_else(|| Refused::because("a base is not in the store"))?;
        (file, trailer) = (next.clone(), read_trailer(next).await?);
    }
    chain.reverse();
    Ok(chain)
}

/// Which pages it shares; `None` if the file does not say.
async fn read_shared(
    file: &File,
    trailer: &Trailer,
    config: &config::Vm<FileIndex>,
) -> Result<Option<Shared>, Refused> {
    let Some(part) = trailer.shared else { return Ok(None) };
    if !config.private {
        let text = alloc::format!("file {:?}: it has shared pages; the configuration has private = false", file.name);
        return Err(Refused::because(text));
    }
    let (first, blocks) = trailer.shared_place();
    let bytes = file::read(file, first, blocks).await?;
    let shared = Shared::decode(&bytes, &part, &map::private_frames(config.memory));
    shared.map(Some).map_err(|error| Refused::file(&file.name, &error))
}

/// The configuration with the bundle's files for those that it knows by what they hold.
fn known_files(saved: &Saved, bundle: &Bundle<'static>, file: &str) -> Result<config::Vm<FileIndex>, Refused> {
    let find = |role: config::Role, known: Known| {
        let is_it = |file: entresol_wire::bundle::File<'_>| {
            (file.data.len() as u64, file.checksum) == (known.length, known.checksum)
        };
        let place = bundle.files().position(is_it);
        let place = place.map(|place| FileIndex(place as u32));
        place.ok_or_else(|| {
            let rule = "must be among the files that this machine was started with";
            let refusal = Refusal::text(alloc::format!("file {file:?} {role}"), &known.name, rule);
            Refused(Error::refused(Code::BadField, refusal))
        })
    };
    saved.config.clone().map_files(0, &mut { find })
}

/// The rules that a bundle's configuration keeps to.
fn check_config(config: &config::Vm<FileIndex>, bundle: &Bundle<'static>) -> Result<(), Refused> {
    let all = Config { outer: bundle.config().outer, vms: alloc::vec![config.clone()] };
    let mut length = |file: &FileIndex| {
        bundle.file(*file).map(|file| file.data.len() as u64).ok_or_else(|| "not in the bundle".to_string())
    };
    all.check(&mut length).map_err(|refusal| Refused(Error::refused(Code::BadField, refusal)))?;
    if config.flash.is_some() || config.balloon || !config.pass_through.is_empty() {
        let text = "the snapshot's configuration: must have no flash, no balloon and no pass_through";
        return Err(Refused::because(text));
    }
    Ok(())
}

/// Every file has tags if its machine does, and only then.
fn check_tags(config: &config::Vm<FileIndex>, chain: &[Link]) -> Result<(), Refused> {
    match chain.iter().find(|link| link.pages.tagged != config.mte) {
        None => Ok(()),
        Some(link) => {
            let text = alloc::format!(
                "file {:?}: its pages have tags: {}; the configuration has mte = {}",
                link.pages.file.name,
                link.pages.tagged,
                config.mte
            );
            Err(Refused::because(text))
        }
    }
}

/// Frames of each object: the memory, and each disk.
fn sizes(config: &config::Vm<FileIndex>, bundle: &Bundle<'static>) -> Vec<u64> {
    let disks = config.disks.iter().map(|disk| image(bundle, disk.file).len() as u64);
    core::iter::once(config.memory).chain(disks).map(|bytes| bytes.div_ceil(PAGE_SIZE)).collect()
}

fn image(bundle: &Bundle<'static>, file: FileIndex) -> &'static [u8] {
    bundle.file(file).map_or(&[][..], |file| file.data)
}

/// Memory that is no machine's yet.
struct Memory(ObjectHandle);

impl Drop for Memory {
    fn drop(&mut self) {
        build::destroy_ram(self.0);
    }
}

/// Memory and disks, put together.
struct Parts {
    ram: Memory,
    disks: Vec<Arc<Overlay>>,
}

impl Parts {
    async fn make(
        config: &config::Vm<FileIndex>,
        bundle: &Bundle<'static>,
        (chain, shared): (&[Link], Option<&Shared>),
        source: Option<&Source>,
    ) -> Result<Self, Refused> {
        let ram = match shared {
            None => build::create_ram(config),
            Some(_) => build::create_closed_ram(config),
        };
        let mut parts = Self { ram: Memory(ram.map_err(Refused::out_of_memory)?), disks: Vec::new() };
        if let Some(shared) = shared {
            shared::apply(parts.ram.0, shared).await?;
        }
        for (number, disk) in (1..).zip(&config.disks) {
            let image = image(bundle, disk.file);
            let written = chain.iter().any(|link| link.index.runs.iter().any(|run| run.object == number));
            parts.disks.push(if written {
                overlay(image, disk.read_only)?
            } else {
                Overlay::new(image, disk.read_only)
            });
        }
        for (age, link) in chain.iter().enumerate() {
            parts.put(link, age, source).await?;
        }
        Ok(parts)
    }

    /// Puts what file `age` of the chain has over what is there.
    async fn put(&self, link: &Link, age: usize, source: Option<&Source>) -> Result<(), Refused> {
        let mut page = 0;
        for run in &link.index.runs {
            let object = match run.object.checked_sub(1) {
                None => Some(self.ram.0),
                Some(disk) => self.disks.get(disk as usize).and_then(|disk| disk.written()),
            };
            let object = object.ok_or_else(|| Refused::because("a run is of no object"))?;
            if age > 0 {
                clear(object, run.first, run.count)?;
            }
            if run.vacant {
                continue;
            }
            let frames = (object, run.first, run.count);
            match source {
                Some(source) if run.object == 0 => source.put((age, page), frames)?,
                _ => pages::fill(&link.pages, page, frames).await?,
            }
            page += run.count;
            store::task::pause().await;
        }
        Ok(())
    }

    /// The machine around them, which goes on. Its number. `records`: it shares its page with the records of stolen time.
    fn run(
        self,
        saved: Saved,
        config: &config::Vm<FileIndex>,
        bundle: &Bundle<'static>,
        (file, records): (&str, bool),
    ) -> Result<usize, Refused> {
        let Self { ram, disks } = self;
        let media = Media { disks, flash: None };
        let refused = |text: String| Refused::because(alloc::format!("file {file:?}: {text}"));
        registry::adopt(config, &media, |terminal| {
            let handle = ram.0;
            // It is the machine's from here on.
            core::mem::forget(ram);
            let (vm, status) = saved.load(config, bundle, terminal, &media, handle)?;
            if records {
                vm.share_records().map_err(|error| alloc::format!("the page with the records: {error:?}"))?;
            }
            Ok((vm, status))
        })
        .map_err(|refusal| match refusal {
            Ok(refusal) => Refused(crate::control::fork_refused("", refusal)),
            Err(text) => refused(text),
        })
    }
}

/// A disk over `image` on which nothing is written yet, but may be.
fn overlay(image: &'static [u8], read_only: bool) -> Result<Arc<Overlay>, Refused> {
    let host = host::get();
    let spec = Spec::anonymous((image.len() as u64).div_ceil(PAGE_SIZE), Policy::Pages);
    let object = host.objects.create(&host.supply(cpu::index()), spec).map_err(Refused::out_of_memory)?;
    Ok(Overlay::over(image, read_only, object))
}

/// Makes frames vacant.
fn clear(object: ObjectHandle, first: u64, count: u64) -> Result<(), Refused> {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let object = host.objects.get(&pin, object).ok_or_else(|| Refused::because("an object is gone"))?;
    object.punch(&host.supply(cpu::index()), first, count).map(drop).map_err(Refused::out_of_memory)
}
