//! Guests and owners as scripts: what each CPU of a scenario does.
//!
//! [`vcpu`] is a guest's access as hardware makes it, [`shadowed`] one on shadow tables, [`context`] what the vCPU has of it, [`operation`] what the manual says about it, [`trap`] what an exit
//! says, [`memory`] its effect; [`format`](mod@format) is the entry format of the machine;
//! [`owner`] what the owner of a virtual machine asks of the core;
//! [`posted`] is coalesced MMIO; [`poison`] finds frames to be bad; [`relatives`] forks and ends machines; [`swap`] keeps pages that no frame has; [`record`] what the lab remembers of that; [`stage`] puts machine, objects and virtual machines up and runs scripts.

pub mod context;
pub mod dirty;
pub mod format;
pub mod memory;
pub mod operation;
pub mod owner;
pub mod poison;
pub mod posted;
pub mod private;
pub mod record;
pub mod relatives;
pub mod shadowed;
pub mod stage;
pub mod swap;
pub mod trap;
pub mod vcpu;
