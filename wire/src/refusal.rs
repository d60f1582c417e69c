//! How an owner is told of a mistake: the field, the value that stands there, the rule that it breaks.

use alloc::format;
use alloc::string::String;
use core::fmt;

/// Most characters of a part of a message that repeats what an owner wrote.
pub(crate) const MAX_SHOWN: usize = 300;

/// A value of the owner's that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {value}: {rule}")]
pub struct Refusal {
    /// Where the value stands, as a path: `vms[1].memory`.
    pub field: String,
    /// The value as it was written, its end left off if it is long.
    pub value: String,
    /// What must hold and does not.
    pub rule: String,
}

impl Refusal {
    /// `value` at `field` breaks `rule`.
    pub fn new(field: impl Into<String>, value: impl fmt::Display, rule: impl Into<String>) -> Self {
        Self { field: shorten(field.into()), value: shorten(format!("{value}")), rule: shorten(rule.into()) }
    }

    /// The same for a text, which is shown in quotes with its control characters escaped.
    pub fn text(field: impl Into<String>, value: &str, rule: impl Into<String>) -> Self {
        Self::new(field, format_args!("{value:?}"), rule)
    }
}

/// `text`, or its first characters and a mark that there were more: so that an error about a long value still fits
/// where an error must fit.
pub(crate) fn shorten(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(MAX_SHOWN) {
        text.truncate(end);
        text.push('…');
    }
    text
}
