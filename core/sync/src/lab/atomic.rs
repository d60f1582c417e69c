//! Atomics that announce each operation. Orderings are taken and passed on; see the parent for what they mean here.

use core::fmt;
use core::sync::atomic::{self as real, Ordering};

use super::access;

macro_rules! common {
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
            #[track_caller]
            pub fn load(&self, order: Ordering) -> $value {
                access(self, false);
                self.0.load(order)
            }

            /// As in `core`.
            #[track_caller]
            pub fn store(&self, value: $value, order: Ordering) {
                access(self, true);
                self.0.store(value, order);
            }

            /// As in `core`.
            #[track_caller]
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                access(self, true);
                self.0.swap(value, order)
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
                access(self, true);
                self.0.compare_exchange(current, new, success, failure)
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

            /// As in `core`; one operation here.
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
                access(self, true);
                self.0.fetch_update(set, fetch, update)
            }

            /// As in `core`.
            #[track_caller]
            pub fn fetch_and(&self, value: $value, order: Ordering) -> $value {
                access(self, true);
                self.0.fetch_and(value, order)
            }

            /// As in `core`.
            #[track_caller]
            pub fn fetch_or(&self, value: $value, order: Ordering) -> $value {
                access(self, true);
                self.0.fetch_or(value, order)
            }

            /// As in `core`.
            pub fn get_mut(&mut self) -> &mut $value {
                self.0.get_mut()
            }

            /// As in `core`.
            pub fn into_inner(self) -> $value {
                self.0.into_inner()
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new(<$value>::default())
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

macro_rules! integer {
    ($name:ident, $value:ty) => {
        common!($name, $value);

        impl $name {
            /// As in `core`.
            #[track_caller]
            pub fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                access(self, true);
                self.0.fetch_add(value, order)
            }

            /// As in `core`.
            #[track_caller]
            pub fn fetch_sub(&self, value: $value, order: Ordering) -> $value {
                access(self, true);
                self.0.fetch_sub(value, order)
            }

            /// As in `core`.
            #[track_caller]
            pub fn fetch_max(&self, value: $value, order: Ordering) -> $value {
                access(self, true);
                self.0.fetch_max(value, order)
            }

            /// As in `core`.
            #[track_caller]
            pub fn fetch_min(&self, value: $value, order: Ordering) -> $value {
                access(self, true);
                self.0.fetch_min(value, order)
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
