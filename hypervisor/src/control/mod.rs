//! The control channel.

use entresol_metal_arm64::boot::BootInfo;

use crate::vm::{OutOfHeap, Vm};

/// Finds the channel among the machine's devices.
///
/// # Errors
///
/// [`OutOfHeap`].
pub fn init(_info: &BootInfo) -> Result<(), OutOfHeap> {
    Ok(())
}

/// Whether `intid` is the channel's.
pub fn owns(_intid: u32) -> bool {
    false
}

/// Its interrupt has come.
pub fn acknowledge() {}

/// Host's work: reads requests, answers, sends events.
pub fn serve() {}

/// Virtual machine `number` has printed.
pub fn printed(_number: usize) {}

/// Virtual machine `number` has room for input.
pub fn input_wanted(_number: usize) {}

/// `vm` has changed its state.
pub fn state_changed(_vm: &Vm) {}
