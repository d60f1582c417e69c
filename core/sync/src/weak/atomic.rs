//! Atomics that are loom's from their first use on.

use core::fmt;
use std::sync::OnceLock;

use loom::sync::atomic as real;

use crate::atomic::Ordering;
use crate::scheduled::atomics;

macro_rules! explored {
    ($name:ident, $value:ty) => {
        /// The type of the same name of `core`, explored.
        pub struct $name {
            first: $value,
            real: OnceLock<real::$name>,
        }

        impl $name {
            /// As in `core`.
            pub const fn new(value: $value) -> Self {
                Self { first: value, real: OnceLock::new() }
            }

            #[track_caller]
            fn at(&self, _write: bool) -> &real::$name {
                self.real.get_or_init(|| real::$name::new(self.first))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // Reading the value would be one more access to explore.
                f.debug_struct(stringify!($name)).field("first", &self.first).finish_non_exhaustive()
            }
        }
    };
}

atomics!(explored);
