//! What a disk costs a guest whose memory is private, against one whose memory is shared.
//!
//! Linux reads and writes a disk in pieces of 64 KiB past its page cache, so each goes through virtio's queue once, and writes to
//! the kernel's log in between, which says when: guest time, which is instructions here ([`machine`]), the hypervisor's included. The
//! first round is not counted: it makes what the later ones find.

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

/// Seconds that a guest took for a round, the mean.
struct Times {
    read: f64,
    write: f64,
}

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
    ])
}

fn run(bench: &Bench, private: bool) -> Result<Times> {
    let name = if private { "disk-private" } else { "disk-shared" };
    let script = format!(
        "echo {MARK} > /dev/kmsg; for round in $(seq {}); do \
         dd if=/dev/vda of=/dev/null bs=64k iflag=direct || exit 1; echo {MARK} > /dev/kmsg; \
         dd if=/dev/zero of=/dev/vda bs=64k count={} oflag=direct || exit 1; echo {MARK} > /dev/kmsg; done",
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

/// From lines such as `[    0.820963] disk: mark`, between which a read and a write take turns.
fn times(console: &str) -> Result<Times> {
    let marked = console.lines().filter_map(|line| line.trim_end().strip_suffix(MARK)?.trim().strip_prefix('['));
    let marked = marked.map(|line| line.trim_end_matches(']').trim());
    let marks: Vec<f64> =
        marked.map(|text| text.parse().with_context(|| format!("{text:?}"))).collect::<Result<_>>()?;
    ensure!(marks.len() == 2 * (ROUNDS + 1) + 1, "a guest told {} times", marks.len());
    let counted: Vec<f64> = marks.windows(2).skip(2).map(|pair| pair[1] - pair[0]).collect();
    let mean = |first: usize| counted.iter().skip(first).step_by(2).sum::<f64>() / ROUNDS as f64;
    Ok(Times { read: mean(0), write: mean(1) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_round_does_not_count_and_reads_and_writes_take_turns() {
        let line = |seconds: f64| format!("[ {seconds:>11.6}] {MARK}\r\n");
        let text: String = [0.0, 9.0, 18.0, 18.1, 19.1, 19.3, 21.3, 21.6, 24.6].map(line).concat();
        let Times { read, write } = times(&text).unwrap();
        assert!((read - 0.2).abs() < 1e-9 && (write - 2.0).abs() < 1e-9, "{read} {write}");
        assert!(times("").is_err());
    }
}
