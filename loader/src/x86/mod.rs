//! Linux on an x86-64 guest: everything that its first instruction finds, as data.
//!
//! Purpose: [`boot`] turns a kernel file, an initial RAM disk and a command line into pieces of guest memory and the registers
//! of the first vCPU, or says which field has which value and which rule it breaks. Two kinds of kernels: `bzImage` by the
//! 64-bit boot protocol, and ELF by the x86/HVM direct boot ABI (PVH). The machine is that of [`map`].
//!
//! Protocol: [`boot`] decides and refuses; [`Boot::place`] copies. Whoever runs the vCPU loads [`Boot::start`]; the other vCPUs
//! wait for INIT and SIPI. Memory that no piece names reads as zero, as it does when it was never touched.
//!
//! | room | question |
//! |---|---|
//! | [`map`] | where is what on this machine? |
//! | [`memory`] | how does memory lie, and which map says so? |
//! | [`bzimage`], `pvh` | what does the kernel file say, and what does it want to be told? |
//! | `acpi` | how does the kernel learn of CPUs, devices and the switch? |
//! | [`start`] | what is in the registers? |
//!
//! Invariants: no input panics; heap is a table of 4 KiB, one of 24 KiB and one page, each fallibly; pieces lie inside memory
//! and overlap nowhere.
//!
//! Known holes: kernels compressed from outside (the payload of a bzImage is the kernel's own affair); initial RAM disks above
//! 4 GiB; the generation of a copy is not described.

mod acpi;
pub mod bzimage;
pub mod map;
pub mod memory;
mod pvh;
pub mod start;
#[cfg(test)]
mod tests;

use alloc::vec::Vec;

use arrayvec::ArrayVec;
use entresol_addr::{Gpa, PAGE_SIZE};

use crate::kernel::{KernelError, MAX_SEGMENTS, Program};
use crate::{Invalid, Memory as GuestMemory, Region};
use bzimage::Header;
use memory::Memory;
use start::Start;

/// Most vCPUs: a local APIC's identity is a byte, FFh is everybody, and the I/O APIC has one.
pub const MAX_VCPUS: u8 = 0xf0;

/// What a guest is started with.
#[derive(Clone, Copy, Debug)]
pub struct Machine<'a> {
    /// Bytes of memory.
    pub memory: u64,
    /// CPUs.
    pub vcpus: u8,
    /// The virtio transports that there are, by bit.
    pub virtio: u32,
    /// The kernel's command line.
    pub cmdline: &'a str,
}

/// Bytes for guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contents<'f> {
    /// Of the kernel or the RAM disk.
    File(&'f [u8]),
    /// Made here.
    Made(Vec<u8>),
    /// So many zeros.
    Zeros(u64),
}

/// A piece of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece<'f> {
    /// Where.
    pub at: Gpa,
    /// What.
    pub contents: Contents<'f>,
}

impl Piece<'_> {
    /// Where it lies.
    pub fn region(&self) -> Region {
        let size = match &self.contents {
            Contents::File(bytes) => bytes.len() as u64,
            Contents::Made(bytes) => bytes.len() as u64,
            Contents::Zeros(size) => *size,
        };
        Region { start: self.at, size }
    }
}

/// Segments with their zeros, and what goes beside them: RAM disk, command line, start information, tables of three kinds.
const MAX_PIECES: usize = 2 * MAX_SEGMENTS + 6;

/// A guest that can be started.
#[derive(Clone, Debug)]
pub struct Boot<'f> {
    /// How its memory lies.
    pub memory: Memory,
    /// Everything that is in it.
    pub pieces: ArrayVec<Piece<'f>, MAX_PIECES>,
    /// The first vCPU.
    pub start: Start,
}

/// Why a guest cannot be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// The file is no kernel for this machine.
    #[error("not a kernel: neither a bzImage nor an x86-64 ELF with a PVH entry")]
    NotAKernel,
    /// The kernel file.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A value that breaks a rule.
    #[error(transparent)]
    Field(#[from] Invalid),
    /// A segment of the kernel lies where there is no memory for it.
    #[error("the kernel needs {kernel}; it must lie between 1 MiB and the end of memory below 3 GiB, {end:#x}")]
    Kernelless {
        /// What it needs.
        kernel: Region,
        /// Where memory below 3 GiB ends.
        end: u64,
    },
    /// No memory for tables.
    #[error("no memory for the guest's tables")]
    OutOfMemory,
}

/// How the kernel is entered.
enum Protocol {
    /// By Linux's 64-bit boot protocol.
    Bits64(Header),
    /// At this address, by the x86/HVM direct boot ABI.
    Pvh(u64),
}

/// The kernel, placed.
struct Placed<'f> {
    pieces: ArrayVec<Piece<'f>, MAX_PIECES>,
    kernel: Region,
    initrd_max: u64,
    cmdline_size: u64,
}

/// Whether `file` is a kernel of this architecture, by its first bytes: a bzImage, or an ELF file of x86-64. [`boot`] says whether it
/// can be started.
pub fn is_kernel(file: &[u8]) -> bool {
    const MAGIC: &[u8] = b"\x7fELF\x02\x01";
    /// e_machine.
    const MACHINE: core::ops::Range<usize> = 18..20;
    let machine = file.get(MACHINE).filter(|_| file.starts_with(MAGIC));
    bzimage::is_one(file) || machine == Some(&pvh::MACHINE.0.to_le_bytes())
}

/// Decides what is where for a guest with `kernel` and, if it is not empty, the RAM disk `initrd`.
///
/// # Errors
///
/// [`BootError`].
pub fn boot<'f>(machine: &Machine<'_>, kernel: &'f [u8], initrd: &'f [u8]) -> Result<Boot<'f>, BootError> {
    let memory = Memory::of(machine.memory)?;
    if machine.vcpus == 0 || machine.vcpus > MAX_VCPUS {
        return Err(Invalid { field: "vcpus", value: machine.vcpus.into(), rule: "from 1 to 240" }.into());
    }
    let tables = acpi::tables(machine.vcpus, machine.virtio).map_err(|_| BootError::OutOfMemory)?;
    let (mut placed, protocol) = if bzimage::is_one(kernel) {
        let header = Header::parse(kernel)?;
        (place_bzimage(&header, &memory, kernel)?, Protocol::Bits64(header))
    } else {
        let (placed, entry) = place_elf(&memory, kernel)?;
        (placed, Protocol::Pvh(entry))
    };
    let disk = place_initrd(&memory, &placed, initrd)?;
    if let Some(disk) = disk {
        placed.pieces.push(Piece { at: disk.start, contents: Contents::File(initrd) });
    }
    let (start, info) = match protocol {
        Protocol::Bits64(header) => {
            let mut params = made::<{ bzimage::PARAMS }>()?;
            header.params(array(&mut params), kernel, placed.kernel, disk, &memory.ranges(), map::ACPI_BASE);
            (start::long(header.entry(placed.kernel)), params)
        }
        Protocol::Pvh(entry) => {
            let mut info = made::<{ pvh::MOST }>()?;
            let used = pvh::start_info(array(&mut info), disk, &memory.ranges(), map::ACPI_BASE);
            info.truncate(used);
            (start::protected(entry), info)
        }
    };
    let cmdline = cmdline(machine.cmdline, placed.cmdline_size)?;
    let mut gdt = made::<{ start::GDT_BYTES }>()?;
    *array(&mut gdt) = start::gdt(&start);
    let mut pieces = placed.pieces;
    for (at, bytes) in
        [(map::CMDLINE, cmdline), (map::START_INFO, info), (map::ACPI_BASE, tables), (start::GDT_AT.get(), gdt)]
    {
        pieces.push(Piece { at: Gpa::new(at), contents: Contents::Made(bytes) });
    }
    if start.cr3 != 0 {
        let mut tables = made::<{ start::TABLES_BYTES }>()?;
        start::page_tables(array(&mut tables));
        pieces.push(Piece { at: start::TABLES_AT, contents: Contents::Made(tables) });
    }
    Ok(Boot { memory, pieces, start })
}

impl Boot<'_> {
    /// Writes everything into guest memory.
    ///
    /// # Errors
    ///
    /// What guest memory says; part of the pieces may have been written.
    pub fn place<M: GuestMemory>(&self, memory: &mut M) -> Result<(), M::Error> {
        self.pieces.iter().try_for_each(|piece| match &piece.contents {
            Contents::File(bytes) => memory.write(piece.at, bytes),
            Contents::Made(bytes) => memory.write(piece.at, bytes),
            Contents::Zeros(size) => memory.zero(piece.at, *size),
        })
    }
}

/// `N` zeros on the heap.
fn made<const N: usize>() -> Result<Vec<u8>, BootError> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(N).map_err(|_| BootError::OutOfMemory)?;
    bytes.resize(N, 0);
    Ok(bytes)
}

/// All of `bytes`, which [`made`] has made with this size.
fn array<const N: usize>(bytes: &mut [u8]) -> &mut [u8; N] {
    bytes.try_into().expect("it was made with this size")
}

fn place_bzimage<'f>(header: &Header, memory: &Memory, file: &'f [u8]) -> Result<Placed<'f>, BootError> {
    let kernel = header.place(memory)?;
    let bytes = crate::kernel::contents(file, header.offset, header.size, "protected-mode part")?;
    let mut pieces = ArrayVec::new();
    pieces.push(Piece { at: kernel.start, contents: Contents::File(bytes) });
    Ok(Placed { pieces, kernel, initrd_max: header.initrd_max, cmdline_size: header.cmdline_size })
}

/// The segments where they want to be, and the entry.
fn place_elf<'f>(memory: &Memory, file: &'f [u8]) -> Result<(Placed<'f>, u64), BootError> {
    let program = Program::read(file, file.len() as u64, pvh::MACHINE)?.ok_or(BootError::NotAKernel)?;
    let entry = pvh::entry(file, &program)?;
    let (mut first, mut last, mut pieces) = (u64::MAX, 0, ArrayVec::new());
    for segment in &program.segments {
        if segment.address < map::EXTENDED_BASE || segment.end() > memory.low.size {
            let kernel = Region { start: Gpa::new(segment.address), size: segment.memory_size };
            return Err(BootError::Kernelless { kernel, end: memory.low.size });
        }
        (first, last) = (first.min(segment.address), last.max(segment.end()));
        let bytes = crate::kernel::contents(file, segment.offset, segment.file_size, "ELF segment")?;
        if !bytes.is_empty() {
            pieces.push(Piece { at: Gpa::new(segment.address), contents: Contents::File(bytes) });
        }
        let zeros = segment.memory_size - segment.file_size;
        if zeros != 0 {
            let at = Gpa::new(segment.address + segment.file_size);
            pieces.push(Piece { at, contents: Contents::Zeros(zeros) });
        }
    }
    let kernel = Region { start: Gpa::new(first), size: last.saturating_sub(first) };
    // What the ABI leaves open, Linux bounds by its own protocol's habits.
    Ok((Placed { pieces, kernel, initrd_max: u64::from(u32::MAX), cmdline_size: map::CMDLINE_ROOM - 1 }, entry))
}

/// The RAM disk as high as it may be; it must lie above the kernel, which unpacks itself where it lies.
fn place_initrd(memory: &Memory, placed: &Placed<'_>, initrd: &[u8]) -> Result<Option<Region>, Invalid> {
    let size = initrd.len() as u64;
    if size == 0 {
        return Ok(None);
    }
    let end = memory.low.size.min(placed.initrd_max.saturating_add(1));
    let start = end.checked_sub(size).map(|start| start / PAGE_SIZE * PAGE_SIZE);
    match start.filter(|start| *start >= placed.kernel.end().get()) {
        Some(start) => Ok(Some(Region { start: Gpa::new(start), size })),
        None => {
            let rule = "such that it fits above the kernel, into memory below 3 GiB and initrd_addr_max";
            Err(Invalid { field: "size of the initrd", value: size, rule })
        }
    }
}

/// The command line with the zero that ends it.
fn cmdline(text: &str, most: u64) -> Result<Vec<u8>, BootError> {
    let size = text.len() as u64;
    if size > most.min(map::CMDLINE_ROOM - 1) {
        let rule = "at most what the kernel says (setup header cmdline_size), and 65535";
        return Err(Invalid { field: "bytes of the command line", value: size, rule }.into());
    }
    if text.contains('\0') {
        return Err(
            Invalid { field: "byte of the command line", value: 0, rule: "other than zero, which ends it" }.into()
        );
    }
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(text.len() + 1).map_err(|_| BootError::OutOfMemory)?;
    bytes.extend_from_slice(text.as_bytes());
    bytes.push(0);
    Ok(bytes)
}
