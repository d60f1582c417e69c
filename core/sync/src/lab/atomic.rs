//! Atomics that announce each operation. Orderings are taken and passed on; see the parent for what they mean here.

use core::fmt;
use core::sync::atomic::{self as real, Ordering};

use super::access;
use crate::scheduled::atomics;

macro_rules! announced {
    ($name:ident, $value:ty) => {
        /// The type of the same name of `core`, scheduled.
        #[repr(transparent)]
        pub struct $name(real::$name);

        impl $name {
            /// As in `core`.
            pub const fn new(value: $value) -> Self {
                Self(real::$name::new(value))
            }

            /// As in `core`.
            pub fn get_mut(&mut self) -> &mut $value {
                self.0.get_mut()
            }

            /// As in `core`.
            pub fn into_inner(self) -> $value {
                self.0.into_inner()
            }

            #[track_caller]
            fn at(&self, write: bool) -> &real::$name {
                access(self, write);
                &self.0
            }
        }

        impl From<$value> for $name {
            fn from(value: $value) -> Self {
                Self::new(value)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

atomics!(announced);
