//! Accesses to what is no memory: the instruction is fetched through the guest's own tables, decoded, and carried out.
//!
//! Protocol: one pin for all of it, and each part of the access looks at the slots again in that pin (INV-9): what has become memory
//! meanwhile is read and written as memory. A fault of the guest's own tables is the guest's, with nothing changed.
//!
//! The processor has told the physical address of the access that failed. An instruction that touches one place has touched that one:
//! its tables are not walked a second time for it.
//!
//! An instruction that was found is kept ([`emulate::memo`]), with the frames of the entries and of the code that led to it
//! ([`entresol_mmu::Kept`]): in memory that the machine shares with nobody, and by walks of four or five levels.
//!
use entresol_addr::{Gpa, Hpa, PAGE_SIZE};
use entresol_arch_x86::control::ControlRegisters;
use entresol_arch_x86::emulate::memo::{Held, Memo, Place};
use entresol_arch_x86::emulate::{
    self, Bus, CodeSize, Instruction, Privileged, Progress, Registers, Unsupported, Width,
};
use entresol_arch_x86::paging::{self, Kind, Mode, Regime, Request, Tables, WalkError, Way};
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::Word;
use entresol_metal_x86::switch::Guest;
use entresol_metal_x86::{Metal, features};
use entresol_mmu::{CopyError, Kept, MmioCache, Outcome};
use entresol_slot::Hint;
use entresol_sync::Pin;

use super::identity::guest_time;
use super::{GENERAL_PROTECTION, Next, PAGE_FAULT, UNDEFINED, go_on, inject, interrupts};
use crate::devices::Devices;
use crate::vm::{Crash, End, Made, Vm};

/// Why an access is not completed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The guest gets a page fault.
    Fault { linear: u64, code: u32 },
    /// The address is not canonical.
    NonCanonical,
    /// Something moved: the guest tries again.
    Again,
    /// No frame is free.
    OutOfMemory,
    /// The guest's tables, or its code, are where no memory is, or none that can be read.
    Outside(Gpa),
}

impl From<CopyError> for Stop {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Outside { gpa }
            | CopyError::ReadOnly { gpa }
            | CopyError::Absent { gpa, .. }
            | CopyError::Poisoned { gpa } => Self::Outside(gpa),
            CopyError::MemoryFault(fault) => Self::Outside(fault.gpa()),
            CopyError::OutOfMemory => Self::OutOfMemory,
            CopyError::Busy => Self::Again,
        }
    }
}

/// Carries out the instruction that touched `fault.gpa`. Apart from the faults on memory, which are counted in instructions.
#[inline(never)]
pub fn access(cpu: usize, vm: &mut Vm, fault: &Fault) -> Next {
    if fault.stage1_walk || fault.is_fetch() {
        return Next::End(End::Crash(Crash::Access(fault.gpa)));
    }
    let guest = &mut *vm.vcpu.guest;
    interrupts::begin(guest, &vm.devices);
    let mut registers = registers(guest);
    let done = {
        let pin = vm.memory.host().epoch.pin(cpu);
        let mut view = View {
            memory: &vm.memory,
            devices: &vm.devices,
            mmio: &vm.vcpu.mmio,
            now: guest_time(guest),
            pin: &pin,
            hint: &vm.vcpu.hint,
            place: place(guest),
            shadow: vm.vcpu.regime,
            by_leave: *guest.rflags() & RFLAGS_AC != 0,
            known: None,
        };
        carry_out(&mut view, &mut vm.vcpu.code, &mut registers, fault.gpa)
    };
    match done {
        Ok(Ok(progress)) => {
            write_back(guest, &registers);
            match progress {
                Progress::Done => go_on(guest, registers.rip),
                // Between two steps it takes interrupts.
                Progress::Again => Next::Look,
            }
        }
        Ok(Err(Unsupported::NoMemory)) => Next::Again,
        Ok(Err(Unsupported::Invalid)) => inject(guest, UNDEFINED, None),
        Ok(Err(unsupported)) => Next::End(End::Crash(Crash::Instruction { gpa: fault.gpa, unsupported })),
        Err(stop) => stopped(vm, stop),
    }
}

/// What becomes of an access that is not completed.
pub fn stopped(vm: &mut Vm, stop: Stop) -> Next {
    let guest = &mut *vm.vcpu.guest;
    match stop {
        Stop::Again => Next::Again,
        Stop::Fault { linear, code } => {
            guest.set_cr2(linear);
            inject(guest, PAGE_FAULT, Some(code))
        }
        Stop::NonCanonical => inject(guest, GENERAL_PROTECTION, Some(0)),
        Stop::OutOfMemory => Next::End(End::Crash(Crash::OutOfMemory)),
        Stop::Outside(gpa) => Next::End(End::Crash(Crash::Access(gpa))),
    }
}

/// The instruction that a guest on shadow tables left with, RIP behind it, and the size of its code.
pub fn privileged(cpu: usize, vm: &mut Vm) -> Result<Result<(Privileged, u64, CodeSize), Unsupported>, Stop> {
    let guest = &mut *vm.vcpu.guest;
    let registers = registers(guest);
    let pin = vm.memory.host().epoch.pin(cpu);
    let mut view = View {
        memory: &vm.memory,
        devices: &vm.devices,
        mmio: &vm.vcpu.mmio,
        now: guest_time(guest),
        pin: &pin,
        hint: &vm.vcpu.hint,
        place: place(guest),
        shadow: vm.vcpu.regime,
        by_leave: *guest.rflags() & RFLAGS_AC != 0,
        known: None,
    };
    let size = code_size(&view.place);
    let at = code_at(&view.place);
    let bytes = emulate::fetch(at, |at, to| view.read_code(at, to).map(|_| ()))?;
    match emulate::privileged(bytes.as_slice(), &registers, size) {
        Err(Unsupported::Truncated) => bytes.stopped.map_or(Ok(Err(Unsupported::Truncated)), Err),
        read => Ok(read.map(|(privileged, next)| (privileged, next, size))),
    }
}

/// Finds the instruction, executes it.
fn carry_out(
    view: &mut View<'_>,
    memo: &mut Memo<Kept>,
    registers: &mut Registers,
    gpa: Gpa,
) -> Result<Result<Progress, Unsupported>, Stop> {
    let (memory, pin) = (view.memory, view.pin);
    let known = memo.recall(&view.place, |kept| memory.is_kept(pin, kept), |at| Metal::load_guest(word_at(at)));
    if let Some(instruction) = known {
        view.known = instruction.touches_one_place().then_some(gpa);
        return instruction.execute(registers, view).map(Ok);
    }
    match find(view, memo)? {
        Ok(instruction) => {
            view.known = instruction.touches_one_place().then_some(gpa);
            instruction.execute(registers, view).map(Ok)
        }
        Err(unsupported) => Ok(Err(unsupported)),
    }
}

/// Fetches and decodes the instruction, and keeps it.
#[cold]
#[inline(never)]
fn find(view: &mut View<'_>, memo: &mut Memo<Kept>) -> Result<Result<Instruction, Unsupported>, Stop> {
    let place = view.place;
    let size = code_size(&place);
    let at = code_at(&place);
    let kept = view.memory.keep();
    let mut way = None;
    let bytes = emulate::fetch(at, |at, to| view.read_code(at, to).map(|found| way = way.or(Some(found))))?;
    let instruction = match Instruction::decode(bytes.as_slice(), place.rip, size) {
        Ok(instruction) => instruction,
        Err(Unsupported::Truncated) => return bytes.stopped.map_or(Ok(Err(Unsupported::Truncated)), Err),
        Err(unsupported) => return Ok(Err(unsupported)),
    };
    if let Some((gpa, way)) = way
        && let Some(words) = view.depends_on(gpa, &way, &bytes.as_slice()[..instruction.length()])
    {
        memo.keep(&place, kept, words.into_iter().flatten(), &instruction);
    }
    Ok(Ok(instruction))
}

/// The word of the machine's memory at an aligned address.
#[inline]
fn word_at(at: Hpa) -> Word {
    Word::new(at.frame(), (at.page_offset() / 8) as u16)
}

/// Entries of a walk, and words that code touches, at most.
const MOST_ENTRIES: usize = 5;
const MOST_CODE: usize = 3;
/// L and D/B of a segment's attributes.
const ATTRIBUTE_L: u16 = 1 << 9;
const ATTRIBUTE_D: u16 = 1 << 10;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_AC: u64 = 1 << 18;

fn code_size(place: &Place) -> CodeSize {
    let Place { attributes, efer, .. } = *place;
    CodeSize::of(efer & EFER_LMA != 0, attributes & ATTRIBUTE_L != 0, attributes & ATTRIBUTE_D != 0)
}

/// The linear address of the next instruction.
fn code_at(place: &Place) -> u64 {
    match code_size(place) {
        CodeSize::Bits64 => place.rip,
        CodeSize::Bits16 | CodeSize::Bits32 => place.base.wrapping_add(place.rip) & u64::from(u32::MAX),
    }
}

fn place(guest: &mut Guest) -> Place {
    let code = guest.code();
    Place {
        rip: guest.rip(),
        base: code.base,
        root: guest.cr3(),
        cr0: guest.cr0(),
        cr4: guest.cr4(),
        efer: guest.efer(),
        attributes: code.attributes,
        user: guest.privilege() == 3,
    }
}

fn registers(guest: &mut Guest) -> Registers {
    Registers { general: guest.generals(), rip: guest.rip(), rflags: *guest.rflags(), bases: guest.bases() }
}

fn write_back(guest: &mut Guest, from: &Registers) {
    guest.set_generals(&from.general);
    *guest.rflags() = from.rflags;
}

/// The guest's memory by its linear addresses, for the length of one instruction.
struct View<'v> {
    memory: &'v Made,
    devices: &'v Devices,
    mmio: &'v MmioCache,
    /// The guest's time stamp counter.
    now: u64,
    pin: &'v Pin<'v>,
    hint: &'v Hint,
    place: Place,
    /// What its tables are read by, if it runs on shadow tables.
    shadow: Option<Regime>,
    by_leave: bool,
    /// Where the access that failed goes, if the instruction has no other.
    known: Option<Gpa>,
}

impl View<'_> {
    /// What the guest's tables are read by.
    fn regime(&mut self) -> Regime {
        if let Some(regime) = self.shadow {
            return regime;
        }
        let Place { root, cr0, cr4, efer, .. } = self.place;
        let own = ControlRegisters { cr0, cr3: root, cr4, efer, pointers: [0; 4] };
        let mut regime = own.regime(self.memory.ipa_bits(), features::get().giant_pages);
        if regime.mode == Mode::Pae {
            // With nested paging the processor reads them with each walk (APM 15.25.10). Where there is no memory they are absent.
            for index in 0..4 {
                let at = Gpa::new(own.pointers_at() + index * 8);
                regime.pointers[index as usize] = Tables::load(self, at, paging::Width::Long).unwrap_or(0);
            }
        }
        regime
    }

    fn trace(&mut self, linear: u64, kind: Kind) -> Result<(Gpa, Way), Stop> {
        let request = Request { kind, user: self.place.user, by_leave: self.by_leave };
        let regime = self.regime();
        match paging::trace(self, &regime, linear, request) {
            Ok((translation, way)) => Ok((translation.gpa, way)),
            Err(WalkError::Fault(code)) => Err(Stop::Fault { linear, code: code.bits() }),
            Err(WalkError::NonCanonical) => Err(Stop::NonCanonical),
            Err(WalkError::Contended) => Err(Stop::Again),
            Err(WalkError::Tables(stop)) => Err(stop),
        }
    }

    fn translate(&mut self, linear: u64, kind: Kind) -> Result<Gpa, Stop> {
        self.trace(linear, kind).map(|(gpa, _)| gpa)
    }

    /// Bytes of code, within one page; where they are, and which entries said so.
    fn read_code(&mut self, linear: u64, to: &mut [u8]) -> Result<(Gpa, Way), Stop> {
        let (gpa, way) = self.trace(linear, Kind::Fetch)?;
        self.memory.read(self.pin, self.hint, gpa, to)?;
        Ok((gpa, way))
    }

    /// The words that the code `bytes` at `gpa` and the way to it are in, if they can be kept and hold just that.
    fn depends_on(&self, gpa: Gpa, way: &Way, bytes: &[u8]) -> Option<[Option<Held>; MOST_ENTRIES + MOST_CODE]> {
        let (first, end) = (gpa.page_offset(), gpa.page_offset() + bytes.len() as u64);
        let mode = Mode::of(self.place.cr0, self.place.cr4, self.place.efer);
        if !matches!(mode, Mode::Level4 | Mode::Level5) || end > PAGE_SIZE {
            return None;
        }
        let mut words = [None; MOST_ENTRIES + MOST_CODE];
        for (word, entry) in words.iter_mut().zip(way.entries()) {
            let frame = self.memory.frame_to_keep(self.pin, self.hint, entry.at)?;
            let at = Hpa::new(frame.base().get() + entry.at.page_offset());
            *word = Some(Held { at, value: entry.raw });
        }
        let frame = self.memory.frame_to_keep(self.pin, self.hint, gpa)?.base().get();
        let mut loaded = [0; MOST_CODE * 8];
        for (number, offset) in (first & !7..end).step_by(8).enumerate() {
            let at = Hpa::new(frame + offset);
            let value = Metal::load_guest(word_at(at));
            loaded.get_mut(number * 8..number * 8 + 8)?.copy_from_slice(&value.to_le_bytes());
            *words.get_mut(MOST_ENTRIES + number)? = Some(Held { at, value });
        }
        let skipped = (first % 8) as usize;
        (loaded.get(skipped..skipped + bytes.len())? == bytes).then_some(words)
    }

    /// The physical addresses of an access, and how many of its bytes are at the first.
    fn places(&mut self, linear: u64, width: Width, kind: Kind) -> Result<([Gpa; 2], usize), Stop> {
        let (bytes, left) = (width.bytes(), PAGE_SIZE - linear % PAGE_SIZE);
        let known = self.known.filter(|gpa| bytes <= left && gpa.page_offset() == linear % PAGE_SIZE);
        let first = known.map_or_else(|| self.translate(linear, kind), Ok)?;
        if bytes <= left {
            return Ok(([first; 2], bytes as usize));
        }
        let second = self.translate(linear.wrapping_add(left), kind)?;
        Ok(([first, second], left as usize))
    }

    /// Bytes within one page: of memory, or of a device.
    fn read(&self, gpa: Gpa, to: &mut [u8]) -> Result<(), Stop> {
        if self.memory.is_nothing(self.pin, self.mmio, gpa.frame()) {
            self.devices.load(gpa, to, self.now);
            return Ok(());
        }
        match self.memory.read(self.pin, self.hint, gpa, to) {
            Err(CopyError::Outside { .. }) => {
                self.devices.load(gpa, to, self.now);
                Ok(())
            }
            done => Ok(done?),
        }
    }

    /// The same for a store; one to read-only memory is ignored too.
    fn write(&self, gpa: Gpa, from: &[u8]) -> Result<(), Stop> {
        if self.memory.is_nothing(self.pin, self.mmio, gpa.frame()) {
            self.devices.store(gpa, from, self.now);
            return Ok(());
        }
        match self.memory.write(self.pin, self.hint, gpa, from) {
            Err(CopyError::Outside { .. }) => {
                self.devices.store(gpa, from, self.now);
                Ok(())
            }
            Err(CopyError::ReadOnly { .. }) => Ok(()),
            done => Ok(done?),
        }
    }

    /// The frame and the word of an entry.
    fn word(&self, at: Gpa) -> Result<Word, Stop> {
        let frame = self.memory.frame_behind(self.pin, self.hint, at);
        // What nothing backs yet reads as zero, but has no word.
        let frame = frame.ok_or(Stop::Outside(at))?;
        Ok(Word::new(frame, (at.page_offset() / 8) as u16))
    }
}

impl Bus for View<'_> {
    type Error = Stop;

    fn load(&mut self, linear: u64, width: Width) -> Result<u64, Stop> {
        let ([first, second], count) = self.places(linear, width, Kind::Read)?;
        let mut bytes = [0; 8];
        let whole = width.bytes() as usize;
        self.read(first, &mut bytes[..count])?;
        if count < whole {
            self.read(second, &mut bytes[count..whole])?;
        }
        Ok(u64::from_le_bytes(bytes))
    }

    fn store(&mut self, linear: u64, width: Width, value: u64) -> Result<(), Stop> {
        let ([first, second], count) = self.places(linear, width, Kind::Write)?;
        let (bytes, whole) = (value.to_le_bytes(), width.bytes() as usize);
        self.write(first, &bytes[..count])?;
        if count < whole {
            self.write(second, &bytes[count..whole])?;
        }
        Ok(())
    }
}

impl Tables for View<'_> {
    type Error = Stop;

    fn load(&mut self, at: Gpa, width: paging::Width) -> Result<u64, Stop> {
        let word = match self.word(at) {
            Ok(word) => Metal::load_guest(word),
            Err(Stop::Outside(_)) => {
                let mut bytes = [0; 8];
                self.memory.read(self.pin, self.hint, Gpa::new(at.get() & !7), &mut bytes)?;
                u64::from_le_bytes(bytes)
            }
            Err(stop) => return Err(stop),
        };
        Ok(match width {
            paging::Width::Long => word,
            paging::Width::Word => word >> (at.get() % 8 * 8) & u64::from(u32::MAX),
        })
    }

    /// The page is made the guest's own to write first, as a store of its own would have: sharing is broken, a log names it.
    fn compare_exchange(&mut self, at: Gpa, width: paging::Width, current: u64, new: u64) -> Result<bool, Stop> {
        let store = Fault {
            gpa: at,
            access: Access::Write,
            cause: Cause::Translation,
            stage1_walk: false,
            cache_maintenance: false,
            transfer: None,
            syndrome: 0,
        };
        match self.memory.touch(self.pin, self.hint, &store) {
            Outcome::Resume => {}
            Outcome::Retry | Outcome::Unshare => return Err(Stop::Again),
            _ => return Err(Stop::Outside(at)),
        }
        let word = self.word(at)?;
        let (current, new) = match width {
            paging::Width::Long => (current, new),
            paging::Width::Word => {
                let (whole, shift) = (Metal::load_guest(word), at.get() % 8 * 8);
                let mask = u64::from(u32::MAX) << shift;
                (whole & !mask | current << shift, whole & !mask | new << shift)
            }
        };
        Ok(Metal::compare_exchange_guest(word, current, new).is_ok())
    }
}
