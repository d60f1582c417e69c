//! Where the numbers of a bundle stand. The only place that knows offsets; see the table in the parent.

/// The first bytes of a bundle.
pub const MAGIC: [u8; 8] = *b"ENTRESOL";
/// The version that this code writes and reads.
pub const VERSION: u32 = 2;
/// Bytes in the header.
pub const HEADER_LEN: usize = 64;
/// Data of files starts at multiples of this many bytes.
pub const FILE_ALIGN: u64 = 4096;

/// Bytes in an entry of the file table.
pub(super) const ENTRY_LEN: usize = 32;
/// Where the file table may start.
pub(super) const TABLE_ALIGN: u64 = 8;
/// Where the checksum stands.
pub(super) const CHECKSUM: usize = 12;

const VERSION_AT: usize = 8;
const TOTAL_AT: usize = 16;
const CONFIG_AT: usize = 24;
const CONFIG_LEN_AT: usize = 32;
const TABLE_AT: usize = 40;
const COUNT_AT: usize = 48;
const RESERVED_AT: usize = 52;
const NAMES_LEN_AT: usize = 56;

// Every field starts where the one before it ends, and the last ends with the header.
const _: () = {
    assert!(VERSION_AT == MAGIC.len());
    assert!(CHECKSUM == VERSION_AT + 4);
    assert!(TOTAL_AT == CHECKSUM + 4);
    assert!(CONFIG_AT == TOTAL_AT + 8);
    assert!(CONFIG_LEN_AT == CONFIG_AT + 8);
    assert!(TABLE_AT == CONFIG_LEN_AT + 8);
    assert!(COUNT_AT == TABLE_AT + 8);
    assert!(RESERVED_AT == COUNT_AT + 4);
    assert!(NAMES_LEN_AT == RESERVED_AT + 4);
    assert!(HEADER_LEN == NAMES_LEN_AT + 8);
};

const OFFSET_AT: usize = 0;
const LENGTH_AT: usize = 8;
const NAME_AT: usize = 16;
const NAME_LEN_AT: usize = 20;
const FLAGS_AT: usize = 24;
const ENTRY_CHECKSUM_AT: usize = 28;

const _: () = {
    assert!(LENGTH_AT == OFFSET_AT + 8);
    assert!(NAME_AT == LENGTH_AT + 8);
    assert!(NAME_LEN_AT == NAME_AT + 4);
    assert!(FLAGS_AT == NAME_LEN_AT + 4);
    assert!(ENTRY_CHECKSUM_AT == FLAGS_AT + 4);
    assert!(ENTRY_LEN == ENTRY_CHECKSUM_AT + 4);
    assert!(FILE_ALIGN.is_power_of_two() && FILE_ALIGN.is_multiple_of(TABLE_ALIGN));
};

/// The header, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub magic: [u8; 8],
    pub version: u32,
    pub checksum: u32,
    pub total: u64,
    pub config: u64,
    pub config_len: u64,
    pub table: u64,
    pub count: u32,
    pub reserved: u32,
    pub names_len: u64,
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        put(&mut bytes, 0, self.magic);
        put(&mut bytes, VERSION_AT, self.version.to_le_bytes());
        put(&mut bytes, CHECKSUM, self.checksum.to_le_bytes());
        put(&mut bytes, TOTAL_AT, self.total.to_le_bytes());
        put(&mut bytes, CONFIG_AT, self.config.to_le_bytes());
        put(&mut bytes, CONFIG_LEN_AT, self.config_len.to_le_bytes());
        put(&mut bytes, TABLE_AT, self.table.to_le_bytes());
        put(&mut bytes, COUNT_AT, self.count.to_le_bytes());
        put(&mut bytes, RESERVED_AT, self.reserved.to_le_bytes());
        put(&mut bytes, NAMES_LEN_AT, self.names_len.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        Self {
            magic: take(bytes, 0),
            version: u32::from_le_bytes(take(bytes, VERSION_AT)),
            checksum: u32::from_le_bytes(take(bytes, CHECKSUM)),
            total: u64::from_le_bytes(take(bytes, TOTAL_AT)),
            config: u64::from_le_bytes(take(bytes, CONFIG_AT)),
            config_len: u64::from_le_bytes(take(bytes, CONFIG_LEN_AT)),
            table: u64::from_le_bytes(take(bytes, TABLE_AT)),
            count: u32::from_le_bytes(take(bytes, COUNT_AT)),
            reserved: u32::from_le_bytes(take(bytes, RESERVED_AT)),
            names_len: u64::from_le_bytes(take(bytes, NAMES_LEN_AT)),
        }
    }
}

/// An entry of the file table, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub offset: u64,
    pub length: u64,
    pub name: u32,
    pub name_len: u32,
    pub flags: u32,
    pub checksum: u32,
}

impl Entry {
    /// Flag: a guest may write to the file.
    pub const WRITABLE: u32 = 1;

    pub fn encode(&self) -> [u8; ENTRY_LEN] {
        let mut bytes = [0; ENTRY_LEN];
        put(&mut bytes, OFFSET_AT, self.offset.to_le_bytes());
        put(&mut bytes, LENGTH_AT, self.length.to_le_bytes());
        put(&mut bytes, NAME_AT, self.name.to_le_bytes());
        put(&mut bytes, NAME_LEN_AT, self.name_len.to_le_bytes());
        put(&mut bytes, FLAGS_AT, self.flags.to_le_bytes());
        put(&mut bytes, ENTRY_CHECKSUM_AT, self.checksum.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8; ENTRY_LEN]) -> Self {
        Self {
            offset: u64::from_le_bytes(take(bytes, OFFSET_AT)),
            length: u64::from_le_bytes(take(bytes, LENGTH_AT)),
            name: u32::from_le_bytes(take(bytes, NAME_AT)),
            name_len: u32::from_le_bytes(take(bytes, NAME_LEN_AT)),
            flags: u32::from_le_bytes(take(bytes, FLAGS_AT)),
            checksum: u32::from_le_bytes(take(bytes, ENTRY_CHECKSUM_AT)),
        }
    }

    pub fn writable(&self) -> bool {
        self.flags & Self::WRITABLE != 0
    }
}

fn put<const N: usize, const M: usize>(bytes: &mut [u8; N], at: usize, value: [u8; M]) {
    bytes[at..at + M].copy_from_slice(&value);
}

/// `M` bytes at a constant place of a record; the assertions above keep every place inside.
fn take<const N: usize, const M: usize>(bytes: &[u8; N], at: usize) -> [u8; M] {
    let mut value = [0; M];
    value.copy_from_slice(&bytes[at..at + M]);
    value
}
