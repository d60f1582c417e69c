//! What the hypervisor says without being asked.

use alloc::borrow::Cow;

use serde::{Deserialize, Serialize};

use super::response::owned;
use super::{Bytes, State};

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event<'a> {
    /// A guest's console printed.
    Console {
        /// The virtual machine.
        #[serde(borrow)]
        vm: Cow<'a, str>,
        /// What it printed, at most [`CONSOLE_CHUNK`](super::CONSOLE_CHUNK) bytes.
        data: Bytes<'a>,
    },
    /// Console output was lost, because the channel took it too slowly.
    Dropped {
        /// The virtual machine.
        #[serde(borrow)]
        vm: Cow<'a, str>,
        /// Bytes lost since the last event of this VM's console.
        bytes: u64,
    },
    /// A console that did not take all input has room again.
    InputReady {
        /// The virtual machine.
        #[serde(borrow)]
        vm: Cow<'a, str>,
    },
    /// A doorbell of the attached virtual machine rang; told once until `posted` is asked.
    Doorbell {
        /// The virtual machine.
        #[serde(borrow)]
        vm: Cow<'a, str>,
    },
    /// The attached virtual machine's state changed.
    State {
        /// The virtual machine.
        #[serde(borrow)]
        vm: Cow<'a, str>,
        /// Its state from now on.
        state: State,
        /// Why, where the state has a reason.
        #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
        reason: Option<Cow<'a, str>>,
    },
}

impl Event<'_> {
    /// The same, borrowing nothing.
    pub fn into_owned(self) -> Event<'static> {
        match self {
            Self::Console { vm, data } => {
                Event::Console { vm: owned(vm), data: Bytes(Cow::Owned(data.0.into_owned())) }
            }
            Self::Dropped { vm, bytes } => Event::Dropped { vm: owned(vm), bytes },
            Self::InputReady { vm } => Event::InputReady { vm: owned(vm) },
            Self::Doorbell { vm } => Event::Doorbell { vm: owned(vm) },
            Self::State { vm, state, reason } => Event::State { vm: owned(vm), state, reason: reason.map(owned) },
        }
    }
}
