//! Registers of devices that keep what is stored: what the tests are about, read and written one by one.
//!
//! | window | registers | sizes |
//! |---|---|---|
//! | [`ROUTERS`] | GICD_IROUTER64–67 (IHI 0069 12.9.22) | 4, 8 |
//! | [`PRIORITIES`] | GICD_IPRIORITYR of 64–67 | 1, 4 |
//! | [`MATCH`] | RTCMR of the PL031 (DDI 0224 3.3.2) | 2, 4; 1 |

use guest_rt::machine::{GICD, RTC};
use guest_rt::memory::{load32, load64, store32, store64};

/// Four registers of 64 bits, aligned to 512 bytes.
pub const ROUTERS: u64 = GICD + 0x6000 + 8 * 64;
/// Four registers of 8 bits.
pub const PRIORITIES: u64 = GICD + 0x400 + 64;
/// A register of 32 bits.
pub const MATCH: u64 = RTC + 4;

/// GICD_CTLR: affinity routing, no group enabled.
const ROUTING: u32 = 1 << 4;
/// Bits of a router that every implementation keeps.
const ROUTER_BITS: u64 = 0x0000_00ff_80ff_ffff;

/// What the windows hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// [`ROUTERS`].
    pub routers: [u64; 4],
    /// [`PRIORITIES`], the first in the lowest byte.
    pub priorities: u32,
    /// [`MATCH`].
    pub matched: u32,
}

/// What they hold before each instruction: all different, with signs.
pub const BEFORE: Content = Content {
    routers: [0x0000_0012_8034_5678, 0x0000_009a_00bc_def1, 0x0000_0023_0045_6789, 0x0000_00ab_80cd_ef12],
    priorities: 0xf828_1080,
    matched: 0x8765_c321,
};

/// Switches the distributor to registers that are kept.
pub fn prepare() {
    store32(GICD, ROUTING);
}

/// Stores `content`.
pub fn set(content: &Content) {
    for (at, value) in (ROUTERS..).step_by(8).zip(content.routers) {
        store64(at, value);
    }
    store32(PRIORITIES, content.priorities);
    store32(MATCH, content.matched);
}

/// What is there now.
pub fn get() -> Content {
    let routers = [0, 8, 16, 24].map(|offset| load64(ROUTERS + offset) & ROUTER_BITS);
    Content { routers, priorities: load32(PRIORITIES), matched: load32(MATCH) }
}
