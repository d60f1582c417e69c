//! Long work of the store, a part at a time.
//!
//! A task is a future that host's work polls whenever the store's disk has finished something, or a task asked for another
//! turn. Nothing wakes a single task: there are few, and each poll of one that waits costs a look at what it waits for.
//!
//! Lock order: the list is free while a task runs.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::future::{Future, poll_fn};
use core::pin::Pin;
use core::task::{Context, Poll, Waker};

use entresol_sync::Mutex;

use crate::host_work::{self, Work};

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

static TASKS: Mutex<Vec<Task>> = Mutex::new(Vec::new());

/// Begins a task; its first part is done with the host's next work.
pub fn spawn(task: impl Future<Output = ()> + Send + 'static) {
    TASKS.lock().push(Box::pin(task));
    host_work::raise(Work::Store);
}

/// Does a part of every task.
pub fn run() {
    let mut tasks = core::mem::take(&mut *TASKS.lock());
    tasks.retain_mut(|task| task.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
    let mut list = TASKS.lock();
    // Those that were begun meanwhile come after.
    tasks.append(&mut list);
    *list = tasks;
}

/// Lets guests have their turn, and goes on with the host's next work.
pub async fn pause() {
    let mut paused = false;
    poll_fn(|_| {
        if core::mem::replace(&mut paused, true) {
            return Poll::Ready(());
        }
        host_work::raise(Work::Store);
        Poll::Pending
    })
    .await;
}
