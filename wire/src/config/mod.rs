//! Which virtual machines there are, on what outer machine, and what their owner wants of them.
//!
//! Protocol: three forms of one thing, each made only from the one before.
//!
//! 1. [`Written`]: as the owner wrote it, sizes as text and numbers as wide as they come. The host tool reads it from
//!    TOML; keys that nobody knows are refused there, by name.
//! 2. [`Config<String>`](Config): checked, files by path. [`Written::check`] makes it.
//! 3. [`Config<FileIndex>`](crate::bundle::FileIndex): the same with files as numbers in a bundle, stored there as JSON.
//!
//! [`Config::check`] holds every rule that does not depend on how a value is written. Both sides call it: the host
//! with the files of its disk, the hypervisor with the files of the bundle that it was given.
//!
//! Invariants of a checked configuration: at least one VM and at most [`MAX_VMS`]; names differ, and are 1–32 of
//! `[a-z0-9-]` not starting with `-`; memory is a multiple of 2 MiB above zero, and no VM has more than the outer
//! machine; 1–8 vCPUs; at most [`MAX_DISKS`] disks of whole sectors; kernel and initrd fit into memory together, or the
//! kernel is firmware, which starts in place at [`FIRMWARE_BASE`] and has no initrd; it, at most [`MAX_ROMS`] other read-only
//! files and the flash at [`FLASH_BASE`] overlap nowhere and end by [`ROM_END`]; zones, doorbells and devices of the
//! outer machine lie apart in [`OWNERS_WINDOW`], and such a device is given to one VM only; at most one VM has the console's
//! foreground. The sum of all memory may exceed the machine's: memory is given on demand.
//!
//! Known hole: whether a file *is* a kernel is the loader's to say; here it only has to be there and to fit.

mod arch;
mod check;
mod memory;
mod size;
#[cfg(test)]
mod tests;
mod written;

use alloc::string::String;
use alloc::vec::Vec;
use core::{fmt, iter};

use serde::{Deserialize, Serialize};

pub use arch::Arch;
pub use check::{FileLength, check_name};
pub use memory::{Limits, PRIORITY, WrittenMemory, Yields};
pub use size::{format_size, parse_size};
pub use written::{Written, WrittenDisk, WrittenOuter, WrittenPolicies, WrittenRom, WrittenVm};

/// Most virtual machines in one configuration.
pub const MAX_VMS: usize = 64;
/// Most vCPUs of one virtual machine.
pub const MAX_VCPUS: u32 = 8;
/// Most disks of one virtual machine.
pub const MAX_DISKS: usize = 8;
/// Most read-only files of one virtual machine, firmware not counted.
pub const MAX_ROMS: usize = 8;
/// Guest physical address of firmware: the first flash bank of QEMU's `virt`.
pub const FIRMWARE_BASE: u64 = 0;
/// Guest physical address of the flash: the second bank of QEMU's `virt`.
pub const FLASH_BASE: u64 = 0x0400_0000;
/// Most bytes of the flash, and of firmware: a bank of QEMU's `virt`.
pub const MAX_FLASH: u64 = 64 << 20;
/// Least bytes of the flash: one erase block, as QEMU's `virt` has them.
pub const MIN_FLASH: u64 = 256 << 10;
/// Guest physical address by which read-only files and flash end: devices begin there.
pub const ROM_END: u64 = 0x0800_0000;
/// Read-only files begin at multiples of this many bytes.
pub const ROM_ALIGN: u64 = 4096;
/// Longest name of a virtual machine, in bytes.
pub const MAX_NAME: usize = 32;
/// Longest kernel command line, in bytes: arm64 Linux keeps 2048 with the terminating zero.
pub const MAX_CMDLINE: usize = 2047;
/// Most CPUs of the outer machine: the hypervisor keeps state for as many.
pub const MAX_OUTER_CPUS: u32 = 64;
/// Least memory of the outer machine, in bytes: the hypervisor, its heap and a small bundle.
pub const MIN_OUTER_MEMORY: u64 = 256 << 20;
/// Most memory of the outer machine, in bytes: QEMU's `virt` has its next device region behind that.
pub const MAX_OUTER_MEMORY: u64 = 255 << 30;
/// Least memory of a virtual machine whose devices bounce, in bytes.
pub const MIN_BOUNCE_MEMORY: u64 = 128 << 20;
/// Memory comes in multiples of this many bytes: the block of the second stage.
pub const MEMORY_GRANULE: u64 = 2 << 20;
/// Where an owner puts what no device of the machine is: the platform bus of QEMU's `virt`. Memory and emulated devices are
/// elsewhere.
pub const OWNERS_WINDOW: core::ops::Range<u64> = 0x0c00_0000..0x0e00_0000;
/// Most zones of coalesced MMIO of one virtual machine.
pub const MAX_COALESCED: usize = 4;
/// Most devices of the outer machine that one virtual machine is given.
pub const MAX_PASS_THROUGH: usize = 4;
/// What a device that is given away has whole ones of, in bytes.
pub const DEVICE_PAGE: u64 = 4 << 10;
/// Most doorbells of one virtual machine.
pub const MAX_DOORBELLS: usize = 8;
/// Pages that are read in a second to find equal ones, if the owner says nothing.
pub const MERGE_PAGES_PER_SECOND: u32 = 5_000;
/// Most of them: 4 GiB.
pub const MAX_MERGE_PAGES_PER_SECOND: u32 = 1 << 20;
/// Bytes in a disk's sector.
pub const SECTOR: u64 = 512;

/// A checked configuration; `F` is how it names files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config<F> {
    /// The machine that the hypervisor runs on.
    pub outer: Outer,
    /// The virtual machines, in the order of the console's escape digits.
    pub vms: Vec<Vm<F>>,
}

/// The machine that the hypervisor runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outer {
    /// Bytes of memory.
    pub memory: u64,
    /// CPUs.
    pub cpus: u32,
    /// CPUs, the first ones, that run no guest: they only look after the hypervisor's own work. Fewer than [`Outer::cpus`].
    #[serde(default)]
    pub housekeeping_cpus: u32,
    /// Its architecture.
    #[serde(default)]
    pub arch: Arch,
    /// Pages that the scanner for equal ones reads in a second, of all VMs that take part; 0: only when its owner asks.
    #[serde(default = "merge_rate")]
    pub merge_pages_per_second: u32,
}

const fn merge_rate() -> u32 {
    MERGE_PAGES_PER_SECOND
}

impl Default for Outer {
    fn default() -> Self {
        Self {
            memory: 4 << 30,
            cpus: 2,
            housekeeping_cpus: 0,
            arch: Arch::Arm64,
            merge_pages_per_second: MERGE_PAGES_PER_SECOND,
        }
    }
}

/// One virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm<F> {
    /// Its name, unique in the configuration.
    pub name: String,
    /// Bytes of memory.
    pub memory: u64,
    /// Whether its memory is private: absent from the hypervisor's own mapping.
    #[serde(default)]
    pub private: bool,
    /// How much of it is in memory.
    #[serde(default)]
    pub limits: Limits,
    /// How devices reach private memory.
    #[serde(default)]
    pub private_io: PrivateIo,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// The file its first vCPU starts with.
    pub kernel: F,
    /// How to read that file.
    pub kernel_format: KernelFormat,
    /// A file for the kernel to find in memory.
    pub initrd: Option<F>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Block devices, in the order of their virtio slots.
    pub disks: Vec<Disk<F>>,
    /// Files that the guest sees as memory that it cannot change.
    #[serde(default = "Vec::new")]
    pub roms: Vec<Rom<F>>,
    /// What its flash at [`FLASH_BASE`] holds at boot, if it has one. What it writes is kept in memory over its resets, and is
    /// gone when the machine stops.
    #[serde(default = "no_flash")]
    pub flash: Option<F>,
    /// Where its stores are kept for its owner to take.
    #[serde(default)]
    pub coalesced_mmio: Vec<CoalescedZone>,
    /// Where its stores are signals to its owner.
    #[serde(default)]
    pub doorbells: Vec<Doorbell>,
    /// Devices of the outer machine that are its own.
    #[serde(default)]
    pub pass_through: Vec<PassThrough>,
    /// Whether it has a balloon, through which it gives memory back that it can do without.
    #[serde(default)]
    pub balloon: bool,
    /// Whether it has memory tagging (FEAT_MTE2). The outer machine must have it.
    #[serde(default)]
    pub mte: bool,
    /// What the owner decided where the architecture leaves a choice.
    pub policies: Policies,
    /// Whether it starts with the hypervisor; else it waits, paused, for a `resume`.
    pub autostart: bool,
    /// Whether its pages may become one with equal pages, its own and those of other VMs that say so too.
    #[serde(default)]
    pub merge: bool,
}

/// How devices reach memory that is private.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrivateIo {
    /// Page by page, each for one access.
    #[default]
    Lease,
    /// Not at all: they reach what the guest shares, and a window that is shared from the start.
    Bounce,
}

/// A zone of coalesced MMIO.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoalescedZone {
    /// First guest physical address.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

/// Registers of the outer machine that a guest reaches without the hypervisor. What the device does with addresses that it is
/// given is the machine's: whoever gives a device away trusts the guest with all of the machine's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PassThrough {
    /// First physical address of the outer machine.
    pub machine: u64,
    /// Where the guest has it.
    pub base: u64,
    /// Bytes.
    pub size: u64,
}

/// A doorbell: a store of just this size at just this address counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Doorbell {
    /// Guest physical address.
    pub address: u64,
    /// Bytes: 1, 2, 4 or 8.
    pub size: u64,
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk<F> {
    /// What it holds at boot.
    pub file: F,
    /// Whether the guest is kept from writing. Writes are kept in memory and are gone when the machine stops.
    pub read_only: bool,
}

/// For a configuration that was written before there was flash.
const fn no_flash<F>() -> Option<F> {
    None
}

/// A file in the guest's address space, read-only and shared with every VM that names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rom<F> {
    /// What it holds. The rest of its last page reads as zero.
    pub file: F,
    /// Guest physical address of its first byte.
    pub at: u64,
}

/// How to read a kernel file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KernelFormat {
    /// By what the file says of itself: arm64 `Image`, the same compressed, ELF; on x86-64 `bzImage`, ELF.
    #[default]
    Auto,
    /// Position-independent code without a header, started at its first byte.
    Flat,
    /// Code that is not copied: it lies read-only at [`FIRMWARE_BASE`], shared with every VM that names it, and starts there.
    Firmware,
}

/// The owner's decisions for one virtual machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policies {
    /// What an access to an address that no device claims does.
    pub unclaimed_mmio: UnclaimedMmio,
    /// The largest entry its second stage may use.
    pub page_size: LargestEntry,
    /// Whether it has the console at the start.
    pub console: Console,
    /// What happens when it asks for a reset.
    pub on_guest_reset: OnReset,
    /// Whether it may drive the hypervisor by vendor calls: for measurements and tests.
    #[serde(default)]
    pub services: bool,
    /// What an access to no memory does that neither the hardware describes nor the hypervisor decodes.
    #[serde(default)]
    pub no_syndrome: NoSyndrome,
    /// What DC IVAC does to read-only memory.
    #[serde(default)]
    pub read_only_ivac: ReadOnlyIvac,
    /// Who carries out its cache maintenance by address.
    #[serde(default)]
    pub cache_maintenance: CacheMaintenance,
    /// What a store to read-only memory does.
    #[serde(default)]
    pub read_only_store: ReadOnlyStore,
    /// What a write to a block of 2 MiB that a fork shares copies.
    #[serde(default)]
    pub shared_block: SharedBlock,
    /// What its guest's addresses are translated by.
    #[serde(default)]
    pub paging: Paging,
}

/// What the addresses of a guest on x86-64 are translated by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Paging {
    /// Its own tables, and the processor's second stage below them.
    #[default]
    Nested,
    /// Tables of the hypervisor's in place of its own, as on a processor without a second stage.
    Shadow,
}

/// What a write to a block of 2 MiB that a fork shares copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SharedBlock {
    /// The page of 4 KiB that is written: the block is pages from then on.
    #[default]
    Split,
    /// All of it, where a block is free: a longer write, and no smaller entries after it.
    Whole,
}

/// What a store to read-only memory does. It never reaches the memory (INV-13).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReadOnlyStore {
    /// Nothing, as on a machine with a ROM: firmware relies on it.
    #[default]
    Ignore,
    /// The guest takes a synchronous external abort.
    Abort,
}

/// What an access does that cannot be emulated: exclusives, atomics and other instructions that no device answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NoSyndrome {
    /// The guest takes a synchronous external abort.
    #[default]
    Inject,
    /// The virtual machine crashes, and says instruction, address and syndrome.
    Stop,
}

/// What DC IVAC, which needs write permission, does to read-only memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReadOnlyIvac {
    /// The guest takes a synchronous external abort.
    #[default]
    Abort,
    /// The page is cleaned and invalidated, as for every other address.
    Clean,
}

/// Who carries out a guest's cache maintenance by address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheMaintenance {
    /// The hardware.
    #[default]
    Direct,
    /// The hypervisor: every operation traps (HCR_EL2.TPCP and TPU).
    Trap,
}

/// What an access to an address that no device claims does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnclaimedMmio {
    /// The guest takes a synchronous external abort.
    #[default]
    Abort,
    /// Loads give zero, stores do nothing.
    ReadAsZero,
}

/// The largest entry that a second stage may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LargestEntry {
    /// Blocks of 2 MiB where the object allows, pages elsewhere.
    #[default]
    #[serde(rename = "2M")]
    Block2M,
    /// Pages of 4 KiB only.
    #[serde(rename = "4K")]
    Page4K,
}

/// Who has the console at the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Console {
    /// This virtual machine.
    Foreground,
    /// Another one; its own output is kept for later.
    #[default]
    Background,
}

/// What happens when a guest asks for a reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReset {
    /// It starts again from its files.
    #[default]
    Reboot,
    /// It stops, as if it had powered off.
    Stop,
}

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The kernel of the VM at this index.
    Kernel {
        /// Index of the VM.
        vm: usize,
    },
    /// Its initrd.
    Initrd {
        /// Index of the VM.
        vm: usize,
    },
    /// One of its disks.
    Disk {
        /// Index of the VM.
        vm: usize,
        /// Index of the disk in the VM.
        disk: usize,
        /// Whether the guest may write.
        writable: bool,
    },
    /// One of its read-only files.
    Rom {
        /// Index of the VM.
        vm: usize,
        /// Index of the file in the VM.
        rom: usize,
    },
    /// What its flash holds at boot. The guest writes to a copy.
    Flash {
        /// Index of the VM.
        vm: usize,
    },
}

impl Role {
    /// Whether the guest may write to the file.
    pub fn writable(self) -> bool {
        matches!(self, Self::Disk { writable: true, .. })
    }
}

impl fmt::Display for Role {
    /// The field that names the file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel { vm } => write!(f, "vms[{vm}].kernel"),
            Self::Initrd { vm } => write!(f, "vms[{vm}].initrd"),
            Self::Disk { vm, disk, .. } => write!(f, "vms[{vm}].disks[{disk}].file"),
            Self::Rom { vm, rom } => write!(f, "vms[{vm}].roms[{rom}].file"),
            Self::Flash { vm } => write!(f, "vms[{vm}].flash"),
        }
    }
}

impl<F> Config<F> {
    /// Every file that is named, with its role, in the order of [`Config::map_files`].
    pub fn files(&self) -> impl Iterator<Item = (Role, &F)> {
        self.vms.iter().enumerate().flat_map(|(index, vm)| vm.files(index))
    }

    /// The same configuration with every file named differently: `name` is asked for each file, in order.
    ///
    /// # Errors
    /// The first error of `name`.
    pub fn map_files<G, E>(self, mut name: impl FnMut(Role, F) -> Result<G, E>) -> Result<Config<G>, E> {
        let vms = self.vms.into_iter().enumerate().map(|(index, vm)| vm.map_files(index, &mut name));
        Ok(Config { outer: self.outer, vms: vms.collect::<Result<_, E>>()? })
    }
}

impl<F> Vm<F> {
    /// Every file that this VM names, with its role; `vm` is its index.
    fn files(&self, vm: usize) -> impl Iterator<Item = (Role, &F)> {
        let kernel = (Role::Kernel { vm }, &self.kernel);
        let initrd = self.initrd.iter().map(move |file| (Role::Initrd { vm }, file));
        let disks = self.disks.iter().enumerate();
        let disks = disks.map(move |(disk, it)| (Role::Disk { vm, disk, writable: !it.read_only }, &it.file));
        let roms = self.roms.iter().enumerate().map(move |(rom, it)| (Role::Rom { vm, rom }, &it.file));
        let flash = self.flash.iter().map(move |file| (Role::Flash { vm }, file));
        iter::once(kernel).chain(initrd).chain(disks).chain(roms).chain(flash)
    }

    /// As [`Config::map_files`], for this VM alone; `vm` is the index that roles tell.
    ///
    /// # Errors
    /// The first error of `name`.
    pub fn map_files<G, E>(self, vm: usize, name: &mut impl FnMut(Role, F) -> Result<G, E>) -> Result<Vm<G>, E> {
        let kernel = name(Role::Kernel { vm }, self.kernel)?;
        let initrd = self.initrd.map(|file| name(Role::Initrd { vm }, file)).transpose()?;
        let disks = self.disks.into_iter().enumerate().map(|(disk, Disk { file, read_only })| {
            Ok(Disk { file: name(Role::Disk { vm, disk, writable: !read_only }, file)?, read_only })
        });
        let disks = disks.collect::<Result<_, E>>()?;
        let roms = self.roms.into_iter().enumerate();
        let roms = roms.map(|(rom, Rom { file, at })| Ok(Rom { file: name(Role::Rom { vm, rom }, file)?, at }));
        let roms = roms.collect::<Result<_, E>>()?;
        let flash = self.flash.map(|file| name(Role::Flash { vm }, file)).transpose()?;
        Ok(Vm {
            name: self.name,
            memory: self.memory,
            private: self.private,
            limits: self.limits,
            private_io: self.private_io,
            vcpus: self.vcpus,
            kernel,
            kernel_format: self.kernel_format,
            initrd,
            cmdline: self.cmdline,
            disks,
            roms,
            flash,
            coalesced_mmio: self.coalesced_mmio,
            doorbells: self.doorbells,
            pass_through: self.pass_through,
            balloon: self.balloon,
            mte: self.mte,
            policies: self.policies,
            autostart: self.autostart,
            merge: self.merge,
        })
    }
}
