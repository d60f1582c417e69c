//! What the lab must be told because no memory access shows it: who owns a frame. Empty outside the lab.

/// Frames left the pool: `first` is a frame number.
#[inline]
pub fn taken(first: u64, frames: u64) {
    #[cfg(feature = "lab")]
    crate::lab::taken(first, frames);
    #[cfg(not(feature = "lab"))]
    let _ = (first, frames);
}

/// Frames went back to the pool for good: nobody may reach them any more.
#[inline]
pub fn freed(first: u64, frames: u64) {
    #[cfg(feature = "lab")]
    crate::lab::freed(first, frames);
    #[cfg(not(feature = "lab"))]
    let _ = (first, frames);
}

/// Whether this request for a frame is one that the lab wants refused. `false` outside it.
#[inline]
pub fn starved() -> bool {
    #[cfg(feature = "lab")]
    return crate::lab::starved();
    #[cfg(not(feature = "lab"))]
    false
}
