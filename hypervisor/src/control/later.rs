//! An answer that comes when a task is done.

use alloc::sync::Arc;

use entresol_sync::Mutex;
use entresol_wire::control::{Answer, Error};

use crate::host_work::{self, Work};

type Result = core::result::Result<Answer<'static>, Error>;

/// The session's end: it looks whether the answer is there.
#[derive(Clone, Default)]
pub struct Later(Arc<Mutex<Option<Result>>>);

impl Later {
    /// The answer, once.
    pub fn take(&self) -> Option<Result> {
        self.0.lock().take()
    }

    /// The task is done. Whoever asked may be gone.
    pub fn say(&self, result: Result) {
        *self.0.lock() = Some(result);
        host_work::raise(Work::Control);
    }
}
