//! The interrupt controllers of an x86-64 machine: lines, commands and vCPUs against lists and sets.
//!
//! Purpose: local APICs and I/O APIC, reached through [`Pc`] as a guest and its devices reach them, and a reference that keeps what
//! waits, what is served and which line is high. What a vCPU could take is compared after each operation, and that whoever
//! could take more was told to look. At the end of a run a hostile guest has the machine: there only nothing may break.
//!
//! The canary is a reference that believes something wrong ([`Belief`]): a search that would not notice proves nothing.
//!
//! Known holes: physical destinations and fixed vectors only; timers run, and are not judged.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use entresol_devices::apic::{Event, Kick};
use entresol_devices::bus::{Interrupt, Terminal};
use entresol_devices::pc::{Kicks, Pc, Time};

use crate::feedback::Feedback;
use crate::input::Input;

const CPUS: usize = 2;
/// Inputs that the reference knows, from this one.
const FIRST_INPUT: usize = 16;
const INPUTS: usize = 4;
/// Operations of one run.
const MOST: usize = 200;
/// Few, so that they meet: three of one class, and others.
const VECTORS: [u8; 6] = [0x31, 0x35, 0x3f, 0x41, 0x80, 0xfe];

/// What the reference thinks of interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Belief {
    /// What the manuals say.
    Manuals,
    /// A level that is still high at its end does not come again.
    LevelsComeOnce,
    /// A vector interrupts any lower one, also of its own class.
    EveryVectorIsAClass,
}

/// Time stands still but for the count of operations.
struct At(u64);

impl Time for At {
    fn tsc(&self) -> u64 {
        self.0 << 16
    }

    fn nanoseconds(&self) -> u64 {
        self.0 << 16
    }

    fn unix_seconds(&self) -> u64 {
        self.0
    }
}

/// Who was told to look.
#[derive(Default)]
struct Told(AtomicU8);

impl Kicks for Told {
    fn kick(&self, who: Kick) {
        let who = who.iter().fold(0, |bits, vcpu| bits | 1 << vcpu);
        self.0.fetch_or(who, Ordering::Relaxed);
    }
}

/// Nobody reads what the guest prints.
struct Nobody;

impl Terminal for Nobody {
    fn put(&self, _: &[u8]) {}

    fn input_wanted(&self) {}
}

/// One input of the I/O APIC.
#[derive(Clone, Copy, Default)]
struct Line {
    vector: u8,
    level: bool,
    open: bool,
    to: usize,
    /// It has sent, and waits for the end.
    waits: bool,
    high: bool,
}

/// One vCPU.
#[derive(Clone, Default)]
struct Cpu {
    on: bool,
    waiting: BTreeSet<u8>,
    levels: BTreeSet<u8>,
    served: BTreeSet<u8>,
    tpr: u8,
}

struct Reference {
    belief: Belief,
    lines: [Line; INPUTS],
    cpus: [Cpu; CPUS],
}

impl Reference {
    fn send(&mut self, to: usize, vector: u8, level: bool) -> bool {
        let cpu = &mut self.cpus[to];
        if cpu.on {
            cpu.waiting.insert(vector);
            if level {
                cpu.levels.insert(vector);
            } else {
                cpu.levels.remove(&vector);
            }
        }
        cpu.on
    }

    fn look_at(&mut self, input: usize) {
        let Line { vector, level, open, to, waits, high } = self.lines[input];
        if level && open && high && !waits {
            self.lines[input].waits = self.send(to, vector, true);
        }
    }

    fn drive(&mut self, input: usize, high: bool) {
        let line = &mut self.lines[input];
        let rises = high && !line.high;
        line.high = high;
        let Line { vector, level, open, to, .. } = *line;
        if level {
            self.look_at(input);
        } else if rises && open {
            self.send(to, vector, false);
        }
    }

    fn end(&mut self, vcpu: usize) {
        let cpu = &mut self.cpus[vcpu];
        let Some(vector) = cpu.served.pop_last() else { return };
        if !cpu.levels.contains(&vector) {
            return;
        }
        for input in 0..INPUTS {
            let line = &mut self.lines[input];
            if line.waits && line.vector == vector {
                line.waits = false;
                if self.belief != Belief::LevelsComeOnce {
                    self.look_at(input);
                }
            }
        }
    }

    fn class(&self, vector: u8) -> u8 {
        if self.belief == Belief::EveryVectorIsAClass { vector } else { vector >> 4 }
    }

    /// The vector above all that is served, and whether TPR keeps it.
    fn pending(&self, vcpu: usize) -> Option<(u8, bool)> {
        let cpu = &self.cpus[vcpu];
        let vector = *cpu.waiting.last().filter(|_| cpu.on)?;
        let above = cpu.served.last().is_none_or(|served| self.class(vector) > self.class(*served));
        above.then_some((vector, vector >> 4 <= cpu.tpr >> 4))
    }

    fn acknowledge(&mut self, vcpu: usize) -> Option<u8> {
        let (vector, _) = self.pending(vcpu).filter(|(_, masked)| !masked)?;
        self.cpus[vcpu].waiting.remove(&vector);
        self.cpus[vcpu].served.insert(vector);
        Some(vector)
    }
}

type Machine = Pc<Nobody, Told>;

struct Subject {
    pc: Machine,
    told: Arc<Told>,
    reference: Reference,
    now: u64,
    feedback: &'static Feedback,
}

/// Runs an input.
///
/// # Errors
///
/// What does not hold, and after which operation.
pub fn run(bytes: &[u8]) -> Result<(), String> {
    run_with(bytes, Belief::Manuals)
}

/// The same against a reference that believes `belief`.
///
/// # Errors
///
/// As [`run`].
pub fn run_with(bytes: &[u8], belief: Belief) -> Result<(), String> {
    let mut input = Input::new(bytes);
    let told = Arc::new(Told::default());
    let pc = Pc::new(CPUS, Nobody, told.clone()).map_err(|error| format!("new: {error}"))?;
    let reference = Reference { belief, lines: Default::default(), cpus: Default::default() };
    let mut subject = Subject { pc, told, reference, now: 0, feedback: Feedback::here() };
    for count in 0..MOST {
        if input.is_empty() {
            break;
        }
        subject.now += 1;
        let before = subject.look();
        let what = subject.step(&mut input);
        subject.judge(before).map_err(|wrong| format!("operation {count}, {what}: {wrong}"))?;
    }
    subject.compare_registers()?;
    subject.hostile(&mut input)
}

impl Subject {
    fn store(&self, vcpu: usize, register: u64, value: u64) {
        self.pc.write(vcpu, 0xfee0_0000 + register, 4, value, &At(self.now));
    }

    fn load(&self, vcpu: usize, register: u64) -> u64 {
        self.pc.read(vcpu, 0xfee0_0000 + register, 4, &At(self.now)).unwrap_or_default()
    }

    /// Every vCPU looks, as before an entry; what each could take then.
    fn look(&mut self) -> [Option<(u8, bool)>; CPUS] {
        self.told.0.store(0, Ordering::Relaxed);
        core::array::from_fn(|vcpu| {
            while self.pc.apic().take_event(vcpu).is_some() {}
            self.pc.apic().pending(vcpu).map(|pending| (pending.vector, pending.masked))
        })
    }

    /// One operation, on both.
    fn step(&mut self, input: &mut Input<'_>) -> &'static str {
        let (kind, vcpu) = (input.below(9), input.below(CPUS as u64) as usize);
        match kind {
            0 | 1 => {
                let (line, high) = (input.below(INPUTS as u64) as usize, input.bit());
                self.pc.wire(FIRST_INPUT + line).set_level(high);
                self.reference.drive(line, high);
                "line"
            }
            2 => {
                self.redirect(input, vcpu);
                "redirection"
            }
            3 => {
                let (to, vector) = (input.below(CPUS as u64), input.one_of(&VECTORS));
                self.store(vcpu, 0x310, to << 24);
                self.store(vcpu, 0x300, vector.into());
                self.reference.send(to as usize, vector, false);
                "command"
            }
            4 => {
                let tpr = input.one_of(&[0, 0x30, 0x3f, 0x80, 0xff]);
                self.store(vcpu, 0x80, u64::from(tpr));
                self.reference.cpus[vcpu].tpr = tpr;
                "TPR"
            }
            5 => {
                self.store(vcpu, 0xb0, 0);
                self.reference.end(vcpu);
                "end"
            }
            6 => {
                let on = input.below(4) != 0;
                self.store(vcpu, 0xf0, if on { 0x1ff } else { 0xff });
                self.reference.cpus[vcpu].on = on;
                "switch"
            }
            7 if input.below(4) == 0 => {
                let to = input.below(CPUS as u64);
                self.store(vcpu, 0x310, to << 24);
                self.store(vcpu, 0x300, 0x4500);
                self.reference.cpus[to as usize] = Cpu::default();
                "INIT"
            }
            _ => "nothing",
        }
    }

    /// A redirection entry, half after half, as the guest has to store it.
    fn redirect(&mut self, input: &mut Input<'_>, to: usize) {
        let (line, vector) = (input.below(INPUTS as u64) as usize, input.one_of(&VECTORS));
        let (level, open) = (input.bit(), input.below(4) != 0);
        let (number, now) = (FIRST_INPUT + line, At(self.now));
        let low = u64::from(vector) | u64::from(level) << 15 | u64::from(!open) << 16;
        for (half, value) in [(1, (to as u64) << 24), (0, low)] {
            self.pc.write(0, 0xfec0_0000, 4, 0x10 + 2 * number as u64 + half, &now);
            self.pc.write(0, 0xfec0_0010, 4, value, &now);
            let it = &mut self.reference.lines[line];
            if half == 1 {
                it.to = to;
            } else {
                (it.vector, it.level, it.open) = (vector, level, open);
                it.waits &= level;
            }
            self.reference.look_at(line);
        }
    }

    /// Both say the same, and whoever could take more was told. Then each vCPU takes what it can, on both.
    fn judge(&mut self, before: [Option<(u8, bool)>; CPUS]) -> Result<(), String> {
        for (vcpu, before) in before.into_iter().enumerate() {
            let pending = self.pc.apic().pending(vcpu).map(|pending| (pending.vector, pending.masked));
            let expected = self.reference.pending(vcpu);
            if pending != expected {
                return Err(format!("vCPU {vcpu} could take {pending:x?}, and should {expected:x?}"));
            }
            let told = self.told.0.load(Ordering::Relaxed) >> vcpu & 1 != 0;
            if pending.is_some() && pending != before && !(told && self.pc.apic().needs_look(vcpu)) {
                return Err(format!("vCPU {vcpu} could take {pending:x?}, and was not told"));
            }
            // Every other operation, so that vectors meet.
            if self.now % 2 == vcpu as u64 {
                let (taken, expected) = (self.pc.apic().acknowledge(vcpu), self.reference.acknowledge(vcpu));
                if taken != expected {
                    return Err(format!("vCPU {vcpu} takes {taken:x?}, and should {expected:x?}"));
                }
                let cpu = &self.reference.cpus[vcpu];
                let waits = self.reference.lines.iter().fold(0, |bits, line| bits << 1 | u32::from(line.waits));
                let depth = (cpu.served.len() as u32) << 4 | cpu.waiting.len() as u32;
                self.feedback.note(u32::from(taken.unwrap_or_default()) << 16 | waits << 8 | depth << 1 | vcpu as u32);
            }
        }
        Ok(())
    }

    /// IRR, ISR and remote IRR, as registers show them.
    fn compare_registers(&self) -> Result<(), String> {
        for (vcpu, cpu) in self.reference.cpus.iter().enumerate() {
            for (name, base, set) in [("ISR", 0x100, &cpu.served), ("IRR", 0x200, &cpu.waiting)] {
                let shown: BTreeSet<u8> = (0..=u8::MAX)
                    .filter(|it| self.load(vcpu, base + u64::from(it / 32) * 16) >> (it % 32) & 1 != 0)
                    .collect();
                if shown != *set {
                    return Err(format!("{name} of vCPU {vcpu} has {shown:x?}, and should have {set:x?}"));
                }
            }
        }
        for (line, it) in self.reference.lines.iter().enumerate() {
            let index = 0x10 + 2 * (FIRST_INPUT + line) as u64;
            self.pc.write(0, 0xfec0_0000, 4, index, &At(self.now));
            let shown = self.pc.read(0, 0xfec0_0010, 4, &At(self.now)).unwrap_or_default() >> 14 & 1 != 0;
            if shown != it.waits {
                return Err(format!("input {line} shows remote IRR {shown}, and should {}", it.waits));
            }
        }
        Ok(())
    }

    /// The rest of the input is a guest that does anything.
    fn hostile(&mut self, input: &mut Input<'_>) -> Result<(), String> {
        const PORTS: [u16; 5] = [0x3f8, 0x40, 0x61, 0x70, 0x600];
        while !input.is_empty() {
            self.now += 1;
            let (kind, vcpu, at) = (input.below(6), input.below(CPUS as u64) as usize, input.byte());
            let value = u64::from(input.byte()) << input.below(32);
            let (pc, now) = (&self.pc, At(self.now << input.below(40)));
            match kind {
                0 => {
                    pc.port_write(PORTS[usize::from(at) % 5] + u16::from(at >> 5), 1, value as u32, &now);
                }
                1 => {
                    pc.write(vcpu, 0xfee0_0000 + (u64::from(at) << 4), 4, value, &now);
                }
                2 => {
                    pc.write(vcpu, 0xfec0_0000 + u64::from(at & 0x10), 4, value, &now);
                }
                3 => {
                    let refused = pc.write_msr(vcpu, 0x800 + u32::from(at), value, &now).is_err();
                    self.feedback.note(u32::from(at) << 1 | u32::from(refused) | 1 << 20);
                }
                4 => {
                    let face = [0xfee0_0000, 0xfee0_0800, 0xfee0_0c00][usize::from(at) % 3];
                    let refused = pc.write_msr(vcpu, 0x1b, face, &now).is_err();
                    self.feedback.note(face as u32 | u32::from(refused));
                }
                _ => {
                    pc.tick(&now);
                    pc.expire(vcpu, &now);
                    pc.uart().offer(&[at]);
                }
            }
            for vcpu in 0..CPUS {
                while let Some(event) = self.pc.apic().take_event(vcpu) {
                    self.feedback.note(if event == Event::Init { 1 } else { 2 });
                }
                if self.pc.apic().acknowledge(vcpu).is_some_and(|vector| vector < 16) {
                    return Err(format!("vCPU {vcpu} takes a vector of the processor's own"));
                }
            }
        }
        Ok(())
    }
}
