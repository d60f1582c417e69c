//! Bundles that were written read back; bundles that were damaged say how.

use std::string::{String, ToString};
use std::vec::Vec;
use std::{format, vec};

use proptest::prelude::*;

use super::layout::{Entry, Header};
use super::*;
use crate::config::{Disk, Limits, Outer, PrivateIo, Vm};

fn vm(name: &str, kernel: FileIndex, disks: Vec<Disk<FileIndex>>) -> Vm<FileIndex> {
    Vm {
        name: name.into(),
        memory: 64 << 20,
        private: false,
        limits: Limits::default(),
        private_io: PrivateIo::Lease,
        vcpus: 2,
        kernel,
        kernel_format: Default::default(),
        initrd: None,
        cmdline: "console=ttyAMA0 \"quoted\"\n".into(),
        disks,
        roms: vec![],
        flash: None,
        coalesced_mmio: Vec::new(),
        doorbells: Vec::new(),
        pass_through: Vec::new(),
        balloon: true,
        mte: false,
        policies: Default::default(),
        autostart: true,
        merge: false,
    }
}

/// Two VMs that share a kernel and have a disk each.
fn sample() -> (Config<FileIndex>, Vec<u8>) {
    let mut builder = Builder::new();
    let kernel = builder.add("Image", vec![7; 5000], false).expect("room");
    let disks = [1, 2].map(|n| builder.add(format!("disk{n}"), vec![n; 1024], true).expect("room"));
    let own = |n: usize| vec![Disk { file: disks[n], read_only: false }];
    let config = Config { outer: Outer::default(), vms: vec![vm("a", kernel, own(0)), vm("b", kernel, own(1))] };
    let bytes = builder.pack(&config).expect("right").to_vec();
    (config, bytes)
}

/// Changes the header, and the checksum with it.
fn with_header(mut bytes: Vec<u8>, change: impl FnOnce(&mut Header)) -> Vec<u8> {
    let mut header = Header::decode(bytes.first_chunk().expect("a header"));
    change(&mut header);
    bytes[..HEADER_LEN].copy_from_slice(&header.encode());
    resealed(bytes)
}

/// Changes an entry of the file table, and the checksum with it.
fn with_entry(mut bytes: Vec<u8>, index: usize, change: impl FnOnce(&mut Entry)) -> Vec<u8> {
    let at = Header::decode(bytes.first_chunk().expect("a header")).table as usize + 32 * index;
    let mut entry = Entry::decode(bytes[at..].first_chunk().expect("an entry"));
    change(&mut entry);
    bytes[at..at + 32].copy_from_slice(&entry.encode());
    resealed(bytes)
}

fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes[12..16].fill(0);
    let checksum = crc32fast::hash(&bytes);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn message(bytes: &[u8]) -> String {
    Bundle::parse(bytes).expect_err("damaged").to_string()
}

#[test]
fn what_was_packed_reads_back() {
    let (config, bytes) = sample();
    let bundle = Bundle::parse(&bytes).expect("right");
    assert_eq!(bundle.config(), &config);
    assert_eq!(bundle.total(), bytes.len() as u64);
    let files: Vec<_> = bundle.files().collect();
    assert_eq!(files.iter().map(|file| file.name).collect::<Vec<_>>(), ["Image", "disk1", "disk2"]);
    assert_eq!(files.iter().map(|file| file.writable).collect::<Vec<_>>(), [false, true, true]);
    assert_eq!(files[0].data, [7; 5000]);
    assert_eq!(files[2].data, [2; 1024]);
    assert_eq!(files[2].checksum, crc32fast::hash(files[2].data));
    assert_eq!(bytes.len() as u64, (files[2].offset + 1024).next_multiple_of(FILE_ALIGN));
    assert!(
        bytes[files[2].offset as usize + 1024..].iter().all(|byte| *byte == 0),
        "nobody else's bytes in the last page"
    );
    for file in files {
        assert!(file.offset.is_multiple_of(FILE_ALIGN));
        assert!(std::ptr::eq(file.data, &bytes[file.offset as usize..][..file.data.len()]), "read in place");
    }
    assert_eq!(bundle.file(FileIndex(3)), None);
}

#[test]
fn bytes_behind_the_end_are_ignored() {
    let (config, mut bytes) = sample();
    bytes.resize(bytes.len() + 4096, 0xff);
    assert_eq!(Bundle::parse(&bytes).expect("right").config(), &config);
}

#[test]
fn writer_to_io_gives_the_same_bytes() {
    let mut builder = Builder::new();
    let kernel = builder.add("Image", &[1_u8; 100][..], false).expect("room");
    let packed = builder.pack(&Config { outer: Outer::default(), vms: vec![vm("a", kernel, vec![])] }).expect("right");
    let mut written = Vec::new();
    packed.write_to(&mut written).expect("a Vec takes everything");
    assert_eq!(written, packed.to_vec());
    assert_eq!(written.len() as u64, packed.total());
}

#[test]
fn every_cut_is_told_with_its_numbers() {
    let (_, bytes) = sample();
    for have in 0..bytes.len() {
        let expected = if have < HEADER_LEN {
            BundleError::NoHeader { have: have as u64 }
        } else {
            BundleError::CutOff { says: bytes.len() as u64, have: have as u64 }
        };
        assert_eq!(Bundle::parse(&bytes[..have]).expect_err("cut"), expected);
    }
    assert_eq!(message(&bytes[..100]), format!("cut off: the bundle says {} bytes, 100 are there", bytes.len()));
}

#[test]
fn flipped_bits_are_found() {
    let (_, bytes) = sample();
    let head = 0..1024;
    for at in head.chain((1024..bytes.len()).step_by(61)) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(Bundle::parse(&damaged).is_err(), "bit {} of byte {at}", at % 8);
    }
}

#[test]
fn each_damage_has_its_message() {
    let (_, bytes) = sample();
    let total = bytes.len() as u64;
    assert_eq!(message(b"short"), "a bundle's header has 64 bytes, 5 are there");
    let magic = with_header(bytes.clone(), |header| header.magic = *b"\x7fELF\x02\x01\x01\0");
    assert_eq!(message(&magic), "not a bundle: it starts with [7f, 45, 4c, 46, 02, 01, 01, 00], not with \"ENTRESOL\"");
    let version = with_header(bytes.clone(), |header| header.version = 3);
    assert_eq!(message(&version), "the bundle has version 3, this hypervisor reads version 2");
    let mut data = bytes.clone();
    *data.last_mut().expect("not empty") ^= 1;
    assert!(message(&data).starts_with("the bundle's checksum is 0x"), "{}", message(&data));
    let short = with_header(bytes.clone(), |header| header.total = 63);
    assert_eq!(message(&short), "the bundle's length = 63: must be at least the header's 64 bytes");
    let odd = with_header(bytes.clone(), |header| header.total -= 1);
    assert_eq!(message(&odd), format!("the bundle's length = {}: must be a multiple of 4096", total - 1));
    let table = with_header(bytes.clone(), |header| header.table = u64::MAX - 7);
    assert!(
        message(&table).starts_with("the bundle's table = 0x60 bytes at 0xfffffffffffffff8: must lie in the bundle")
    );
    let config = with_header(bytes.clone(), |header| header.config_len = total);
    assert!(message(&config).contains("config = ") && message(&config).contains("must lie in the bundle between 0x40"));
    let count = with_header(bytes.clone(), |header| header.count = u32::MAX);
    assert_eq!(message(&count), "the bundle's file count = 4294967295: must be at most 1216");
    let names = with_header(bytes.clone(), |header| header.names_len = total);
    assert!(message(&names).starts_with("the bundle's names = "));
    let reserved = with_header(bytes.clone(), |header| header.reserved = 1);
    assert!(message(&reserved).contains("reserved bytes zero"));
    let none = with_header(bytes.clone(), |header| header.config_len = 0);
    assert!(message(&none).starts_with("the bundle's configuration cannot be read: "));
}

#[test]
fn each_wrong_entry_has_its_message() {
    let (_, bytes) = sample();
    let entry = |index, change: fn(&mut Entry)| message(&with_entry(bytes.clone(), index, change));
    assert!(entry(0, |entry| entry.offset += 8).contains("files[0].offset"));
    assert!(entry(0, |entry| entry.offset = 0).contains("files[0].data"));
    assert!(entry(1, |entry| entry.offset -= 4096).contains("files[1].data"), "overlaps the file before it");
    assert!(entry(2, |entry| entry.length = u64::MAX).contains("files[2].data"));
    assert!(entry(2, |entry| entry.name_len = 100).contains("files[2].name"));
    assert!(entry(1, |entry| entry.flags = 3).contains("files[1].flags"));
    let read_only = "vms[0].disks[0].file = file 1: must be a file that a guest may write to";
    assert!(entry(1, |entry| entry.flags = 0).contains(read_only));
    let kernel = "vms[0].kernel = file 0: must not be a file that a guest may write to";
    assert!(entry(0, |entry| entry.flags = Entry::WRITABLE).contains(kernel));
    assert!(entry(0, |entry| entry.length = 0).contains("must not be empty"));
}

#[test]
fn a_writable_file_has_one_owner() {
    let mut builder = Builder::new();
    let kernel = builder.add("Image", vec![7; 10], false).expect("room");
    let disk = builder.add("disk", vec![1; 512], true).expect("room");
    let shared = || vec![Disk { file: disk, read_only: false }];
    let config = Config { outer: Outer::default(), vms: vec![vm("a", kernel, shared()), vm("b", kernel, shared())] };
    let error = builder.pack(&config).expect_err("shared").to_string();
    assert!(error.contains("vms[1].disks[0].file = file 1: must be this disk's own, and vms[0].disks[0].file has it"));
}

#[test]
fn a_file_that_is_not_there_is_refused() {
    let config = Config { outer: Outer::default(), vms: vec![vm("a", FileIndex(0), vec![])] };
    let error = Builder::new().pack(&config).expect_err("no file").to_string();
    assert!(error.contains("vms[0].kernel = file 0: must be in the bundle"), "{error}");
}

proptest! {
    // Whole bundles: fewer cases, as each has many bytes.
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_files_read_back(files in prop::collection::vec(("[a-zé/]{0,20}", prop::collection::vec(any::<u8>(), 1..9000)), 1..20)) {
        let mut builder = Builder::new();
        for (name, data) in &files {
            builder.add(name.clone(), data.as_slice(), false).expect("room");
        }
        let config = Config { outer: Outer::default(), vms: vec![vm("a", FileIndex(0), vec![])] };
        let bytes = builder.pack(&config).expect("right").to_vec();
        let bundle = Bundle::parse(&bytes).expect("right");
        let read: Vec<_> = bundle.files().map(|file| (file.name.to_string(), file.data.to_vec())).collect();
        prop_assert_eq!(read, files);
    }
}

proptest! {
    #[test]
    fn headers_decode_as_encoded(total: u64, config: u64, config_len: u64, table: u64, names_len: u64, words: [u32; 4], magic: [u8; 8]) {
        let [version, checksum, count, reserved] = words;
        let header = Header { magic, version, checksum, total, config, config_len, table, count, reserved, names_len };
        prop_assert_eq!(Header::decode(&header.encode()), header);
    }

    #[test]
    fn entries_decode_as_encoded(offset: u64, length: u64, words: [u32; 4]) {
        let [name, name_len, flags, checksum] = words;
        let entry = Entry { offset, length, name, name_len, flags, checksum };
        prop_assert_eq!(Entry::decode(&entry.encode()), entry);
    }

    /// Numbers of any kind behind a right checksum: an error or a bundle, never a panic, and no data from outside.
    #[test]
    fn hostile_numbers_never_panic(
        words in prop::collection::vec((prop_oneof![24_usize..HEADER_LEN, 400_usize..700], any::<u64>(), 0_u32..64), 1..4),
    ) {
        let (_, mut bytes) = sample();
        for (at, value, shift) in words {
            bytes[at..at + 8].copy_from_slice(&(value >> shift).to_le_bytes());
        }
        let bytes = resealed(bytes);
        if let Ok(bundle) = Bundle::parse(&bytes) {
            for file in bundle.files() {
                prop_assert!(bytes.as_ptr_range().contains(&file.data.as_ptr()) || file.data.is_empty());
            }
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Bundle::parse(&bytes).is_err());
    }
}
