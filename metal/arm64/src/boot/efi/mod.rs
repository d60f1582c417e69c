//! The image as an EFI application: from the firmware's call to the same start as everybody else's.
//!
//! Purpose: EFI firmware (EDK2, or U-Boot's `bootefi`) loads the image by its PE header ([`super::header`]) and calls
//! it, with MMU and caches on. Here it asks the firmware for what the boot protocol of Linux would have passed, ends the
//! firmware's services, turns MMU and caches off, and goes to the image's first instruction.
//!
//! Rooms:
//!
//! | room | question |
//! |---|---|
//! | `head` | what are the first and the last instructions? |
//! | `application` | in which order is the firmware asked, and left? |
//! | `firmware` | what can be asked of it, and how? |
//! | [`memory_map`] | which memory is ours when it has ended? |
//!
//! Protocol:
//!
//! 1. The device tree comes from the firmware's configuration table. It is copied to pages of our own, because the
//!    firmware may keep it where only the firmware may write.
//! 2. The bundle comes by LoadFile2 from the device path that Linux has given to initial RAM disks, into pages of our
//!    own. Where there is none, the hypervisor says so later, as with every other loader.
//! 3. Boot services end. The memory map that ended them decides what RAM is: EFI has the last word on that, not the
//!    device tree, whose memory nodes firmware need not keep. Runtime services are never called and keep their memory.
//! 4. [`Handover`] carries bundle and RAM past the second start, in `.data`, which the start code does not clear.
//! 5. All of it is cleaned to the point of coherency, and `head` leaves: what follows reads past the caches.
//!
//! A firmware that cannot carry the hypervisor gets one line on its console that begins with `PANIC`, and an error
//! status; it goes on with whatever it starts next.
//!
//! Sources: UEFI 2.10: 2.3.6 (AArch64: identity map, EL2, MMU and caches on), 4.6 (configuration table), 7.2 and 7.4
//! (memory, ExitBootServices), 13.2 (LoadFile2).
//!
//! Invariants: nothing is written to `.bss`, and to `.data` only the handover. Nothing here panics: the firmware's
//! vectors are in force, and no panic could be reported.
//!
//! Known holes: the firmware's load options are not taken for a command line (nothing reads one). When ExitBootServices
//! fails for good, the firmware may be half gone, and all that is left is the status. No secure boot measurements.

#[cfg(target_os = "none")]
mod application;
#[cfg(target_os = "none")]
mod firmware;
#[cfg(target_os = "none")]
mod head;
pub mod memory_map;

use arrayvec::ArrayVec;

use super::info::{self, BootInfo, InfoError, MAX_REGIONS, Region};

/// What the firmware told, for the start that follows.
#[derive(Clone, Debug)]
pub struct Handover {
    /// The bundle, in pages of our own.
    pub bundle: Option<Region>,
    /// RAM that is free when boot services have ended, by address, disjoint.
    pub ram: ArrayVec<Region, MAX_REGIONS>,
}

impl Handover {
    /// Corrects what the device tree `blob` says of the machine.
    ///
    /// # Errors
    ///
    /// [`InfoError`]: the clock's node is malformed.
    pub fn apply(&self, info: &mut BootInfo, blob: &'static [u8]) -> Result<(), InfoError> {
        info.ram.clone_from(&self.ram);
        info.bundle = self.bundle;
        // Firmware disables the clock's node because its runtime services drive it. They are never called.
        info.rtc = info::rtc_even_if_disabled(blob)?;
        Ok(())
    }
}

#[cfg(target_os = "none")]
pub use application::handover;
