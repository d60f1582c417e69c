//! One step of a script, from text.
//!
//! A step is a verb and its arguments; a virtual machine's name and a colon may stand before it, and `-> NAME` after a
//! step that has a result. Numbers are decimal or `0x` hexadecimal. [`VERBS`] is the whole grammar.

use entresol_addr::{Gfn, GfnRange, Gpa, PAGE_SHIFT};

use crate::guest::operation::{For, Line, Operation};

/// What a verb looks like and does, for errors and for the documentation.
pub const VERBS: [(&str, &str); 41] = [
    ("load GPA", "the vCPU loads the word at GPA"),
    ("store GPA VALUE", "the vCPU stores a word"),
    ("fetch GPA", "the vCPU fetches the instruction word at GPA"),
    ("ldxr GPA", "the vCPU loads a word and watches it"),
    ("stxr GPA VALUE", "the vCPU stores a word if nobody stored there since its ldxr: 0, or 1 if it did not"),
    ("walk data|fetch GPA", "the hardware reads the vCPU's stage-1 descriptor at GPA"),
    ("update data|fetch GPA", "the hardware sets the access flag of the stage-1 descriptor at GPA"),
    ("dc ivac|cvac|civac|cvau GPA", "the vCPU's maintenance of the line at GPA, with its barrier"),
    ("ic ivau GPA", "the same for instruction caches"),
    ("tlbi", "the vCPU's own TLB invalidation, which promises nothing about the second stage"),
    ("mmu on|off", "the vCPU's own translation: off makes its accesses Non-cacheable"),
    ("post COUNT", "the vCPU stores to a coalesced zone; the result is how many stores the ring took"),
    ("drain", "the owner takes the coalesced stores that wait; the result is how many"),
    ("leave", "the CPU stops running the virtual machine"),
    ("write GPA VALUE", "the owner stores a word to guest memory"),
    ("read GPA", "the owner reads a word of guest memory"),
    ("zap GPA PAGES", "the owner invalidates a range"),
    ("start GPA PAGES", "invalidate_range_start"),
    ("end", "invalidate_range_end of the CPU's last start"),
    ("punch OBJECT FRAME COUNT", "the owner makes frames of an object vacant"),
    ("populate OBJECT FRAME COUNT", "the owner makes frames of an object present"),
    ("fork VM OBJECT", "in setup: VM, which has no slot, becomes a fork, and OBJECT its memory"),
    ("unshare GPA", "the owner breaks the sharing of the page through the notifier"),
    ("slot ID GPA PAGES OBJECT OFFSET [ro]", "the owner creates a slot"),
    ("delete ID", "the owner deletes a slot"),
    ("move ID GPA", "the owner moves a slot"),
    ("flags ID log|none", "the owner changes a slot's flags"),
    ("revert ID", "the owner begins to delete a slot and gives up"),
    ("split GPA", "the block behind GPA becomes smaller leaves"),
    ("merge GPA", "the leaves around GPA become a 2 MiB block"),
    ("age GPA PAGES", "the owner clears access flags"),
    ("protect GPA PAGES", "the owner takes write permission away"),
    ("log get ID", "the owner fetches and clears a slot's dirty log: how many pages it names"),
    ("log read ID", "the owner reads a slot's dirty log"),
    ("log clear ID MASK", "the owner clears pages of the first 64 from a slot's dirty log"),
    ("rings", "every CPU's vCPU gets a dirty ring"),
    ("harvest CPU", "the owner harvests the ring of the CPU's vCPU: how many entries"),
    ("forge CPU SLOT OFFSET", "the first entry of a ring says something else"),
    ("reset", "the owner resets the dirty rings: how many entries were freed"),
    ("clean-all", "the guest's set/way maintenance, trapped"),
    ("reap", "frames whose grace period is over become free"),
];

/// Beside [`VERBS`]: `vmids COUNT` wears VMIDs out, for `setup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A vCPU's access.
    Guest {
        /// Whose.
        vm: usize,
        /// What it does.
        what: Operation,
        /// Where, 8-byte aligned.
        gpa: Gpa,
        /// The register for the result.
        to: Option<String>,
    },
    /// The vCPU's MMU.
    Mmu {
        /// On or off.
        on: bool,
    },
    /// The vCPU's own TLB invalidation.
    Tlbi,
    /// Stores to a coalesced zone.
    Post {
        /// How many.
        count: u64,
        /// The register for how many were taken.
        to: Option<String>,
    },
    /// The owner takes those that wait.
    Drain {
        /// The register for how many there were.
        to: Option<String>,
    },
    /// The CPU puts its virtual machine.
    Leave,
    /// The owner's store.
    Write {
        /// Whose memory.
        vm: usize,
        /// Where.
        gpa: Gpa,
        /// What.
        value: u64,
    },
    /// The owner's load.
    Read {
        /// Whose memory.
        vm: usize,
        /// Where.
        gpa: Gpa,
        /// The register for the result.
        to: Option<String>,
    },
    /// Something about a range of guest frames.
    Range {
        /// Whose.
        vm: usize,
        /// Which frames.
        range: GfnRange,
        /// What.
        what: RangeVerb,
    },
    /// `invalidate_range_end`.
    End,
    /// A virtual machine becomes a fork of another.
    Fork {
        /// The parent.
        vm: usize,
        /// The child.
        child: usize,
        /// The child's memory.
        object: usize,
    },
    /// The notifier's way to a page of one's own.
    Unshare {
        /// Whose.
        vm: usize,
        /// Where.
        gpa: Gpa,
    },
    /// Something about frames of an object.
    Object {
        /// Which object.
        object: usize,
        /// First frame.
        frame: u64,
        /// How many.
        count: u64,
        /// Vacant rather than present.
        punch: bool,
    },
    /// Something about a slot.
    Slot {
        /// Whose.
        vm: usize,
        /// Which.
        id: u32,
        /// What.
        what: SlotVerb,
    },
    /// Something about the dirty log of a slot.
    Log {
        /// Whose.
        vm: usize,
        /// Which slot.
        id: u16,
        /// What.
        what: LogVerb,
        /// The register for the result.
        to: Option<String>,
    },
    /// Something about the dirty rings of a virtual machine.
    Ring {
        /// Whose.
        vm: usize,
        /// What.
        what: RingVerb,
        /// The register for the result.
        to: Option<String>,
    },
    /// Set/way maintenance.
    CleanAll {
        /// Whose.
        vm: usize,
    },
    /// Deferred frames become free.
    Reap,
    /// So many VMIDs are used up.
    Vmids {
        /// How many.
        count: u64,
    },
}

/// What happens to a range of guest frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeVerb {
    /// Invalidated at once.
    Zap,
    /// `invalidate_range_start`.
    Start,
    /// The block there is split.
    Split,
    /// The leaves there are merged.
    Merge,
    /// Access flags are cleared.
    Age,
    /// Write permission is taken away.
    Protect,
}

/// What happens to a dirty log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogVerb {
    /// It is fetched and cleared.
    Get,
    /// It is read.
    Read,
    /// These of its first 64 pages are cleared.
    Clear {
        /// Bit by bit.
        mask: u64,
    },
}

/// What happens to dirty rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingVerb {
    /// They are made.
    Make,
    /// One is harvested.
    Harvest {
        /// The CPU whose vCPU's it is.
        vcpu: u32,
    },
    /// The first entry of one is overwritten.
    Forge {
        /// The CPU whose vCPU's it is.
        vcpu: u32,
        /// What it names.
        slot: u32,
        /// What it names.
        offset: u64,
    },
    /// They are reset.
    Reset,
}

/// What happens to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotVerb {
    /// It is made.
    Create {
        /// Where.
        range: GfnRange,
        /// The object behind it.
        object: usize,
        /// The object's first frame.
        offset: u64,
        /// Guests may not write.
        read_only: bool,
    },
    /// It goes.
    Delete,
    /// It goes elsewhere.
    Move {
        /// Where to.
        base: Gfn,
    },
    /// Its flags become these.
    Flags {
        /// Writes are logged.
        log: bool,
    },
    /// It is withdrawn, and the update given up.
    Revert,
}

/// Why a text is no step.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("step {step:?}: {rule}")]
pub struct StepError {
    /// The text.
    pub step: String,
    /// What it must be.
    pub rule: String,
}

/// Names that steps may use, by their numbers.
#[derive(Clone, Copy, Debug)]
pub struct Names<'a> {
    /// Virtual machines.
    pub vms: &'a [String],
    /// Objects.
    pub objects: &'a [String],
}

/// The words of a step, taken one by one.
struct Words<'a> {
    text: &'a str,
    rest: std::str::SplitWhitespace<'a>,
    names: Names<'a>,
}

impl<'a> Words<'a> {
    fn error(&self, rule: impl Into<String>) -> StepError {
        StepError { step: self.text.to_owned(), rule: rule.into() }
    }

    fn word(&mut self, what: &str) -> Result<&'a str, StepError> {
        self.rest.next().ok_or_else(|| self.error(format!("{what} is missing")))
    }

    fn number(&mut self, what: &str) -> Result<u64, StepError> {
        let word = self.word(what)?;
        number(word).ok_or_else(|| self.error(format!("{what} {word:?} must be a number")))
    }

    fn gpa(&mut self) -> Result<Gpa, StepError> {
        let raw = self.number("GPA")?;
        if raw % 8 != 0 {
            return Err(self.error(format!("GPA {raw:#x} must be a multiple of 8")));
        }
        Ok(Gpa::new(raw))
    }

    fn frame(&mut self) -> Result<Gfn, StepError> {
        let gpa = self.gpa()?;
        if gpa.page_offset() != 0 {
            return Err(self.error(format!("GPA {gpa:#x} must be a multiple of 4096")));
        }
        Ok(gpa.frame())
    }

    fn range(&mut self) -> Result<GfnRange, StepError> {
        let (start, pages) = (self.frame()?, self.number("PAGES")?);
        let range = GfnRange::new(start, pages).filter(|range| !range.is_empty());
        range.ok_or_else(|| self.error(format!("PAGES {pages} must be at least 1 and not wrap")))
    }

    fn vm(&mut self) -> Result<usize, StepError> {
        let name = self.word("VM")?;
        let known = self.names.vms.iter().position(|vm| vm == name);
        known.ok_or_else(|| self.error(format!("VM {name:?} must be the name of a virtual machine")))
    }

    fn object(&mut self) -> Result<usize, StepError> {
        let name = self.word("OBJECT")?;
        let known = self.names.objects.iter().position(|object| object == name);
        known.ok_or_else(|| self.error(format!("OBJECT {name:?} must be the name of an object")))
    }

    fn id(&mut self) -> Result<u32, StepError> {
        let id = self.number("ID")?;
        u32::try_from(id).map_err(|_| self.error(format!("ID {id} must be below 2^32")))
    }

    fn stage1(&mut self) -> Result<For, StepError> {
        Ok(if self.choice(["data", "fetch"])? { For::Data } else { For::Fetch })
    }

    fn line(&mut self, data: bool) -> Result<Line, StepError> {
        let name = self.word("an operation")?;
        let fits = |line: Line| (line != Line::Ivau) == data;
        let known = Line::ALL.iter().find(|(known, line)| *known == name && fits(*line));
        let names = Line::ALL.iter().filter(|(_, line)| fits(*line)).map(|(name, _)| *name);
        let rule = || self.error(format!("{name:?} must be {}", names.collect::<Vec<_>>().join(" or ")));
        known.map(|(_, line)| *line).ok_or_else(rule)
    }

    /// A number that fits.
    fn small<T: TryFrom<u64>>(&mut self, what: &str) -> Result<T, StepError> {
        let value = self.number(what)?;
        T::try_from(value).map_err(|_| self.error(format!("{what} {value} is too large")))
    }

    fn choice(&mut self, of: [&str; 2]) -> Result<bool, StepError> {
        let word = self.word(&of.join("|"))?;
        let [yes, no] = of;
        if word != yes && word != no {
            return Err(self.error(format!("{word:?} must be {yes} or {no}")));
        }
        Ok(word == yes)
    }
}

/// A number as steps and conditions write it.
pub fn number(word: &str) -> Option<u64> {
    match word.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    }
}

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
        let mut words = Words { text, rest: body.split_whitespace(), names };
        let verb = words.word("a verb")?;
        let step = Self::verb(verb, vm, to.clone(), &mut words)?;
        if let Some(extra) = words.rest.next() {
            return Err(words.error(format!("{extra:?} must not stand there")));
        }
        if to.is_some() && step.result().is_none() {
            return Err(words.error(format!("{verb} has no result")));
        }
        Ok(step)
    }

    fn verb(verb: &str, vm: usize, to: Option<String>, words: &mut Words<'_>) -> Result<Self, StepError> {
        let range = |what, words: &mut Words<'_>| Ok(Self::Range { vm, range: words.range()?, what });
        let page = |what, words: &mut Words<'_>| Ok(Self::Range { vm, range: GfnRange::single(words.frame()?), what });
        let slot = |what, id| Ok(Self::Slot { vm, id, what });
        let guest = |what, words: &mut Words<'_>, to| Ok(Self::Guest { vm, what, gpa: words.gpa()?, to });
        match verb {
            "load" => guest(Operation::Load, words, to),
            "fetch" => guest(Operation::Fetch, words, to),
            "ldxr" => guest(Operation::LoadExclusive, words, to),
            "store" | "stxr" => {
                let (gpa, value) = (words.gpa()?, words.number("VALUE")?);
                let what = if verb == "store" { Operation::Store(value) } else { Operation::StoreExclusive(value) };
                Ok(Self::Guest { vm, what, gpa, to })
            }
            "walk" => guest(Operation::Walk(words.stage1()?), words, to),
            "update" => guest(Operation::Update(words.stage1()?), words, to),
            "dc" | "ic" => guest(Operation::Maintain(words.line(verb == "dc")?), words, to),
            "tlbi" => Ok(Self::Tlbi),
            "post" => Ok(Self::Post { count: words.number("COUNT")?, to }),
            "drain" => Ok(Self::Drain { to }),
            "mmu" => Ok(Self::Mmu { on: words.choice(["on", "off"])? }),
            "leave" => Ok(Self::Leave),
            "write" => Ok(Self::Write { vm, gpa: words.gpa()?, value: words.number("VALUE")? }),
            "read" => Ok(Self::Read { vm, gpa: words.gpa()?, to }),
            "zap" => range(RangeVerb::Zap, words),
            "start" => range(RangeVerb::Start, words),
            "age" => range(RangeVerb::Age, words),
            "protect" => range(RangeVerb::Protect, words),
            "split" => page(RangeVerb::Split, words),
            "merge" => page(RangeVerb::Merge, words),
            "end" => Ok(Self::End),
            "fork" => Ok(Self::Fork { vm, child: words.vm()?, object: words.object()? }),
            "unshare" => Ok(Self::Unshare { vm, gpa: words.gpa()? }),
            "punch" | "populate" => {
                let (object, frame, count) = (words.object()?, words.number("FRAME")?, words.number("COUNT")?);
                Ok(Self::Object { object, frame, count, punch: verb == "punch" })
            }
            "slot" => {
                let (id, range) = (words.id()?, words.range()?);
                let (object, offset) = (words.object()?, words.number("OFFSET")?);
                let read_only = match words.rest.next() {
                    None => false,
                    Some("ro") => true,
                    Some(other) => return Err(words.error(format!("{other:?} must be ro, or nothing"))),
                };
                slot(SlotVerb::Create { range, object, offset, read_only }, id)
            }
            "delete" => slot(SlotVerb::Delete, words.id()?),
            "revert" => slot(SlotVerb::Revert, words.id()?),
            "move" => {
                let id = words.id()?;
                slot(SlotVerb::Move { base: words.frame()? }, id)
            }
            "flags" => {
                let id = words.id()?;
                slot(SlotVerb::Flags { log: words.choice(["log", "none"])? }, id)
            }
            "log" => Self::log(vm, to, words),
            "rings" => Ok(Self::Ring { vm, what: RingVerb::Make, to }),
            "harvest" => Ok(Self::Ring { vm, what: RingVerb::Harvest { vcpu: words.small("CPU")? }, to }),
            "forge" => {
                let (vcpu, slot) = (words.small("CPU")?, words.small("SLOT")?);
                Ok(Self::Ring { vm, what: RingVerb::Forge { vcpu, slot, offset: words.number("OFFSET")? }, to })
            }
            "reset" => Ok(Self::Ring { vm, what: RingVerb::Reset, to }),
            "clean-all" => Ok(Self::CleanAll { vm }),
            "reap" => Ok(Self::Reap),
            "vmids" => Ok(Self::Vmids { count: words.number("COUNT")? }),
            _ => {
                let known: Vec<&str> = VERBS.iter().filter_map(|(form, _)| form.split(' ').next()).collect();
                Err(words.error(format!("{verb:?} must be one of {}", known.join(", "))))
            }
        }
    }

    /// The register that it sets.
    pub fn result(&self) -> Option<&str> {
        match self {
            Self::Guest { to, .. }
            | Self::Read { to, .. }
            | Self::Log { to, .. }
            | Self::Ring { to, .. }
            | Self::Post { to, .. }
            | Self::Drain { to } => to.as_deref(),
            _ => None,
        }
    }

    fn log(vm: usize, to: Option<String>, words: &mut Words<'_>) -> Result<Self, StepError> {
        let verb = words.word("get, read or clear")?;
        let id = words.small("ID")?;
        let what = match verb {
            "get" => LogVerb::Get,
            "read" => LogVerb::Read,
            "clear" => LogVerb::Clear { mask: words.number("MASK")? },
            _ => return Err(words.error(format!("{verb:?} must be get, read or clear"))),
        };
        Ok(Self::Log { vm, id, what, to })
    }

    /// The guest page that the step is about, for reports.
    pub fn page(&self) -> Option<(usize, Gfn)> {
        match self {
            Self::Guest { vm, gpa, .. } | Self::Write { vm, gpa, .. } | Self::Read { vm, gpa, .. } => {
                Some((*vm, Gfn::new(gpa.get() >> PAGE_SHIFT)))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Step, StepError> {
        let (vms, objects) = (["a".to_owned(), "b".to_owned()], ["ram".to_owned()]);
        Step::parse(text, Names { vms: &vms, objects: &objects })
    }

    #[test]
    fn every_verb_is_read() {
        let arguments = [
            ("GPA", "0x2000"),
            ("VALUE", "7"),
            ("PAGES", "2"),
            ("ID", "1"),
            ("VM", "b"),
            ("OBJECT", "ram"),
            ("FRAME", "3"),
            ("COUNT", "1"),
            ("OFFSET", "0"),
            ("[ro]", "ro"),
            ("on|off", "off"),
            ("data|fetch", "fetch"),
            ("ivac|cvac|civac|cvau", "civac"),
            ("log|none", "log"),
            ("MASK", "1"),
            ("CPU", "0"),
            ("SLOT", "0"),
        ];
        for (form, _) in VERBS {
            let text = arguments.iter().fold(form.to_owned(), |text, (from, to)| text.replace(from, to));
            assert!(parse(&text).is_ok(), "{text}: {:?}", parse(&text));
        }
    }

    #[test]
    fn names_and_results() {
        let step = parse("b: load 0x1008 -> r1").unwrap();
        let expected = Step::Guest { vm: 1, what: Operation::Load, gpa: Gpa::new(0x1008), to: Some("r1".to_owned()) };
        assert_eq!(step, expected);
        assert_eq!(step.page(), Some((1, Gfn::new(1))));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, rule) in [
            ("lod 0x1000", "must be one of load"),
            ("load", "GPA is missing"),
            ("load x", "must be a number"),
            ("load 0x1001", "multiple of 8"),
            ("zap 0x1008 1", "multiple of 4096"),
            ("zap 0x1000 0", "at least 1"),
            ("c: load 0x1000", "name of a virtual machine"),
            ("punch disk 0 1", "name of an object"),
            ("reap -> r1", "has no result"),
            ("reap now", "must not stand there"),
            ("mmu maybe", "must be on or off"),
            ("log take 0", "must be get, read or clear"),
            ("log get 65536", "ID 65536 is too large"),
            ("dc ivau 0x1000", "must be ivac or cvac or civac or cvau"),
            ("ic ivac 0x1000", "must be ivau"),
            ("walk store 0x1000", "must be data or fetch"),
            ("tlbi 0x1000", "must not stand there"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(rule) && error.contains(text), "{error}");
        }
    }
}
