//! The store: what the host puts there the machine finds, and the other way round.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use entresol_cli::Exit;
use entresol_cli::store::{self, Store};
use entresol_wire::control::{Answer, Code, Files, Op};

use super::Context;
use super::control::Listener;
use super::machine::Builder;
use crate::bundle::linux;
use crate::initrd::Initrd;

/// Who only waits, so that the machine stays on.
const WITNESS: &str = "witness";

/// Carries out what `entresol store` does.
pub fn host(store: &Store) -> Result<()> {
    ensure!(store::run(store) == Exit::Done, "{store:?} failed");
    Ok(())
}

/// An empty store in place of one that an earlier run left.
pub fn create(image: &Path, size: u64) -> Result<()> {
    if image.exists() {
        std::fs::remove_file(image)?;
    }
    host(&Store::Create { image: image.to_owned(), size })
}

/// What the hypervisor says of its store.
pub fn files(told: &mut Listener) -> Result<Files<'static>> {
    match told.ask(Op::Files)? {
        Answer::Files(files) => Ok(files),
        other => bail!("{other:?} should be a list of files"),
    }
}

/// A store of the host's is listed and changed by the machine, and right on the host after it; a machine without one says so.
pub fn files_outlive_the_machine(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "files_outlive_the_machine")?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive())?;
    let image = builder.file("store.img", &[])?;
    create(&image, 16 << 20)?;
    for (name, length) in [("one", 5000), ("two", 100_000)] {
        let input = builder.file(name, &vec![7; length])?;
        host(&Store::Put { image: image.clone(), name: name.to_owned(), input })?;
    }
    let mut waiting = linux(WITNESS, &context.guest.kernel()?, &initrd);
    waiting.autostart = Some(false);
    let mut machine = builder.store(&image).boot(vec![waiting.clone()])?;
    machine.expect("store: 2 files")?;
    let mut told = Listener::attach(machine.control()?, WITNESS)?;
    let before = files(&mut told)?;
    let names: Vec<_> = before.rows.iter().map(|row| (&*row.name, row.length)).collect();
    ensure!(names == [("one", 5000), ("two", 100_000)], "the machine lists {names:?}");
    told.done(Op::RemoveFile { file: "two".into() })?;
    let after = files(&mut told)?;
    ensure!(after.rows.len() == 1 && after.free == before.free + 25 * 4096, "removed: {after:?}");
    told.refused(Op::RemoveFile { file: "two".into() }, Code::StoreFailed)?;
    told.done(Op::Shutdown)?;
    machine.expect_power_off()?;
    host(&Store::Check { image: image.clone() })?;
    let output: PathBuf = image.with_file_name("got");
    if output.exists() {
        std::fs::remove_file(&output)?;
    }
    host(&Store::Get { image: image.clone(), name: "one".to_owned(), output: output.clone() })?;
    ensure!(std::fs::read(&output)? == vec![7; 5000], "one is another");
    let gone = store::run(&Store::Get { image, name: "two".to_owned(), output: output.with_extension("two") });
    ensure!(gone != Exit::Done, "two is still there");
    without_a_store(context, waiting)
}

fn without_a_store(context: &Context, waiting: entresol_wire::config::WrittenVm) -> Result<()> {
    let mut machine = Builder::new(context, "files_outlive_the_machine-none")?.boot(vec![waiting])?;
    let mut told = Listener::attach(machine.control()?, WITNESS)?;
    told.refused(Op::Files, Code::StoreFailed)?;
    told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}
