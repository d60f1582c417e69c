//! The register file of a virtio device over MMIO (virtio 4.2), and the life of the device (virtio 2.1, 3.1).
//!
//! Protocol: status bits are only ever added by the driver, and all are taken away by storing zero. FEATURES_OK sticks
//! if the driver accepted VERSION_1 and nothing that was not offered; queues can be made ready after it, and DRIVER_OK
//! sticks only with it. Notifications count from DRIVER_OK until DEVICE_NEEDS_RESET or FAILED.
//!
//! Interrupts: the line is high while InterruptStatus is not zero. QEMU's device tree calls it edge-triggered, so an
//! acknowledgement that leaves another reason standing lowers the line for a moment: a controller that samples edges
//! sees the reason that is left, and one that samples levels sees nothing new.
//!
//! Rings: what the guest's memory remembers of a queue's areas is forgotten in the access in which the queue stops working, whatever
//! stopped it: its own reset, the device's, a driver that gave up or broke the format.
//!
//! Invariants: registers are 32 bits wide at multiples of four; other accesses below the configuration space read as
//! zero and store nothing (virtio 4.2.2.2). The line's level and InterruptStatus agree whenever the lock is free.
//!
//! Lock order: see [`super`].

use entresol_sync::Mutex;
use serde::{Deserialize, Serialize};
use virtio::DeviceStatus;

use super::chain::Chain;
use super::queue::{Queue, SavedQueue};
use super::{Broken, OutOfMemory, QUEUE_SIZE_MAX, QUEUES_MAX, Service, Stop, VirtioDevice, registers};
use crate::bus::{Area, Device, GuestMemory, Interrupt, Work};
use crate::saved::{BadState, check};

/// Features of the transport and its queues.
const TRANSPORT_FEATURES: u64 =
    feature(virtio::F::VERSION_1) | feature(virtio::F::INDIRECT_DESC) | feature(virtio::F::RING_RESET);

/// A feature's bit; all that we know of lie in the low 64.
const fn feature(bits: virtio::F) -> u64 {
    bits.bits().to_ne() as u64
}

/// Status bits that a driver sets.
const DRIVER_STATUS: DeviceStatus = DeviceStatus::ACKNOWLEDGE
    .union(DeviceStatus::DRIVER)
    .union(DeviceStatus::FEATURES_OK)
    .union(DeviceStatus::DRIVER_OK)
    .union(DeviceStatus::FAILED);

/// A virtio device of type `D` with the memory of its VM and its interrupt line.
pub struct VirtioMmio<D, M, L> {
    state: Mutex<State<D>>,
    memory: M,
    line: L,
}

/// A device's transport, outside of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    status: u8,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    foreign_features: bool,
    queue_sel: u32,
    queues: [SavedQueue; QUEUES_MAX],
    interrupt_status: u32,
    generation: u32,
    high: bool,
}

/// Everything that the device's lock guards.
pub(super) struct State<D> {
    pub(super) device: D,
    status: DeviceStatus,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    /// The driver accepted a feature above bit 63, which nobody offered.
    foreign_features: bool,
    queue_sel: u32,
    queues: [Queue; QUEUES_MAX],
    /// Of which queues the memory may remember rings.
    remembered: [bool; QUEUES_MAX],
    /// What is left to do on each queue.
    left: [Work; QUEUES_MAX],
    interrupt_status: u32,
    generation: u32,
    broken: Option<Broken>,
    chain: Chain,
    /// Level of the line as last driven.
    high: bool,
    /// Offered beside the transport's and the device's own.
    platform_features: u64,
}

impl<D: VirtioDevice, M: GuestMemory, L: Interrupt> VirtioMmio<D, M, L> {
    /// A device at power-on.
    ///
    /// # Errors
    ///
    /// If the heap has no room for it.
    pub fn new(device: D, memory: M, line: L) -> Result<Self, OutOfMemory> {
        const { assert!(D::QUEUES <= QUEUES_MAX) };
        let state = State::new(device, Chain::new()?, memory.is_restricted());
        Ok(Self { state: Mutex::new(state), memory, line })
    }

    /// A device in the same state for a copy of the virtual machine: `device` makes its type's part from this one's, `memory`
    /// holds what this one's does, `line` is as high. No part of any work is in progress: the vCPUs are stopped.
    ///
    /// # Errors
    ///
    /// If the heap has no room for it.
    pub fn fork(
        &self,
        device: impl FnOnce(&D) -> Result<D, OutOfMemory>,
        memory: M,
        line: L,
    ) -> Result<Self, OutOfMemory> {
        let state = self.state.lock();
        let fork = state.fork(device(&state.device)?, Chain::new()?);
        Ok(Self { state: Mutex::new(fork), memory, line })
    }

    /// The transport's registers and queues. No part of any work is in progress: the vCPUs are stopped.
    pub fn save(&self) -> Saved {
        let state = self.state.lock();
        Saved {
            status: state.status.bits(),
            device_features_sel: state.device_features_sel,
            driver_features_sel: state.driver_features_sel,
            driver_features: state.driver_features,
            foreign_features: state.foreign_features,
            queue_sel: state.queue_sel,
            queues: state.queues.each_ref().map(Queue::save),
            interrupt_status: state.interrupt_status,
            generation: state.generation,
            high: state.high,
        }
    }

    /// Takes over what was saved of a device of the same kind. Every queue is looked at again, whatever was left to do.
    ///
    /// # Errors
    ///
    /// [`BadState`].
    pub fn load(&self, saved: &Saved) -> Result<(), BadState> {
        let mut state = self.state.lock();
        let status = DeviceStatus::from_bits_retain(saved.status);
        let known = DRIVER_STATUS | DeviceStatus::DEVICE_NEEDS_RESET;
        check(known.contains(status), "virtio.status", "must have no bits that the device has not")?;
        let agreed = !saved.foreign_features
            && saved.driver_features & !state.offered() == 0
            && saved.driver_features & feature(virtio::F::VERSION_1) != 0;
        check(
            agreed || !status.contains(DeviceStatus::FEATURES_OK),
            "virtio.driver_features",
            "must be among those that the device offers",
        )?;
        let works = status.contains(DeviceStatus::FEATURES_OK);
        check(works || !status.contains(DeviceStatus::DRIVER_OK), "virtio.status", "must have FEATURES_OK first")?;
        let reasons = registers::USED_BUFFER | registers::CONFIGURATION_CHANGE;
        check(saved.interrupt_status & !reasons == 0, "virtio.interrupt_status", "must have two bits at most")?;
        let indirect = saved.driver_features & feature(virtio::F::INDIRECT_DESC) != 0;
        let mut queues = fresh_queues();
        for (number, (queue, saved)) in queues.iter_mut().zip(&saved.queues).enumerate() {
            *queue = Queue::load(number, saved, indirect && works)?;
        }
        check(works || !queues.iter().any(Queue::is_ready), "virtio.queues", "must not be ready before FEATURES_OK")?;
        state.broken = status.contains(DeviceStatus::DEVICE_NEEDS_RESET).then_some(Broken::Before);
        state.left = queues.each_ref().map(|queue| if queue.is_ready() { Work::More } else { Work::Idle });
        state.queues = queues;
        state.status = status;
        state.device_features_sel = saved.device_features_sel;
        state.driver_features_sel = saved.driver_features_sel;
        state.driver_features = saved.driver_features;
        state.foreign_features = saved.foreign_features;
        state.queue_sel = saved.queue_sel;
        state.interrupt_status = saved.interrupt_status;
        state.generation = saved.generation;
        state.high = saved.high;
        Ok(())
    }

    /// How the driver broke the device, until it resets it.
    pub fn broken(&self) -> Option<Broken> {
        self.state.lock().broken
    }

    /// Runs `act` on the device, settles what it left of rings and of the line, and then, with the lock free, calls the terminal if
    /// input is wanted.
    pub(super) fn access<R>(&self, act: impl FnOnce(&mut State<D>, &M) -> R) -> R {
        let mut state = self.state.lock();
        let result = act(&mut state, &self.memory);
        state.forget_rings(&self.memory);
        let high = state.interrupt_status != 0;
        if high != state.high {
            state.high = high;
            self.line.set_level(high);
        }
        let terminal = state.device.input_wanted();
        drop(state);
        if let Some(terminal) = terminal {
            terminal.input_wanted();
        }
        result
    }

    /// InterruptACK.
    fn acknowledge(&self, reasons: u32) {
        self.access(|state, _| {
            let seen = state.interrupt_status & reasons;
            state.interrupt_status &= !seen;
            if seen != 0 && state.interrupt_status != 0 {
                // An edge for the reason that is left; `access` raises the line again.
                state.high = false;
                self.line.set_level(false);
            }
        });
    }
}

impl<D: VirtioDevice, M: GuestMemory, L: Interrupt> Device for VirtioMmio<D, M, L> {
    fn read(&self, offset: u64, size: u8) -> u64 {
        if let Some(offset) = offset.checked_sub(registers::CONFIG) {
            return config_bytes(&self.state.lock().device.config(), offset, size);
        }
        if size != 4 || !offset.is_multiple_of(4) {
            return 0;
        }
        self.state.lock().load(offset).into()
    }

    fn write(&self, offset: u64, size: u8, value: u64) -> Work {
        if let Some(offset) = offset.checked_sub(registers::CONFIG) {
            self.access(|state, _| state.device.write_config(offset, size, value));
            return Work::Idle;
        }
        if size != 4 || !offset.is_multiple_of(4) {
            return Work::Idle;
        }
        let value = value as u32;
        match offset {
            registers::QUEUE_NOTIFY => self.access(|state, memory| state.notify(memory, value)),
            registers::INTERRUPT_ACK => {
                self.acknowledge(value);
                Work::Idle
            }
            _ => {
                self.access(|state, _| state.store(offset, value));
                Work::Idle
            }
        }
    }

    fn run(&self) -> Work {
        self.access(|state, memory| {
            for index in 0..D::QUEUES {
                if state.left[index] != Work::Idle {
                    state.serve(memory, index);
                }
            }
            state.work()
        })
    }

    fn reset(&self) {
        self.access(|state, _| state.reset());
    }
}

/// `size` bytes of the configuration space; what lies past its end is zero.
fn config_bytes(config: &[u8], offset: u64, size: u8) -> u64 {
    let Ok(offset) = usize::try_from(offset) else { return 0 };
    if !matches!(size, 1 | 2 | 4 | 8) {
        return 0;
    }
    let mut bytes = [0; 8];
    for (to, from) in bytes[..usize::from(size)].iter_mut().zip(config.get(offset..).unwrap_or_default()) {
        *to = *from;
    }
    u64::from_le_bytes(bytes)
}

impl<D: VirtioDevice> State<D> {
    fn new(device: D, chain: Chain, restricted: bool) -> Self {
        let platform_features = if restricted { feature(virtio::F::ACCESS_PLATFORM) } else { 0 };
        Self {
            device,
            status: DeviceStatus::empty(),
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            foreign_features: false,
            queue_sel: 0,
            queues: fresh_queues(),
            remembered: [false; QUEUES_MAX],
            left: [Work::Idle; QUEUES_MAX],
            interrupt_status: 0,
            generation: 0,
            broken: None,
            chain,
            high: false,
            platform_features,
        }
    }

    /// The same state around another device.
    fn fork(&self, device: D, chain: Chain) -> Self {
        Self {
            device,
            status: self.status,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            foreign_features: self.foreign_features,
            queue_sel: self.queue_sel,
            queues: self.queues.clone(),
            remembered: [false; QUEUES_MAX],
            left: self.left,
            interrupt_status: self.interrupt_status,
            generation: self.generation,
            broken: self.broken,
            chain,
            high: self.high,
            platform_features: self.platform_features,
        }
    }

    /// Back to power-on, but for what the driver must be able to compare (the generation) and what is outside (the
    /// line).
    fn reset(&mut self) {
        self.status = DeviceStatus::empty();
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.foreign_features = false;
        self.queue_sel = 0;
        self.queues.iter_mut().for_each(Queue::reset);
        self.left = [Work::Idle; QUEUES_MAX];
        self.interrupt_status = 0;
        self.broken = None;
        self.device.reset();
    }

    fn load(&self, register: u64) -> u32 {
        match register {
            registers::MAGIC_VALUE => registers::MAGIC,
            registers::VERSION => registers::LAYOUT,
            registers::DEVICE_ID => u8::from(D::ID).into(),
            registers::VENDOR_ID => registers::VENDOR,
            registers::DEVICE_FEATURES => half(self.offered(), self.device_features_sel),
            registers::QUEUE_NUM_MAX if self.selected() < D::QUEUES => QUEUE_SIZE_MAX.into(),
            registers::QUEUE_READY => self.queues.get(self.selected()).is_some_and(Queue::is_ready).into(),
            registers::INTERRUPT_STATUS => self.interrupt_status,
            registers::STATUS => self.status.bits().into(),
            registers::CONFIG_GENERATION => self.generation,
            register if registers::SHARED_MEMORY.contains(&register) => u32::MAX,
            _ => 0,
        }
    }

    fn store(&mut self, register: u64, value: u32) {
        match register {
            registers::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            registers::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            registers::DRIVER_FEATURES => self.accept_features(value),
            registers::QUEUE_SEL => self.queue_sel = value,
            registers::STATUS => self.set_status(value),
            _ => self.store_to_queue(register, value),
        }
    }

    /// Registers that speak of the selected queue.
    fn store_to_queue(&mut self, register: u64, value: u32) {
        let index = self.selected();
        if index >= D::QUEUES {
            return;
        }
        match register {
            registers::QUEUE_NUM => self.queues[index].set_size(value),
            registers::QUEUE_READY if value == 0 => self.reset_queue(index),
            registers::QUEUE_READY => self.enable_queue(index),
            registers::QUEUE_RESET if value == 1 && self.accepted(virtio::F::RING_RESET) => self.reset_queue(index),
            register => {
                let areas = [
                    (registers::QUEUE_DESC, Area::Descriptors),
                    (registers::QUEUE_DRIVER, Area::Driver),
                    (registers::QUEUE_DEVICE, Area::Device),
                ];
                for (halves, area) in areas {
                    if let Some(high) = halves.iter().position(|half| *half == register) {
                        self.queues[index].set_area(area, high == 1, value);
                    }
                }
            }
        }
    }

    /// QueueSel as an index; one past the end if it is none.
    fn selected(&self) -> usize {
        usize::try_from(self.queue_sel).map_or(D::QUEUES, |index| index.min(D::QUEUES))
    }

    fn offered(&self) -> u64 {
        TRANSPORT_FEATURES | self.platform_features | self.device.features()
    }

    /// Whether negotiation has ended with `bits` in it.
    fn accepted(&self, bits: virtio::F) -> bool {
        self.status.contains(DeviceStatus::FEATURES_OK) && self.driver_features & feature(bits) != 0
    }

    /// DriverFeatures. Once FEATURES_OK is set it is too late (virtio 3.1.1).
    fn accept_features(&mut self, value: u32) {
        if self.status.contains(DeviceStatus::FEATURES_OK) {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.driver_features = (self.driver_features & !0xffff_ffff) | value,
            1 => self.driver_features = (self.driver_features & 0xffff_ffff) | value << 32,
            _ => self.foreign_features |= value != 0,
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut status = self.status | (DeviceStatus::from_bits_retain(value as u8) & DRIVER_STATUS);
        let sound = !self.foreign_features
            && self.driver_features & !self.offered() == 0
            && self.driver_features & feature(virtio::F::VERSION_1) != 0;
        if !self.status.contains(DeviceStatus::FEATURES_OK) && !sound {
            status.remove(DeviceStatus::FEATURES_OK);
        }
        if !status.contains(DeviceStatus::FEATURES_OK) {
            status.remove(DeviceStatus::DRIVER_OK);
        }
        self.status = status;
    }

    fn enable_queue(&mut self, index: usize) {
        if !self.status.contains(DeviceStatus::FEATURES_OK) || self.queues[index].is_ready() {
            return;
        }
        let indirect = self.accepted(virtio::F::INDIRECT_DESC);
        if let Err(broken) = self.queues[index].enable(indirect) {
            self.fail(broken);
        }
    }

    fn reset_queue(&mut self, index: usize) {
        self.queues[index].reset();
        self.left[index] = Work::Idle;
    }

    /// The device cannot go on with this driver (virtio 2.1.2).
    fn fail(&mut self, broken: Broken) {
        if self.broken.is_some() {
            return;
        }
        self.broken = Some(broken);
        self.left = [Work::Idle; QUEUES_MAX];
        self.status.insert(DeviceStatus::DEVICE_NEEDS_RESET);
        if self.status.contains(DeviceStatus::DRIVER_OK) {
            self.interrupt_status |= registers::CONFIGURATION_CHANGE;
        }
    }

    /// The configuration space has changed.
    pub(super) fn config_changed(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        if self.is_live() {
            self.interrupt_status |= registers::CONFIGURATION_CHANGE;
        }
    }

    /// Whether the driver is at work.
    fn is_live(&self) -> bool {
        self.status.contains(DeviceStatus::DRIVER_OK)
            && !self.status.intersects(DeviceStatus::DEVICE_NEEDS_RESET | DeviceStatus::FAILED)
    }

    /// Whether queue `index` is ready, and its driver at work.
    fn works(&self, index: usize) -> bool {
        self.is_live() && self.queues.get(index).is_some_and(Queue::is_ready)
    }

    /// Has `memory` forget the rings of queues that have stopped.
    fn forget_rings(&mut self, memory: &dyn GuestMemory) {
        for index in 0..QUEUES_MAX {
            if self.remembered[index] && !self.works(index) {
                self.remembered[index] = false;
                memory.forget_rings(index);
            }
        }
    }

    /// QueueNotify.
    fn notify(&mut self, memory: &dyn GuestMemory, index: u32) -> Work {
        if let Some(index) = usize::try_from(index).ok().filter(|index| *index < D::QUEUES) {
            self.serve(memory, index);
        }
        self.work()
    }

    /// Lets the device take buffers from queue `index`.
    pub(super) fn serve(&mut self, memory: &dyn GuestMemory, index: usize) {
        self.serve_with(memory, index, |device, queue, service| device.serve(index, queue, service));
    }

    /// Does a part of the work on queue `index`, if it works, and notes what is left and whether to interrupt.
    pub(super) fn serve_with(
        &mut self,
        memory: &dyn GuestMemory,
        index: usize,
        act: impl FnOnce(&mut D, &mut Queue, &mut Service<'_>) -> Result<Work, Stop>,
    ) {
        if !self.works(index) {
            // A driver that has given up gets no more of what it asked for.
            self.left[index] = Work::Idle;
            return;
        }
        self.remembered[index] = true;
        let queue = &mut self.queues[index];
        let mut outcome = act(&mut self.device, queue, &mut Service::new(memory, &mut self.chain));
        // Buffers used before a stop are announced all the same.
        if queue.take_used() {
            match queue.wants_interrupt(memory) {
                Ok(false) => {}
                // A driver that cannot be asked now gets an interrupt that it may not need.
                Ok(true) | Err(Stop::OutOfMemory | Stop::Absent) => self.interrupt_status |= registers::USED_BUFFER,
                Err(stop @ Stop::Broken(_)) => outcome = outcome.and(Err(stop)),
            }
        }
        match outcome {
            Ok(work) => self.left[index] = work,
            Err(Stop::OutOfMemory) => self.left[index] = Work::Stalled,
            Err(Stop::Absent) => self.left[index] = Work::Waiting,
            Err(Stop::Broken(broken)) => self.fail(broken),
        }
    }

    /// What is left on all queues.
    fn work(&self) -> Work {
        let any = |work| self.left.contains(&work);
        if any(Work::More) {
            Work::More
        } else if any(Work::Stalled) {
            Work::Stalled
        } else if any(Work::Waiting) {
            Work::Waiting
        } else {
            Work::Idle
        }
    }
}

/// The queues of a device at power-on.
fn fresh_queues() -> [Queue; QUEUES_MAX] {
    core::array::from_fn(Queue::new)
}

/// The half of `features` that a selector names; beyond the second there are none.
fn half(features: u64, selector: u32) -> u32 {
    match selector {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_space_is_read_in_any_size() {
        let config = [1, 2, 3, 4, 5, 6, 7, 8, 9];
        assert_eq!(config_bytes(&config, 0, 8), 0x0807_0605_0403_0201);
        assert_eq!(config_bytes(&config, 1, 1), 2);
        assert_eq!(config_bytes(&config, 2, 2), 0x0403);
        assert_eq!(config_bytes(&config, 8, 4), 9, "past the end is zero");
        for (offset, size) in [(9, 4), (u64::MAX, 1), (0, 3), (0, 0), (0, 255)] {
            assert_eq!(config_bytes(&config, offset, size), 0);
        }
    }

    #[test]
    fn features_are_read_by_halves() {
        let features = TRANSPORT_FEATURES;
        assert_eq!(half(features, 0), 1 << 28);
        assert_eq!(half(features, 1), 1 | 1 << 8);
        assert_eq!(half(features, 2), 0);
    }
}
