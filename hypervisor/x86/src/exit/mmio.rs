//! Accesses to what is no memory: the instruction is fetched through the guest's own tables, decoded, and carried out.
//!
//! Protocol: one pin for all of it, and each part of the access looks at the slots again in that pin (INV-9): what has become memory
//! meanwhile is read and written as memory. A fault of the guest's own tables is the guest's, with nothing changed.
//!
//! The processor has told the physical address of the access that failed. An instruction that touches one place has touched that one:
//! its tables are not walked a second time for it.
//!
use entresol_addr::{Gpa, PAGE_SIZE};
use entresol_arch_x86::emulate::{self, Bus, CodeSize, Instruction, Progress, Registers, Unsupported, Width};
use entresol_arch_x86::paging::{self, Controls, Kind, Mode, Regime, Request, Tables, WalkError};
use entresol_fault::{Access, Cause, Fault};
use entresol_machine::Word;
use entresol_metal_x86::switch::Guest;
use entresol_metal_x86::{Metal, features};
use entresol_mmu::{CopyError, Outcome};
use entresol_slot::Hint;
use entresol_sync::Pin;

use super::identity::guest_time;
use super::{GENERAL_PROTECTION, Next, PAGE_FAULT, UNDEFINED, go_on, inject, interrupts};
use crate::devices::Devices;
use crate::vm::{Crash, End, Made, Vm};

/// Why an access is not completed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
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
        let mut view = View::new(&vm.memory, &vm.devices, &pin, &vm.vcpu.hint, guest);
        carry_out(&mut view, &mut registers, guest, fault.gpa)
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
        Ok(Err(Unsupported::NoMemory)) | Err(Stop::Again) => Next::Again,
        Ok(Err(Unsupported::Invalid)) => inject(guest, UNDEFINED, None),
        Ok(Err(unsupported)) => Next::End(End::Crash(Crash::Instruction { gpa: fault.gpa, unsupported })),
        Err(Stop::Fault { linear, code }) => {
            guest.set_cr2(linear);
            inject(guest, PAGE_FAULT, Some(code))
        }
        Err(Stop::NonCanonical) => inject(guest, GENERAL_PROTECTION, Some(0)),
        Err(Stop::OutOfMemory) => Next::End(End::Crash(Crash::OutOfMemory)),
        Err(Stop::Outside(gpa)) => Next::End(End::Crash(Crash::Access(gpa))),
    }
}

/// Fetches, decodes, executes.
fn carry_out(
    view: &mut View<'_>,
    registers: &mut Registers,
    guest: &mut Guest,
    gpa: Gpa,
) -> Result<Result<Progress, Unsupported>, Stop> {
    let size = code_size(guest);
    let at = match size {
        CodeSize::Bits64 => registers.rip,
        CodeSize::Bits16 | CodeSize::Bits32 => registers.bases[CS].wrapping_add(registers.rip) & u64::from(u32::MAX),
    };
    let bytes = emulate::fetch(at, |at, to| view.read_code(at, to))?;
    let instruction = match Instruction::decode(bytes.as_slice(), registers.rip, size) {
        Ok(instruction) => instruction,
        Err(Unsupported::Truncated) => return bytes.stopped.map_or(Ok(Err(Unsupported::Truncated)), Err),
        Err(unsupported) => return Ok(Err(unsupported)),
    };
    view.known = instruction.touches_one_place().then_some(gpa);
    instruction.execute(registers, view).map(Ok)
}

/// CS among the bases.
const CS: usize = 1;
/// L and D/B of a segment's attributes.
const ATTRIBUTE_L: u16 = 1 << 9;
const ATTRIBUTE_D: u16 = 1 << 10;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;

fn code_size(guest: &mut Guest) -> CodeSize {
    let (attributes, efer) = (guest.code().attributes, guest.efer());
    CodeSize::of(efer & EFER_LMA != 0, attributes & ATTRIBUTE_L != 0, attributes & ATTRIBUTE_D != 0)
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
    /// The guest's time stamp counter.
    now: u64,
    pin: &'v Pin<'v>,
    hint: &'v Hint,
    regime: Regime,
    user: bool,
    by_leave: bool,
    /// Where the access that failed goes, if the instruction has no other.
    known: Option<Gpa>,
}

impl<'v> View<'v> {
    fn new(memory: &'v Made, devices: &'v Devices, pin: &'v Pin<'v>, hint: &'v Hint, guest: &mut Guest) -> Self {
        let (user, by_leave) = (guest.privilege() == 3, *guest.rflags() & RFLAGS_AC != 0);
        let (cr0, cr3, cr4, efer) = (guest.cr0(), guest.cr3(), guest.cr4(), guest.efer());
        let mut controls = Controls::empty();
        for (set, flag) in [
            (cr0 & 1 << 16 != 0, Controls::WRITE_PROTECT),
            (cr4 & 1 << 4 != 0, Controls::LARGE_PAGES),
            (cr4 & 1 << 7 != 0, Controls::GLOBAL_PAGES),
            (cr4 & 1 << 20 != 0, Controls::NO_SUPERVISOR_FETCH),
            (cr4 & 1 << 21 != 0, Controls::NO_SUPERVISOR_ACCESS),
            (efer & EFER_NXE != 0, Controls::NO_EXECUTE),
            (features::get().giant_pages, Controls::GIGABYTE_PAGES),
        ] {
            controls.set(flag, set);
        }
        let regime = Regime {
            mode: Mode::of(cr0, cr4, efer),
            root: cr3,
            pointers: [0; 4],
            controls,
            // CPUID says that there are no protection keys.
            pkru: 0,
            physical_bits: memory.ipa_bits(),
        };
        let now = guest_time(guest);
        let mut view = Self { memory, devices, now, pin, hint, regime, user, by_leave, known: None };
        if view.regime.mode == Mode::Pae {
            // With nested paging the processor reads them with each walk (APM 15.25.10). Where there is no memory they are absent.
            for index in 0..4 {
                let at = Gpa::new((cr3 & 0xffff_ffe0) + index * 8);
                view.regime.pointers[index as usize] = Tables::load(&mut view, at, paging::Width::Long).unwrap_or(0);
            }
        }
        view
    }

    fn translate(&mut self, linear: u64, kind: Kind) -> Result<Gpa, Stop> {
        let request = Request { kind, user: self.user, by_leave: self.by_leave };
        let regime = self.regime;
        match paging::walk(self, &regime, linear, request) {
            Ok(translation) => Ok(translation.gpa),
            Err(WalkError::Fault(code)) => Err(Stop::Fault { linear, code: code.bits() }),
            Err(WalkError::NonCanonical) => Err(Stop::NonCanonical),
            Err(WalkError::Contended) => Err(Stop::Again),
            Err(WalkError::Tables(stop)) => Err(stop),
        }
    }

    /// Bytes of code, within one page.
    fn read_code(&mut self, linear: u64, to: &mut [u8]) -> Result<(), Stop> {
        let gpa = self.translate(linear, Kind::Fetch)?;
        Ok(self.memory.read(self.pin, self.hint, gpa, to)?)
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
