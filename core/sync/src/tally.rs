//! Counters that no decision depends on: statistics. The lab lets no other CPU go before them, so counting costs no
//! schedules. Whatever an algorithm branches on belongs in [`crate::atomic`].

pub use core::sync::atomic::AtomicU64;
