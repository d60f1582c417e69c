//! The EFI application: asks, ends the firmware, leaves.

use core::cell::UnsafeCell;
use core::fmt;
use core::slice;

use r_efi::efi::{Handle, Status, SystemTable};

use super::Handover;
use super::firmware::{Firmware, FirmwareError};
use crate::boot::Region;

unsafe extern "C" {
    static __image_start: u8;
    static __image_end: u8;
    fn entresol_clean_to_poc(start: u64, end: u64);
    fn entresol_efi_leave(device_tree: u64) -> !;
}

struct HandoverCell(UnsafeCell<Option<Handover>>);

// SAFETY: written by the EFI application, which is gone when the boot CPU reads it; nobody writes it after.
unsafe impl Sync for HandoverCell {}

// Outside `.bss`, which the start code clears.
#[unsafe(link_section = ".data.efi_handover")]
static HANDOVER: HandoverCell = HandoverCell(UnsafeCell::new(None));

/// What EFI firmware has told, if it started us.
pub fn handover() -> Option<&'static Handover> {
    // SAFETY: the writer, if there was one, is gone for good.
    unsafe { (*HANDOVER.0.get()).as_ref() }
}

/// Why the firmware cannot carry the hypervisor.
enum Refusal {
    ExceptionLevel(u64),
    NoDeviceTree,
    Firmware(FirmwareError),
}

impl From<FirmwareError> for Refusal {
    fn from(error: FirmwareError) -> Self {
        Self::Firmware(error)
    }
}

impl Refusal {
    fn status(&self) -> Status {
        match self {
            Self::ExceptionLevel(_) => Status::UNSUPPORTED,
            Self::NoDeviceTree => Status::NOT_FOUND,
            Self::Firmware(error) => error.status(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ExceptionLevel(level) => {
                write!(f, "entered at EL{level}; EL2 is needed: enable the machine's virtualization")
            }
            Self::NoDeviceTree => f.write_str("the firmware has no device tree: switch its ACPI off"),
            Self::Firmware(error) => write!(f, "{error}"),
        }
    }
}

/// Called by `head`, which has relocated the image; `image` and `table` are as the firmware passed them, `level` is the
/// exception level. Comes back only with an error.
///
/// # Safety
///
/// The firmware's own call of an application (UEFI 2.10, 4.1).
#[unsafe(no_mangle)]
unsafe extern "efiapi" fn entresol_efi_main(image: Handle, table: *const SystemTable, level: u64) -> Status {
    // SAFETY: boot services last until `Firmware` ends them, as the caller promises.
    let firmware = unsafe { Firmware::new(image, table) };
    let (device_tree, bundle) = match collect(&firmware, level) {
        Ok(collected) => collected,
        Err(refusal) => return refuse(&firmware, &refusal),
    };
    let ours = [Some(device_tree), bundle];
    let ram = match firmware.exit_boot_services(ours.into_iter().flatten()) {
        Ok(ram) => ram,
        Err((firmware, error)) => {
            let refusal = Refusal::from(error);
            return firmware.map_or_else(|| refusal.status(), |firmware| refuse(&firmware, &refusal));
        }
    };
    // SAFETY: one CPU, and no reference to the cell.
    unsafe { HANDOVER.0.get().write(Some(Handover { bundle, ram })) };
    let image = Region { start: &raw const __image_start as u64, end: &raw const __image_end as u64 };
    // SAFETY: all three ranges are mapped RAM; nothing is written to them between here and the MMU's end. The
    // firmware has ended, so nobody needs its vectors, stack or tables after that.
    unsafe {
        for range in [Some(image), Some(device_tree), bundle].into_iter().flatten() {
            entresol_clean_to_poc(range.start, range.end);
        }
        entresol_efi_leave(device_tree.start)
    }
}

fn refuse(firmware: &Firmware, refusal: &Refusal) -> Status {
    firmware.print(format_args!("\r\nPANIC: {refusal}\r\nEND OF PANIC\r\n"));
    refusal.status()
}

/// The device tree and the bundle, each in pages of our own.
fn collect(firmware: &Firmware, level: u64) -> Result<(Region, Option<Region>), Refusal> {
    if level != 2 {
        return Err(Refusal::ExceptionLevel(level));
    }
    let theirs = firmware.device_tree().ok_or(Refusal::NoDeviceTree)?;
    // SAFETY: the firmware states that a device tree is there.
    let blob = unsafe { crate::boot::start::device_tree(theirs) }.ok_or(Refusal::NoDeviceTree)?;
    let device_tree = firmware.allocate(blob.len(), "AllocatePages for the device tree")?;
    // SAFETY: fresh pages of at least this size, whose only user we are.
    unsafe { slice::from_raw_parts_mut(device_tree.start as *mut u8, blob.len()) }.copy_from_slice(blob);
    Ok((device_tree, firmware.bundle()?))
}
