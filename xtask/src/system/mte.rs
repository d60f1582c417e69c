//! Memory tagging in Linux: the C library's tagged heap finds what is used after it was freed; a guest without it has none. Tags from outside, and
//! in snapshots.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use entresol_wire::config::{Arch, WrittenVm};
use entresol_wire::control::{Answer, Bytes, Code, Op, TAGGED_PER_ANSWER};

use super::Context;
use super::control::Listener;
use super::machine::{Builder, Machine};
use super::store::create;
use crate::bundle::{linux, program};
use crate::fetch::{self, programs::PERL};
use crate::guests;
use crate::initrd::{self, Initrd};

/// Who may use tags.
const TAGGED: &str = "tagged";
/// Who may not.
const PLAIN: &str = "plain";

/// Keeps the address of a string, frees the string, and reads it.
const MISUSE: &str = "perl -e '$x .= \"A\" for 1..1000; $p = unpack(\"J\", pack(\"p\", $x)); undef $x; \
                      print unpack(\"P1000\", pack(\"J\", $p)) ? \"re\" . \"ad\" : \"no\"' 2> /dev/null";

/// How often that is tried: whoever got the memory since has the same tag one time in fifteen, and then nobody notices.
const TIMES: u32 = 12;

/// With the C library's tags (glibc's manual, glibc.mem.tagging: 1 tags, 2 makes faults precise) the program is killed for it, on a
/// machine with `mte = true`, and on no other.
pub fn tagged_heap_finds_what_was_freed(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "tagged_heap_finds_what_was_freed")?;
    let initrd =
        builder.initrd("initrd.cpio", &Initrd::interactive().with(fetch::programs(PERL, Arch::Arm64)?.files()?))?;
    let kernel = context.guest.kernel()?;
    let vm = |name: &str, mte| {
        let vm = linux(name, &kernel, &initrd);
        WrittenVm { memory: "256M".to_owned().into(), autostart: Some(false), mte, ..vm }
    };
    let mut machine = builder.boot(vec![vm(TAGGED, true), vm(PLAIN, false)])?;
    let mut told = Listener::attach(machine.control()?, TAGGED)?;
    for (serial, vm, has) in [(10, TAGGED, true), (20, PLAIN, false)] {
        told.turn_to(vm)?;
        told.done(Op::Resume { vm: vm.into() })?;
        told.hear(initrd::READY)?;
        let shown = told.shell(serial, "dmesg -n 1; grep -o -w mte /proc/cpuinfo | sort | uniq | wc -l")?;
        ensure!(shown == u32::from(has).to_string(), "{vm}: /proc/cpuinfo names mte {shown} times");
        for (step, tunables, finds) in [(1, 0, false), (2, 3, has)] {
            let misuse = format!("GLIBC_TUNABLES=glibc.mem.tagging={tunables} {MISUSE}");
            // 128 + SIGSEGV (11), as the shell reports it.
            let each = format!("for n in $(seq {TIMES}); do {misuse}; echo $?; done");
            let count = "grep -c ^139 /run/ends; grep -c ^read0 /run/ends; true";
            let command = format!("({each}) > /run/ends 2> /dev/null; {count}");
            let answer = told.shell(serial + step, &command)?;
            let mut counts = answer.lines().map(|line| line.trim().parse().unwrap_or(0));
            let (killed, read): (u32, u32) = (counts.next().unwrap_or(0), counts.next().unwrap_or(0));
            let right = killed + read == TIMES && if finds { killed > read } else { killed == 0 };
            ensure!(right, "{vm}, tagging {tunables}: {killed} killed, {read} have read: {answer:?}");
        }
    }
    told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

/// Memory of who keeps tags, and what of it is tagged.
const MEMORY: u64 = 64 << 20;
const KEPT: u64 = 8 << 20;
const PAGE: u64 = 4096;
/// Tags of a page.
const TAGS: usize = 256;
/// Where memory begins, and its last page, which nobody touches.
const RAM: u64 = 0x4000_0000;
const LAST: u64 = RAM + MEMORY - PAGE;

/// A guest's tags are read and written from outside, saved with the machine, the second time as a difference, and the same in a machine that is
/// made from the files.
pub fn tags_outlive_the_machine(context: &Context) -> Result<()> {
    const NAME: &str = "tags_outlive_the_machine";
    let store = Builder::new(context, NAME)?.file("store.img", &[])?;
    create(&store, 256 << 20)?;
    let mut machine = boot_keeper(context, NAME, &store)?;
    let mut told = Listener::attach(machine.control()?, TAGGED)?;
    told.done(Op::Resume { vm: TAGGED.into() })?;
    told.hear("TOUCHER 8 MiB at 0x")?;
    let line = told.line()?;
    let start = line.split(',').next().and_then(|digits| u64::from_str_radix(digits, 16).ok());
    let start = start.with_context(|| format!("{line:?} begins with an address"))?;
    told.hear("VERIFIED")?;
    refusals(&mut told, start)?;
    let kept = read(&mut told, TAGGED, start, KEPT)?;
    ensure!(kept.iter().any(|tag| *tag != 0) && kept.iter().all(|tag| *tag < 16), "its tags are no tags");
    save(&mut told, "one", None)?;
    from_outside(&mut told, start)?;
    save(&mut told, "two", Some("one"))?;
    told.hear("VERIFIED")?;
    told.done(Op::Shutdown)?;
    machine.expect_power_off()?;

    let mut machine = boot_keeper(context, "tags_outlive_the_machine-again", &store)?;
    let mut told = Listener::attach(machine.control()?, TAGGED)?;
    machine.expect("store: 2 files")?;
    told.done(Op::Restore { file: "two".into(), name: Some("back".into()) })?;
    // Read before it is there, or after.
    ensure!(read(&mut told, "back", start, KEPT)? == kept, "the tags of the restored machine are others");
    ensure!(read(&mut told, "back", LAST, PAGE)? == last_tags(), "a page of zeros has lost its tags");
    told.turn_to("back")?;
    for _ in 0..3 {
        told.hear("VERIFIED")?;
    }
    told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

fn boot_keeper(context: &Context, name: &str, store: &Path) -> Result<Machine> {
    let kernel = guests::flat("toucher")?;
    let vm = |name: &str, mte, arguments: &str| WrittenVm {
        memory: "64M".to_owned().into(),
        autostart: Some(false),
        mte,
        ..program(name, &kernel, arguments)
    };
    let vms = vec![vm(TAGGED, true, "mib=8 seed=1 tags hold"), vm(PLAIN, false, "mib=1")];
    Builder::new(context, name)?.store(store).boot(vms)
}

fn save(told: &mut Listener, file: &'static str, base: Option<&'static str>) -> Result<()> {
    told.done(Op::Snapshot { vm: TAGGED.into(), file: file.into(), base: base.map(Into::into) })
}

/// The tags of so much memory.
fn read(told: &mut Listener, vm: &'static str, gpa: u64, size: u64) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    while (all.len() / TAGS) as u64 * PAGE != size {
        let done = (all.len() / TAGS) as u64 * PAGE;
        let size = (size - done).min(TAGGED_PER_ANSWER * PAGE);
        let Answer::Tags(tags) = told.ask(Op::ReadTags { vm: vm.into(), gpa: gpa + done, size })? else {
            bail!("tags are told otherwise");
        };
        ensure!(tags.0.len() as u64 == size / 16, "{} tags of {size:#x} bytes at {:#x}", tags.0.len(), gpa + done);
        all.extend(&*tags.0);
    }
    Ok(all)
}

/// What is not to be read or written.
fn refusals(told: &mut Listener, start: u64) -> Result<()> {
    let page = [1; TAGS];
    let read = |vm: &'static str, gpa, size| Op::ReadTags { vm: vm.into(), gpa, size };
    let write =
        |vm: &'static str, gpa, tags: &[u8]| Op::WriteTags { vm: vm.into(), gpa, tags: Bytes(tags.to_vec().into()) };
    told.refused(read(PLAIN, RAM, PAGE), Code::WrongState)?;
    told.refused(write(PLAIN, RAM, &page), Code::WrongState)?;
    for (gpa, size) in [(start + 16, PAGE), (start, 100), (start, 0), (start, (TAGGED_PER_ANSWER + 1) * PAGE)] {
        told.refused(read(TAGGED, gpa, size), Code::BadField)?;
    }
    told.refused(write(TAGGED, start + 16, &page), Code::BadField)?;
    told.refused(write(TAGGED, start, &page[1..]), Code::BadField)?;
    told.refused(write(TAGGED, start, &[16; TAGS]), Code::BadField)?;
    // No slot; the serial port's registers.
    for gpa in [RAM + MEMORY, 0x0900_0000] {
        told.refused(read(TAGGED, gpa, PAGE), Code::BadField)?;
        told.refused(write(TAGGED, gpa, &page), Code::BadField)?;
    }
    Ok(())
}

fn last_tags() -> Vec<u8> {
    (0..TAGS).map(|granule| (granule % 16) as u8).collect()
}

/// What can be: as far as memory goes.
fn from_outside(told: &mut Listener, start: u64) -> Result<()> {
    for _ in 0..2 {
        ensure!(read(told, TAGGED, LAST, PAGE)? == [0; TAGS], "a page that nobody touched has tags");
    }
    let write = |gpa, tags: Vec<u8>| Op::WriteTags { vm: TAGGED.into(), gpa, tags: Bytes(tags.into()) };
    let two = [last_tags(), last_tags()].concat();
    ensure!(told.ask(write(LAST, two))? == Answer::Count(1), "the second page is outside");
    ensure!(read(told, TAGGED, LAST, PAGE)? == last_tags(), "tags are not what was written");
    let Answer::Tags(tags) = told.ask(Op::ReadTags { vm: TAGGED.into(), gpa: LAST, size: 2 * PAGE })? else {
        bail!("tags are told otherwise");
    };
    ensure!(*tags.0 == last_tags(), "{} tags up to the end of memory", tags.0.len());
    // The guest finds what was written: the same, or it would end.
    let mine = read(told, TAGGED, start, PAGE)?;
    ensure!(told.ask(write(start, mine))? == Answer::Count(1), "a page of the guest's");
    told.hear("VERIFIED")
}
