//! Writing a virtual machine into a file.
//!
//! Protocol: [`begin`], in host's work, answers when the moment is over; the rest is a task. A file that cannot be written
//! whole leaves the store as it was; the machine knows nothing of it.

use alloc::collections::TryReserveError;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::arch::{cpu, timer};
use entresol_addr::PAGE_SIZE;
use entresol_backing::ObjectHandle;
use entresol_machine::Tags;
use entresol_wire::Refusal;
use entresol_wire::bundle::FileIndex;
use entresol_wire::control::{Code, Error};
use entresol_wire::snapshot::{Index, Known, TAGGED_PAGES, TAGS, Trailer, page_checksum};
use entresol_wire::store::{self as form, BLOCK};

use super::{Image, Refused, kept, lazy, pages, shared};
use crate::host;
use crate::registry::{self, Copy};
use crate::store::change::Turn;
use crate::store::file::Writer;
use crate::store::{self, Failure};

const _: () = assert!(BLOCK == PAGE_SIZE, "a page is a block");

/// Pages between two lines of progress.
const TOLD: u64 = 4096;

/// What is written.
pub struct Taken {
    number: usize,
    file: String,
    turn: Turn,
    base: Option<(u64, Arc<Image>)>,
    image: Arc<Image>,
    state: Vec<u8>,
    /// The page with the records of stolen time is shared with the hypervisor.
    records: bool,
    /// How long the machine stood still, in microseconds.
    pause: u64,
}

/// Takes the moment of virtual machine `number`.
///
/// # Errors
///
/// [`Refused`]; the store is as it was, and the machine goes on.
pub fn begin(number: usize, file: &str, base: Option<&str>) -> Result<Taken, Refused> {
    let vm = registry::find(number).ok_or_else(|| Refused::because("the virtual machine has ended"))?;
    if let Some(field) = vm.unsavable() {
        let rule = alloc::format!("must have no {field}");
        return Err(Refused(Error::refused(Code::WrongState, Refusal::text("vm", &vm.config.name, rule))));
    }
    let turn = Turn::take()?;
    let directory = store::directory()?;
    let base = base.map(|base| find_base(&directory, number, base)).transpose()?;
    lazy::check_unused(&directory, file)?;
    form::Writer::new(&directory, file, base.as_ref().map_or(0, |(id, _)| *id))?;
    drop(vm);
    let copy = registry::copy(number).map_err(|refusal| Refused(crate::control::fork_refused("", refusal)))?;
    let state = write_down(&copy)?;
    let image = Arc::new(Image::of(copy.vm.ram(), &copy.disks)?);
    let records = copy.vm.shares_records();
    let pause = copy.pause * 1_000_000 / timer::frequency();
    copy.discard();
    Ok(Taken { number, file: file.into(), turn, base, image, state, records, pause })
}

/// The file called `name`, if the machine's next snapshot can be the difference to it.
fn find_base(directory: &form::Directory, number: usize, name: &str) -> Result<(u64, Arc<Image>), Refused> {
    let id = directory.file(name)?.id;
    let image = kept::find(number, id).ok_or_else(|| {
        let rule =
            "must be the last snapshot of this virtual machine, or the one that it was made from, since it started";
        Refused(Error::refused(Code::BadField, Refusal::text("base", name, rule)))
    })?;
    Ok((id, image))
}

/// The small state.
fn write_down(copy: &Copy) -> Result<Vec<u8>, Refused> {
    let bundle = registry::bundle().ok_or_else(|| Refused::because("there is no bundle"))?;
    let known = |index: FileIndex| {
        let file = bundle.file(index);
        file.map_or(Known { name: String::new(), length: 0, checksum: 0 }, |file| Known {
            name: file.name.into(),
            length: file.data.len() as u64,
            checksum: file.checksum,
        })
    };
    let saved = copy.vm.save(copy.status, known).map_err(|_| Refused::out_of_memory("the heap has no room"))?;
    serde_json::to_vec(&saved).map_err(|error| Refused::because(alloc::format!("state: {error}")))
}

impl Taken {
    /// Writes it.
    ///
    /// # Errors
    ///
    /// [`Refused`]; the store is as it was.
    pub async fn write(self) -> Result<(), Refused> {
        let directory = store::directory()?;
        let base = self.base.as_ref().map_or(0, |(id, _)| *id);
        let mut writer = Writer::begin(&self.turn, &directory, &self.file, base)?;
        let (id, begun) = (writer.id(), timer::now());
        let pages = match self.write_all(&mut writer).await {
            Ok(pages) => pages,
            Err(failure) => {
                log::warn!("snapshot {}: given up: {failure}", self.file);
                writer.abandon(&failure).await;
                return Err(failure.into());
            }
        };
        let bytes = writer.length();
        writer.finish().await?;
        let milliseconds = (timer::now() - begun) * 1000 / timer::frequency();
        log::info!(
            "snapshot {}: {pages} pages, {bytes} bytes; the machine stood still for {} us; written in {milliseconds} ms",
            self.file,
            self.pause
        );
        // Of a machine that has ended meanwhile nobody needs it.
        if registry::find(self.number).is_some() {
            kept::keep(self.number, id, self.image);
        }
        Ok(())
    }

    /// Pages, state, index, shared pages, trailer. How many pages.
    async fn write_all(&self, writer: &mut Writer<'_>) -> Result<u64, Failure> {
        let mut index = Index::default();
        let mut tags = self.image.is_tagged().then(Group::default);
        let objects = self.image.objects();
        let bases = self.base.as_ref().map_or(Vec::new(), |(_, image)| image.objects());
        for (number, object) in objects.into_iter().enumerate() {
            let Some(object) = object else { continue };
            let base = bases.get(number).copied().flatten();
            self.write_object((writer, &mut tags), &mut index, number as u32, (object, base)).await?;
        }
        if let Some(group) = tags.as_mut().filter(|group| group.pages != 0) {
            group.write(writer).await?;
        }
        let shared = shared::list(self.image.ram, self.records).await?;
        let list = shared.as_ref().map_or(Ok(Vec::new()), |shared| shared.encode().map_err(no_room))?;
        let bytes = index.encode().map_err(no_room)?;
        let trailer = Trailer {
            base: self.base.as_ref().map_or(0, |(id, _)| *id),
            pages: index.checksums.len() as u64,
            state: self.state.len() as u64,
            state_checksum: crc32fast::hash(&self.state),
            index_checksum: crc32fast::hash(&bytes),
            runs: index.runs.len() as u64,
            tagged: tags.is_some(),
            shared: shared.map(|shared| shared.part(&list)),
        };
        writer.bytes(&self.state).await?;
        writer.bytes(&bytes).await?;
        writer.bytes(&list).await?;
        writer.bytes(&trailer.encode()).await?;
        Ok(trailer.pages)
    }

    /// The pages of one object that are not as in the base's.
    async fn write_object(
        &self,
        (writer, tags): (&mut Writer<'_>, &mut Option<Group>),
        index: &mut Index,
        number: u32,
        (object, base): (ObjectHandle, Option<ObjectHandle>),
    ) -> Result<(), Failure> {
        let empty = if base.is_some() { None } else { Some(Empty::like(object)?) };
        let against = base.or(empty.as_ref().map(|empty| empty.0)).ok_or(Failure::OutOfMemory)?;
        let mut from = 0;
        while let Some((first, count)) = next_difference(object, against, from) {
            from = first + count;
            for frame in first..from {
                let mut page = [0; PAGE_SIZE as usize];
                let found = pages::read(object, frame, &mut page).await?;
                // A disk's page that was written is not the image's, zero or not; one of zeros with a tag is not untouched.
                let differs = |tags: &Tags| number != 0 || *tags != Tags::ZERO || page != [0; PAGE_SIZE as usize];
                if let Some(found) = found.filter(differs) {
                    let found = tags.is_some().then(|| found.to_bytes());
                    index.push(number, frame, Some(page_checksum(&page, found.as_ref()))).map_err(no_room)?;
                    writer.page(|block| block.copy_from_slice(&page)).await?;
                    if let Some((group, found)) = tags.as_mut().zip(found) {
                        group.add(writer, &found).await?;
                    }
                    if (index.checksums.len() as u64).is_multiple_of(TOLD) {
                        log::info!("snapshot {}: {} pages so far", self.file, index.checksums.len());
                    }
                } else if base.is_some() {
                    index.push(number, frame, None).map_err(no_room)?;
                }
            }
            store::task::pause().await;
        }
        Ok(())
    }
}

fn no_room(_: TryReserveError) -> Failure {
    Failure::OutOfMemory
}

/// Tags of pages that are in the file, whose block is not.
struct Group {
    block: [u8; BLOCK as usize],
    pages: usize,
}

impl Default for Group {
    fn default() -> Self {
        Self { block: [0; BLOCK as usize], pages: 0 }
    }
}

impl Group {
    /// One page's more; a whole block goes behind its pages.
    async fn add(&mut self, writer: &mut Writer<'_>, tags: &[u8; TAGS]) -> Result<(), Failure> {
        self.block[self.pages * TAGS..][..TAGS].copy_from_slice(tags);
        self.pages += 1;
        if self.pages as u64 == TAGGED_PAGES { self.write(writer).await } else { Ok(()) }
    }

    async fn write(&mut self, writer: &mut Writer<'_>) -> Result<(), Failure> {
        let Self { block, .. } = core::mem::take(self);
        writer.page(|to| to.copy_from_slice(&block)).await
    }
}

/// The next part in which both differ, from frame `from` on.
fn next_difference(object: ObjectHandle, base: ObjectHandle, from: u64) -> Option<(u64, u64)> {
    let host = host::get();
    let pin = host.epoch.pin(cpu::index());
    let (object, base) = (host.objects.get(&pin, object)?, host.objects.get(&pin, base)?);
    let supply = host.supply(cpu::index());
    // Both are images of one machine: they have one shape.
    let mut differences = object.differences(&supply, base, from).ok()?;
    differences.next()
}

/// An object in which nothing was ever written.
struct Empty(ObjectHandle);

impl Empty {
    fn like(object: ObjectHandle) -> Result<Self, Failure> {
        let host = host::get();
        let made = host.objects.create_like(&host.supply(cpu::index()), object);
        made.map(Self).map_err(|_| Failure::OutOfMemory)
    }
}

impl Drop for Empty {
    fn drop(&mut self) {
        crate::vm::build::destroy_ram(self.0);
    }
}
