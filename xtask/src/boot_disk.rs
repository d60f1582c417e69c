//! A disk from which a PC with a BIOS starts the hypervisor through GRUB, by the multiboot2 protocol.
//!
//! | sectors | what |
//! |---|---|
//! | 0 | GRUB's first sector, with the table of partitions |
//! | 1 to 2047 | GRUB itself |
//! | 2048 and on | the one partition: a tar archive of the files that GRUB loads |
//!
//! A tar archive is a file system that GRUB reads and that needs no tool to write.
//!
//! Sources: POSIX.1-2017, pax ("ustar interchange format"); the classic master boot record (a table of four entries at 1BEh).

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::fetch::Bochs;
use crate::image;

const SECTOR: usize = 512;
/// Where the partition begins: what GRUB has for itself ends there.
const PARTITION: usize = 2048;
/// A disk's size is a multiple of a cylinder: 16 heads of 63 sectors.
const CYLINDER: usize = 16 * 63 * SECTOR;
/// The table of partitions, and the mark at a sector's end that firmware asks for.
const TABLE: usize = 0x1be;
const MARK: [u8; 2] = [0x55, 0xaa];
/// What a partition holds: as Linux marks its own.
const KIND: u8 = 0x83;

/// What GRUB needs for this disk and this script.
const MODULES: [&str; 4] = ["biosdisk", "part_msdos", "tar", "multiboot2"];
const SCRIPT: &str = "multiboot2 (hd0,msdos1)/hypervisor\nmodule2 (hd0,msdos1)/bundle\nboot\n";

/// Writes the disk into `folder`.
///
/// # Errors
/// When a file cannot be read or written, or GRUB is larger than its place.
pub fn write(bochs: &Bochs, hypervisor: &Path, bundle: &Path, folder: &Path) -> Result<PathBuf> {
    let (script, grub) = (folder.join("grub.cfg"), folder.join("grub.img"));
    image::write_new(&script, SCRIPT.as_bytes())?;
    bochs.grub(&script, &MODULES, &grub)?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let files = [("hypervisor", read(hypervisor)?), ("bundle", read(bundle)?)];
    let disk = disk(&read(&bochs.first_sector())?, &read(&grub)?, &files)?;
    let path = folder.join("disk.img");
    image::write_new(&path, &disk)?;
    // Bochs leaves its lock behind when it is killed, and refuses a disk that has one.
    if let Err(error) = fs::remove_file(folder.join("disk.img.lock"))
        && error.kind() != ErrorKind::NotFound
    {
        return Err(error).context("cannot remove the lock of a disk that was left behind");
    }
    Ok(path)
}

fn disk(first: &[u8], grub: &[u8], files: &[(&str, Vec<u8>)]) -> Result<Vec<u8>> {
    ensure!(first.len() == SECTOR, "GRUB's first sector has {} bytes, not {SECTOR}", first.len());
    let room = (PARTITION - 1) * SECTOR;
    ensure!(grub.len() <= room, "GRUB has {} bytes: there is room for {room}", grub.len());
    let mut disk = first.to_vec();
    disk.extend_from_slice(grub);
    disk.resize(PARTITION * SECTOR, 0);
    for (name, bytes) in files {
        disk.extend_from_slice(&header(name, bytes.len()));
        disk.extend_from_slice(bytes);
        disk.resize(disk.len().next_multiple_of(SECTOR), 0);
    }
    // Two empty blocks end an archive.
    disk.resize((disk.len() + 2 * SECTOR).next_multiple_of(CYLINDER), 0);
    let sectors = u32::try_from(disk.len() / SECTOR - PARTITION).context("the files are larger than a partition")?;
    let entry = &mut disk[TABLE..TABLE + 64];
    entry.fill(0);
    entry[0] = 0x80;
    entry[4] = KIND;
    entry[8..12].copy_from_slice(&(PARTITION as u32).to_le_bytes());
    entry[12..16].copy_from_slice(&sectors.to_le_bytes());
    disk[SECTOR - 2..SECTOR].copy_from_slice(&MARK);
    Ok(disk)
}

/// A file's header in a tar archive: numbers are octal text, and the sum is over the header with blanks in the sum's place.
fn header(name: &str, size: usize) -> [u8; SECTOR] {
    let mut header = [0; SECTOR];
    let mut put = |at: usize, text: &str| header[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, name);
    put(100, "0000644");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, "00000000000");
    put(148, "        ");
    put(156, "0");
    put(257, "ustar");
    put(263, "00");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_what_firmware_and_grub_look_for() {
        let files = [("one", vec![1; 700]), ("two", vec![2; 512])];
        let disk = disk(&[7; SECTOR], &[9; 3 * SECTOR], &files).unwrap();
        assert_eq!((disk[0], disk[SECTOR], disk[4 * SECTOR], &disk[510..512]), (7, 9, 0, &MARK[..]));
        assert!(disk.len().is_multiple_of(CYLINDER));
        let sectors = (disk.len() / SECTOR - PARTITION) as u32;
        assert_eq!(
            disk[TABLE..TABLE + 16],
            [&[0x80, 0, 0, 0, KIND, 0, 0, 0, 0, 8, 0, 0], &sectors.to_le_bytes()[..]].concat()
        );
        let archive = &disk[PARTITION * SECTOR..];
        assert_eq!((&archive[..4], &archive[257..265]), (&b"one\0"[..], &b"ustar\x0000"[..]));
        assert_eq!((archive[SECTOR], archive[SECTOR + 699], archive[SECTOR + 700]), (1, 1, 0));
        assert_eq!(&archive[3 * SECTOR..3 * SECTOR + 3], b"two");
    }

    #[test]
    fn a_header_is_posixs() {
        let header = header("bundle", 0o1234567);
        assert_eq!(&header[124..136], b"00001234567\0");
        let sum: u32 = header
            .iter()
            .enumerate()
            .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) })
            .sum();
        assert_eq!(header[148..156], format!("{sum:06o}\0 ").as_bytes()[..]);
    }

    #[test]
    fn what_has_no_room_is_refused() {
        assert!(disk(&[0; 511], &[], &[]).unwrap_err().to_string().contains("511 bytes"));
        assert!(
            disk(&[0; SECTOR], &vec![0; PARTITION * SECTOR], &[])
                .unwrap_err()
                .to_string()
                .contains("there is room for")
        );
    }
}
