//! The rules. Pure: what a file is like is asked of the caller.

use alloc::format;
use alloc::string::String;
use core::fmt;

use arrayvec::ArrayVec;

use super::{
    CoalescedZone, Config, Console, DEVICE_PAGE, Disk, FIRMWARE_BASE, FLASH_BASE, KernelFormat, Limits, MAX_CMDLINE,
    MAX_COALESCED, MAX_DISKS, MAX_DOORBELLS, MAX_FLASH, MAX_MERGE_PAGES_PER_SECOND, MAX_NAME, MAX_OUTER_CPUS,
    MAX_OUTER_MEMORY, MAX_PASS_THROUGH, MAX_ROMS, MAX_VCPUS, MAX_VMS, MEMORY_GRANULE, MIN_BOUNCE_MEMORY, MIN_FLASH,
    MIN_OUTER_MEMORY, OWNERS_WINDOW, Outer, PrivateIo, ROM_ALIGN, ROM_END, SECTOR, Vm, arch, format_size,
};
use crate::Refusal;

/// Tells how many bytes a file has, or what keeps it from being used.
pub type FileLength<'a, F> = dyn FnMut(&F) -> Result<u64, String> + 'a;

impl<F: fmt::Display> Config<F> {
    /// Checks every rule of a configuration; `length` tells how many bytes a file has, or what is wrong with it.
    ///
    /// # Errors
    /// The first value that breaks a rule.
    pub fn check(&self, length: &mut FileLength<'_, F>) -> Result<(), Refusal> {
        outer(self.outer)?;
        let count = self.vms.len();
        if count == 0 {
            return Err(Refusal::new("vms", "[]", "must list at least one virtual machine"));
        }
        if count > MAX_VMS {
            return Err(Refusal::new("vms", format_args!("{count} entries"), format!("must be at most {MAX_VMS}")));
        }
        for (index, vm) in self.vms.iter().enumerate() {
            let at = format!("vms[{index}]");
            check_name(&format!("{at}.name"), &vm.name)?;
            unlike_earlier(self, index, &at)?;
            arch::check(self.outer.arch, &at, vm)?;
            memory(&at, vm.memory, self.outer.memory)?;
            private(&at, vm)?;
            limits(&at, vm)?;
            vcpus(&at, i64::from(vm.vcpus))?;
            cmdline(&at, &vm.cmdline)?;
            owners_window(&at, vm)?;
            pass_through(self, index, &at)?;
            files(&at, vm, length)?;
            roms(&at, vm, length)?;
        }
        Ok(())
    }
}

fn outer(outer: Outer) -> Result<(), Refusal> {
    let Outer { memory, cpus, housekeeping_cpus, merge_pages_per_second, .. } = outer;
    outer_cpus(i64::from(cpus))?;
    self::housekeeping_cpus(i64::from(housekeeping_cpus), cpus)?;
    merge_rate(i64::from(merge_pages_per_second))?;
    let rule = if memory < MIN_OUTER_MEMORY {
        format!("must be at least {}", format_size(MIN_OUTER_MEMORY))
    } else if memory > MAX_OUTER_MEMORY {
        format!("must be at most {}", format_size(MAX_OUTER_MEMORY))
    } else if !memory.is_multiple_of(MEMORY_GRANULE) {
        format!("must be a multiple of {}", format_size(MEMORY_GRANULE))
    } else {
        return Ok(());
    };
    Err(Refusal::new("outer.memory", format_size(memory), rule))
}

/// The outer machine's CPUs, if there may be so many.
pub(super) fn outer_cpus(cpus: i64) -> Result<u32, Refusal> {
    within(cpus, MAX_OUTER_CPUS)
        .ok_or_else(|| Refusal::new("outer.cpus", cpus, format!("must be from 1 to {MAX_OUTER_CPUS}")))
}

/// The CPUs that run no guest, if there may be so many of `cpus`: one at least does.
pub(super) fn housekeeping_cpus(own: i64, cpus: u32) -> Result<u32, Refusal> {
    let allowed = u32::try_from(own).ok().filter(|own| *own < cpus);
    allowed.ok_or_else(|| Refusal::new("outer.housekeeping_cpus", own, format!("must be from 0 to {}", cpus - 1)))
}

/// What the scanner reads in a second, if it may be so much.
pub(super) fn merge_rate(rate: i64) -> Result<u32, Refusal> {
    let rule = || format!("must be from 0 to {MAX_MERGE_PAGES_PER_SECOND}");
    let allowed = u32::try_from(rate).ok().filter(|rate| *rate <= MAX_MERGE_PAGES_PER_SECOND);
    allowed.ok_or_else(|| Refusal::new("outer.merge_pages_per_second", rate, rule()))
}

/// A VM's vCPUs, if there may be so many.
pub(super) fn vcpus(at: &str, vcpus: i64) -> Result<u32, Refusal> {
    within(vcpus, MAX_VCPUS)
        .ok_or_else(|| Refusal::new(format!("{at}.vcpus"), vcpus, format!("must be from 1 to {MAX_VCPUS}")))
}

fn within(count: i64, most: u32) -> Option<u32> {
    u32::try_from(count).ok().filter(|count| (1..=most).contains(count))
}

/// Whether a virtual machine may have this name; `field` is where it stands.
///
/// # Errors
/// The rule that it breaks.
pub fn check_name(field: &str, name: &str) -> Result<(), Refusal> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(allowed) && !name.starts_with('-') {
        return Ok(());
    }
    let rule = format!("must be 1 to {MAX_NAME} of the characters a-z, 0-9 and '-', and not start with '-'");
    Err(Refusal::text(field, name, rule))
}

/// The VM at `index` shares neither its name nor the console's foreground with one before it.
fn unlike_earlier<F>(config: &Config<F>, index: usize, at: &str) -> Result<(), Refusal> {
    let vm = &config.vms[index];
    let earlier = config.vms[..index].iter().enumerate();
    for (other, before) in earlier {
        if before.name == vm.name {
            let rule = format!("must differ from every other VM's name, and vms[{other}] has it");
            return Err(Refusal::text(format!("{at}.name"), &vm.name, rule));
        }
        if (before.policies.console, vm.policies.console) == (Console::Foreground, Console::Foreground) {
            let rule = format!("one VM at most has the foreground, and vms[{other}] has it");
            return Err(Refusal::text(format!("{at}.policies.console"), "foreground", rule));
        }
    }
    Ok(())
}

fn memory(at: &str, memory: u64, machine: u64) -> Result<(), Refusal> {
    let rule = if memory == 0 {
        "must be above zero".into()
    } else if !memory.is_multiple_of(MEMORY_GRANULE) {
        format!("must be a multiple of {}", format_size(MEMORY_GRANULE))
    } else if memory > machine {
        format!("must be at most the machine's: outer.memory = {}", format_size(machine))
    } else {
        return Ok(());
    };
    Err(Refusal::new(format!("{at}.memory"), format_size(memory), rule))
}

/// What reads memory by its address cannot have it absent.
fn private<F>(at: &str, vm: &Vm<F>) -> Result<(), Refusal> {
    let clash = [("mte", vm.mte), ("merge", vm.merge)].into_iter().find(|(_, wanted)| *wanted);
    match clash.filter(|_| vm.private) {
        Some((other, _)) => {
            Err(Refusal::new(format!("{at}.memory.private"), true, format!("must be false where {at}.{other} = true")))
        }
        None => bounce(at, vm),
    }
}

/// Bytes of a page.
const PAGE: u64 = 4096;

/// What it may have is no more than it has, and no less than what it is to keep.
fn limits<F>(at: &str, vm: &Vm<F>) -> Result<(), Refusal> {
    let Limits { max, low, .. } = vm.limits;
    let refused =
        |field: &str, size, rule: String| Err(Refusal::new(format!("{at}.memory.{field}"), format_size(size), rule));
    let not_pages = |size: u64| !size.is_multiple_of(PAGE);
    let of_pages = || format!("must be a multiple of {}", format_size(PAGE));
    if let Some(max) = max {
        if vm.private {
            return refused(
                "max",
                max,
                format!("must be absent where {at}.memory.private = true: private memory stays"),
            );
        }
        if not_pages(max) {
            return refused("max", max, of_pages());
        }
        if max < MEMORY_GRANULE || max > vm.memory {
            let (least, size) = (format_size(MEMORY_GRANULE), format_size(vm.memory));
            return refused("max", max, format!("must be between {least} and the VM's size, {size}"));
        }
    }
    if not_pages(low) {
        return refused("low", low, of_pages());
    }
    let most = max.unwrap_or(vm.memory);
    if low > most {
        return refused("low", low, format!("must be at most what the VM may have, {}", format_size(most)));
    }
    Ok(())
}

/// Who bounces has something to keep from devices, and room for the window.
fn bounce<F>(at: &str, vm: &Vm<F>) -> Result<(), Refusal> {
    if vm.private_io == PrivateIo::Lease {
        return Ok(());
    }
    if !vm.private {
        return Err(Refusal::text(format!("{at}.memory.io"), "bounce", "needs memory.private = true"));
    }
    if vm.memory < MIN_BOUNCE_MEMORY {
        let rule = format!("must be at least {} where memory.io = \"bounce\"", format_size(MIN_BOUNCE_MEMORY));
        return Err(Refusal::new(format!("{at}.memory"), format_size(vm.memory), rule));
    }
    Ok(())
}

fn cmdline(at: &str, cmdline: &str) -> Result<(), Refusal> {
    let field = || format!("{at}.cmdline");
    if cmdline.len() > MAX_CMDLINE {
        let rule = format!("must be at most {MAX_CMDLINE} bytes");
        return Err(Refusal::new(field(), format_args!("{} bytes", cmdline.len()), rule));
    }
    if cmdline.contains('\0') {
        return Err(Refusal::text(field(), cmdline, "must not contain a zero byte, which would end it"));
    }
    Ok(())
}

/// Zones and doorbells: inside the window, apart from each other, and few.
fn owners_window<F>(at: &str, vm: &Vm<F>) -> Result<(), Refusal> {
    most(&format!("{at}.coalesced_mmio"), vm.coalesced_mmio.len(), MAX_COALESCED)?;
    most(&format!("{at}.doorbells"), vm.doorbells.len(), MAX_DOORBELLS)?;
    for (index, zone) in vm.coalesced_mmio.iter().enumerate() {
        let field = |name: &str| format!("{at}.coalesced_mmio[{index}].{name}");
        if zone.size == 0 || !zone.size.is_multiple_of(8) {
            return Err(Refusal::new(field("size"), zone.size, "must be a multiple of 8 above zero"));
        }
        if !zone.base.is_multiple_of(8) || !inside(zone.base, zone.size) {
            let rule = format!("must be a multiple of 8, and the zone {}", within_window());
            return Err(Refusal::new(field("base"), format_args!("{:#x}", zone.base), rule));
        }
        let earlier = vm.coalesced_mmio[..index].iter();
        if let Some(other) = earlier.clone().position(|other| meets(other, zone.base, zone.size)) {
            let rule = format!("must not overlap {at}.coalesced_mmio[{other}]");
            return Err(Refusal::new(field("base"), format_args!("{:#x}", zone.base), rule));
        }
    }
    for (index, bell) in vm.doorbells.iter().enumerate() {
        let field = |name: &str| format!("{at}.doorbells[{index}].{name}");
        if ![1, 2, 4, 8].contains(&bell.size) {
            return Err(Refusal::new(field("size"), bell.size, "must be 1, 2, 4 or 8"));
        }
        let refused = |rule: String| Err(Refusal::new(field("address"), format_args!("{:#x}", bell.address), rule));
        if !bell.address.is_multiple_of(bell.size) || !inside(bell.address, bell.size) {
            return refused(format!("must be a multiple of its size, and the doorbell {}", within_window()));
        }
        if let Some(zone) = vm.coalesced_mmio.iter().position(|zone| meets(zone, bell.address, bell.size)) {
            return refused(format!("must not lie in {at}.coalesced_mmio[{zone}]"));
        }
        if let Some(other) = vm.doorbells[..index].iter().position(|other| other.address == bell.address) {
            return refused(format!("must not be that of {at}.doorbells[{other}]"));
        }
    }
    Ok(())
}

/// Devices of the outer machine: whole pages, apart from what else is in the window, and nobody else's.
fn pass_through<F>(config: &Config<F>, vm: usize, at: &str) -> Result<(), Refusal> {
    let given = &config.vms[vm].pass_through;
    most(&format!("{at}.pass_through"), given.len(), MAX_PASS_THROUGH)?;
    for (index, it) in given.iter().enumerate() {
        let field = |name: &str| format!("{at}.pass_through[{index}].{name}");
        if it.size == 0 || !it.size.is_multiple_of(DEVICE_PAGE) {
            return Err(Refusal::new(
                field("size"),
                it.size,
                format!("must be a multiple of {DEVICE_PAGE} above zero"),
            ));
        }
        let machine = |rule: String| Err(Refusal::new(field("machine"), format_args!("{:#x}", it.machine), rule));
        if !it.machine.is_multiple_of(DEVICE_PAGE) || it.machine.checked_add(it.size).is_none() {
            return machine(format!("must be a multiple of {DEVICE_PAGE}, and not wrap with its size"));
        }
        let before =
            config.vms[..vm].iter().enumerate().flat_map(|(vm, it)| it.pass_through.iter().map(move |it| (vm, it)));
        let before = before.chain(given[..index].iter().map(|it| (vm, it)));
        if let Some((other, _)) =
            before.clone().find(|(_, other)| overlap(other.machine, other.size, it.machine, it.size))
        {
            return machine(format!("must be given once, and vms[{other}] has some of it"));
        }
        let base = |rule: String| Err(Refusal::new(field("base"), format_args!("{:#x}", it.base), rule));
        if !it.base.is_multiple_of(DEVICE_PAGE) || !inside(it.base, it.size) {
            return base(format!("must be a multiple of {DEVICE_PAGE}, and the device {}", within_window()));
        }
        let vm = &config.vms[vm];
        let posted = vm.coalesced_mmio.iter().map(|zone| (zone.base, zone.size));
        let posted = posted.chain(vm.doorbells.iter().map(|bell| (bell.address, bell.size)));
        let pages = posted.map(|(start, size)| {
            let first = start / DEVICE_PAGE * DEVICE_PAGE;
            (first, (start + size).next_multiple_of(DEVICE_PAGE) - first)
        });
        let mut others = given[..index].iter().map(|other| (other.base, other.size)).chain(pages);
        if others.any(|(start, size)| overlap(start, size, it.base, it.size)) {
            return base("must share no page with a coalesced zone, a doorbell or another device".into());
        }
    }
    Ok(())
}

/// Whether two ranges share a byte; neither wraps.
fn overlap(one: u64, bytes: u64, other: u64, others: u64) -> bool {
    one < other + others && other < one + bytes
}

fn most(field: &str, count: usize, most: usize) -> Result<(), Refusal> {
    if count <= most {
        return Ok(());
    }
    Err(Refusal::new(field, format_args!("{count} entries"), format!("must be at most {most}")))
}

/// Whether all of it lies in the owners' window.
fn inside(start: u64, size: u64) -> bool {
    start >= OWNERS_WINDOW.start && start.checked_add(size).is_some_and(|end| end <= OWNERS_WINDOW.end)
}

fn within_window() -> String {
    format!("must lie within {:#x}-{:#x}", OWNERS_WINDOW.start, OWNERS_WINDOW.end - 1)
}

/// Whether a zone and a range share a byte; both lie in the window.
fn meets(zone: &CoalescedZone, start: u64, size: u64) -> bool {
    overlap(zone.base, zone.size, start, size)
}

fn files<F: fmt::Display>(at: &str, vm: &Vm<F>, length: &mut FileLength<'_, F>) -> Result<(), Refusal> {
    let memory = format_size(vm.memory);
    let mut kernel = present(&format!("{at}.kernel"), &vm.kernel, length)?;
    if vm.kernel_format == KernelFormat::Firmware {
        // It takes none of the VM's memory.
        kernel = 0;
        if let Some(file) = &vm.initrd {
            let rule = "must be absent beside firmware, which would not look for it";
            return Err(Refusal::text(format!("{at}.initrd"), &format!("{file}"), rule));
        }
    }
    if kernel > vm.memory {
        let rule = format!("must fit into the VM's memory: it has {kernel} bytes, {at}.memory is {memory}");
        return Err(Refusal::text(format!("{at}.kernel"), &format!("{}", vm.kernel), rule));
    }
    if let Some(file) = &vm.initrd {
        let initrd = present(&format!("{at}.initrd"), file, length)?;
        if initrd > vm.memory - kernel {
            let rule = format!(
                "must fit into the VM's memory beside the kernel: they have {initrd} and {kernel} bytes, {at}.memory is {memory}"
            );
            return Err(Refusal::text(format!("{at}.initrd"), &format!("{file}"), rule));
        }
    }
    let count = vm.disks.len();
    if count > MAX_DISKS {
        let rule = format!("must be at most {MAX_DISKS}");
        return Err(Refusal::new(format!("{at}.disks"), format_args!("{count} entries"), rule));
    }
    vm.disks
        .iter()
        .enumerate()
        .try_for_each(|(index, disk)| sectors(&format!("{at}.disks[{index}].file"), disk, length))
}

fn sectors<F: fmt::Display>(field: &str, disk: &Disk<F>, length: &mut FileLength<'_, F>) -> Result<(), Refusal> {
    let bytes = present(field, &disk.file, length)?;
    if bytes.is_multiple_of(SECTOR) {
        return Ok(());
    }
    let rule = format!("must be whole sectors of {SECTOR} bytes: it has {bytes} bytes");
    Err(Refusal::text(field, &format!("{}", disk.file), rule))
}

/// The guest physical address that `address` at `field` says.
pub(super) fn address(field: &str, address: i64) -> Result<u64, Refusal> {
    u64::try_from(address).map_err(|_| Refusal::new(field, address, "must not be negative"))
}

/// A range of guest physical addresses and the field that put something there.
struct Place {
    field: String,
    start: u64,
    end: u64,
}

/// Firmware, read-only files and flash have room, and each its own.
fn roms<F: fmt::Display>(at: &str, vm: &Vm<F>, length: &mut FileLength<'_, F>) -> Result<(), Refusal> {
    if vm.roms.len() > MAX_ROMS {
        let value = format_args!("{} entries", vm.roms.len());
        return Err(Refusal::new(format!("{at}.roms"), value, format!("must be at most {MAX_ROMS}")));
    }
    let mut taken: ArrayVec<Place, { MAX_ROMS + 2 }> = ArrayVec::new();
    if vm.kernel_format == KernelFormat::Firmware {
        let field = format!("{at}.kernel");
        let bytes = present(&field, &vm.kernel, length)?;
        if bytes > MAX_FLASH {
            let rule = format!("must have at most {} as firmware: it has {bytes} bytes", format_size(MAX_FLASH));
            return Err(Refusal::text(field, &format!("{}", vm.kernel), rule));
        }
        taken.push(Place { field, start: FIRMWARE_BASE, end: FIRMWARE_BASE + bytes });
    }
    if let Some(file) = &vm.flash {
        let field = format!("{at}.flash");
        let bytes = present(&field, file, length)?;
        if !bytes.is_power_of_two() || !(MIN_FLASH..=MAX_FLASH).contains(&bytes) {
            let (least, most) = (format_size(MIN_FLASH), format_size(MAX_FLASH));
            let rule = format!("must have a power of two of bytes, from {least} to {most}: it has {bytes}");
            return Err(Refusal::text(field, &format!("{file}"), rule));
        }
        taken.push(Place { field, start: FLASH_BASE, end: FLASH_BASE + bytes });
    }
    for (index, rom) in vm.roms.iter().enumerate() {
        let bytes = present(&format!("{at}.roms[{index}].file"), &rom.file, length)?;
        let place = place(format!("{at}.roms[{index}].at"), rom.at, bytes)?;
        if let Some(other) = taken.iter().find(|other| other.start < place.end && place.start < other.end) {
            let Place { field, start, end } = other;
            let rule =
                format!("must leave {start:#x}..{end:#x} to {field}: with {bytes} bytes it ends at {:#x}", place.end);
            return Err(Refusal::new(place.field, format_args!("{:#x}", place.start), rule));
        }
        taken.push(place);
    }
    Ok(())
}

/// Where a read-only file of `bytes` bytes goes: whole pages before the devices.
fn place(field: String, start: u64, bytes: u64) -> Result<Place, Refusal> {
    let end = start.checked_add(bytes).and_then(|end| end.checked_next_multiple_of(ROM_ALIGN));
    let rule = if !start.is_multiple_of(ROM_ALIGN) {
        format!("must be a multiple of {}", format_size(ROM_ALIGN))
    } else if let Some(end) = end.filter(|end| *end <= ROM_END) {
        return Ok(Place { field, start, end });
    } else {
        format!("must be such that {bytes} bytes end by {ROM_END:#x}, where devices begin")
    };
    Err(Refusal::new(field, format_args!("{start:#x}"), rule))
}

/// The length of a file that is there and has something in it.
fn present<F: fmt::Display>(field: &str, file: &F, length: &mut FileLength<'_, F>) -> Result<u64, Refusal> {
    let refused = |rule: String| Refusal::text(field, &format!("{file}"), rule);
    match length(file) {
        Ok(0) => Err(refused("must not be empty".into())),
        Ok(bytes) => Ok(bytes),
        Err(reason) => Err(refused(format!("must be a file that can be read: {reason}"))),
    }
}
