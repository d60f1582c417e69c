//! The words of a step, each read as what it must be.

use std::str::SplitWhitespace;

use entresol_addr::{Gfn, GfnRange, Gpa};

use super::{Names, StepError};
use crate::guest::operation::{For, Line};

/// The words of a step, taken one by one.
pub(super) struct Words<'a> {
    text: &'a str,
    rest: SplitWhitespace<'a>,
    names: Names<'a>,
}

impl<'a> Words<'a> {
    /// The words of `body`, a part of the step `text`.
    pub(super) fn new(text: &'a str, body: &'a str, names: Names<'a>) -> Self {
        Self { text, rest: body.split_whitespace(), names }
    }

    /// The next word, if there is one.
    pub(super) fn next(&mut self) -> Option<&'a str> {
        self.rest.next()
    }

    pub(super) fn error(&self, rule: impl Into<String>) -> StepError {
        StepError { step: self.text.to_owned(), rule: rule.into() }
    }

    pub(super) fn word(&mut self, what: &str) -> Result<&'a str, StepError> {
        self.rest.next().ok_or_else(|| self.error(format!("{what} is missing")))
    }

    pub(super) fn number(&mut self, what: &str) -> Result<u64, StepError> {
        let word = self.word(what)?;
        number(word).ok_or_else(|| self.error(format!("{what} {word:?} must be a number")))
    }

    pub(super) fn gpa(&mut self) -> Result<Gpa, StepError> {
        let raw = self.number("GPA")?;
        if raw % 8 != 0 {
            return Err(self.error(format!("GPA {raw:#x} must be a multiple of 8")));
        }
        Ok(Gpa::new(raw))
    }

    pub(super) fn frame(&mut self) -> Result<Gfn, StepError> {
        let gpa = self.gpa()?;
        if gpa.page_offset() != 0 {
            return Err(self.error(format!("GPA {gpa:#x} must be a multiple of 4096")));
        }
        Ok(gpa.frame())
    }

    pub(super) fn range(&mut self) -> Result<GfnRange, StepError> {
        let (start, pages) = (self.frame()?, self.number("PAGES")?);
        let range = GfnRange::new(start, pages).filter(|range| !range.is_empty());
        range.ok_or_else(|| self.error(format!("PAGES {pages} must be at least 1 and not wrap")))
    }

    pub(super) fn vm(&mut self) -> Result<usize, StepError> {
        let name = self.word("VM")?;
        let known = self.names.vms.iter().position(|vm| vm == name);
        known.ok_or_else(|| self.error(format!("VM {name:?} must be the name of a virtual machine")))
    }

    pub(super) fn object(&mut self) -> Result<usize, StepError> {
        self.object_as("OBJECT")
    }

    pub(super) fn object_as(&mut self, what: &str) -> Result<usize, StepError> {
        let name = self.word(what)?;
        let known = self.names.objects.iter().position(|object| object == name);
        known.ok_or_else(|| self.error(format!("{what} {name:?} must be the name of an object")))
    }

    pub(super) fn id(&mut self) -> Result<u32, StepError> {
        let id = self.number("ID")?;
        u32::try_from(id).map_err(|_| self.error(format!("ID {id} must be below 2^32")))
    }

    pub(super) fn stage1(&mut self) -> Result<For, StepError> {
        Ok(if self.choice(["data", "fetch"])? { For::Data } else { For::Fetch })
    }

    pub(super) fn line(&mut self, data: bool) -> Result<Line, StepError> {
        let name = self.word("an operation")?;
        let fits = |line: Line| (line != Line::Ivau) == data;
        let known = Line::ALL.iter().find(|(known, line)| *known == name && fits(*line));
        let names = Line::ALL.iter().filter(|(_, line)| fits(*line)).map(|(name, _)| *name);
        let rule = || self.error(format!("{name:?} must be {}", names.collect::<Vec<_>>().join(" or ")));
        known.map(|(_, line)| *line).ok_or_else(rule)
    }

    /// A number that fits.
    pub(super) fn small<T: TryFrom<u64>>(&mut self, what: &str) -> Result<T, StepError> {
        let value = self.number(what)?;
        T::try_from(value).map_err(|_| self.error(format!("{what} {value} is too large")))
    }

    pub(super) fn choice(&mut self, of: [&str; 2]) -> Result<bool, StepError> {
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
