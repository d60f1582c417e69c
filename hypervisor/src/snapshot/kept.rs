//! The image of each virtual machine's last snapshot.
//!
//! Invariants: at most one for each; it goes when the machine does, or starts again.

use alloc::sync::Arc;
use alloc::vec::Vec;

use entresol_backing::ObjectHandle;
use entresol_sync::Mutex;

use super::Image;

/// An image and the file that holds it.
struct Kept {
    /// The virtual machine's number.
    number: usize,
    /// The file's number in the store.
    file: u64,
    image: Arc<Image>,
}

static KEPT: Mutex<Vec<Kept>> = Mutex::new(Vec::new());

/// The image of virtual machine `number`, if file `file` has it.
pub fn find(number: usize, file: u64) -> Option<Arc<Image>> {
    let kept = KEPT.lock();
    kept.iter().find(|kept| (kept.number, kept.file) == (number, file)).map(|kept| kept.image.clone())
}

/// The memory of virtual machine `number`'s image.
pub fn memory(number: usize) -> Option<ObjectHandle> {
    KEPT.lock().iter().find(|kept| kept.number == number).map(|kept| kept.image.ram)
}

/// From now on `image`, which file `file` has, is that of virtual machine `number`.
pub fn keep(number: usize, file: u64, image: Arc<Image>) {
    forget(number);
    KEPT.lock().push(Kept { number, file, image });
}

/// Virtual machine `number` is gone, or another.
pub fn forget(number: usize) {
    let mut kept = KEPT.lock();
    let place = kept.iter().position(|kept| kept.number == number);
    let gone = place.map(|place| kept.swap_remove(place));
    drop(kept);
    // Giving memory back waits for a grace period.
    drop(gone);
}
