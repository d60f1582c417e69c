//! Accesses that the hardware does not describe: the instruction is read from the guest's memory and carried out for it.
//!
//! Purpose: pairs, writeback, SIMD registers and DC ZVA on a device, and single accesses that a page boundary or a lack of
//! alignment splits; and cache maintenance whose fault does not say so, which goes to [`maintenance`]. What
//! [`instruction::decode`] leaves out is the owner's to decide (policy `no_syndrome`).
//!
//! Protocol, in this order, so that whatever stops it leaves nothing half done:
//! 1. read and decode the instruction; compute addresses and what a store stores;
//! 2. translate each page by the guest's own stage 1, with the rights that the access has; see which is memory;
//! 3. ask for every part whether somebody answers there;
//! 4. do the parts in memory (running out of frames pauses the virtual machine; doing them again is harmless);
//! 5. do the parts in devices, each once, at ascending addresses;
//! 6. write registers and base, then step over the instruction.
//!
//! An abort comes from steps 2 and 3, and cancels all: no register, no base, no PC (Z-B5). A part is naturally aligned and at
//! most 8 bytes; a Q register is two. Step 2 believes the fault for the page that faulted, and asks AT for another one.
//!
//! The guest may have changed its instruction since it faulted, or its tables. What it then gets is what its instructions
//! say with its own rights, or an abort; [`Fit`] refuses what does not belong to the fault.
//!
//! Invariants: bounded: at most 14 parts of a transfer, 256 of a DC ZVA (a block is at most 2 KiB). Devices are never called
//! while pinned: they pin for their own copies.
//!
//! Known hole: PSTATE.PAN has no say over a second page.

use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_arch_arm64::inject::{Exception, Status, pstate};
use entresol_arch_arm64::instruction::data::{self, Piece, Pieces, Value};
use entresol_arch_arm64::instruction::{self, Bank, Base, MAX_BYTES, Operation, Transfer};
use entresol_arch_arm64::policy::CacheOp;
use entresol_fault::{Access, Fault};
use entresol_metal_arm64::exit::{self as hardware, Rights, Translated};
use entresol_metal_arm64::switch::fp;
use entresol_metal_arm64::{Metal, cpu, live};
use entresol_mmu::{Abort, CopyError};
use entresol_wire::config::NoSyndrome;

use super::walk::{self, Untranslated};
use super::{Next, absent, maintenance, memory, mmio, park, starve, undefined};
use crate::arch::State;
use crate::counters::Reason;
use crate::host;
use crate::sched::{Leave, VcpuRef};
use crate::vm::{Claim, Crash, Pause, Store};

/// Why an access was not carried out. Nothing of it shows.
enum Stop {
    /// It is not known what the instruction does; the word, if it could be read.
    NoSyndrome(Option<u32>),
    /// The guest takes a data abort.
    Abort { address: u64, status: Status },
    /// No frame for a page.
    OutOfMemory,
    /// A page is in a store.
    Absent { gpa: Gpa },
    /// The guest's memory changed meanwhile: it tries again.
    Again,
    /// The owner has to take coalesced writes first.
    Full,
}

type Bytes = [u8; MAX_BYTES];

/// Carries out the access of `fault`, which no memory serves, from its instruction.
#[cold]
pub fn access(vcpu: &VcpuRef, state: &mut State, fault: &Fault, esr: u64, far: u64) -> Next {
    vcpu.vm.counters.bump(Reason::NoSyndrome);
    match carry_out(vcpu, state, fault, far) {
        Ok(Done::Access { look }) => {
            state.skip(esr);
            if look { Next::Look } else { Next::Again }
        }
        Ok(Done::Maintenance(operation)) => maintenance::maintain_at(vcpu, state, esr, operation, fault.gpa, far),
        Err(Stop::Abort { address, status }) => {
            let write = fault.access == Access::Write;
            undefined::enter(state, Exception::DataAbort { address, status, write, cache_maintenance: false });
            Next::Again
        }
        Err(Stop::Again) => Next::Look,
        Err(Stop::OutOfMemory) => starve(vcpu),
        Err(Stop::Absent { gpa }) => absent(vcpu, gpa),
        Err(Stop::Full) => park(&vcpu.vm, Pause::CoalescedFull),
        Err(Stop::NoSyndrome(instruction)) => refuse(vcpu, state, fault, far, instruction),
    }
}

/// Nobody knows what the access is: as its owner decided.
fn refuse(vcpu: &VcpuRef, state: &mut State, fault: &Fault, far: u64, instruction: Option<u32>) -> Next {
    vcpu.vm.counters.bump(Reason::NotDecoded);
    match vcpu.vm.config.policies.no_syndrome {
        NoSyndrome::Inject => {
            memory::inject(vcpu, state, fault, far, Abort::External);
            Next::Again
        }
        NoSyndrome::Stop => {
            let (gpa, syndrome) = (fault.gpa.get(), fault.syndrome);
            vcpu.vm.crash(Crash::NoSyndrome { instruction, gpa, syndrome });
            Next::Leave(Leave::Park)
        }
    }
}

/// What an instruction turned out to be.
enum Done {
    /// A load or store, which is done; whether the vCPU has to look up.
    Access { look: bool },
    /// Cache maintenance, whose fault did not say so; nothing is done yet.
    Maintenance(CacheOp),
}

/// Steps 1 to 6 but the last.
fn carry_out(vcpu: &VcpuRef, state: &mut State, fault: &Fault, far: u64) -> Result<Done, Stop> {
    let word = fetch(vcpu, state)?;
    let Some(instruction) = instruction::decode(word) else { return Err(Stop::NoSyndrome(Some(word))) };
    let base = instruction.address.base;
    let resolved = instruction.address.resolve(read_base(state, base), |register| state.read(register));
    let fit = Fit { fault, far, word };
    let look = match instruction.operation {
        Operation::Transfer(transfer) => move_registers(vcpu, state, fit, &transfer, resolved.address)?,
        Operation::Zero => zero(vcpu, state, fit, resolved.address)?,
        Operation::Maintain(operation) => return Ok(Done::Maintenance(operation)),
    };
    if let Some(value) = resolved.base {
        write_base(state, base, value);
    }
    Ok(Done::Access { look })
}

/// The instruction at the guest's PC.
#[inline]
fn fetch(vcpu: &VcpuRef, state: &State) -> Result<u32, Stop> {
    if state.regs.pstate & pstate::AARCH32 != 0 {
        return Err(Stop::NoSyndrome(None));
    }
    match fetch_mapped(state.regs.pc) {
        Some(word) => Ok(word),
        None => fetch_unmapped(vcpu, state),
    }
}

/// The instruction at `pc`, if both stages have it now, as they nearly always do where it was just executed. A frame
/// that the second stage maps after the pin began is not another's before the pin ends: frames are given back past a grace
/// period after their last translation has gone.
#[inline]
fn fetch_mapped(pc: u64) -> Option<u32> {
    let _pin = host::get().epoch.pin(cpu::index());
    // EL1 may read whatever EL0 may execute.
    hardware::translate_to_machine(pc).and_then(Metal::load_word)
}

/// The same through the slots.
#[cold]
fn fetch_unmapped(vcpu: &VcpuRef, state: &State) -> Result<u32, Stop> {
    let pc = state.regs.pc;
    let page = match walk::translate(vcpu, state, pc, Rights::El1Read) {
        Ok(translated) => translated.page(),
        // Its tables changed since it was fetched.
        Err(Untranslated::Fault(_)) => return Err(Stop::NoSyndrome(None)),
        Err(Untranslated::OutOfMemory) => return Err(Stop::OutOfMemory),
        Err(Untranslated::Absent { gpa }) => return Err(Stop::Absent { gpa }),
        Err(Untranslated::Again) => return Err(Stop::Again),
    };
    let mut word = [0; 4];
    let pin = host::get().epoch.pin(cpu::index());
    match vcpu.vm.memory.read(&pin, &state.hint, Gpa::new(page | pc & (PAGE_SIZE - 1)), &mut word) {
        Ok(()) => Ok(u32::from_le_bytes(word)),
        Err(CopyError::OutOfMemory) => Err(Stop::OutOfMemory),
        Err(CopyError::Absent { gpa, .. }) => Err(Stop::Absent { gpa }),
        // The guest fetches it again, and takes the abort.
        Err(CopyError::Busy | CopyError::Poisoned { .. }) => Err(Stop::Again),
        Err(CopyError::Outside { .. } | CopyError::ReadOnly { .. } | CopyError::MemoryFault(_)) => {
            Err(Stop::NoSyndrome(None))
        }
    }
}

/// Loads or stores registers.
fn move_registers(
    vcpu: &VcpuRef,
    state: &mut State,
    fit: Fit<'_>,
    transfer: &Transfer,
    address: u64,
) -> Result<bool, Stop> {
    let length = transfer.length() as u16;
    let part = Part { address, length, element: transfer.size, write: !transfer.load };
    let span = Span::new(vcpu, state, fit, part, transfer.unprivileged)?;
    if span.is_by_registers() {
        if part.write
            && transfer.second.is_none()
            && let Some(look) = post(vcpu, state, &span, transfer)?
        {
            return Ok(look);
        }
        span.is_answered(vcpu)?;
        return move_each(vcpu, state, &span, transfer);
    }
    let big_endian = mmio::is_big_endian(state);
    let mut bytes = [0; MAX_BYTES];
    if !transfer.load {
        transfer.store(&mut bytes, 0, read_register(state, transfer.bank, transfer.first), big_endian);
        if let Some(second) = transfer.second {
            transfer.store(&mut bytes, 1, read_register(state, transfer.bank, second), big_endian);
        }
        return span.perform(vcpu, state, Some(&mut bytes));
    }
    let look = span.perform(vcpu, state, Some(&mut bytes))?;
    write_register(state, transfer.bank, transfer.first, transfer.loaded(&bytes, 0, big_endian));
    if let Some(second) = transfer.second {
        write_register(state, transfer.bank, second, transfer.loaded(&bytes, 1, big_endian));
    }
    Ok(look)
}

/// A store of one register to a zone of coalesced MMIO or to a doorbell; `None` if it is to neither.
fn post(vcpu: &VcpuRef, state: &State, span: &Span, transfer: &Transfer) -> Result<Option<bool>, Stop> {
    let gpa = Gpa::new(span.first.base() | span.part.address & (PAGE_SIZE - 1));
    if !vcpu.vm.posted.may_cover(gpa) {
        return Ok(None);
    }
    let [value, _] = read_register(state, transfer.bank, transfer.first);
    match vcpu.vm.posted.store(gpa, transfer.size, mmio::order(state, value, transfer.size)) {
        Store::Elsewhere => Ok(None),
        Store::Full => Err(Stop::Full),
        Store::Done => Ok(Some(false)),
        Store::Signalled => Ok(Some(true)),
    }
}

/// Step 5 where each register is one access.
#[inline]
fn move_each(vcpu: &VcpuRef, state: &mut State, span: &Span, transfer: &Transfer) -> Result<bool, Stop> {
    let (size, mut look, mut loaded) = (transfer.size, false, [0; 2]);
    let registers = [Some(transfer.first), transfer.second];
    for (index, register) in registers.into_iter().flatten().enumerate() {
        let address = span.part.address.wrapping_add(index as u64 * u64::from(size));
        let gpa = Gpa::new(span.first.base() | address & (PAGE_SIZE - 1));
        let claim = if transfer.load {
            vcpu.vm.device_read(vcpu, state, gpa, size)
        } else {
            let [value, _] = read_register(state, transfer.bank, register);
            vcpu.vm.device_write(vcpu, state, gpa, size, mmio::order(state, value, size))
        };
        match claim {
            Claim::Value(value) => loaded[index] = value,
            Claim::Done => {}
            Claim::Look => look = true,
            Claim::Abort => return Err(Stop::Abort { address, status: Status::External }),
            // Devices fill whole pages: where one register finds none, the other has done nothing either.
            Claim::Again => return Err(Stop::Again),
        }
    }
    for (register, value) in registers.into_iter().flatten().zip(loaded).filter(|_| transfer.load) {
        let value = mmio::order(state, value, size);
        let value = match transfer.bank {
            Bank::General { sign_extend, wide } => data::extend(value, size, sign_extend, wide),
            Bank::Vector => value,
        };
        write_register(state, transfer.bank, register, [value, 0]);
    }
    Ok(look)
}

fn read_register(state: &State, bank: Bank, register: u8) -> Value {
    match bank {
        Bank::General { .. } => [state.read(register), 0],
        Bank::Vector => fp::read_live(register),
    }
}

fn write_register(state: &mut State, bank: Bank, register: u8, value: Value) {
    match bank {
        Bank::General { .. } => state.write(register, value[0]),
        Bank::Vector => fp::write_live(register, value),
    }
}

/// DC ZVA: 4 << DCZID_EL0.BS bytes, at most 2 KiB (Arm DDI 0487 D24.2, DCZID_EL0).
fn zero(vcpu: &VcpuRef, state: &mut State, fit: Fit<'_>, address: u64) -> Result<bool, Stop> {
    let length = (4u16 << (live::zero_block_id() & 0xf).min(9)).min(2048);
    let part = Part { address: address & !(u64::from(length) - 1), length, element: 8, write: true };
    Span::new(vcpu, state, fit, part, false)?.perform(vcpu, state, None)
}

/// The fault that an instruction has to explain.
#[derive(Clone, Copy)]
struct Fit<'f> {
    fault: &'f Fault,
    far: u64,
    /// The instruction.
    word: u32,
}

/// What an instruction touches.
#[derive(Clone, Copy)]
struct Part {
    address: u64,
    length: u16,
    element: u8,
    write: bool,
}

/// A page of the guest's that is touched: its intermediate physical address, and in bit 0 whether memory serves the access.
#[derive(Clone, Copy)]
struct Page(u64);

impl Page {
    const fn base(self) -> u64 {
        self.0 & !(PAGE_SIZE - 1)
    }

    const fn is_memory(self) -> bool {
        self.0 & 1 != 0
    }
}

/// What an instruction touches, and where that is: in one page or in two.
struct Span {
    part: Part,
    first: Page,
    last: Page,
}

/// Bits of a virtual address below a tag.
const ADDRESS: u64 = (1 << 56) - 1;

/// Whether two addresses of one access lie in one page.
const fn same_page(one: u64, other: u64) -> bool {
    (one ^ other) & ADDRESS < PAGE_SIZE
}

impl Span {
    /// Step 2.
    // A call would return it through memory: a hundred instructions of copies.
    #[inline(always)]
    fn new(vcpu: &VcpuRef, state: &State, fit: Fit<'_>, part: Part, unprivileged: bool) -> Result<Self, Stop> {
        let Fit { fault, far, word } = fit;
        let inside = far.wrapping_sub(part.address) & ADDRESS < u64::from(part.length);
        if !inside || part.write != (fault.access == Access::Write) {
            return Err(Stop::NoSyndrome(Some(word)));
        }
        let rights = rights(state, part.write, unprivileged);
        let page = |address: u64| {
            if same_page(address, far) {
                // No memory serves it, or there would be no fault.
                return Ok(Page(fault.gpa.get() & !(PAGE_SIZE - 1)));
            }
            let base = translate(vcpu, state, address, rights)?;
            Ok(Page(base | u64::from(is_memory(vcpu, state, Gpa::new(base), part.write))))
        };
        let last = part.address.wrapping_add(u64::from(part.length) - 1);
        let first = page(part.address)?;
        let last = if same_page(part.address, last) { first } else { page(last & !(PAGE_SIZE - 1))? };
        Ok(Self { part, first, last })
    }

    fn pieces(&self) -> Pieces {
        data::pieces(self.part.address, self.part.length.into(), self.part.element)
    }

    fn page(&self, piece: &Piece) -> Page {
        if same_page(piece.address, self.part.address) { self.first } else { self.last }
    }

    fn gpa(&self, piece: &Piece) -> Gpa {
        Gpa::new(self.page(piece).base() | piece.address & (PAGE_SIZE - 1))
    }

    /// Whether each register is one access to one device, as nearly always.
    fn is_by_registers(&self) -> bool {
        let size = u64::from(self.part.element);
        size <= 8 && self.part.address & (size - 1) == 0 && self.first.0 == self.last.0 && !self.first.is_memory()
    }

    /// Step 3. A part that is alone is refused when it is tried, with nothing done yet.
    fn is_answered(&self, vcpu: &VcpuRef) -> Result<(), Stop> {
        let whole = |page: Page| page.is_memory() || vcpu.vm.fills(page.base());
        if whole(self.first) && (self.first.0 == self.last.0 || whole(self.last)) {
            return Ok(());
        }
        let alone = |piece: &Piece| u16::from(piece.size) == self.part.length;
        let refused =
            |piece: &Piece| !self.page(piece).is_memory() && !vcpu.vm.answers(self.gpa(piece), self.part.write);
        self.pieces().find(|piece| !alone(piece) && refused(piece)).map_or(Ok(()), |piece| Err(abort(&piece)))
    }

    /// Steps 3 to 5; `bytes` are zero and stay it if there are none. Whether the vCPU has to look up.
    fn perform(&self, vcpu: &VcpuRef, state: &mut State, mut bytes: Option<&mut Bytes>) -> Result<bool, Stop> {
        let mixed = self.first.is_memory() || self.last.is_memory();
        self.is_answered(vcpu)?;
        if mixed {
            self.copy(vcpu, state, bytes.as_deref_mut())?;
        }
        let (mut look, mut begun) = (false, false);
        for piece in self.pieces() {
            if self.page(&piece).is_memory() {
                continue;
            }
            let (gpa, size) = (self.gpa(&piece), piece.size);
            let claim = if self.part.write {
                let value = bytes.as_deref().map_or(0, |bytes| data::get(bytes, piece.offset, piece.size));
                vcpu.vm.device_write(vcpu, state, gpa, size, value)
            } else {
                vcpu.vm.device_read(vcpu, state, gpa, size)
            };
            // What has begun before there was memory ends without it, and is not done twice.
            let claim = if claim == Claim::Again && begun { vcpu.vm.nobody(self.part.write) } else { claim };
            begun = true;
            match claim {
                Claim::Value(value) => {
                    if let Some(bytes) = bytes.as_deref_mut() {
                        data::put(bytes, piece.offset, piece.size, value);
                    }
                }
                Claim::Done => {}
                Claim::Look => look = true,
                Claim::Abort => return Err(abort(&piece)),
                Claim::Again => return Err(Stop::Again),
            }
        }
        Ok(look)
    }

    /// Step 4.
    fn copy(&self, vcpu: &VcpuRef, state: &State, mut bytes: Option<&mut Bytes>) -> Result<(), Stop> {
        let pin = host::get().epoch.pin(cpu::index());
        for piece in self.pieces().filter(|piece| self.page(piece).is_memory()) {
            let (gpa, size) = (self.gpa(&piece), usize::from(piece.size));
            let mut part = bytes.as_deref().map_or(0, |bytes| data::get(bytes, piece.offset, piece.size)).to_le_bytes();
            let done = if self.part.write {
                vcpu.vm.memory.write(&pin, &state.hint, gpa, &part[..size])
            } else {
                vcpu.vm.memory.read(&pin, &state.hint, gpa, &mut part[..size])
            };
            match done {
                Ok(()) => {}
                Err(CopyError::OutOfMemory) => return Err(Stop::OutOfMemory),
                Err(CopyError::Absent { gpa, .. }) => return Err(Stop::Absent { gpa }),
                Err(CopyError::ReadOnly { .. } | CopyError::Poisoned { .. }) => return Err(abort(&piece)),
                // The slot has gone since it was looked at, or memory is being forked.
                Err(CopyError::Outside { .. } | CopyError::MemoryFault(_) | CopyError::Busy) => {
                    return Err(Stop::Again);
                }
            }
            if let (Some(bytes), false) = (bytes.as_deref_mut(), self.part.write) {
                data::put(bytes, piece.offset, piece.size, u64::from_le_bytes(part));
            }
        }
        Ok(())
    }
}

fn abort(piece: &Piece) -> Stop {
    Stop::Abort { address: piece.address, status: Status::External }
}

/// The intermediate page of `address`.
fn translate(vcpu: &VcpuRef, state: &State, address: u64, rights: Rights) -> Result<u64, Stop> {
    walk::translate(vcpu, state, address, rights).map(Translated::page).map_err(|reason| match reason {
        Untranslated::Fault(status) => Stop::Abort { address, status },
        Untranslated::OutOfMemory => Stop::OutOfMemory,
        Untranslated::Absent { gpa } => Stop::Absent { gpa },
        Untranslated::Again => Stop::Again,
    })
}

/// Whose rights an access of the loaded vCPU has (Arm DDI 0487 D8.4; LDTR and STTR give way to PSTATE.UAO).
fn rights(state: &State, write: bool, unprivileged: bool) -> Rights {
    let now = state.regs.pstate;
    let el0 = now & pstate::MODE == pstate::EL0T || (unprivileged && now & pstate::UAO == 0);
    match (el0, write) {
        (false, false) => Rights::El1Read,
        (false, true) => Rights::El1Write,
        (true, false) => Rights::El0Read,
        (true, true) => Rights::El0Write,
    }
}

/// Whether memory serves the access to the page at `gpa`.
fn is_memory(vcpu: &VcpuRef, state: &State, gpa: Gpa, write: bool) -> bool {
    let pin = host::get().epoch.pin(cpu::index());
    let slot = vcpu.vm.memory.slots().find(&pin, gpa.frame(), &state.hint);
    slot.is_some_and(|slot| !(write && slot.is_read_only()))
}

/// Whether the loaded vCPU's stack pointer is SP_EL1.
fn uses_sp_el1(state: &State) -> bool {
    state.regs.pstate & pstate::MODE == pstate::EL1H
}

fn read_base(state: &State, base: Base) -> u64 {
    match base {
        Base::Pc => state.regs.pc,
        Base::Zero => 0,
        Base::Register(31) => live::stack_pointer(uses_sp_el1(state)),
        Base::Register(register) => state.read(register),
    }
}

fn write_base(state: &mut State, base: Base, value: u64) {
    match base {
        Base::Pc | Base::Zero => {}
        Base::Register(31) => live::set_stack_pointer(uses_sp_el1(state), value),
        Base::Register(register) => state.write(register, value),
    }
}
