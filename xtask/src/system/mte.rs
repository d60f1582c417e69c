//! Memory tagging in Linux: the C library's tagged heap finds what is used after it was freed; a guest without it has none.

use anyhow::{Result, ensure};
use entresol_wire::config::WrittenVm;
use entresol_wire::control::Op;

use super::Context;
use super::control::Listener;
use super::machine::Builder;
use crate::bundle::linux;
use crate::fetch::{self, programs::PERL};
use crate::initrd::{self, Initrd};

/// Who may use tags.
const TAGGED: &str = "tagged";
/// Who may not.
const PLAIN: &str = "plain";

/// Keeps the address of a string, frees the string, and reads it.
const MISUSE: &str = "perl -e '$x .= \"A\" for 1..1000; $p = unpack(\"J\", pack(\"p\", $x)); undef $x; \
                      print unpack(\"P1000\", pack(\"J\", $p)) ? \"re\" . \"ad\" : \"no\"' 2> /dev/null";

/// With the C library's tags (glibc's manual, glibc.mem.tagging: 1 tags, 2 makes faults precise) the program is killed for it, on a
/// machine with `mte = true`, and on no other.
pub fn tagged_heap_finds_what_was_freed(context: &Context) -> Result<()> {
    let builder = Builder::new(context, "tagged_heap_finds_what_was_freed")?;
    let initrd = builder.initrd("initrd.cpio", &Initrd::interactive().with(fetch::programs(PERL)?.files()?))?;
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
        for (step, tunables, killed) in [(1, 0, false), (2, 3, has)] {
            let command = format!("GLIBC_TUNABLES=glibc.mem.tagging={tunables} {MISUSE}; echo \" $?\"");
            let answer = told.shell(serial + step, &command)?;
            // 128 + SIGSEGV (11), as the shell reports it.
            let expected = if killed { "139" } else { "read 0" };
            ensure!(answer.ends_with(expected), "{vm}, tagging {tunables}: {answer:?}, not {expected:?}");
        }
    }
    told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}
