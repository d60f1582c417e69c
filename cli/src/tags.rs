//! `entresol ctl tags`: allocation tags of a virtual machine's memory, for debuggers and for whoever moves one.
//!
//! As text, a tag is one hexadecimal digit for each 16 bytes of memory, and a page a line of 256: what `read` prints, `write` takes. Pages are
//! asked for in parts, as far as they go; a failure says how many pages were done before.

use std::io::Read;

use clap::Subcommand;
use entresol_wire::control::{Answer, Bytes, Op, TAGGED_PER_ANSWER};

use crate::client::{Client, ClientError, unexpected};

const PAGE: u64 = 4096;
/// Tags of a page.
const TAGS: usize = 256;

/// What `entresol ctl tags` can do.
#[derive(Clone, Debug, Subcommand)]
pub enum What {
    /// Print the tags of SIZE bytes from GPA on: a line of 256 hexadecimal digits for each page
    Read {
        /// The virtual machine's name
        vm: String,
        /// The first guest physical address, a multiple of 4096
        #[arg(value_parser = crate::ctl::number)]
        gpa: u64,
        /// Bytes, or a size like 64K: a multiple of 4096
        #[arg(value_parser = crate::ctl::number)]
        size: u64,
    },
    /// Give SIZE bytes from GPA on the tags on standard input, as `read` prints them
    Write {
        /// The virtual machine's name
        vm: String,
        /// The first guest physical address, a multiple of 4096
        #[arg(value_parser = crate::ctl::number)]
        gpa: u64,
        /// Bytes, or a size like 64K: a multiple of 4096
        #[arg(value_parser = crate::ctl::number)]
        size: u64,
    },
}

/// Why it did not work.
#[derive(Debug, thiserror::Error)]
pub enum TagsError {
    /// The hypervisor or the way to it, before the first page.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The same, after some.
    #[error("after {pages} pages: {error}")]
    After {
        /// Pages that were done.
        pages: u64,
        /// What then came.
        error: ClientError,
    },
    /// What was given.
    #[error("{0}")]
    Input(String),
}

impl TagsError {
    fn after(pages: u64, error: ClientError) -> Self {
        if pages == 0 { Self::Client(error) } else { Self::After { pages, error } }
    }
}

/// The tags of `size` bytes from `gpa` on; all that could be read, and why there are no more.
pub fn read(client: &mut Client, vm: &str, gpa: u64, size: u64) -> (Vec<u8>, Result<(), TagsError>) {
    let mut all = Vec::new();
    let mut part = || -> Result<(), TagsError> {
        check(size)?;
        while (all.len() / TAGS) as u64 != size / PAGE {
            let done = (all.len() / TAGS) as u64;
            let size = ((size / PAGE - done).min(TAGGED_PER_ANSWER)) * PAGE;
            let op = Op::ReadTags { vm: vm.into(), gpa: gpa.saturating_add(done * PAGE), size };
            match client.call(op.clone()).map_err(|error| TagsError::after(done, error))? {
                Answer::Tags(tags) if !tags.0.is_empty() && tags.0.len().is_multiple_of(TAGS) => all.extend(&*tags.0),
                other => return Err(TagsError::after(done, unexpected(&op, &other))),
            }
        }
        Ok(())
    };
    let result = part();
    (all, result)
}

/// Gives memory from `gpa` on these tags: how many pages.
///
/// # Errors
/// [`TagsError`], which says how many pages have theirs.
pub fn write(client: &mut Client, vm: &str, gpa: u64, tags: &[u8]) -> Result<u64, TagsError> {
    let mut done = 0;
    while let Some(rest) = tags.get(done as usize * TAGS..).filter(|rest| !rest.is_empty()) {
        let part = &rest[..rest.len().min(TAGGED_PER_ANSWER as usize * TAGS)];
        let op = Op::WriteTags { vm: vm.into(), gpa: gpa.saturating_add(done * PAGE), tags: Bytes::from(part) };
        match client.call(op.clone()).map_err(|error| TagsError::after(done, error))? {
            Answer::Count(pages) if pages != 0 && pages <= (part.len() / TAGS) as u64 => done += pages,
            other => return Err(TagsError::after(done, unexpected(&op, &other))),
        }
    }
    Ok(done)
}

/// A line of digits for each page.
pub fn text(tags: &[u8]) -> String {
    let digit = |tag: &u8| char::from_digit(u32::from(*tag & 0xf), 16).expect("below 16");
    tags.chunks(TAGS).flat_map(|page| page.iter().map(digit).chain(['\n'])).collect()
}

/// The tags of `size` bytes from such a text.
///
/// # Errors
/// [`TagsError::Input`].
pub fn parse(mut from: impl Read, size: u64) -> Result<Vec<u8>, TagsError> {
    check(size)?;
    let mut text = String::new();
    from.read_to_string(&mut text).map_err(|error| TagsError::Input(format!("standard input: {error}")))?;
    let digit = |digit: char| {
        let tag = digit.to_digit(16).map(|tag| tag as u8);
        tag.ok_or_else(|| TagsError::Input(format!("standard input: {digit:?} must be a hexadecimal digit")))
    };
    let tags = text.chars().filter(|digit| !digit.is_whitespace()).map(digit).collect::<Result<Vec<_>, _>>()?;
    let wanted = size / PAGE * TAGS as u64;
    if tags.len() as u64 == wanted {
        return Ok(tags);
    }
    Err(TagsError::Input(format!("standard input: {} digits: must be {wanted}, one for each 16 bytes", tags.len())))
}

fn check(size: u64) -> Result<(), TagsError> {
    if size != 0 && size.is_multiple_of(PAGE) {
        return Ok(());
    }
    Err(TagsError::Input(format!("SIZE {size}: must be a multiple of {PAGE}, not 0")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read() {
        let tags: Vec<u8> = (0..2 * TAGS).map(|granule| (granule * 7 % 16) as u8).collect();
        let printed = text(&tags);
        assert_eq!((printed.lines().count(), printed.lines().next().map(str::len)), (2, Some(TAGS)));
        assert_eq!(parse(printed.as_bytes(), 2 * PAGE).unwrap(), tags);
    }

    #[test]
    fn mistakes_are_named() {
        let message = |text: &str, size| parse(text.as_bytes(), size).unwrap_err().to_string();
        assert_eq!(message("", 100), "SIZE 100: must be a multiple of 4096, not 0");
        assert_eq!(message("", 0), "SIZE 0: must be a multiple of 4096, not 0");
        assert!(message("0g", PAGE).contains("'g' must be a hexadecimal digit"));
        assert!(message("012", PAGE).contains("3 digits: must be 256"));
    }
}
