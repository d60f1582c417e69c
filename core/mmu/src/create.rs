//! The beginning of a virtual machine's memory: everything that can fail fails here, and gives back what it took.

use alloc::collections::VecDeque;

use entresol_addr::{PAGE_SHIFT, PfnRange};
use entresol_backing::Order;
use entresol_machine::Machine;
use entresol_slot::Slots;
use entresol_sync::Mutex;
use entresol_table::{Format, Geometry, RootError, Table};

use crate::dirty::Logs;
use crate::pfncache::Caches;
use crate::{Host, Notifier, Options, OutOfHeap, Stats, Switches, Vm, VmVmid};

/// Why a virtual machine was not created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CreateError {
    /// The tables' format has no shape for so many bits.
    IpaBits {
        /// What was asked for.
        value: u8,
    },
    /// The slots could not be made.
    Slots(entresol_slot::CreateError),
    /// The heap has no room for the places of dirty logs.
    OutOfHeap,
    /// No frames for the root.
    OutOfMemory,
    /// The frames that the pool gave do not make a root.
    Root(RootError),
}

/// The order of a root's frames in the pool.
pub(crate) fn root_order(geometry: Geometry) -> Order {
    let order = geometry.root_frames().next_power_of_two().trailing_zeros();
    Order::new(order as u8).expect("a root has at most 16 frames")
}

impl<'h, M: Machine, F: Format> Vm<'h, M, F> {
    /// A virtual machine without memory. `cpu` is the CPU that the caller runs on.
    ///
    /// # Errors
    ///
    /// [`CreateError`]; nothing is left behind.
    pub fn new(host: &'h Host<M>, cpu: usize, format: F, options: Options) -> Result<Self, CreateError> {
        let ipa_bits = options.ipa_bits;
        let geometry = format.geometry(ipa_bits).ok_or(CreateError::IpaBits { value: ipa_bits })?;
        let slots =
            Slots::with_capacity(options.slots, 1 << (u32::from(ipa_bits) - PAGE_SHIFT)).map_err(CreateError::Slots)?;
        let logs = Logs::new(options.slots).map_err(|OutOfHeap| CreateError::OutOfHeap)?;
        let order = root_order(geometry);
        let first = host.pool.take(cpu, order).map_err(|_| CreateError::OutOfMemory)?;
        let root = PfnRange::new(first, geometry.root_frames()).expect("the pool's frames do not wrap");
        let table = Table::new(&host.machine, format, geometry, root).map_err(|error| {
            host.pool.give(cpu, first, order);
            CreateError::Root(error)
        })?;
        let (notifier, vmid, stats) = (Notifier::new(), VmVmid::new(), Stats::default());
        let (switches, forking, detached) = (Switches::default(), Mutex::new(()), Mutex::new(VecDeque::new()));
        Ok(Self {
            host,
            slots,
            table,
            notifier,
            vmid,
            logs,
            caches: Caches::new(),
            shade: None,
            options,
            switches,
            forking,
            detached,
            stats,
        })
    }
}
