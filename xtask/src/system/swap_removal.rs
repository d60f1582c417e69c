//! A swap device that is taken out of use, and used again.

use std::time::Instant;

use anyhow::{Result, bail, ensure};
use entresol_wire::config::WrittenVm;
use entresol_wire::control::{Answer, Code, Op};

use super::Context;
use super::control::Listener;
use super::machine::{ANSWER, Builder};
use super::nbd::{Mode, Server};
use crate::bundle::program;
use crate::guests;

/// It has tags, and changes what it keeps.
const KEEPER: &str = "keeper";
/// Its copy.
const COPY: &str = "copy";
/// What is counted by.
const WITNESS: &str = "witness";
/// It may not have all that it uses in frames.
const BOUNDED: &str = "bounded";

const MIBS: u64 = 16;
const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Bytes of the disk: a place is nine sectors, with room for tags.
const DISK: usize = 108 << 20;

/// What is on the disk comes back for all who share it, tags too, before it is out of use: nobody misses it then. Where it cannot all come back, the disk stays.
pub fn swap_device_is_removed_and_used_again(context: &Context) -> Result<()> {
    let kernel = guests::flat("toucher")?;
    let vm = |name: &str, arguments: &str| WrittenVm {
        memory: "64M".to_owned().into(),
        autostart: Some(false),
        ..program(name, &kernel, arguments)
    };
    let mut bounded = vm(BOUNDED, "mib=8 seed=2 hold");
    bounded.memory.max = Some("4M".to_owned());
    let keeper = WrittenVm { mte: true, ..vm(KEEPER, &format!("mib={MIBS} seed=1 tags zero churn")) };
    let disk = Server::start(DISK)?;
    let builder = Builder::new(context, "swap_device_is_removed_and_used_again")?.outer("1G", 2);
    let device = "virtio-blk-device,drive=swap,serial=entresol-swap";
    let mut machine = builder.qemu(&["-drive", &disk.drive("swap"), "-device", device]).boot(vec![
        keeper,
        bounded,
        vm(WITNESS, "mib=1"),
    ])?;
    machine.expect("swap: 96 MiB")?;
    let told = Listener::attach(machine.control()?, BOUNDED)?;
    let mut test = Test { told, disk };
    test.stays_where_a_limit_says_so()?;
    test.takes_nothing_with_it()?;
    test.go_on(&[KEEPER])?;
    test.put_out(KEEPER)?;
    test.told.done(Op::Fork { vm: KEEPER.into(), name: COPY.into(), count: None })?;
    // It changes some of what both have on the disk, and what it does not change leaves again.
    test.go_on(&[COPY])?;
    test.put_out(COPY)?;
    test.disk.set(Mode::NoReads);
    test.told.refused(Op::SwapOff, Code::StoreFailed)?;
    test.disk.set(Mode::Right);
    let read = test.remove()?;
    ensure!(read > MIBS * MIB / 2, "{read} bytes came back");
    test.no_disk_is_missed()?;
    test.is_used_again()?;
    test.leaves_while_guests_run()?;
    test.no_disk_is_missed()?;
    test.told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

struct Test {
    told: Listener,
    disk: Server,
}

impl Test {
    fn stays_where_a_limit_says_so(&mut self) -> Result<()> {
        self.go_on(&[BOUNDED])?;
        self.told.refused(Op::SwapOff, Code::WrongState)?;
        self.told.done(Op::Kill { vm: BOUNDED.into() })
    }

    /// What the hypervisor needs for it is given back.
    fn takes_nothing_with_it(&mut self) -> Result<()> {
        self.remove()?;
        let free = self.told.stats(WITNESS)?.free_frames;
        self.add()?;
        ensure!(self.told.stats(WITNESS)?.free_frames < free, "the disk is used without a frame");
        self.remove()?;
        let deadline = Instant::now() + ANSWER;
        while self.told.stats(WITNESS)?.free_frames != free {
            ensure!(Instant::now() < deadline, "not all of {free} frames come back");
        }
        self.add()
    }

    /// Nobody runs who may share what is to leave.
    fn put_out(&mut self, vm: &'static str) -> Result<()> {
        self.told.done(Op::Pause { vm: vm.into() })?;
        let deadline = Instant::now() + ANSWER;
        loop {
            match self.told.ask(Op::Reclaim { vm: vm.into(), size: MIBS * MIB }) {
                Ok(Answer::Count(1..)) => return Ok(()),
                Ok(answer) => bail!("{vm} was to leave: {answer:?}"),
                // QEMU connects again, when it is asked for something, to a disk that was gone.
                Err(error) => ensure!(Instant::now() < deadline, error),
            }
        }
    }

    /// Lets them run, until a round that was begun after this is found right.
    fn go_on(&mut self, vms: &[&'static str]) -> Result<()> {
        for vm in vms {
            self.told.done(Op::Resume { vm: (*vm).into() })?;
        }
        self.another_round(vms)
    }

    fn another_round(&mut self, vms: &[&'static str]) -> Result<()> {
        for vm in vms {
            self.told.turn_to(vm)?;
            for _ in 0..3 {
                self.told.hear("VERIFIED")?;
            }
        }
        Ok(())
    }

    /// Bytes that came back.
    fn remove(&mut self) -> Result<u64> {
        match self.told.ask(Op::SwapOff)? {
            Answer::Count(bytes) => Ok(bytes),
            other => bail!("the removal is answered with {other:?}"),
        }
    }

    fn add(&mut self) -> Result<()> {
        let room = self.told.ask(Op::SwapOn)?;
        ensure!(room == Answer::Count(96 * MIB), "there is room for {room:?}");
        self.told.refused(Op::SwapOn, Code::StoreFailed)
    }

    fn no_disk_is_missed(&mut self) -> Result<()> {
        self.disk.set(Mode::Gone);
        self.go_on(&[KEEPER, COPY])?;
        for op in [Op::Reclaim { vm: KEEPER.into(), size: PAGE }, Op::SwapOff] {
            self.told.refused(op, Code::StoreFailed)?;
        }
        self.disk.set(Mode::Right);
        Ok(())
    }

    fn is_used_again(&mut self) -> Result<()> {
        self.add()?;
        for vm in [KEEPER, COPY] {
            self.put_out(vm)?;
        }
        self.go_on(&[KEEPER, COPY])
    }

    /// Both are at it while their memory comes back, and stop only to be asked to go on without a disk.
    fn leaves_while_guests_run(&mut self) -> Result<()> {
        for vm in [KEEPER, COPY] {
            self.put_out(vm)?;
        }
        for vm in [KEEPER, COPY] {
            self.told.done(Op::Resume { vm: vm.into() })?;
        }
        self.remove()?;
        self.another_round(&[KEEPER, COPY])?;
        for vm in [KEEPER, COPY] {
            self.told.done(Op::Pause { vm: vm.into() })?;
        }
        Ok(())
    }
}
