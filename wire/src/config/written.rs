//! The configuration as an owner writes it, before any rule but its shape was checked.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use serde::Deserialize;

use super::check::{self, FileLength};
use super::memory::WrittenMemory;
use super::{
    Arch, CacheMaintenance, CoalescedZone, Config, Console, Disk, Doorbell, KernelFormat, LargestEntry, Limits,
    NoSyndrome, OnReset, Outer, PRIORITY, Paging, PassThrough, Policies, ReadOnlyIvac, ReadOnlyStore, Rom, SharedBlock,
    UnclaimedMmio, Vm, size,
};
use crate::Refusal;

/// A whole configuration as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Written {
    /// The outer machine; absent parts have their defaults.
    #[serde(default)]
    pub outer: WrittenOuter,
    /// The virtual machines.
    #[serde(default)]
    pub vms: Vec<WrittenVm>,
}

/// The outer machine as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrittenOuter {
    /// A size; `4G` if absent.
    pub memory: Option<String>,
    /// CPUs; 2 if absent.
    pub cpus: Option<i64>,
    /// See [`Outer::housekeeping_cpus`]; none if absent.
    pub housekeeping_cpus: Option<i64>,
    /// Architecture; arm64 if absent.
    pub arch: Option<Arch>,
    /// See [`Outer::merge_pages_per_second`]; 5000 if absent.
    pub merge_pages_per_second: Option<i64>,
}

/// A virtual machine as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrittenVm {
    /// Name.
    pub name: String,
    /// A size, or a table of a size and more.
    pub memory: WrittenMemory,
    /// Virtual CPUs; 1 if absent.
    pub vcpus: Option<i64>,
    /// Path of the kernel.
    pub kernel: String,
    /// How to read it. If absent: flat if the path ends in `.bin`, else by what the file says of itself.
    pub kernel_format: Option<KernelFormat>,
    /// Path of the initrd.
    pub initrd: Option<String>,
    /// Command line; empty if absent.
    #[serde(default)]
    pub cmdline: String,
    /// Block devices.
    #[serde(default)]
    pub disks: Vec<WrittenDisk>,
    /// Read-only files.
    #[serde(default)]
    pub roms: Vec<WrittenRom>,
    /// Path of what the flash holds at boot.
    pub flash: Option<String>,
    /// Zones of coalesced MMIO.
    #[serde(default)]
    pub coalesced_mmio: Vec<CoalescedZone>,
    /// Doorbells.
    #[serde(default)]
    pub doorbells: Vec<Doorbell>,
    /// Devices of the outer machine.
    #[serde(default)]
    pub pass_through: Vec<PassThrough>,
    /// Whether it has a balloon; no if absent.
    #[serde(default)]
    pub balloon: bool,
    /// Whether it has memory tagging; no if absent.
    #[serde(default)]
    pub mte: bool,
    /// Policies.
    #[serde(default)]
    pub policies: WrittenPolicies,
    /// Whether it starts with the hypervisor; yes if absent.
    pub autostart: Option<bool>,
    /// Whether its pages are merged with equal ones; no if absent.
    #[serde(default)]
    pub merge: bool,
}

/// A block device as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrittenDisk {
    /// Path of the image.
    pub file: String,
    /// Whether the guest is kept from writing; no if absent.
    #[serde(default)]
    pub read_only: bool,
}

/// A read-only file as written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrittenRom {
    /// Path of the file.
    pub file: String,
    /// Guest physical address of its first byte.
    pub at: i64,
}

/// Policies as written; each absent one has its default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrittenPolicies {
    /// See [`Policies::unclaimed_mmio`].
    #[serde(default)]
    pub unclaimed_mmio: UnclaimedMmio,
    /// See [`Policies::page_size`].
    #[serde(default)]
    pub page_size: LargestEntry,
    /// If no VM says `foreground`, the first that says nothing has the foreground.
    pub console: Option<Console>,
    /// See [`Policies::on_guest_reset`].
    #[serde(default)]
    pub on_guest_reset: OnReset,
    /// See [`Policies::services`].
    #[serde(default)]
    pub services: bool,
    /// See [`Policies::no_syndrome`].
    #[serde(default)]
    pub no_syndrome: NoSyndrome,
    /// See [`Policies::read_only_ivac`].
    #[serde(default)]
    pub read_only_ivac: ReadOnlyIvac,
    /// See [`Policies::cache_maintenance`].
    #[serde(default)]
    pub cache_maintenance: CacheMaintenance,
    /// See [`Policies::read_only_store`].
    #[serde(default)]
    pub read_only_store: ReadOnlyStore,
    /// See [`Policies::shared_block`].
    #[serde(default)]
    pub shared_block: SharedBlock,
    /// See [`Policies::paging`].
    #[serde(default)]
    pub paging: Paging,
}

impl Written {
    /// Checks everything; `length` tells how many bytes the file at a path has, or what is wrong with it.
    ///
    /// # Errors
    /// The first value that breaks a rule.
    pub fn check(self, length: &mut FileLength<'_, String>) -> Result<Config<String>, Refusal> {
        let outer = self.outer.convert()?;
        let claimed = self.vms.iter().any(|vm| vm.policies.console == Some(Console::Foreground));
        let first_silent = self.vms.iter().position(|vm| vm.policies.console.is_none()).filter(|_| !claimed);
        let vms = self.vms.into_iter().enumerate().map(|(index, vm)| vm.convert(index, first_silent == Some(index)));
        let config = Config { outer, vms: vms.collect::<Result<_, _>>()? };
        config.check(length)?;
        Ok(config)
    }
}

impl WrittenOuter {
    fn convert(self) -> Result<Outer, Refusal> {
        let default = Outer::default();
        let memory = self.memory.map_or(Ok(default.memory), |text| memory("outer.memory", &text))?;
        let cpus = self.cpus.map_or(Ok(default.cpus), check::outer_cpus)?;
        Ok(Outer {
            memory,
            cpus,
            housekeeping_cpus: check::housekeeping_cpus(self.housekeeping_cpus.unwrap_or(0), cpus)?,
            arch: self.arch.unwrap_or_default(),
            merge_pages_per_second: self
                .merge_pages_per_second
                .map_or(Ok(default.merge_pages_per_second), check::merge_rate)?,
        })
    }
}

impl WrittenVm {
    fn convert(self, index: usize, foreground: bool) -> Result<Vm<String>, Refusal> {
        let at = format!("vms[{index}]");
        let by_name = if self.kernel.ends_with(".bin") { KernelFormat::Flat } else { KernelFormat::Auto };
        let roms = self.roms.into_iter().enumerate().map(|(rom, WrittenRom { file, at: address })| {
            Ok(Rom { file, at: check::address(&format!("{at}.roms[{rom}].at"), address)? })
        });
        let roms = roms.collect::<Result<_, Refusal>>()?;
        let by_place = if foreground { Console::Foreground } else { Console::Background };
        Ok(Vm {
            memory: memory(&format!("{at}.memory"), &self.memory.size)?,
            private: self.memory.private,
            limits: limits(&format!("{at}.memory"), &self.memory)?,
            private_io: self.memory.io,
            vcpus: check::vcpus(&at, self.vcpus.unwrap_or(1))?,
            kernel_format: self.kernel_format.unwrap_or(by_name),
            policies: Policies {
                unclaimed_mmio: self.policies.unclaimed_mmio,
                page_size: self.policies.page_size,
                console: self.policies.console.unwrap_or(by_place),
                on_guest_reset: self.policies.on_guest_reset,
                services: self.policies.services,
                no_syndrome: self.policies.no_syndrome,
                read_only_ivac: self.policies.read_only_ivac,
                cache_maintenance: self.policies.cache_maintenance,
                read_only_store: self.policies.read_only_store,
                shared_block: self.policies.shared_block,
                paging: self.policies.paging,
            },
            disks: self.disks.into_iter().map(|disk| Disk { file: disk.file, read_only: disk.read_only }).collect(),
            roms,
            flash: self.flash,
            coalesced_mmio: self.coalesced_mmio,
            doorbells: self.doorbells,
            pass_through: self.pass_through,
            balloon: self.balloon,
            mte: self.mte,
            name: self.name,
            kernel: self.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            autostart: self.autostart.unwrap_or(true),
            merge: self.merge,
        })
    }
}

fn limits(at: &str, written: &WrittenMemory) -> Result<Limits, Refusal> {
    let size =
        |name, text: &Option<String>| text.as_deref().map(|text| memory(&format!("{at}.{name}"), text)).transpose();
    let priority = written.priority.map_or(Ok(PRIORITY), |priority| {
        let rule = "must be between 0 and 255";
        priority.try_into().map_err(|_| Refusal::new(format!("{at}.priority"), priority, rule))
    });
    Ok(Limits { max: size("max", &written.max)?, low: size("low", &written.low)?.unwrap_or(0), priority: priority? })
}

/// Bytes that `text` at `field` says.
fn memory(field: &str, text: &str) -> Result<u64, Refusal> {
    size::parse_size(text).ok_or_else(|| Refusal::text(field, text, size::RULE))
}
