//! From words to a step, theme by theme: the vCPU, ranges, slots, dirty tracking, and what is left.

use entresol_addr::GfnRange;

use super::words::Words;
use super::{CacheVerb, LogVerb, Names, RangeVerb, RingVerb, SlotVerb, Step, StepError, VERBS};
use crate::guest::operation::Operation;

/// A verb, with what may stand around it and its arguments.
struct Said<'a> {
    verb: &'a str,
    vm: usize,
    to: Option<String>,
    words: Words<'a>,
}

/// A step, or nothing if the verb belongs to another theme.
type Parsed = Result<Option<Step>, StepError>;

impl Step {
    /// Reads a step.
    ///
    /// # Errors
    ///
    /// [`StepError`], with the rule that was broken.
    pub fn parse(text: &str, names: Names<'_>) -> Result<Self, StepError> {
        let error = |rule: String| StepError { step: text.to_owned(), rule };
        let (body, to) = match text.split_once("->") {
            Some((body, name)) => (body, Some(name.trim().to_owned())),
            None => (text, None),
        };
        let (vm, body) = match body.split_once(':') {
            Some((name, body)) => {
                let known = names.vms.iter().position(|vm| vm == name.trim());
                (known.ok_or_else(|| error(format!("{:?} must be the name of a virtual machine", name.trim())))?, body)
            }
            None => (0, body),
        };
        let mut words = Words::new(text, body, names);
        let verb = words.word("a verb")?;
        let mut said = Said { verb, vm, to, words };
        let step = said.step()?;
        if let Some(extra) = said.words.next() {
            return Err(said.words.error(format!("{extra:?} must not stand there")));
        }
        if said.to.is_some() && step.result().is_none() {
            return Err(said.words.error(format!("{verb} has no result")));
        }
        Ok(step)
    }
}

impl Said<'_> {
    fn step(&mut self) -> Result<Step, StepError> {
        let themes: [fn(&mut Self) -> Parsed; 6] =
            [Self::access, Self::vcpu, Self::range, Self::slot, Self::dirty, Self::owner];
        for theme in themes {
            if let Some(step) = theme(self)? {
                return Ok(step);
            }
        }
        let known: Vec<&str> = VERBS.iter().filter_map(|(form, _)| form.split(' ').next()).collect();
        Err(self.words.error(format!("{:?} must be one of {}", self.verb, known.join(", "))))
    }

    /// A vCPU's access.
    fn access(&mut self) -> Parsed {
        let words = &mut self.words;
        let (gpa, what) = match self.verb {
            "load" => (words.gpa()?, Operation::Load),
            "fetch" => (words.gpa()?, Operation::Fetch),
            "ldxr" => (words.gpa()?, Operation::LoadExclusive),
            "ldg" => (words.gpa()?, Operation::LoadTag),
            "stg" => (words.gpa()?, Operation::StoreTag(words.small("VALUE")?)),
            "store" => (words.gpa()?, Operation::Store(words.number("VALUE")?)),
            "stxr" => (words.gpa()?, Operation::StoreExclusive(words.number("VALUE")?)),
            "walk" | "update" => {
                let stage1 = words.stage1()?;
                let what = if self.verb == "walk" { Operation::Walk(stage1) } else { Operation::Update(stage1) };
                (words.gpa()?, what)
            }
            "dc" | "ic" => {
                let line = words.line(self.verb == "dc")?;
                (words.gpa()?, Operation::Maintain(line))
            }
            _ => return Ok(None),
        };
        Ok(Some(Step::Guest { vm: self.vm, what, gpa, to: self.to.clone() }))
    }

    /// What else a vCPU does.
    fn vcpu(&mut self) -> Parsed {
        Ok(Some(match self.verb {
            "tlbi" => Step::Tlbi,
            "invlpg" => Step::Invlpg { vm: self.vm, linear: self.words.gpa()?.get() },
            "cr3" => Step::Cr3 { vm: self.vm, root: self.words.frame()?.base() },
            "post" => Step::Post { count: self.words.number("COUNT")?, to: self.to.clone() },
            "mmu" => Step::Mmu { on: self.words.choice(["on", "off"])? },
            "leave" => Step::Leave,
            _ => return Ok(None),
        }))
    }

    /// The owner and a range of guest frames.
    fn range(&mut self) -> Parsed {
        let what = match self.verb {
            "zap" => RangeVerb::Zap,
            "start" => RangeVerb::Start,
            "age" => RangeVerb::Age,
            "protect" => RangeVerb::Protect,
            "split" => RangeVerb::Split,
            "merge" => RangeVerb::Merge,
            "convert" => {
                let range = self.words.range()?;
                let what = RangeVerb::Convert { open: self.words.choice(["open", "private"])? };
                return Ok(Some(Step::Range { vm: self.vm, range, what }));
            }
            "end" => return Ok(Some(Step::End)),
            _ => return Ok(None),
        };
        let range = match what {
            RangeVerb::Split | RangeVerb::Merge => GfnRange::single(self.words.frame()?),
            _ => self.words.range()?,
        };
        Ok(Some(Step::Range { vm: self.vm, range, what }))
    }

    /// The owner and a slot.
    fn slot(&mut self) -> Parsed {
        if !["slot", "delete", "revert", "move", "flags"].contains(&self.verb) {
            return Ok(None);
        }
        let words = &mut self.words;
        let id = words.id()?;
        let what = match self.verb {
            "slot" => {
                let range = words.range()?;
                let (object, offset) = (words.object()?, words.number("OFFSET")?);
                let read_only = match words.next() {
                    None => false,
                    Some("ro") => true,
                    Some(other) => return Err(words.error(format!("{other:?} must be ro, or nothing"))),
                };
                SlotVerb::Create { range, object, offset, read_only }
            }
            "delete" => SlotVerb::Delete,
            "revert" => SlotVerb::Revert,
            "move" => SlotVerb::Move { base: words.frame()? },
            _ => SlotVerb::Flags { log: words.choice(["log", "none"])? },
        };
        Ok(Some(Step::Slot { vm: self.vm, id, what }))
    }

    /// The owner and dirty logs and rings.
    fn dirty(&mut self) -> Parsed {
        let words = &mut self.words;
        let what = match self.verb {
            "log" => return self.log().map(Some),
            "rings" => RingVerb::Make,
            "harvest" => RingVerb::Harvest { vcpu: words.small("CPU")? },
            "forge" => {
                let (vcpu, slot) = (words.small("CPU")?, words.small("SLOT")?);
                RingVerb::Forge { vcpu, slot, offset: words.number("OFFSET")? }
            }
            "reset" => RingVerb::Reset,
            _ => return Ok(None),
        };
        Ok(Some(Step::Ring { vm: self.vm, what, to: self.to.clone() }))
    }

    fn log(&mut self) -> Result<Step, StepError> {
        let words = &mut self.words;
        let verb = words.word("get, read or clear")?;
        let id = words.small("ID")?;
        let what = match verb {
            "get" => LogVerb::Get,
            "read" => LogVerb::Read,
            "clear" => LogVerb::Clear { mask: words.number("MASK")? },
            _ => return Err(words.error(format!("{verb:?} must be get, read or clear"))),
        };
        Ok(Step::Log { vm: self.vm, id, what, to: self.to.clone() })
    }

    /// What else the owner asks for.
    fn owner(&mut self) -> Parsed {
        let (vm, words) = (self.vm, &mut self.words);
        Ok(Some(match self.verb {
            "drain" => Step::Drain { to: self.to.clone() },
            "write" => Step::Write { vm, gpa: words.gpa()?, value: words.number("VALUE")? },
            "read" => Step::Read { vm, gpa: words.gpa()?, to: self.to.clone() },
            "fork" => Step::Fork { vm, child: words.vm()?, object: words.object()?, to: self.to.clone() },
            "kill" => Step::Kill { vm, to: self.to.clone() },
            "differ" => {
                let object = words.object()?;
                Step::Differ { object, base: words.object_as("BASE")?, to: self.to.clone() }
            }
            "reclaim" => Step::Reclaim,
            "unshare" => Step::Unshare { vm, gpa: words.gpa()? },
            "notifier" => Step::Notifier { vm },
            "merging" => Step::Merging { vm },
            "join" => {
                let (gpa, other) = (words.frame()?.base(), words.vm()?);
                Step::Join { vm, gpa, other, other_gpa: words.frame()?.base() }
            }
            "punch" | "populate" => {
                let (object, frame, count) = (words.object()?, words.number("FRAME")?, words.number("COUNT")?);
                Step::Object { object, frame, count, punch: self.verb == "punch" }
            }
            "out" | "out-fails" => {
                Step::Out { vm, range: words.range()?, fails: self.verb == "out-fails", to: self.to.clone() }
            }
            "swap-off" => Step::SwapOff { to: self.to.clone() },
            "clean-all" => Step::CleanAll { vm },
            "reap" => Step::Reap,
            "lease" => Step::Lease { vm, gpa: words.gpa()? },
            "use" => Step::Use { to: self.to.clone() },
            "release" => Step::Release,
            "poison" => Step::Poison { vm, gpa: words.gpa()?, to: self.to.clone() },
            "generation" => Step::Generation { vm, count: words.number("COUNT")? },
            "cache" => Step::Cache { vm, what: CacheVerb::Activate { gpa: words.gpa()? }, to: None },
            "tell" => Step::Cache { vm, what: CacheVerb::Tell { value: words.number("VALUE")? }, to: self.to.clone() },
            "refresh" => Step::Cache { vm, what: CacheVerb::Refresh, to: None },
            "uncache" => Step::Cache { vm, what: CacheVerb::Deactivate, to: None },
            "keep" => Step::Keep { vm, gpa: words.gpa()? },
            "recall" => Step::Recall { to: self.to.clone() },
            "vmids" => Step::Vmids { count: words.number("COUNT")? },
            _ => return Ok(None),
        }))
    }
}
