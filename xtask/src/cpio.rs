//! The "new ASCII" cpio format that Linux unpacks as its initial file system (kernel documentation,
//! "initramfs buffer format": `070701`, thirteen 8-digit hexadecimal fields, names and data padded to 4 bytes).
//!
//! Deterministic: no times, no owners but root, inode numbers in order of writing.

const TRAILER: &str = "TRAILER!!!";

/// File type and permission bits of `st_mode`, as in stat(2).
const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_777;
const CHARACTER: u32 = 0o020_600;

/// An archive being written.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// A folder. Parents come first.
    pub fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY, &[], (0, 0));
    }

    /// A file with the given permission bits.
    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) {
        self.entry(name, REGULAR | (permissions & 0o7777), data, (0, 0));
    }

    /// A symbolic link to `target`.
    pub fn symlink(&mut self, name: &str, target: &str) {
        self.entry(name, SYMLINK, target.as_bytes(), (0, 0));
    }

    /// A character device, readable and writable by root.
    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, CHARACTER, &[], (major, minor));
    }

    /// The finished archive, padded to 512 bytes as cpio itself does.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, &[], (0, 0));
        self.pad(512);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8], device: (u32, u32)) {
        self.entries += 1;
        let size = u32::try_from(data.len()).expect("a file of an initial file system is smaller than 4 GiB");
        let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
        let name_size = name.len() as u32 + 1;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(data);
        self.pad(4);
    }

    fn pad(&mut self, alignment: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(alignment), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads an archive back: name, mode, data.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                u32::from_str_radix(std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap(), 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let data = (110 + name_size).next_multiple_of(4);
            if name == TRAILER {
                return entries;
            }
            entries.push((name, mode, bytes[data..data + size].to_vec()));
            bytes = &bytes[(data + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut archive = Archive::default();
        archive.directory("bin");
        archive.file("bin/one", 0o755, b"x");
        archive.file("bin/four", 0o644, b"1234");
        archive.symlink("bin/sh", "one");
        archive.character_device("console", 5, 1);
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        let entries = read(&bytes);
        let expected: [(&str, u32, &[u8]); 5] = [
            ("bin", 0o040_755, b""),
            ("bin/one", 0o100_755, b"x"),
            ("bin/four", 0o100_644, b"1234"),
            ("bin/sh", 0o120_777, b"one"),
            ("console", 0o020_600, b""),
        ];
        assert_eq!(entries.len(), expected.len());
        for ((name, mode, data), (want_name, want_mode, want_data)) in entries.iter().zip(expected) {
            assert_eq!((name.as_str(), *mode, data.as_slice()), (want_name, want_mode, want_data));
        }
    }

    #[test]
    fn the_header_is_110_bytes_and_an_empty_archive_is_its_trailer() {
        let bytes = Archive::default().finish();
        assert_eq!(&bytes[110..121], b"TRAILER!!!\0");
        assert_eq!(bytes.len(), 512);
    }
}
