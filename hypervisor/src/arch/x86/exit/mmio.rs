//! Accesses to what is no memory: the instruction is fetched through the guest's own tables, decoded, and carried out.
//!
//! Protocol: the guest's tables, its code and its memory are read with a grace period pinned; a device is asked without (it may wait
//! for one), and that nothing is at an address is looked at and answered in one pin (INV-9): what has become memory meanwhile is read
//! and written as memory. A fault of the guest's own tables is the guest's, with nothing changed.
//!
//! The processor has told the physical address of the access that failed. An instruction that touches one place has touched that one:
//! its tables are not walked a second time for it.
//!
//! An instruction that was found is kept ([`emulate::memo`]), with the frames of the entries and of the code that led to it
//! ([`entresol_mmu::Kept`]): in memory that the machine shares with nobody, and by walks of four or five levels.

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

use super::{GENERAL_PROTECTION, PAGE_FAULT, UNDEFINED, inject, interrupts};
use crate::arch::{Now, State};
use crate::counters::Reason;
use crate::exit::{Next, absent, crash, park, starve};
use crate::host;
use crate::sched::VcpuRef;
use crate::vm::{Claim, Crash, Pause, Store};

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
    /// A page that it needs is in a store.
    Absent(Gpa),
    /// The owner has to take coalesced stores first.
    Full,
    /// The guest's tables, or its code, are where no memory is, or none that can be read.
    Outside(Gpa),
}

impl From<CopyError> for Stop {
    fn from(error: CopyError) -> Self {
        match error {
            CopyError::Outside { gpa } | CopyError::ReadOnly { gpa } | CopyError::Poisoned { gpa } => {
                Self::Outside(gpa)
            }
            CopyError::Absent { gpa, .. } => Self::Absent(gpa),
            CopyError::MemoryFault(fault) => Self::Outside(fault.gpa()),
            CopyError::OutOfMemory => Self::OutOfMemory,
            CopyError::Busy => Self::Again,
        }
    }
}

/// Carries out the instruction that touched `fault.gpa`. Apart from the faults on memory, which are counted in instructions.
#[inline(never)]
pub fn access(cpu: usize, vcpu: &VcpuRef, state: &mut State, fault: &Fault) -> Next {
    vcpu.vm.counters.bump(Reason::Mmio);
    if fault.stage1_walk || fault.is_fetch() {
        return crash(vcpu, Crash::BadObject { gpa: fault.gpa.get() });
    }
    interrupts::begin(vcpu, state);
    let mut registers = registers(&mut state.guest);
    let (done, looks, controls) = {
        let State { guest, code, hint, mmio, regime, .. } = state;
        let (place, by_leave) = (place(guest), *guest.rflags() & RFLAGS_AC != 0);
        let now = Now { offset: guest.time() };
        let shadow = *regime;
        let mut view = View {
            cpu,
            vcpu,
            mmio,
            hint,
            now,
            pin: None,
            place,
            shadow,
            by_leave,
            known: None,
            looks: false,
            controls: false,
        };
        (carry_out(&mut view, code, &mut registers, fault.gpa), view.looks, view.controls)
    };
    if controls {
        interrupts::lead(vcpu, state);
    }
    match done {
        Ok(Ok(progress)) => {
            write_back(&mut state.guest, &registers);
            if progress == Progress::Done {
                state.guest.go_on(registers.rip);
            }
            // Between two steps it takes interrupts.
            if looks || progress == Progress::Again { Next::Look } else { Next::Again }
        }
        Ok(Err(Unsupported::NoMemory)) => Next::Look,
        Ok(Err(Unsupported::Invalid)) => inject(state, UNDEFINED, None),
        Ok(Err(unsupported)) => {
            let gpa = fault.gpa.get();
            log::error!("vm {}: an instruction on {gpa:#x} is not carried out: {unsupported:?}", vcpu.vm.config.name);
            crash(vcpu, Crash::NoSyndrome { instruction: None, gpa, syndrome: fault.syndrome })
        }
        Err(stop) => stopped(vcpu, state, stop),
    }
}

/// What becomes of an access that is not completed.
pub fn stopped(vcpu: &VcpuRef, state: &mut State, stop: Stop) -> Next {
    match stop {
        Stop::Again => Next::Look,
        Stop::Fault { linear, code } => {
            state.guest.set_cr2(linear);
            inject(state, PAGE_FAULT, Some(code))
        }
        Stop::NonCanonical => inject(state, GENERAL_PROTECTION, Some(0)),
        Stop::OutOfMemory => starve(vcpu),
        Stop::Absent(gpa) => absent(vcpu, gpa),
        Stop::Full => park(&vcpu.vm, Pause::CoalescedFull),
        Stop::Outside(gpa) => crash(vcpu, Crash::BadObject { gpa: gpa.get() }),
    }
}

/// The instruction that a guest on shadow tables left with, RIP behind it, and the size of its code.
pub fn privileged(
    cpu: usize,
    vcpu: &VcpuRef,
    state: &mut State,
) -> Result<Result<(Privileged, u64, CodeSize), Unsupported>, Stop> {
    let registers = registers(&mut state.guest);
    let State { guest, hint, mmio, regime, .. } = state;
    let (place, by_leave) = (place(guest), *guest.rflags() & RFLAGS_AC != 0);
    let (now, shadow) = (Now { offset: guest.time() }, *regime);
    let mut view = View {
        cpu,
        vcpu,
        mmio,
        hint,
        now,
        pin: None,
        place,
        shadow,
        by_leave,
        known: None,
        looks: false,
        controls: false,
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
    let (memory, place) = (&view.vcpu.vm.memory, view.place);
    let pin = view.pinned();
    let known = memo.recall(&place, |kept| memory.is_kept(pin, kept), |at| Metal::load_guest(word_at(at)));
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
    let kept = view.vcpu.vm.memory.keep();
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
    cpu: usize,
    vcpu: &'v VcpuRef,
    mmio: &'v MmioCache,
    hint: &'v Hint,
    now: Now,
    /// Pinned while memory is looked at.
    pin: Option<Pin<'static>>,
    place: Place,
    /// What its tables are read by, if it runs on shadow tables.
    shadow: Option<Regime>,
    by_leave: bool,
    /// Where the access that failed goes, if the instruction has no other.
    known: Option<Gpa>,
    /// The vCPU has to look up afterwards.
    looks: bool,
    /// It has stored to an interrupt controller.
    controls: bool,
}

impl View<'_> {
    #[inline]
    fn pinned(&mut self) -> &Pin<'static> {
        self.pin.get_or_insert_with(|| host::get().epoch.pin(self.cpu))
    }

    /// What the guest's tables are read by.
    fn regime(&mut self) -> Regime {
        if let Some(regime) = self.shadow {
            return regime;
        }
        let Place { root, cr0, cr4, efer, .. } = self.place;
        let own = ControlRegisters { cr0, cr3: root, cr4, efer, pointers: [0; 4] };
        let mut regime = own.regime(self.vcpu.vm.memory.ipa_bits(), features::get().giant_pages);
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
        let (memory, hint) = (&self.vcpu.vm.memory, self.hint);
        memory.read(self.pinned(), hint, gpa, to)?;
        Ok((gpa, way))
    }

    /// The words that the code `bytes` at `gpa` and the way to it are in, if they can be kept and hold just that.
    fn depends_on(&mut self, gpa: Gpa, way: &Way, bytes: &[u8]) -> Option<[Option<Held>; MOST_ENTRIES + MOST_CODE]> {
        let (first, end) = (gpa.page_offset(), gpa.page_offset() + bytes.len() as u64);
        let mode = Mode::of(self.place.cr0, self.place.cr4, self.place.efer);
        if !matches!(mode, Mode::Level4 | Mode::Level5) || end > PAGE_SIZE {
            return None;
        }
        let mut words = [None; MOST_ENTRIES + MOST_CODE];
        let (memory, hint) = (&self.vcpu.vm.memory, self.hint);
        let pin = self.pinned();
        for (word, entry) in words.iter_mut().zip(way.entries()) {
            let frame = memory.frame_to_keep(pin, hint, entry.at)?;
            let at = Hpa::new(frame.base().get() + entry.at.page_offset());
            *word = Some(Held { at, value: entry.raw });
        }
        let frame = memory.frame_to_keep(pin, hint, gpa)?.base().get();
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
    fn read(&mut self, gpa: Gpa, to: &mut [u8]) -> Result<(), Stop> {
        let (memory, mmio, hint) = (&self.vcpu.vm.memory, self.mmio, self.hint);
        let pin = self.pinned();
        if !memory.is_nothing(pin, mmio, gpa.frame()) {
            match memory.read(pin, hint, gpa, to) {
                Err(CopyError::Outside { .. }) => {}
                done => return Ok(done?),
            }
        }
        self.pin = None;
        let value = match self.vcpu.vm.device_read(self.vcpu, &self.now, gpa, to.len() as u8) {
            Claim::Value(value) => value,
            Claim::Again => return Err(Stop::Again),
            // Nobody is there: a PC's bus reads as ones.
            Claim::Abort | Claim::Done | Claim::Look => u64::MAX,
        };
        for (to, from) in to.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
        Ok(())
    }

    /// The same for a store; one to read-only memory is ignored, too.
    fn write(&mut self, gpa: Gpa, from: &[u8]) -> Result<(), Stop> {
        let (memory, mmio, hint) = (&self.vcpu.vm.memory, self.mmio, self.hint);
        let pin = self.pinned();
        if !memory.is_nothing(pin, mmio, gpa.frame()) {
            match memory.write(pin, hint, gpa, from) {
                Err(CopyError::Outside { .. }) => {}
                Err(CopyError::ReadOnly { .. }) => return Ok(()),
                done => return Ok(done?),
            }
        }
        self.pin = None;
        let mut bytes = [0; 8];
        for (to, from) in bytes.iter_mut().zip(from) {
            *to = *from;
        }
        let (vm, value, size) = (&self.vcpu.vm, u64::from_le_bytes(bytes), from.len() as u8);
        let deadline = || vm.board.pc().deadline(self.vcpu.index);
        let before = vm.board.is_controller(gpa.get()).then(deadline);
        if vm.posted.may_cover(Gpa::new(gpa.get() & !(PAGE_SIZE - 1))) {
            match vm.posted.store(gpa, size, value) {
                Store::Elsewhere => {}
                Store::Full => return Err(Stop::Full),
                done => {
                    self.looks |= done == Store::Signalled;
                    return Ok(());
                }
            }
        }
        match vm.device_write(self.vcpu, &self.now, gpa, size, value) {
            Claim::Again => return Err(Stop::Again),
            Claim::Look => self.looks = true,
            // The controllers' timer may be due at another moment.
            Claim::Done => {
                self.controls |= before.is_some();
                self.looks |= before.is_some_and(|before| before != deadline());
            }
            // Nobody is there: nothing happens.
            Claim::Value(_) | Claim::Abort => {}
        }
        Ok(())
    }

    /// The frame and the word of an entry.
    fn word(&mut self, at: Gpa) -> Result<Word, Stop> {
        let (memory, hint) = (&self.vcpu.vm.memory, self.hint);
        // What nothing backs yet reads as zero, but has no word.
        let frame = memory.frame_behind(self.pinned(), hint, at).ok_or(Stop::Outside(at))?;
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
                let (memory, hint) = (&self.vcpu.vm.memory, self.hint);
                memory.read(self.pinned(), hint, Gpa::new(at.get() & !7), &mut bytes)?;
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
        let (memory, hint) = (&self.vcpu.vm.memory, self.hint);
        match memory.touch(self.pinned(), hint, &store) {
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
