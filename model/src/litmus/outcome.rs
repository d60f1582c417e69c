//! What a schedule ended with, and conditions on it: `r0 == 7 and r1 != mmio`.

use std::collections::BTreeMap;
use std::fmt;

use super::step::number;

/// The result of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    /// A word.
    Word(u64),
    /// An instruction without a result was carried out.
    Done,
    /// The access was given to the owner.
    Mmio,
    /// The instruction was skipped.
    Skipped,
    /// The guest got an exception.
    Abort,
    /// The core gave up, with a reason for the owner.
    Exit,
    /// The owner's request was refused.
    Refused,
}

/// Results by register.
pub type Registers = BTreeMap<String, Value>;

impl Value {
    const WORDS: [(&'static str, Self); 6] = [
        ("done", Self::Done),
        ("mmio", Self::Mmio),
        ("skipped", Self::Skipped),
        ("abort", Self::Abort),
        ("exit", Self::Exit),
        ("refused", Self::Refused),
    ];

    fn parse(text: &str) -> Option<Self> {
        let named = Self::WORDS.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
        named.or_else(|| number(text).map(Self::Word))
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, Self::WORDS.iter().find(|(_, value)| value == self)) {
            (Self::Word(word), _) => write!(f, "{word:#x}"),
            (_, Some((name, _))) => f.write_str(name),
            (_, None) => Err(fmt::Error),
        }
    }
}

/// A conjunction of comparisons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    text: String,
    terms: Vec<(String, bool, Value)>,
}

/// Why a text is no condition.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("condition {text:?}: {term:?} must read REGISTER == VALUE or REGISTER != VALUE, joined by \"and\"")]
pub struct ConditionError {
    text: String,
    term: String,
}

impl Condition {
    /// Reads a condition.
    ///
    /// # Errors
    ///
    /// [`ConditionError`].
    pub fn parse(text: &str) -> Result<Self, ConditionError> {
        let term = |term: &str| {
            let error = || ConditionError { text: text.to_owned(), term: term.trim().to_owned() };
            let equal = term.contains("==");
            let (name, value) = term.split_once(if equal { "==" } else { "!=" }).ok_or_else(error)?;
            let (name, value) = (name.trim(), Value::parse(value.trim()).ok_or_else(error)?);
            if name.is_empty() || name.contains(char::is_whitespace) {
                return Err(error());
            }
            Ok((name.to_owned(), equal, value))
        };
        let terms = text.split(" and ").map(term).collect::<Result<_, _>>()?;
        Ok(Self { text: text.to_owned(), terms })
    }

    /// Registers that it speaks of.
    pub fn registers(&self) -> impl Iterator<Item = &str> {
        self.terms.iter().map(|(name, ..)| name.as_str())
    }

    /// Whether it holds. A register without a value makes every comparison with it false.
    pub fn holds(&self, registers: &Registers) -> bool {
        self.terms
            .iter()
            .all(|(name, equal, value)| registers.get(name).is_some_and(|found| (found == value) == *equal))
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_hold_or_not() {
        let registers = Registers::from([("a".to_owned(), Value::Word(7)), ("b".to_owned(), Value::Mmio)]);
        for (text, holds) in [
            ("a == 7", true),
            ("a == 0x7 and b == mmio", true),
            ("a != 7", false),
            ("b != 3", true),
            ("c == 1", false),
            ("c != 1", false),
        ] {
            assert_eq!(Condition::parse(text).unwrap().holds(&registers), holds, "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "a", "a = 1", "a == x", "== 1", "a == 1 and", "a b == 1"] {
            assert!(Condition::parse(text).is_err(), "{text:?}");
        }
    }
}
