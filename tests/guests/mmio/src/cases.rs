//! Instructions and what each one must do to registers and devices: the same with and without a hypervisor.

use core::fmt;

use crate::bench::{self, BEFORE, Content, MATCH, PRIORITIES, ROUTERS};
use crate::code;
use crate::run::{Code, Registers, run};

/// X0–X3 before each instruction: what routers can hold; the low byte is a priority that every implementation keeps.
pub const X: [u64; 4] = [0x0000_0055_0011_2230, 0x0000_0066_8044_5568, 0x0000_0033_0077_8898, 0x0000_0044_8099_aab8];
/// V0–V3 likewise.
pub const V: [[u64; 2]; 4] = [
    [0x0000_0077_0088_99a8, 0x0000_0011_8022_33b0],
    [0x0000_0022_8033_44c8, 0x0000_0088_0099_aad0],
    [0x0000_00b1_0011_00e0, 0x0000_00b2_8022_00f0],
    [0x0000_00b3_0033_0018, 0x0000_00b4_8044_0028],
];
const R: [u64; 4] = BEFORE.routers;

/// Registers and devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// X0–X3.
    pub x: [u64; 4],
    /// V0–V3.
    pub v: [[u64; 2]; 4],
    /// By how much the base has moved.
    pub moved: i64,
    /// What the devices hold.
    pub devices: Content,
}

impl State {
    /// Before an instruction.
    pub const BEFORE: Self = Self { x: X, v: V, moved: 0, devices: BEFORE };
}

/// An instruction on X9 (or SP) and X10.
pub struct Case {
    name: &'static str,
    code: Code,
    base: u64,
    index: u64,
    /// The base is the stack pointer.
    stack: bool,
    expect: fn(&mut State),
}

/// Something else than was expected.
pub enum Wrong {
    /// This exception, or this address for it.
    Taken { vector: u64, esr: u64, far: u64 },
    /// Another value.
    Value { what: &'static str, expected: u64, found: u64 },
}

impl Wrong {
    /// What `after` says of an exception.
    pub fn taken(after: &Registers) -> Self {
        Self::Taken { vector: after.taken, esr: after.esr, far: after.far }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Taken { vector: 0, .. } => f.write_str("no exception"),
            Self::Taken { vector, esr, far } => write!(f, "vector {} esr {esr:#x} far {far:#x}", vector - 1),
            Self::Value { what, expected, found } => write!(f, "{what}: expected {expected:#x}, found {found:#x}"),
        }
    }
}

impl State {
    /// Every value with its name.
    fn values(&self) -> [(&'static str, u64); 19] {
        let Self { x, v, moved, devices } = self;
        let r = &devices.routers;
        [
            ("x0", x[0]),
            ("x1", x[1]),
            ("x2", x[2]),
            ("x3", x[3]),
            ("v0 low", v[0][0]),
            ("v0 high", v[0][1]),
            ("v1 low", v[1][0]),
            ("v1 high", v[1][1]),
            ("v2 low", v[2][0]),
            ("v2 high", v[2][1]),
            ("v3 low", v[3][0]),
            ("v3 high", v[3][1]),
            ("base", *moved as u64),
            ("router 0", r[0]),
            ("router 1", r[1]),
            ("router 2", r[2]),
            ("router 3", r[3]),
            ("priorities", devices.priorities.into()),
            ("match", devices.matched.into()),
        ]
    }

    /// `Ok` if `found` is the same.
    ///
    /// # Errors
    /// The first difference.
    pub fn same(&self, found: &Self) -> Result<(), Wrong> {
        let different = self.values().into_iter().zip(found.values()).find(|(expected, found)| expected != found);
        different.map_or(Ok(()), |((what, expected), (_, found))| Err(Wrong::Value { what, expected, found }))
    }
}

/// Registers as every instruction finds them, with this base and index.
pub fn registers(base: u64, index: u64) -> Registers {
    Registers { x: X, v: V, base, index, ..Registers::default() }
}

impl Case {
    /// Its instruction.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Tries it with the devices mapped `alias` above their addresses.
    ///
    /// # Errors
    /// What was wrong.
    pub fn check(&self, alias: u64, big_endian: bool) -> Result<(), Wrong> {
        bench::set(&BEFORE);
        let base = self.base + alias;
        let mut before = registers(base, self.index);
        if self.stack {
            before.sp = base;
        }
        let after = run(self.code, &before, big_endian);
        if after.taken != 0 {
            return Err(Wrong::taken(&after));
        }
        let place = if self.stack { after.sp } else { after.base };
        let found = State { x: after.x, v: after.v, moved: place.wrapping_sub(base) as i64, devices: bench::get() };
        let mut expected = State::BEFORE;
        (self.expect)(&mut expected);
        expected.same(&found)
    }
}

macro_rules! cases {
    ($($instruction:literal $(stack $stack:literal)? at $base:expr $(, index $index:expr)? => $expect:expr;)*) => {
        &[$(Case {
            name: $instruction,
            code: code!($instruction),
            base: $base,
            index: 0 $(+ $index)?,
            stack: false $(|| $stack)?,
            expect: $expect,
        }),*]
    };
}

const fn low(value: u64) -> u64 {
    value & 0xffff_ffff
}

const fn high(value: u64) -> u64 {
    value >> 32
}

/// `lower` below `upper`.
const fn join(upper: u64, lower: u64) -> u64 {
    upper << 32 | low(lower)
}

const fn sign(word: u64) -> u64 {
    word as i32 as u64
}

/// Pairs of general registers.
pub const PAIRS: &[Case] = cases! {
    "ldp w0, w1, [x9]" at ROUTERS => |s| (s.x[0], s.x[1]) = (low(R[0]), high(R[0]));
    "ldp x0, x1, [x9]" at ROUTERS => |s| (s.x[0], s.x[1]) = (R[0], R[1]);
    "ldp x1, x0, [x9, #16]" at ROUTERS => |s| (s.x[1], s.x[0]) = (R[2], R[3]);
    "ldp w2, w3, [x9, #-8]" at ROUTERS + 16 => |s| (s.x[2], s.x[3]) = (low(R[1]), high(R[1]));
    "ldpsw x0, x1, [x9]" at ROUTERS => |s| (s.x[0], s.x[1]) = (sign(low(R[0])), high(R[0]));
    "ldnp x0, x1, [x9]" at ROUTERS => |s| (s.x[0], s.x[1]) = (R[0], R[1]);
    "ldp x0, x1, [x9], #32" at ROUTERS => |s| (s.x[0], s.x[1], s.moved) = (R[0], R[1], 32);
    "ldp x0, x1, [x9, #16]!" at ROUTERS => |s| (s.x[0], s.x[1], s.moved) = (R[2], R[3], 16);
    "ldp w0, w1, [x9, #-8]!" at ROUTERS + 8 => |s| (s.x[0], s.x[1], s.moved) = (low(R[0]), high(R[0]), -8);
    "ldpsw x1, x0, [x9], #-16" at ROUTERS + 24 => |s| (s.x[1], s.x[0], s.moved) = (sign(low(R[3])), high(R[3]), -16);
    "ldp xzr, x3, [x9]" at ROUTERS => |s| s.x[3] = R[1];
    "ldp x2, x3, [sp], #16" stack true at ROUTERS => |s| (s.x[2], s.x[3], s.moved) = (R[0], R[1], 16);
    "stp w0, w1, [x9]" at ROUTERS => |s| s.devices.routers[0] = join(X[1] & 0xff, X[0]);
    "stp x0, x1, [x9]" at ROUTERS => |s| (s.devices.routers[0], s.devices.routers[1]) = (X[0], X[1]);
    "stnp x2, x3, [x9, #16]" at ROUTERS => |s| (s.devices.routers[2], s.devices.routers[3]) = (X[2], X[3]);
    "stp x1, x1, [x9], #-64" at ROUTERS => |s| {
        (s.devices.routers[0], s.devices.routers[1], s.moved) = (X[1], X[1], -64);
    };
    "stp x0, xzr, [x9, #16]!" at ROUTERS => |s| (s.devices.routers[2], s.devices.routers[3], s.moved) = (X[0], 0, 16);
    "stp x0, x1, [sp, #16]!" stack true at ROUTERS => |s| {
        (s.devices.routers[2], s.devices.routers[3], s.moved) = (X[0], X[1], 16);
    };
};

/// Single general registers without writeback: every size, sign and width that the hardware describes.
pub const DESCRIBED: &[Case] = cases! {
    "ldrb w0, [x9]" at PRIORITIES => |s| s.x[0] = 0x80;
    "ldrsb w0, [x9]" at PRIORITIES => |s| s.x[0] = 0xffff_ff80;
    "ldrsb x0, [x9]" at PRIORITIES => |s| s.x[0] = 0xffff_ffff_ffff_ff80;
    "ldrsb x0, [x9, #1]" at PRIORITIES => |s| s.x[0] = 0x10;
    "ldrh w0, [x9]" at MATCH => |s| s.x[0] = 0xc321;
    "ldrsh w0, [x9]" at MATCH => |s| s.x[0] = 0xffff_c321;
    "ldrsh x0, [x9]" at MATCH => |s| s.x[0] = 0xffff_ffff_ffff_c321;
    "ldr w0, [x9, #4]" at ROUTERS => |s| s.x[0] = high(R[0]);
    "ldrsw x0, [x9]" at ROUTERS => |s| s.x[0] = sign(low(R[0]));
    "ldr x0, [x9, #16]" at ROUTERS => |s| s.x[0] = R[2];
    "ldur x0, [x9, #-8]" at ROUTERS + 16 => |s| s.x[0] = R[1];
    "ldr xzr, [x9]" at ROUTERS => |_| {};
    "strb w0, [x9, #2]" at PRIORITIES => |s| s.devices.priorities = 0xf830_1080;
    "strh w0, [x9]" at MATCH => |s| s.devices.matched = 0x2230;
    "str w0, [x9, #8]" at ROUTERS => |s| s.devices.routers[1] = join(high(R[1]), X[0]);
    "str x3, [x9]" at ROUTERS => |s| s.devices.routers[0] = X[3];
    "stur x3, [x9, #-8]" at ROUTERS + 16 => |s| s.devices.routers[1] = X[3];
    "str xzr, [x9, #24]" at ROUTERS => |s| s.devices.routers[3] = 0;
};

/// Single general registers.
pub const SINGLES: &[Case] = cases! {
    "ldrb w0, [x9], #1" at PRIORITIES => |s| (s.x[0], s.moved) = (0x80, 1);
    "ldrsb w0, [x9, #3]!" at PRIORITIES => |s| (s.x[0], s.moved) = (0xffff_fff8, 3);
    "ldrsb x0, [x9], #-2" at PRIORITIES => |s| (s.x[0], s.moved) = (0xffff_ffff_ffff_ff80, -2);
    "ldrsb x1, [x9, #1]!" at PRIORITIES => |s| (s.x[1], s.moved) = (0x10, 1);
    "ldrh w0, [x9], #2" at MATCH => |s| (s.x[0], s.moved) = (0xc321, 2);
    "ldrsh w0, [x9], #0" at MATCH => |s| s.x[0] = 0xffff_c321;
    "ldrsh x0, [x9], #4" at MATCH => |s| (s.x[0], s.moved) = (0xffff_ffff_ffff_c321, 4);
    "ldr w0, [x9], #4" at ROUTERS => |s| (s.x[0], s.moved) = (low(R[0]), 4);
    "ldr w0, [x9, #4]!" at ROUTERS => |s| (s.x[0], s.moved) = (high(R[0]), 4);
    "ldrsw x0, [x9], #8" at ROUTERS => |s| (s.x[0], s.moved) = (sign(low(R[0])), 8);
    "ldrsw x0, [x9, #-8]!" at ROUTERS + 32 => |s| (s.x[0], s.moved) = (sign(low(R[3])), -8);
    "ldr x0, [x9], #255" at ROUTERS => |s| (s.x[0], s.moved) = (R[0], 255);
    "ldr x0, [x9, #-256]!" at ROUTERS + 264 => |s| (s.x[0], s.moved) = (R[1], -256);
    "ldr x0, [sp], #16" stack true at ROUTERS => |s| (s.x[0], s.moved) = (R[0], 16);
    "ldr xzr, [x9], #8" at ROUTERS => |s| s.moved = 8;
    "ldr x0, [x9, x10, lsl #3]" at ROUTERS, index 2 => |s| s.x[0] = R[2];
    "ldr w0, [x9, w10, sxtw]" at ROUTERS + 16, index 0xffff_fff8 => |s| s.x[0] = low(R[1]);
    "ldrsw x0, [x9, #24]" at ROUTERS => |s| s.x[0] = sign(low(R[3]));
    "ldar x0, [x9]" at ROUTERS => |s| s.x[0] = R[0];
    "strb w0, [x9], #1" at PRIORITIES => |s| (s.devices.priorities, s.moved) = (0xf828_1030, 1);
    "strb w1, [x9, #3]!" at PRIORITIES => |s| (s.devices.priorities, s.moved) = (0x6828_1080, 3);
    "strh w0, [x9], #2" at MATCH => |s| (s.devices.matched, s.moved) = (0x2230, 2);
    "str w0, [x9, #8]!" at ROUTERS => |s| (s.devices.routers[1], s.moved) = (join(high(R[1]), X[0]), 8);
    "str w0, [x9], #4" at MATCH => |s| (s.devices.matched, s.moved) = (X[0] as u32, 4);
    "str x3, [x9], #-256" at ROUTERS => |s| (s.devices.routers[0], s.moved) = (X[3], -256);
    "str x3, [x9, #24]!" at ROUTERS => |s| (s.devices.routers[3], s.moved) = (X[3], 24);
    "str xzr, [x9], #8" at ROUTERS => |s| (s.devices.routers[0], s.moved) = (0, 8);
    "str x2, [x9, w10, uxtw #3]" at ROUTERS, index 0xffff_ffff_0000_0003 => |s| s.devices.routers[3] = X[2];
    "stlr x1, [x9]" at ROUTERS => |s| s.devices.routers[0] = X[1];
};

/// With EL0's rights: without stage 1, since no page here is EL0's.
pub const UNPRIVILEGED: &[Case] = cases! {
    "ldtr x0, [x9, #8]" at ROUTERS => |s| s.x[0] = R[1];
    "ldtrsw x0, [x9]" at ROUTERS => |s| s.x[0] = sign(low(R[0]));
    "sttr x2, [x9, #16]" at ROUTERS => |s| s.devices.routers[2] = X[2];
};

/// SIMD registers, one and two.
pub const VECTORS: &[Case] = cases! {
    "ldr b0, [x9]" at PRIORITIES => |s| s.v[0] = [0x80, 0];
    "ldr b1, [x9, #1]!" at PRIORITIES => |s| (s.v[1], s.moved) = ([0x10, 0], 1);
    "ldr h0, [x9]" at MATCH => |s| s.v[0] = [0xc321, 0];
    "ldr s0, [x9, #8]" at ROUTERS => |s| s.v[0] = [low(R[1]), 0];
    "ldr d3, [x9], #8" at ROUTERS => |s| (s.v[3], s.moved) = ([R[0], 0], 8);
    "ldr q0, [x9]" at ROUTERS => |s| s.v[0] = [R[0], R[1]];
    "ldr q1, [x9], #16" at ROUTERS => |s| (s.v[1], s.moved) = ([R[0], R[1]], 16);
    "ldr q1, [x9, #16]!" at ROUTERS => |s| (s.v[1], s.moved) = ([R[2], R[3]], 16);
    "ldr q2, [x9, w10, sxtw #4]" at ROUTERS + 32, index 0xffff_ffff => |s| s.v[2] = [R[2], R[3]];
    "ldur d0, [x9, #-8]" at ROUTERS + 16 => |s| s.v[0] = [R[1], 0];
    "ldp s0, s1, [x9]" at ROUTERS => |s| (s.v[0], s.v[1]) = ([low(R[0]), 0], [high(R[0]), 0]);
    "ldp d0, d1, [x9, #16]" at ROUTERS => |s| (s.v[0], s.v[1]) = ([R[2], 0], [R[3], 0]);
    "ldp q0, q1, [x9]" at ROUTERS => |s| (s.v[0], s.v[1]) = ([R[0], R[1]], [R[2], R[3]]);
    "ldp q3, q2, [x9], #-32" at ROUTERS => |s| (s.v[3], s.v[2], s.moved) = ([R[0], R[1]], [R[2], R[3]], -32);
    "ldnp q0, q1, [x9]" at ROUTERS => |s| (s.v[0], s.v[1]) = ([R[0], R[1]], [R[2], R[3]]);
    "str b0, [x9, #1]" at PRIORITIES => |s| s.devices.priorities = 0xf828_a880;
    "str h1, [x9]" at MATCH => |s| s.devices.matched = 0x44c8;
    "str s0, [x9], #4" at MATCH => |s| (s.devices.matched, s.moved) = (V[0][0] as u32, 4);
    "str d0, [x9, #8]" at ROUTERS => |s| s.devices.routers[1] = V[0][0];
    "str q0, [x9]" at ROUTERS => |s| (s.devices.routers[0], s.devices.routers[1]) = (V[0][0], V[0][1]);
    "str q2, [x9, #16]!" at ROUTERS => |s| {
        (s.devices.routers[2], s.devices.routers[3], s.moved) = (V[2][0], V[2][1], 16);
    };
    "stp s0, s1, [x9]" at ROUTERS => |s| s.devices.routers[0] = join(V[1][0] & 0xff, V[0][0]);
    "stp d0, d1, [x9, #16]!" at ROUTERS => |s| {
        (s.devices.routers[2], s.devices.routers[3], s.moved) = (V[0][0], V[1][0], 16);
    };
    "stp q2, q3, [x9], #32" at ROUTERS => |s| {
        (s.devices.routers, s.moved) = ([V[2][0], V[2][1], V[3][0], V[3][1]], 32);
    };
};

/// With SCTLR_EL1.EE set.
pub const BIG_ENDIAN: &[Case] = cases! {
    "ldr x0, [x9]" at ROUTERS => |s| s.x[0] = R[0].swap_bytes();
    "ldp w0, w1, [x9]" at ROUTERS => |s| (s.x[0], s.x[1]) = (swap(R[0]), swap(high(R[0])));
    "ldp x0, x1, [x9], #16" at ROUTERS => |s| (s.x[0], s.x[1], s.moved) = (R[0].swap_bytes(), R[1].swap_bytes(), 16);
    "ldrsw x0, [x9], #4" at ROUTERS + 8 => |s| (s.x[0], s.moved) = (sign(swap(R[1])), 4);
    "ldrh w0, [x9], #2" at MATCH => |s| (s.x[0], s.moved) = (0x21c3, 2);
    "ldrb w0, [x9], #1" at PRIORITIES => |s| (s.x[0], s.moved) = (0x80, 1);
    "ldr q0, [x9]" at ROUTERS => |s| s.v[0] = [R[1].swap_bytes(), R[0].swap_bytes()];
    "ldp s0, s1, [x9]" at ROUTERS => |s| (s.v[0], s.v[1]) = ([swap(R[0]), 0], [swap(high(R[0])), 0]);
    // What a router does not keep of a reversed value is left out.
    "str w0, [x9], #4" at MATCH => |s| (s.devices.matched, s.moved) = ((X[0] as u32).swap_bytes(), 4);
    "strh w0, [x9, #0]!" at MATCH => |s| s.devices.matched = 0x3022;
    "str s1, [x9]" at MATCH => |s| s.devices.matched = (V[1][0] as u32).swap_bytes();
};

/// The low word in the other order.
const fn swap(value: u64) -> u64 {
    (value as u32).swap_bytes() as u64
}
