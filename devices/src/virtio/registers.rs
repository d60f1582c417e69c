//! Register map of virtio over MMIO, version 2 (virtio 4.2.2): offsets in bytes; each register is 32 bits wide.

/// "virt".
pub(super) const MAGIC_VALUE: u64 = 0x000;
/// Layout of the registers: 2.
pub(super) const VERSION: u64 = 0x004;
/// Type of device; 0 where there is none.
pub(super) const DEVICE_ID: u64 = 0x008;
/// Maker of the device.
pub(super) const VENDOR_ID: u64 = 0x00c;
/// Features that the device offers, 32 of them.
pub(super) const DEVICE_FEATURES: u64 = 0x010;
/// Which 32.
pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
/// Features that the driver accepts, 32 of them.
pub(super) const DRIVER_FEATURES: u64 = 0x020;
/// Which 32.
pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
/// The queue that the registers below speak of.
pub(super) const QUEUE_SEL: u64 = 0x030;
/// Largest size of the queue; 0 if there is none.
pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
/// Size of the queue.
pub(super) const QUEUE_NUM: u64 = 0x038;
/// Whether the queue works.
pub(super) const QUEUE_READY: u64 = 0x044;
/// A queue has new buffers.
pub(super) const QUEUE_NOTIFY: u64 = 0x050;
/// Why the line is high.
pub(super) const INTERRUPT_STATUS: u64 = 0x060;
/// Reasons that the driver has seen.
pub(super) const INTERRUPT_ACK: u64 = 0x064;
/// Status of device and driver; zero resets.
pub(super) const STATUS: u64 = 0x070;
/// Address of the descriptor table, low and high half.
pub(super) const QUEUE_DESC: [u64; 2] = [0x080, 0x084];
/// Address of the available ring.
pub(super) const QUEUE_DRIVER: [u64; 2] = [0x090, 0x094];
/// Address of the used ring.
pub(super) const QUEUE_DEVICE: [u64; 2] = [0x0a0, 0x0a4];
/// Length (low, high) and base (low, high) of a shared memory region: all ones, as there is none.
pub(super) const SHARED_MEMORY: [u64; 4] = [0x0b0, 0x0b4, 0x0b8, 0x0bc];
/// Resets one queue.
pub(super) const QUEUE_RESET: u64 = 0x0c0;
/// Changes with the configuration space.
pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
/// The configuration space.
pub(super) const CONFIG: u64 = 0x100;

/// MagicValue.
pub(super) const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// Version of the layout.
pub(super) const LAYOUT: u32 = 2;
/// VendorID.
pub(super) const VENDOR: u32 = u32::from_le_bytes(*b"ENTR");

/// InterruptStatus: a buffer was used.
pub(super) const USED_BUFFER: u32 = 1 << 0;
/// InterruptStatus: the configuration or the device's status changed.
pub(super) const CONFIGURATION_CHANGE: u32 = 1 << 1;

/// Bytes of configuration space that any of our devices has; the rest of the slot reads as zero.
pub(super) const CONFIG_BYTES: usize = 64;
