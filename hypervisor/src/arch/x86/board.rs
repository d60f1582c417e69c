//! What a virtual machine has beside memory, vCPUs and virtio: interrupt controllers, COM1, timer and clock of a PC, power, and the page
//! with its generation.
//!
//! What nobody has reads as ones and takes every store, as on a PC's bus.
//!
//! Time: all guests see the machine's time stamp counter, moved by what they have stored to it; kvm-clock counts from when the virtual
//! machine was made.

use alloc::boxed::Box;
use alloc::sync::Arc;

use entresol_addr::{PAGE_SIZE, PageSize};
use entresol_arch_x86::either::{Either, Maker};
use entresol_arch_x86::shadow::Shadow;
use entresol_devices::apic::ApicError;
use entresol_devices::bus::Device;
use entresol_devices::kick::{Flag, Kick};
use entresol_devices::pc::{self, Kicks, Pc, Time, Wire};
use entresol_devices::vmgenid::VmGenId;
use entresol_loader::x86::map as pc_map;
use entresol_metal_x86::{cpu, features, switch, timer};
use entresol_mmu::ConvertError;
use entresol_wire::bundle::FileIndex;
use entresol_wire::config::{self, Paging};
use serde::{Deserialize, Serialize};

use super::{Format, Memory, State, map};
use crate::clock;
use crate::console::Terminal;
use crate::entropy;
use crate::sched::VcpuRef;
use crate::vm::{BuildError, Link, OutOfHeap, Vm};

/// A device's wire.
pub type Line = Wire<Link>;

/// I/O APIC input of the page with the generation; nothing describes it.
const GENERATION_INPUT: usize = 5;

impl Kicks for Link {
    fn kick(&self, who: Kick) {
        Link::kick(self, who);
    }
}

/// See the module.
pub struct Board {
    pc: Pc<Arc<Terminal>, Link>,
    generation: VmGenId<Line>,
    /// Count of the machine's time stamp counter when kvm-clock shows 0, and Unix time then.
    pub(super) epoch: (u64, u64),
}

/// The same outside the machine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    pc: pc::Saved,
    /// Nanoseconds that kvm-clock has shown.
    shown: u64,
}

impl From<ApicError> for OutOfHeap {
    fn from(_: ApicError) -> Self {
        Self
    }
}

/// What time it is for a vCPU whose counter is moved by so much.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// What is added to the machine's counter.
    pub offset: u64,
}

impl Time for Now {
    fn tsc(&self) -> u64 {
        timer::now().wrapping_add(self.offset)
    }

    fn nanoseconds(&self) -> u64 {
        timer::nanoseconds(timer::now())
    }

    fn unix_seconds(&self) -> u64 {
        clock::unix_seconds()
    }
}

/// How many shadow tables a guest with so many bytes of memory has: for all of it twice, in 4 KiB pages, and those of its programs.
fn shadow_tables(bytes: u64) -> usize {
    const MOST: u64 = 1536;
    (2 * bytes.div_ceil(PageSize::Size2M.bytes()) + 256).min(MOST) as usize
}

/// What is the same for all vCPUs.
const NOW: Now = Now { offset: 0 };

impl Board {
    /// That the machine can run what `config` asks for.
    ///
    /// # Errors
    ///
    /// The field, and the rule.
    pub fn check(config: &config::Vm<FileIndex>) -> Result<(), BuildError> {
        if config.vcpus as usize > entresol_devices::apic::MAX_VCPUS {
            return Err(BuildError::new("vcpus: must be at most 8"));
        }
        if config.policies.paging == Paging::Shadow && switch::is_intel() {
            return Err(BuildError::new("policies.paging = \"shadow\": runs by SVM, and this is an Intel processor"));
        }
        Ok(())
    }

    /// Gives `memory`, which no vCPU runs on yet, what else of tables its guest needs: shadow tables, if `config` asks for them.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn shade(memory: &mut Memory, config: &config::Vm<FileIndex>) -> Result<(), OutOfHeap> {
        if config.policies.paging != Paging::Shadow {
            return Ok(());
        }
        let words = Box::new(Shadow::new(features::get().physical_bits, None));
        let shaded = memory.shade(cpu::index(), words, shadow_tables(config.memory), config.vcpus as usize);
        shaded.map_err(|_| OutOfHeap)
    }

    /// The format of its tables.
    pub fn format(_config: &config::Vm<FileIndex>) -> Format {
        let maker = if features::get().vmx.is_some() { Maker::Intel } else { Maker::Amd };
        Either::new(maker, features::get().physical_bits, None)
    }

    /// Bits of physical address that the machine has.
    pub fn physical_bits() -> u8 {
        features::get().physical_bits
    }

    /// That of the virtual machine at the end of `link`, which is as `config` says, with `terminal`; as it was saved, if it was.
    ///
    /// # Errors
    ///
    /// [`BuildError`].
    pub fn new(
        link: &Link,
        terminal: &Arc<Terminal>,
        config: &config::Vm<FileIndex>,
        _memory: &Memory,
        saved: Option<Saved>,
    ) -> Result<Box<Self>, BuildError> {
        let (vcpus, kicks, now) = (config.vcpus as usize, Arc::new(link.clone()), timer::now());
        let (pc, shown) = match saved {
            None => (Pc::new(vcpus, terminal.clone(), kicks).map_err(|_| OutOfHeap)?, 0),
            Some(Saved { pc, shown }) => {
                let pc =
                    Pc::load(pc, vcpus, terminal.clone(), kicks, &NOW).map_err(|error| BuildError::saved(&error))?;
                (pc, shown)
            }
        };
        let generation = VmGenId::new(entropy::generation(), pc.wire(GENERATION_INPUT));
        let seconds = clock::unix_seconds().saturating_sub(shown / 1_000_000_000);
        let epoch = (now.wrapping_sub(timer::counts(shown)), seconds);
        Ok(Box::new(Self { pc, generation, epoch }))
    }

    /// Shows in `memory` what of it is memory: nothing.
    ///
    /// # Errors
    ///
    /// None.
    pub fn show(&self, _memory: &Memory) -> Result<(), BuildError> {
        Ok(())
    }

    /// The same state for the copy of the virtual machine at the end of `link`, on the copy's `terminal`. No vCPU is on a CPU.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn fork(&self, link: &Link, terminal: &Arc<Terminal>) -> Result<Box<Self>, OutOfHeap> {
        let pc = self.pc.fork(terminal.clone(), Arc::new(link.clone()))?;
        let generation = VmGenId::new(self.generation.id(), pc.wire(GENERATION_INPUT));
        Ok(Box::new(Self { pc, generation, epoch: self.epoch }))
    }

    /// A copy's, when its memory is there.
    pub fn take_over(&mut self, _memory: &Memory) {}

    /// Its state outside the machine; no vCPU is on a CPU.
    ///
    /// # Errors
    ///
    /// [`OutOfHeap`].
    pub fn save(&self) -> Result<Saved, OutOfHeap> {
        let shown = timer::nanoseconds(timer::now().wrapping_sub(self.epoch.0));
        Ok(Saved { pc: self.pc.save(&NOW)?, shown })
    }

    /// Tells the guest that it is another than before: a copy.
    pub fn renew_generation(&self) {
        self.generation.renew(entropy::generation());
    }

    /// The line of virtio transport `slot`.
    ///
    /// # Errors
    ///
    /// None here: lines cost nothing.
    pub fn transport_line(&self, slot: usize) -> Result<Line, OutOfHeap> {
        Ok(self.pc.wire(pc_map::VIRTIO_GSI as usize + slot))
    }

    /// Gives the guest's serial port input; returns how many of the first bytes it took.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        self.pc.uart().offer(bytes)
    }

    /// Whether the guest listens at its serial port.
    pub fn is_heard(&self) -> bool {
        self.pc.uart().is_heard()
    }

    /// The count at which the interval timer ticks.
    pub fn alarm(&self) -> Option<u64> {
        self.pc.next_tick().map(timer::counts)
    }

    /// Time passes: to be called when a turn of its first vCPU begins, and every slice of it.
    pub fn tick(&self) {
        self.pc.uart().tick();
        self.pc.tick(&NOW);
    }

    /// What it has behind ports, addresses and MSRs.
    pub(super) fn pc(&self) -> &Pc<Arc<Terminal>, Link> {
        &self.pc
    }

    /// The device at `gpa`, and the offset in it.
    #[inline]
    pub fn device_at(&self, gpa: u64) -> Option<(&dyn Device, u64)> {
        let offset = gpa.checked_sub(map::GENERATION_BASE).filter(|offset| *offset < PAGE_SIZE)?;
        Some((&self.generation, offset))
    }

    /// Whether an interrupt controller answers at `gpa`.
    pub fn is_controller(&self, gpa: u64) -> bool {
        [pc_map::LAPIC_BASE, pc_map::IOAPIC_BASE].into_iter().any(|base| gpa / PAGE_SIZE == base / PAGE_SIZE)
    }

    /// The vCPU's load of `size` bytes at `gpa`, if an interrupt controller is there.
    #[inline]
    pub fn read(&self, vcpu: &VcpuRef, now: &Now, gpa: u64, size: u8) -> Option<u64> {
        self.pc.read(vcpu.index, gpa, size, now)
    }

    /// Its store of the low `size` bytes of `value`; whether a controller is there.
    #[inline]
    pub fn write(&self, vcpu: &VcpuRef, now: &Now, gpa: u64, size: u8, value: u64) -> bool {
        self.pc.write(vcpu.index, gpa, size, value, now)
    }

    /// Up while vCPU `index` must settle its interrupts before it enters its guest.
    #[inline]
    pub fn flag(&self, index: usize) -> Flag<'_> {
        self.pc.apic().look_flag(index)
    }

    /// Whether an interrupt waits that ends the wait of vCPU `index`, which is on no CPU.
    pub fn wakes(&self, index: usize, state: &State) -> bool {
        let apic = self.pc.apic();
        apic.has_event(index) || state.is_open() && apic.pending(index).is_some_and(|pending| !pending.masked)
    }
}

impl Vm {
    /// Whether the guest shares a page beside its memory with the hypervisor: it has none.
    pub fn shares_records(&self) -> bool {
        false
    }

    /// It does from now on: it has none.
    ///
    /// # Errors
    ///
    /// None.
    pub fn share_records(&self) -> Result<(), ConvertError> {
        Ok(())
    }
}
