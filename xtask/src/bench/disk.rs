//! What a disk costs a guest whose memory is private, against one whose memory is shared.
//!
//! Linux reads and writes a disk in pieces of 64 KiB past its page cache, so each goes through virtio's queue once, then reads some
//! of it in pieces of 4 KiB, and writes to the kernel's log in between, which says when: guest time, which is instructions here
//! ([`machine`]), the hypervisor's included. The first round is not counted: it makes what the later ones find.

use anyhow::{Context, Result, ensure};
use entresol_wire::config::{WrittenMemory, WrittenVm};

use super::Bench;
use super::machine::{self, Run};
use super::operations::GUEST;
use super::table::Row;
use crate::initrd::{Initrd, SCRIPT_EXIT};
use crate::{bundle, image};

/// Bytes of the disk.
const DISK: usize = 16 << 20;
/// What the log has between two parts.
const MARK: &str = "disk: mark";
/// Rounds that count.
const ROUNDS: usize = 3;
/// Private memory has at least 0.8 of the throughput.
const TARGET: f64 = 1.0 / 0.8;
/// Pieces of 4 KiB in a round.
const SMALL: u32 = 2048;
/// Instructions of guest and hypervisor for one of them, to shared and to private memory.
const SMALL_TARGETS: [f64; 2] = [27_000.0, 27_000.0];
/// An instruction is a nanosecond of guest time ([`machine`]).
const INSTRUCTIONS: f64 = 1e9;

/// Seconds that a guest took for each part of a round, the mean.
#[derive(Debug)]
struct Times {
    read: f64,
    write: f64,
    small: f64,
}

/// Parts of a round.
const PARTS: usize = 3;

/// Measures both guests.
///
/// # Errors
/// When a machine does not come to its end, or does not say how long it took.
pub fn measure(bench: &Bench) -> Result<Vec<Row>> {
    let (private, shared) = (run(bench, true)?, run(bench, false)?);
    let row = |key, value| Row::Figure { key, value, target: TARGET, unit: "times shared memory's time" };
    Ok(vec![
        row("private_disk_read", private.read / shared.read),
        row("private_disk_write", private.write / shared.write),
        small("disk_read_4k", &shared, SMALL_TARGETS[0]),
        small("private_disk_read_4k", &private, SMALL_TARGETS[1]),
    ])
}

/// What one of the small pieces costs.
fn small(key: &'static str, times: &Times, target: f64) -> Row {
    let value = times.small * INSTRUCTIONS / f64::from(SMALL);
    Row::Figure { key, value, target, unit: "instructions" }
}

fn run(bench: &Bench, private: bool) -> Result<Times> {
    let name = if private { "disk-private" } else { "disk-shared" };
    let script = format!(
        "echo {MARK} > /dev/kmsg; for round in $(seq {}); do \
         dd if=/dev/vda of=/dev/null bs=64k iflag=direct || exit 1; echo {MARK} > /dev/kmsg; \
         dd if=/dev/zero of=/dev/vda bs=64k count={} oflag=direct || exit 1; echo {MARK} > /dev/kmsg; \
         dd if=/dev/vda of=/dev/null bs=4k count={SMALL} iflag=direct || exit 1; echo {MARK} > /dev/kmsg; done",
        ROUNDS + 1,
        DISK >> 16
    );
    let initrd = machine::file(bench, &format!("{name}.cpio"));
    image::write_new(&initrd, &Initrd::scripted(&script).pack(&bench.guest)?)?;
    let disk = machine::file(bench, &format!("{name}.img"));
    image::write_new(&disk, &vec![0xd5; DISK])?;
    let vm = WrittenVm {
        memory: WrittenMemory { size: GUEST.1.to_owned(), private, ..Default::default() },
        disks: vec![bundle::disk(&disk)],
        ..bundle::linux("disk", &bench.guest.kernel()?, &initrd)
    };
    let packed = machine::pack(bench, name, vm)?;
    let done = format!("{SCRIPT_EXIT}0");
    let run = Run::new(name, &bench.hypervisor, &packed, &done);
    times(&run.to_end(bench)?.console)
}

/// From lines such as `[    0.820963] disk: mark`, between which a round's parts take turns.
fn times(console: &str) -> Result<Times> {
    let marked = console.lines().filter_map(|line| line.trim_end().strip_suffix(MARK)?.trim().strip_prefix('['));
    let marked = marked.map(|line| line.trim_end_matches(']').trim());
    let marks: Vec<f64> =
        marked.map(|text| text.parse().with_context(|| format!("{text:?}"))).collect::<Result<_>>()?;
    ensure!(marks.len() == PARTS * (ROUNDS + 1) + 1, "a guest told {} times", marks.len());
    let counted: Vec<f64> = marks.windows(2).skip(PARTS).map(|pair| pair[1] - pair[0]).collect();
    let mean = |first: usize| counted.iter().skip(first).step_by(PARTS).sum::<f64>() / ROUNDS as f64;
    Ok(Times { read: mean(0), write: mean(1), small: mean(2) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_round_does_not_count_and_its_parts_take_turns() {
        let line = |seconds: f64| format!("[ {seconds:>11.6}] {MARK}\r\n");
        let text: String =
            [0.0, 9.0, 18.0, 18.5, 18.6, 19.6, 19.7, 19.9, 21.9, 22.0, 22.3, 25.3, 25.4].map(line).concat();
        let Times { read, write, small } = times(&text).unwrap();
        let near = |value: f64, what: f64| (value - what).abs() < 1e-9;
        assert!(near(read, 0.2) && near(write, 2.0) && near(small, 0.1), "{read} {write} {small}");
        assert!(times("").is_err());
    }
}
