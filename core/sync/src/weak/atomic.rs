//! Atomics that are loom's from their first use on.

use core::fmt;
use std::sync::OnceLock;

use loom::sync::atomic as real;

use crate::atomic::Ordering;

macro_rules! common {
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
            fn real(&self) -> &real::$name {
                self.real.get_or_init(|| real::$name::new(self.first))
            }

            /// As in `core`.
            #[track_caller]
            pub fn load(&self, order: Ordering) -> $value {
                self.real().load(order)
            }

            /// As in `core`.
            #[track_caller]
            pub fn store(&self, value: $value, order: Ordering) {
                self.real().store(value, order);
            }

            /// As in `core`.
            #[track_caller]
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                self.real().swap(value, order)
            }

            /// As in `core`.
            ///
            /// # Errors
            ///
            /// The value found.
            #[track_caller]
            pub fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.real().compare_exchange(current, new, success, failure)
            }

            /// As in `core`; does not fail spuriously.
            ///
            /// # Errors
            ///
            /// The value found.
            #[track_caller]
            pub fn compare_exchange_weak(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                self.compare_exchange(current, new, success, failure)
            }

            /// As in `core`.
            ///
            /// # Errors
            ///
            /// The value found.
            #[track_caller]
            pub fn fetch_update(
                &self,
                set: Ordering,
                fetch: Ordering,
                update: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                self.real().fetch_update(set, fetch, update)
            }

            /// As in `core`.
            #[track_caller]
            pub fn fetch_and(&self, value: $value, order: Ordering) -> $value {
                self.real().fetch_and(value, order)
            }

            /// As in `core`.
            #[track_caller]
            pub fn fetch_or(&self, value: $value, order: Ordering) -> $value {
                self.real().fetch_or(value, order)
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new(<$value>::default())
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

macro_rules! integer {
    ($name:ident, $value:ty) => {
        common!($name, $value);

        impl $name {
            /// As in `core`.
            #[track_caller]
            pub fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                self.real().fetch_add(value, order)
            }

            /// As in `core`.
            #[track_caller]
            pub fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                self.real().fetch_sub(value, order)
            }

            /// As in `core`.
            #[track_caller]
            pub fn fetch_max(&self, value: $value, order: Ordering) -> $value {
                self.real().fetch_max(value, order)
            }

            /// As in `core`.
            #[track_caller]
            pub fn fetch_min(&self, value: $value, order: Ordering) -> $value {
                self.real().fetch_min(value, order)
            }
        }
    };
}

common!(AtomicBool, bool);
integer!(AtomicU8, u8);
integer!(AtomicU16, u16);
integer!(AtomicU32, u32);
integer!(AtomicU64, u64);
integer!(AtomicUsize, usize);
