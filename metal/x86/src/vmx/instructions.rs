//! VMX's instructions.
//!
//! Sources: SDM 31 (VMX instruction reference), 31.2: CF set is "no current structure", ZF set is "an error, whose number is in the structure".

use core::arch::asm;

use super::fields::Field;

/// Reads a field of the current structure.
#[inline]
pub fn read(field: Field) -> u64 {
    let value: u64;
    let failed: u8;
    // SAFETY: changes nothing; a field that is not there is told by the flags.
    unsafe {
        asm!("vmread {}, {}", "setna {}", out(reg) value, in(reg) field, out(reg_byte) failed, options(nostack));
    }
    assert!(failed == 0, "VMREAD of field {field:#x} failed");
    value
}

/// Writes a field of the current structure.
///
/// # Safety
///
/// What the guest can do with it, or what we come back to by it, is what its owner answers for.
#[inline]
pub unsafe fn write(field: Field, value: u64) {
    let failed: u8;
    // SAFETY: the caller answers for the value; nothing acts on it before the next entry.
    unsafe {
        asm!("vmwrite {}, {}", "setna {}", in(reg) field, in(reg) value, out(reg_byte) failed, options(nostack));
    }
    assert!(failed == 0, "VMWRITE of {value:#x} to field {field:#x} failed");
}

/// Enters VMX operation on this CPU.
///
/// # Safety
///
/// `region` is the physical address of a page that begins with the processor's revision and that nobody touches until the machine ends;
/// CR0 and CR4 are as VMX demands.
pub unsafe fn on(region: u64) {
    let failed: u8;
    // SAFETY: as the caller promises.
    unsafe { asm!("vmxon [{}]", "setna {}", in(reg) &raw const region, out(reg_byte) failed, options(nostack)) };
    assert!(failed == 0, "VMXON failed");
}

/// Writes a structure back to its page, and makes it one that was never launched.
///
/// # Safety
///
/// `region` is the physical address of a structure's page, which no other CPU has current.
pub unsafe fn clear(region: u64) {
    let failed: u8;
    // SAFETY: as the caller promises.
    unsafe { asm!("vmclear [{}]", "setna {}", in(reg) &raw const region, out(reg_byte) failed, options(nostack)) };
    assert!(failed == 0, "VMCLEAR failed");
}

/// Makes a structure the current one of this CPU.
///
/// # Safety
///
/// As [`clear`]; the page begins with the processor's revision.
pub unsafe fn make_current(region: u64) {
    let failed: u8;
    // SAFETY: as the caller promises.
    unsafe { asm!("vmptrld [{}]", "setna {}", in(reg) &raw const region, out(reg_byte) failed, options(nostack)) };
    assert!(failed == 0, "VMPTRLD failed");
}

/// All contexts, for INVEPT and INVVPID.
const ALL: u64 = 2;

/// Forgets what this CPU knows of extended page tables, and of guests' own translations through them.
pub fn forget_extended() {
    let descriptor = [0u64; 2];
    let failed: u8;
    // SAFETY: forgets only; the descriptor of this kind is zero.
    unsafe {
        asm!("invept {}, [{}]", "setna {}", in(reg) ALL, in(reg) descriptor.as_ptr(), out(reg_byte) failed, options(nostack));
    }
    assert!(failed == 0, "INVEPT failed");
}

/// Forgets guests' own translations.
pub fn forget_linear() {
    let descriptor = [0u64; 2];
    let failed: u8;
    // SAFETY: as above.
    unsafe {
        asm!("invvpid {}, [{}]", "setna {}", in(reg) ALL, in(reg) descriptor.as_ptr(), out(reg_byte) failed, options(nostack));
    }
    assert!(failed == 0, "INVVPID failed");
}
