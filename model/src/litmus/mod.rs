//! Litmus files: a scenario as a text that needs no Rust.
//!
//! A file is TOML: the machine, the objects, the slots, a script for each CPU, and what must not or must be seen. The
//! guide (`docs/lab.md`) has the grammar with an example; [`step::VERBS`] lists the steps.

pub mod outcome;
pub mod step;

use std::path::Path;

use entresol_addr::{Gfn, GfnRange, PAGE_SHIFT};
use entresol_mmu::ReadOnlyIvac;
use serde::Deserialize;

use crate::guest::operation::Operation;
use crate::machine::config::{Config, MAX_CPUS};
use outcome::{Condition, ConditionError};
use step::{Names, SlotVerb, Step, StepError};

/// The largest pool that a scenario may ask for, in frames: 16 MiB of model.
const MOST_FRAMES: u64 = 4096;

/// A scenario, ready to run.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Its name.
    pub name: String,
    /// What it is about.
    pub about: String,
    /// The machine.
    pub machine: Config,
    /// What the owner decided about guests.
    pub policy: GuestPolicy,
    /// Number of virtual machines, and their names.
    pub vms: Vec<String>,
    /// Objects, by number.
    pub objects: Vec<Object>,
    /// Steps before the CPUs run, on CPU 0.
    pub setup: Vec<Step>,
    /// A script for each CPU.
    pub cpus: Vec<Vec<Step>>,
    /// Outcomes that must not be seen.
    pub forbidden: Vec<Condition>,
    /// Outcomes that some schedule must show.
    pub required: Vec<Condition>,
    /// Events that some schedule must have.
    pub marks: Vec<String>,
    /// Preemptions in an exhaustive search.
    pub bound: Option<u32>,
    /// A schedule has thousands of steps, so tests and the zoo try fewer of them.
    pub long: bool,
}

/// A memory object of a scenario.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object {
    /// Its name.
    pub name: String,
    /// Its extent.
    pub frames: u64,
    /// Made of 2 MiB blocks where they fit.
    #[serde(default)]
    pub blocks: bool,
    /// Read-only, each word with this value.
    pub rom: Option<u64>,
    /// A device's addresses instead of memory; every word reads as 0.
    #[serde(default)]
    pub device: bool,
    /// Absent from the hypervisor's own mapping.
    #[serde(default)]
    pub private: bool,
}

/// What the owner decided about all guests of a scenario.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestPolicy {
    /// Cache maintenance by address traps (HCR_EL2.TPCP and TPU) instead of being done.
    pub trap_maintenance: bool,
    /// What DC IVAC does to read-only memory.
    pub read_only_ivac: Ivac,
    /// What comes of an access that is the owner's to emulate, after it has answered.
    pub emulated: Emulated,
}

/// See [`GuestPolicy::emulated`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Emulated {
    /// It is done.
    #[default]
    Done,
    /// An external abort, which cancels the answer.
    Abort,
}

/// See [`ReadOnlyIvac`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ivac {
    /// An external abort.
    #[default]
    Abort,
    /// Clean and invalidate.
    Clean,
}

impl From<Ivac> for ReadOnlyIvac {
    fn from(ivac: Ivac) -> Self {
        match ivac {
            Ivac::Abort => Self::Abort,
            Ivac::Clean => Self::Clean,
        }
    }
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: String,
    about: String,
    #[serde(default)]
    machine: Config,
    #[serde(default)]
    policy: GuestPolicy,
    #[serde(default = "one_vm")]
    vms: Vec<String>,
    #[serde(default)]
    object: Vec<Object>,
    #[serde(default)]
    slot: Vec<WrittenSlot>,
    #[serde(default)]
    setup: Vec<String>,
    cpu: Vec<WrittenCpu>,
    #[serde(default)]
    forbidden: Vec<String>,
    #[serde(default)]
    required: Vec<String>,
    #[serde(default)]
    marks: Vec<String>,
    #[serde(default = "two")]
    bound: Bound,
    #[serde(default)]
    long: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenSlot {
    vm: Option<String>,
    id: u32,
    gpa: u64,
    frames: u64,
    object: String,
    #[serde(default)]
    offset: u64,
    #[serde(default)]
    read_only: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenCpu {
    steps: Vec<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Bound {
    Preemptions(u32),
    Named(String),
}

fn one_vm() -> Vec<String> {
    vec!["vm".to_owned()]
}

fn two() -> Bound {
    Bound::Preemptions(2)
}

/// Why a file is no scenario.
#[derive(Debug, thiserror::Error)]
pub enum LitmusError {
    /// It could not be read.
    #[error("{path}: {error}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        error: std::io::Error,
    },
    /// It is not TOML of this shape.
    #[error("{0}")]
    Toml(#[from] toml::de::Error),
    /// A step.
    #[error("{0}")]
    Step(#[from] StepError),
    /// A condition.
    #[error("{0}")]
    Condition(#[from] ConditionError),
    /// A field.
    #[error("{field} {value}: {rule}")]
    Field {
        /// Which.
        field: &'static str,
        /// What it was.
        value: String,
        /// What it must be.
        rule: String,
    },
}

fn field(field: &'static str, value: impl ToString, rule: impl Into<String>) -> LitmusError {
    LitmusError::Field { field, value: value.to_string(), rule: rule.into() }
}

impl Scenario {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`LitmusError`].
    pub fn load(path: &Path) -> Result<Self, LitmusError> {
        let text = std::fs::read_to_string(path);
        Self::parse(&text.map_err(|error| LitmusError::Read { path: path.display().to_string(), error })?)
    }

    /// Reads a text.
    ///
    /// # Errors
    ///
    /// [`LitmusError`].
    pub fn parse(text: &str) -> Result<Self, LitmusError> {
        let written: Written = toml::from_str(text)?;
        check(&written)?;
        let objects: Vec<String> = written.object.iter().map(|object| object.name.clone()).collect();
        let names = Names { vms: &written.vms, objects: &objects };
        let steps = |texts: &[String]| texts.iter().map(|text| Step::parse(text, names)).collect::<Result<Vec<_>, _>>();
        let mut setup = written.slot.iter().map(|slot| create(slot, names)).collect::<Result<Vec<_>, _>>()?;
        setup.extend(steps(&written.setup)?);
        let cpus = written.cpu.iter().map(|cpu| steps(&cpu.steps)).collect::<Result<Vec<_>, _>>()?;
        let conditions =
            |texts: &[String]| texts.iter().map(|text| Condition::parse(text)).collect::<Result<Vec<_>, _>>();
        let bound = match written.bound {
            Bound::Preemptions(most) => Some(most),
            Bound::Named(name) if name == "none" => None,
            Bound::Named(name) => return Err(field("bound", name, "must be a number of preemptions or \"none\"")),
        };
        let mut machine = written.machine;
        if machine.format.is_x86() {
            // Its caches are coherent with everything.
            (machine.fwb, machine.dic) = (true, true);
        }
        let scenario = Self {
            name: written.name,
            about: written.about,
            machine,
            policy: written.policy,
            vms: written.vms,
            objects: written.object,
            setup,
            cpus,
            forbidden: conditions(&written.forbidden)?,
            required: conditions(&written.required)?,
            marks: written.marks,
            bound,
            long: written.long,
        };
        scenario.check_registers()?;
        scenario.check_forks()?;
        scenario.check_accesses()?;
        scenario.check_swap()?;
        Ok(scenario)
    }

    /// All steps.
    pub fn steps(&self) -> impl Iterator<Item = &Step> {
        self.setup.iter().chain(self.cpus.iter().flatten())
    }

    /// What a fork makes is not there before.
    fn check_forks(&self) -> Result<(), LitmusError> {
        let object_of = |step: &Step| match step {
            Step::Slot { what: SlotVerb::Create { object, .. }, .. } | Step::Object { object, .. } => Some(*object),
            _ => None,
        };
        for (vm, object) in self.steps().filter_map(Step::forks) {
            if self.steps().any(|step| object_of(step) == Some(object)) {
                let rule = "is made by a fork, so no slot and no other step may name it";
                return Err(field("object", &self.objects[object].name, rule));
            }
            if vm == 0 {
                return Err(field("vms", &self.vms[vm], "is the first, so no fork can make it"));
            }
        }
        Ok(())
    }

    /// On an x86 a vCPU loads, stores and fetches; the rest is arm64's.
    fn check_accesses(&self) -> Result<(), LitmusError> {
        let foreign = self.steps().find_map(|step| match step {
            Step::Guest { what: Operation::Load | Operation::Store(_) | Operation::Fetch, .. } => None,
            Step::Guest { what, .. } => Some(what.name()),
            Step::Mmu { .. } => Some("mmu"),
            _ => None,
        });
        let linear = self.steps().find_map(|step| match step {
            Step::Invlpg { .. } => Some("invlpg"),
            Step::Cr3 { .. } => Some("cr3"),
            _ => None,
        });
        if let Some(name) = linear.filter(|_| !self.machine.is_shadowed()) {
            return Err(field("step", name, "must be on a machine with shadow tables"));
        }
        match foreign.filter(|_| self.machine.format.is_x86()) {
            Some(name) => Err(field("step", name, "must be load, store or fetch on an x86")),
            None => Ok(()),
        }
    }

    /// A condition on a register that nothing sets would never hold.
    fn check_registers(&self) -> Result<(), LitmusError> {
        let set: Vec<&str> = self.steps().filter_map(Step::result).collect();
        for condition in self.forbidden.iter().chain(&self.required) {
            if let Some(unset) = condition.registers().find(|register| !set.contains(register)) {
                return Err(field("condition", condition, format!("no step sets {unset}")));
            }
        }
        Ok(())
    }

    /// What goes out goes somewhere.
    fn check_swap(&self) -> Result<(), LitmusError> {
        let swaps = self.steps().any(|step| matches!(step, Step::Out { .. } | Step::SwapOff { .. }));
        if swaps && self.machine.swap == 0 {
            return Err(field("machine.swap", 0, "must be at least 1, because a step swaps"));
        }
        Ok(())
    }

    /// Frames of read-only memory behind the pool.
    pub fn rom_frames(&self) -> u64 {
        self.objects.iter().filter(|object| object.rom.is_some()).map(|object| object.frames).sum()
    }

    /// The guest pages that scripts touch, for reports.
    pub fn pages(&self) -> Vec<(usize, Gfn)> {
        let mut pages: Vec<_> = self.cpus.iter().flatten().filter_map(Step::page).collect();
        pages.sort_by_key(|(vm, gfn)| (*vm, gfn.get()));
        pages.dedup();
        pages
    }
}

fn check(written: &Written) -> Result<(), LitmusError> {
    let cpus = written.cpu.len();
    if cpus == 0 || cpus > MAX_CPUS {
        return Err(field("cpu", cpus, format!("there must be 1 to {MAX_CPUS}")));
    }
    if written.machine.format.is_x86() && written.machine.tags {
        return Err(field("machine.tags", true, "must not stand beside npt or ept"));
    }
    let Config { vmid_bits, physical_bits, ipa_bits, frames, swap, .. } = written.machine;
    // The allocator's bitmap is made of 64-bit words.
    if !(6..=16).contains(&vmid_bits) {
        return Err(field("machine.vmid_bits", vmid_bits, "must be 6 to 16"));
    }
    if !(32..=48).contains(&ipa_bits) {
        return Err(field("machine.ipa_bits", ipa_bits, "must be 32 to 48"));
    }
    if !(ipa_bits..=48).contains(&physical_bits) {
        return Err(field("machine.physical_bits", physical_bits, "must be ipa_bits to 48"));
    }
    if frames == 0 || frames > MOST_FRAMES {
        return Err(field("machine.frames", frames, format!("must be 1 to {MOST_FRAMES}")));
    }
    if swap > MOST_FRAMES {
        return Err(field("machine.swap", swap, format!("must be at most {MOST_FRAMES}")));
    }
    if written.vms.is_empty() {
        return Err(field("vms", 0, "there must be at least 1"));
    }
    for object in &written.object {
        if object.frames == 0 || object.frames > MOST_FRAMES {
            return Err(field("object.frames", object.frames, format!("must be 1 to {MOST_FRAMES}")));
        }
        if object.device && (object.blocks || object.rom.is_some()) {
            return Err(field("object.device", &object.name, "must not stand beside rom or blocks"));
        }
        if object.private && (object.device || object.rom.is_some() || written.machine.tags) {
            return Err(field("object.private", &object.name, "must not stand beside rom, device or machine.tags"));
        }
    }
    Ok(())
}

fn create(slot: &WrittenSlot, names: Names<'_>) -> Result<Step, LitmusError> {
    let vm = match &slot.vm {
        None => 0,
        Some(name) => names
            .vms
            .iter()
            .position(|vm| vm == name)
            .ok_or_else(|| field("slot.vm", name, "must be the name of a virtual machine"))?,
    };
    let object = names.objects.iter().position(|object| *object == slot.object);
    let object = object.ok_or_else(|| field("slot.object", &slot.object, "must be the name of an object"))?;
    if !slot.gpa.is_multiple_of(1 << PAGE_SHIFT) {
        return Err(field("slot.gpa", format!("{:#x}", slot.gpa), "must be a multiple of 4096"));
    }
    let range = GfnRange::new(Gfn::new(slot.gpa >> PAGE_SHIFT), slot.frames).filter(|range| !range.is_empty());
    let range = range.ok_or_else(|| field("slot.frames", slot.frames, "must be at least 1 and not wrap"))?;
    let what = SlotVerb::Create { range, object, offset: slot.offset, read_only: slot.read_only };
    Ok(Step::Slot { vm, id: slot.id, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = r#"
        name = "small"
        about = "one load"
        [[object]]
        name = "ram"
        frames = 2
        [[slot]]
        id = 0
        gpa = 0x1000
        frames = 2
        object = "ram"
        [[cpu]]
        steps = ["load 0x1000 -> r0"]
    "#;

    #[test]
    fn defaults_fill_what_is_not_said() {
        let scenario = Scenario::parse(SMALL).unwrap();
        assert_eq!((scenario.vms.len(), scenario.cpus.len(), scenario.setup.len()), (1, 1, 1));
        assert_eq!(scenario.machine, Config::default());
        assert_eq!(scenario.bound, Some(2));
        assert_eq!(scenario.pages(), [(0, Gfn::new(1))]);
    }

    #[test]
    fn mistakes_name_field_value_and_rule() {
        let with = |from: &str, to: &str| Scenario::parse(&SMALL.replace(from, to)).unwrap_err().to_string();
        assert!(with("gpa = 0x1000", "gpa = 0x1001").contains("slot.gpa 0x1001: must be a multiple of 4096"));
        assert!(with("object = \"ram\"", "object = \"rom\"").contains("slot.object rom: must be the name"));
        assert!(with("name = \"small\"", "name = \"small\"\nforbidden = [\"r9 == 1\"]").contains("no step sets r9"));
        assert!(with("about =", "abot =").contains("abot"));
        assert!(
            with("name = \"ram\"", "name = \"ram\"\nrom = 1\ndevice = true")
                .contains("object.device ram: must not stand")
        );
        assert!(with("[[object]]", "[policy]\nread_only_ivac = \"keep\"\n[[object]]").contains("keep"));
        assert!(with("[[object]]", "[policy]\nemulated = \"lost\"\n[[object]]").contains("lost"));
        assert!(with("load 0x1000 -> r0", "out 0x1000 1").contains("machine.swap 0: must be at least 1"));
        assert!(with("name = \"small\"", "name = \"small\"\nbound = \"all\"").contains("bound all"));
    }
}
