//! A swap device that fails in every way that one can, and comes back.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use entresol_wire::config::{WrittenMemory, WrittenVm};
use entresol_wire::control::{Op, State};

use super::Context;
use super::control::Listener;
use super::machine::{ANSWER, Builder};
use super::nbd::{Mode, Server};
use crate::bundle::program;
use crate::guests;

/// It has 32 MiB in memory, and works on 64.
const SWAPPER: &str = "swapper";
/// It needs nothing of the disk.
const BYSTANDER: &str = "bystander";
/// Bytes of the disk: a place is nine sectors, with room for tags.
const DISK: usize = 108 << 20;
/// Exits of the bystander that are progress: it tells every round.
const EXITS: u64 = 200;
/// Times that a disk which is back is tried: QEMU fails what comes while it connects again.
const TRIES: usize = 100;

/// Whatever the disk does, no word is lost, so what cannot be written stays in memory: the virtual machine that needs the disk is paused and says so, or
/// waits if there is no answer; the other runs; when the disk is right again the paused one goes on.
pub fn swap_device_fails_and_comes_back(context: &Context) -> Result<()> {
    let kernel = guests::flat("toucher")?;
    let vm = |name: &str, arguments: &str, memory: WrittenMemory| WrittenVm {
        memory,
        autostart: Some(false),
        ..program(name, &kernel, arguments)
    };
    let bounded = WrittenMemory { max: Some("32M".to_owned()), ..WrittenMemory::from("256M") };
    let vms = vec![vm(SWAPPER, "mib=64 seed=1 hold", bounded), vm(BYSTANDER, "mib=8 seed=2 hold", "64M".into())];
    let disk = Server::start(DISK)?;
    let builder = Builder::new(context, "swap_device_fails_and_comes_back")?.outer("1G", 2);
    let device = "virtio-blk-device,drive=swap,serial=entresol-swap";
    let mut machine = builder.qemu(&["-drive", &disk.drive("swap"), "-device", device]).boot(vms)?;
    machine.expect("swap: 96 MiB")?;
    let told = Listener::attach(machine.control()?, SWAPPER)?;
    let mut test = Test { told, disk };
    for vm in [BYSTANDER, SWAPPER] {
        test.told.done(Op::Resume { vm: vm.into() })?;
    }
    test.another_round()?;
    for mode in [Mode::NoReads, Mode::NoWrites, Mode::HalfWrites, Mode::Gone] {
        test.fails_and_comes_back(mode).with_context(|| format!("the disk was {mode:?}"))?;
    }
    test.is_silent_for_a_while()?;
    test.told.done(Op::Shutdown)?;
    machine.expect_power_off().map(drop)
}

struct Test {
    told: Listener,
    disk: Server,
}

impl Test {
    fn fails_and_comes_back(&mut self, mode: Mode) -> Result<()> {
        let failed = self.disk.failed();
        self.disk.set(mode);
        self.told.state(State::Paused, Some("Storage"))?;
        self.bystander_goes_on()?;
        // Tried again too early it ends the same way.
        self.told.done(Op::Resume { vm: SWAPPER.into() })?;
        self.told.state(State::Paused, Some("Storage"))?;
        self.bystander_goes_on()?;
        ensure!(mode == Mode::Gone || self.disk.failed() > failed, "no request has failed");
        self.disk.set(Mode::Right);
        self.goes_on()
    }

    /// A disk that does not answer holds up who waits for it, until it does; nobody has to help.
    fn is_silent_for_a_while(&mut self) -> Result<()> {
        let failed = self.disk.failed();
        self.disk.set(Mode::Silent);
        let deadline = Instant::now() + ANSWER;
        while self.disk.failed() == failed {
            ensure!(Instant::now() < deadline, "nobody asks the disk");
            self.told.stats(BYSTANDER)?;
        }
        self.bystander_goes_on()?;
        self.told.expect_running(SWAPPER)?;
        self.disk.set(Mode::Right);
        self.another_round()
    }

    /// Lets the one that is paused run until it stays so: a round after that is right.
    fn goes_on(&mut self) -> Result<()> {
        for _ in 0..TRIES {
            ensure!(self.disk.is_connected_within(ANSWER), "QEMU does not connect again");
            self.told.done(Op::Resume { vm: SWAPPER.into() })?;
            if self.told.text_or_state("VERIFIED", State::Paused, "Storage")? {
                return self.another_round();
            }
        }
        anyhow::bail!("it does not go on after {TRIES} times")
    }

    /// One that was begun after this is asked is found right.
    fn another_round(&mut self) -> Result<()> {
        for _ in 0..2 {
            self.told.hear("VERIFIED")?;
        }
        Ok(())
    }

    fn bystander_goes_on(&mut self) -> Result<()> {
        let exits = |told: &mut Listener| anyhow::Ok(told.stats(BYSTANDER)?.exits.values().sum::<u64>());
        let (first, deadline) = (exits(&mut self.told)?, Instant::now() + ANSWER);
        while exits(&mut self.told)? < first + EXITS {
            ensure!(Instant::now() < deadline, "the bystander stands still");
        }
        Ok(())
    }
}
