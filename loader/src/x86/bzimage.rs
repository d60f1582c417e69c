//! Linux's `bzImage`, by the 64-bit boot protocol (Documentation/arch/x86/boot.rst).
//!
//! Purpose: the setup header field by field, the kernel's place, and `boot_params`. The real-mode part is not run: the kernel is
//! entered 200h bytes behind its start, in long mode.
//!
//! Invariants: in a parsed [`Header`] the protected-mode part lies inside the file and is not empty.

use super::map;
use super::memory::{Memory, Range};
use crate::kernel::{KernelError, le16, le32, le64};
use crate::{Invalid, Region};
use entresol_addr::Gpa;

/// Bytes of `boot_params`.
pub(super) const PARAMS: usize = 4096;
/// Offset of the entry in long mode from the kernel's start.
const ENTRY_64: u64 = 0x200;
/// Where the setup header begins, in the file and in `boot_params` alike.
const SETUP: usize = 0x1f1;
/// The field that the last version that we need ends with: init_size.
const SETUP_END: usize = 0x264;
const SECTOR: u64 = 512;
/// Real-mode sectors where the header says 0.
const OLD_SECTORS: u64 = 4;
/// `HdrS`.
const MAGIC: &[u8] = b"HdrS";
/// The first version with xloadflags.
const LEAST_VERSION: u16 = 0x020c;
const BOOT_FLAG: u16 = 0xaa55;
/// loadflags: the protected-mode part goes to 1 MiB or higher.
const LOADED_HIGH: u8 = 1 << 0;
/// xloadflags: it has the 64-bit entry.
const KERNEL_64: u16 = 1 << 0;
/// A loader without a number of its own.
const UNDEFINED_LOADER: u8 = 0xff;
/// vid_mode: whatever is there.
const VIDEO_NORMAL: u16 = 0xffff;
/// The largest alignment that is believed: 1 GiB.
const MOST_ALIGNMENT: u32 = 1 << 30;
/// Entries of the memory map that `boot_params` has room for.
const E820_ROOM: usize = 128;
const _: () = assert!(super::memory::MAX_RANGES <= E820_ROOM);

/// Offsets in the setup header.
mod at {
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const SYSSIZE: usize = 0x1f4;
    pub const VID_MODE: usize = 0x1fa;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const JUMP: usize = 0x201;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const TYPE_OF_LOADER: usize = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const CODE32_START: usize = 0x214;
    pub const RAMDISK_IMAGE: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMD_LINE_PTR: usize = 0x228;
    pub const INITRD_ADDR_MAX: usize = 0x22c;
    pub const KERNEL_ALIGNMENT: usize = 0x230;
    pub const RELOCATABLE: usize = 0x234;
    pub const XLOADFLAGS: usize = 0x236;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
    // Outside of the setup header, in `boot_params` only.
    pub const ACPI_RSDP: usize = 0x070;
    pub const E820_ENTRIES: usize = 0x1e8;
    pub const E820_TABLE: usize = 0x2d0;
}

/// What the setup header says that placing needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Where the protected-mode part begins in the file.
    pub offset: u64,
    /// Bytes of it.
    pub size: u64,
    /// Bytes that it needs from its start while it unpacks itself.
    pub init_size: u64,
    /// Where it would like to be.
    pub preferred: u64,
    /// Where it may be instead: at multiples of this.
    pub alignment: u64,
    /// Whether it may.
    pub relocatable: bool,
    /// Last byte that the initial RAM disk may have.
    pub initrd_max: u64,
    /// Most bytes of the command line, without the zero that ends it.
    pub cmdline_size: u64,
    /// One past the last byte of the setup header.
    end: usize,
}

const fn invalid(field: &'static str, value: u64, rule: &'static str) -> KernelError {
    KernelError::Field(Invalid { field, value, rule })
}

/// Whether a file has the setup header's magic.
pub(super) fn is_one(file: &[u8]) -> bool {
    file.get(at::MAGIC..).is_some_and(|rest| rest.starts_with(MAGIC))
}

impl Header {
    /// The setup header of `file`, which has its magic.
    ///
    /// # Errors
    ///
    /// A header that is cut off, too old, without the 64-bit entry, or that contradicts itself or the file.
    pub(super) fn parse(file: &[u8]) -> Result<Self, KernelError> {
        let have = file.len() as u64;
        if file.len() < SETUP_END {
            return Err(KernelError::Truncated { what: "setup header", need: SETUP_END as u64, have });
        }
        let end = Self::kind(file)?;
        let sectors = match file[at::SETUP_SECTS] {
            0 => OLD_SECTORS,
            sectors => u64::from(sectors),
        };
        let offset = (sectors + 1) * SECTOR;
        let size = Self::size(file, offset, have)?;
        let init_size = u64::from(field32(file, at::INIT_SIZE));
        if init_size < size {
            return Err(invalid("setup header init_size", init_size, "at least the bytes of the protected-mode part"));
        }
        let alignment = field32(file, at::KERNEL_ALIGNMENT);
        if !alignment.is_power_of_two() || alignment > MOST_ALIGNMENT {
            let rule = "a power of two, at most 1 GiB";
            return Err(invalid("setup header kernel_alignment", alignment.into(), rule));
        }
        let preferred = le64(file, at::PREF_ADDRESS).unwrap_or_default();
        if !(map::EXTENDED_BASE..map::LOW_END).contains(&preferred) {
            return Err(invalid("setup header pref_address", preferred, "from 1 MiB to 3 GiB"));
        }
        Ok(Self {
            offset,
            size,
            init_size,
            preferred,
            alignment: u64::from(alignment),
            relocatable: file[at::RELOCATABLE] != 0,
            initrd_max: u64::from(field32(file, at::INITRD_ADDR_MAX)),
            cmdline_size: u64::from(field32(file, at::CMDLINE_SIZE)),
            end,
        })
    }

    /// Checks that the 64-bit protocol is spoken; where the setup header ends.
    fn kind(file: &[u8]) -> Result<usize, KernelError> {
        let boot_flag = le16(file, at::BOOT_FLAG).unwrap_or_default();
        if boot_flag != BOOT_FLAG {
            return Err(invalid("setup header boot_flag", boot_flag.into(), "0xaa55"));
        }
        let version = le16(file, at::VERSION).unwrap_or_default();
        if version < LEAST_VERSION {
            let rule = "at least 0x20c (Linux 3.8), which has the 64-bit entry";
            return Err(invalid("setup header version", version.into(), rule));
        }
        let flags = file[at::LOADFLAGS];
        if flags & LOADED_HIGH == 0 {
            return Err(invalid("setup header loadflags", flags.into(), "with bit 0, LOADED_HIGH: a bzImage"));
        }
        let flags = le16(file, at::XLOADFLAGS).unwrap_or_default();
        if flags & KERNEL_64 == 0 {
            return Err(invalid("setup header xloadflags", flags.into(), "with bit 0, XLF_KERNEL_64: a 64-bit kernel"));
        }
        let jump = file[at::JUMP];
        let end = at::MAGIC + usize::from(jump);
        if end < SETUP_END || end > file.len() {
            return Err(invalid(
                "setup header jump",
                jump.into(),
                "such that the header has init_size, and the file it",
            ));
        }
        Ok(end)
    }

    /// Bytes of the protected-mode part. syssize counts paragraphs, the last of which may be cut off.
    fn size(file: &[u8], offset: u64, have: u64) -> Result<u64, KernelError> {
        const PARAGRAPH: u64 = 16;
        let paragraphs = u64::from(field32(file, at::SYSSIZE));
        let size = paragraphs * PARAGRAPH;
        if size <= ENTRY_64 {
            return Err(invalid("setup header syssize", paragraphs, "more than 32: the 64-bit entry lies behind them"));
        }
        let need = offset + size - (PARAGRAPH - 1);
        if need > have {
            return Err(KernelError::Truncated { what: "protected-mode part", need, have });
        }
        Ok(size.min(have - offset))
    }

    /// Where the kernel goes: where it prefers to be, or as low as can be.
    ///
    /// # Errors
    ///
    /// Memory that does not hold it.
    pub(super) fn place(&self, memory: &Memory) -> Result<Region, Invalid> {
        let fits = |start: u64| start.checked_add(self.init_size).is_some_and(|end| end <= memory.low.size);
        let lowest = map::EXTENDED_BASE.next_multiple_of(self.alignment);
        let start = if fits(self.preferred) {
            self.preferred
        } else if self.relocatable && fits(lowest) {
            lowest
        } else {
            let rule =
                "enough for the kernel (setup header init_size) where it may be (pref_address, kernel_alignment)";
            return Err(Invalid { field: "memory", value: memory.low.size, rule });
        };
        Ok(Region { start: Gpa::new(start), size: self.init_size })
    }

    /// The first instruction of a kernel at `kernel`.
    pub(super) fn entry(&self, kernel: Region) -> u64 {
        kernel.start.get().wrapping_add(ENTRY_64)
    }

    /// Fills `params` for a kernel of `file` at `kernel`.
    pub(super) fn params(
        &self,
        params: &mut [u8; PARAMS],
        file: &[u8],
        kernel: Region,
        initrd: Option<Region>,
        ranges: &[Range],
        rsdp: u64,
    ) {
        let end = self.end.min(at::E820_TABLE);
        params[SETUP..end].copy_from_slice(&file[SETUP..end]);
        params[at::TYPE_OF_LOADER] = UNDEFINED_LOADER;
        let mut put = |at: usize, bytes: &[u8]| params[at..at + bytes.len()].copy_from_slice(bytes);
        put(at::VID_MODE, &VIDEO_NORMAL.to_le_bytes());
        // All of these lie below 4 GiB.
        put(at::CODE32_START, &(kernel.start.get() as u32).to_le_bytes());
        put(at::CMD_LINE_PTR, &(map::CMDLINE as u32).to_le_bytes());
        let (image, size) = initrd.map_or((0, 0), |initrd| (initrd.start.get() as u32, initrd.size as u32));
        put(at::RAMDISK_IMAGE, &image.to_le_bytes());
        put(at::RAMDISK_SIZE, &size.to_le_bytes());
        put(at::ACPI_RSDP, &rsdp.to_le_bytes());
        put(at::E820_ENTRIES, &[ranges.len() as u8]);
        for (index, range) in ranges.iter().enumerate() {
            let entry = at::E820_TABLE + 20 * index;
            put(entry, &range.region.start.get().to_le_bytes());
            put(entry + 8, &range.region.size.to_le_bytes());
            put(entry + 16, &(range.kind as u32).to_le_bytes());
        }
    }
}

/// A 32-bit field of a header whose length was checked.
fn field32(file: &[u8], at: usize) -> u32 {
    le32(file, at).unwrap_or_default()
}
