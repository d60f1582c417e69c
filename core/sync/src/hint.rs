//! What a CPU says while it waits.

/// This CPU waits for another one to change what it has just read. The body of every waiting loop.
#[cfg(not(any(feature = "lab", loom)))]
#[inline]
pub fn spin_loop() {
    core::hint::spin_loop();
}

/// This CPU waits for another one to change what it has just read. The body of every waiting loop.
#[cfg(all(feature = "lab", not(loom)))]
#[track_caller]
pub fn spin_loop() {
    crate::lab::spin();
}

/// This CPU waits for another one to change what it has just read. The body of every waiting loop.
#[cfg(loom)]
pub fn spin_loop() {
    loom::thread::yield_now();
}

/// Whether the schedule was given up and its CPUs are only being unwound, so that nobody waited for will ever come.
/// Waiting loops that a destructor runs ask this. `false`, known to the compiler, outside the lab.
#[cfg(not(feature = "lab"))]
#[inline]
pub const fn abandoned() -> bool {
    false
}

/// Whether the schedule was given up and its CPUs are only being unwound, so that nobody waited for will ever come.
/// Waiting loops that a destructor runs ask this. `false`, known to the compiler, outside the lab.
#[cfg(feature = "lab")]
pub fn abandoned() -> bool {
    crate::lab::abandoned()
}
