//! The operations of an atomic that is not the CPU's own, written once.
//!
//! `lab` and `weak` each wrap an atomic and want to know of every operation on it. They say what an atomic of theirs is made
//! of and how one is reached (`at`, which is told whether the operation may change the value); what the operations are,
//! and that they are those of `core`, stands here. Each says where in the source it was called.

/// The operations of every atomic, for a type `$name` of `$value`s with a method `at`.
macro_rules! operations {
    ($name:ident, $value:ty) => {
        impl $name {
            /// As in `core`.
            #[track_caller]
            pub fn load(&self, order: Ordering) -> $value {
                self.at(false).load(order)
            }

            /// As in `core`.
            #[track_caller]
            pub fn store(&self, value: $value, order: Ordering) {
                self.at(true).store(value, order);
            }

            /// As in `core`.
            #[track_caller]
            pub fn swap(&self, value: $value, order: Ordering) -> $value {
                self.at(true).swap(value, order)
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
                self.at(true).compare_exchange(current, new, success, failure)
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

            /// As in `core`; one operation.
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
                self.at(true).fetch_update(set, fetch, update)
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new(<$value>::default())
            }
        }
    };
}

/// Operations that take a value and return the one before, by their names.
macro_rules! fetches {
    ($name:ident, $value:ty, $($fetch:ident)*) => {
        impl $name {
            $(
                /// As in `core`.
                #[track_caller]
                pub fn $fetch(&self, value: $value, order: Ordering) -> $value {
                    self.at(true).$fetch(value, order)
                }
            )*
        }
    };
}

/// All types, each made by `$one` and given its operations.
macro_rules! atomics {
    ($one:ident) => {
        atomics!($one: AtomicBool bool);
        atomics!($one: AtomicU8 u8, AtomicU16 u16, AtomicU32 u32, AtomicU64 u64, AtomicUsize usize; numbers);
    };
    ($one:ident: $($name:ident $value:ty),*) => {
        $(
            $one!($name, $value);
            $crate::scheduled::operations!($name, $value);
            $crate::scheduled::fetches!($name, $value, fetch_and fetch_or);
        )*
    };
    ($one:ident: $($name:ident $value:ty),*; numbers) => {
        atomics!($one: $($name $value),*);
        $($crate::scheduled::fetches!($name, $value, fetch_add fetch_sub fetch_max fetch_min);)*
    };
}

pub(crate) use {atomics, fetches, operations};
