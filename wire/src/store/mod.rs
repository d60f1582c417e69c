//! The store: named files on a block device, each whole or not there, whatever happens to the machine.
//!
//! Form, version 1. Numbers are little-endian; a block has 4096 bytes.
//!
//! | blocks | what |
//! |---|---|
//! | 0–63 | directory, area 0 |
//! | 64–127 | directory, area 1 |
//! | 128– | data |
//!
//! A directory:
//!
//! | bytes | what |
//! |---|---|
//! | 0–7 | magic `ENTSTORE` |
//! | 8–11 | version |
//! | 12–15 | CRC-32 (ISO-HDLC) of the directory's bytes, these four taken as zero |
//! | 16–23 | generation; odd in area 1, even in area 0 |
//! | 24–31 | blocks of the whole store |
//! | 32–35 | bytes of the directory, at most 262144 |
//! | 36–39 | number of files, at most 256 |
//! | 40–47 | the number that the next file gets |
//! | 48–63 | zero |
//! | 64– | files |
//!
//! A file in it:
//!
//! | bytes | what |
//! |---|---|
//! | 0–7 | its number, which no other file ever had |
//! | 8–15 | number of the file that it cannot be read without, or 0 |
//! | 16–23 | bytes |
//! | 24–27 | CRC-32 of its bytes |
//! | 28–31 | number of extents |
//! | 32–33 | bytes of its name, 1 to 64 |
//! | 34–39 | zero |
//! | 40– | its name, then zeros up to a multiple of 8; then the extents: first block, blocks, 4 bytes each |
//!
//! Protocol: the directory of the higher generation counts, if its checksum is right. A change writes data only to blocks that
//! it does not name, then: flush, the next generation into the *other* area, flush ([`Commit`]). So at every moment one whole
//! directory is there, and what it names was not written since it was committed: a crash leaves the old files or the new
//! ones. Blocks of a file that was replaced are free when the commit is done, not before.
//!
//! Trust: a store is read as if a stranger had made it. A directory is used only if every extent lies in the data, no
//! block is named twice, and every other rule holds ([`Directory::decode`]).
//!
//! The device may lose, reorder or cut in the middle every write that was not followed by a flush. That a flush is done
//! when the device says so is all that is relied on.

mod commit;
mod directory;
mod error;
mod layout;
mod space;
#[cfg(test)]
mod tests;

pub use commit::{Commit, Step};
pub use directory::{Directory, File, Writer};
pub use error::StoreError;
pub use layout::{AREA_BLOCKS, AREA_BYTES, BLOCK, DATA_START, Extent, MAX_FILES, MAX_NAME, VERSION, check_name};
