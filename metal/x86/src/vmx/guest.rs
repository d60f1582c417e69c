//! A vCPU's control structure, and what of the record in [`switch`](crate::switch) is in it.
//!
//! Protocol: all of the state goes into the structure at the first entry after the vCPU has come to a CPU ([`Part::load`]) or was
//! [written anew](Part::restart). After an exit the
//! state is there only; who asks for it has it fetched ([`Part::fetch`]), as far as it can be asked for, and what was changed of that goes
//! back at the next entry ([`Part::give_back`]). When the vCPU goes from its CPU ([`Part::put`]) all of it is fetched: a vCPU that is on no
//! CPU can be copied and saved.
//!
//! Segments but CS and SS, and the tables' registers, are never asked for meanwhile: they stay in the structure.
//!
//! Invariants: CR0.NE and CR4.VMXE, which the processor demands, are ours; the guest reads what it wrote of the first, and never the second.

use core::arch::asm;

use entresol_addr::{PAGE_SHIFT, Pfn};
use entresol_arch_x86::ept::eptp;
use entresol_arch_x86::exit::{ControlAccess, Exit};
use entresol_arch_x86::vmx::{self, Fields};
use x86_64::registers::control::{Cr0, Cr3, Cr4};
use x86_64::registers::model_specific::{Efer, FsBase, GsBase, Msr};
use x86_64::registers::segmentation::{CS, DS, ES, SS, Segment as _};

use super::bitmap::REGISTERS;
use super::controls::{INTERRUPT_WINDOW, LONG_MODE};
use super::enable::{CR4_VMXE, Region};
use super::fields::{self, Field};
use super::instructions::{clear, make_current, read, write};
use crate::features;
use crate::switch::Segment;
use crate::switch::vmcb::{ALIGNMENT_CHECK, EFER_SVME, MACHINE_CHECK, PENDING, SaveArea, TPR, VALID, Vmcb};

const CR0_PE: u64 = 1 << 0;
const CR0_NE: u64 = 1 << 5;
const EFER_LMA: u64 = 1 << 10;
/// IA32_PAT.
const PAT: u32 = 0x277;
/// A segment's access rights: present, and that it is not usable.
const PRESENT: u16 = 1 << 7;
const UNUSABLE: u64 = 1 << 16;
/// Interruptibility: by STI, by MOV to SS.
const SHADOW: u64 = 0b11;
const BY_STI: u64 = 1 << 0;
const BY_MOV_SS: u64 = 1 << 1;
const RFLAGS_IF: u64 = 1 << 9;
const NON_MASKABLE: u64 = 2 << 8;
const KIND: u64 = 0b111 << 8;
const ERROR_CODE: u64 = 1 << 11;
/// Where a virtual APIC page has the task priority.
const VTPR: usize = 0x80;
/// CS.L.
const LONG: u16 = 1 << 9;

/// Registers that no instruction moves with the structure: STAR, LSTAR, CSTAR, SFMASK, KernelGSBase.
const MOVED: [u32; 5] = [0xc000_0081, 0xc000_0082, 0xc000_0083, 0xc000_0084, 0xc000_0102];

/// The rest of what the record has of system calls.
const SYSENTER: [Field; 3] = [fields::GUEST_SYSENTER_CS, fields::GUEST_SYSENTER_ESP, fields::GUEST_SYSENTER_EIP];

/// Fields of the state that can be asked for, in the order of [`image`].
const STATE: [Field; 18] = [
    fields::GUEST_RIP,
    fields::GUEST_RSP,
    fields::GUEST_RFLAGS,
    fields::GUEST_CR0,
    fields::CR0_SHADOW,
    fields::GUEST_CR3,
    fields::GUEST_CR4,
    fields::GUEST_EFER,
    fields::GUEST_PAT,
    fields::GUEST_RIGHTS + 2 * fields::CS,
    fields::GUEST_RIGHTS + 2 * fields::SS,
    fields::GUEST_BASE + 2 * fields::ES,
    fields::GUEST_BASE + 2 * fields::CS,
    fields::GUEST_BASE + 2 * fields::SS,
    fields::GUEST_BASE + 2 * fields::DS,
    fields::GUEST_BASE + 2 * fields::FS,
    fields::GUEST_BASE + 2 * fields::GS,
    fields::GUEST_SHADOW,
];

/// Where a vCPU's state is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Place {
    /// In the record, all of it.
    Record = 0,
    /// In the structure; what of it can be asked for is in the record too, and is newer there.
    Both,
    /// In the structure.
    Structure,
}

/// What of a vCPU the processor has. All zero is a structure that no processor has seen.
pub struct Part {
    structure: Region,
    apic: Region,
    place: Place,
    launched: bool,
    /// What the structure has of [`STATE`], while it is in the record too.
    image: [u64; STATE.len()],
    /// Extended page table pointer, primary controls, time stamp counter's offset: as the structure has them.
    eptp: u64,
    primary: u32,
    time_offset: u64,
}

impl Part {
    /// The record was written anew.
    pub fn restart(&mut self) {
        self.place = Place::Record;
    }

    /// Whether the record lacks the state.
    #[inline]
    pub fn is_away(&self) -> bool {
        self.place == Place::Structure
    }

    /// Whether it has to be launched, and not resumed.
    #[inline]
    pub(super) fn launches(&mut self) -> bool {
        !core::mem::replace(&mut self.launched, true)
    }

    /// This CPU is about to run it.
    pub fn load(&mut self) {
        let region = self.structure.address();
        // Nothing that it may hold is of use any more.
        self.structure.stamp();
        // SAFETY: the structure's own page, which begins with the revision; it is current nowhere: the vCPU has left whatever CPU it was on.
        unsafe {
            clear(region);
            make_current(region);
        }
        self.launched = false;
        // SAFETY: it is entered here only, until it comes to another CPU.
        unsafe { write_host() };
    }

    /// What no instruction moves with the structure, into this CPU.
    fn move_in(state: &SaveArea) {
        for (register, value) in MOVED.into_iter().zip(state.system_calls) {
            // SAFETY: the hypervisor makes no system calls and no SWAPGS: these are the guest's alone. LSTAR, CSTAR and the base were
            // canonical when the guest wrote them.
            unsafe { Msr::new(register).write(value) };
        }
        // SAFETY: DR7, which arms what it reports, is the processor's to clear at each exit.
        unsafe { asm!("mov dr6, {}", in(reg) state.dr6, options(nomem, nostack, preserves_flags)) };
    }

    /// And out of it.
    fn move_out(state: &mut SaveArea) {
        for (register, value) in MOVED.into_iter().zip(&mut state.system_calls) {
            // SAFETY: the registers are there in long mode.
            *value = unsafe { Msr::new(register).read() };
        }
        // SAFETY: reads a register.
        unsafe { asm!("mov {}, dr6", out(reg) state.dr6, options(nomem, nostack, preserves_flags)) };
    }

    /// This CPU runs it no more: all of it goes into the record.
    pub fn put(&mut self, vmcb: &mut Vmcb) {
        if self.is_away() {
            self.fetch(vmcb);
        }
        if self.place != Place::Record {
            let state = &mut vmcb.save;
            for (number, segment) in segments(state) {
                segment.selector = read(fields::GUEST_SELECTOR + 2 * number) as u16;
                segment.limit = read(fields::GUEST_LIMIT + 2 * number) as u32;
                segment.attributes = attributes(read(fields::GUEST_RIGHTS + 2 * number));
                segment.base = read(fields::GUEST_BASE + 2 * number);
            }
            let table = |base, limit| (read(base), read(limit) as u32);
            (state.gdtr.base, state.gdtr.limit) = table(fields::GUEST_GDTR_BASE, fields::GUEST_GDTR_LIMIT);
            (state.idtr.base, state.idtr.limit) = table(fields::GUEST_IDTR_BASE, fields::GUEST_IDTR_LIMIT);
            state.dr7 = read(fields::GUEST_DR7);
            for (field, value) in SYSENTER.into_iter().zip(&mut state.system_calls[MOVED.len()..]) {
                *value = read(field);
            }
            Self::move_out(state);
        }
        // SAFETY: it is current here; its page has what the processor had of it after that.
        unsafe { clear(self.structure.address()) };
        self.place = Place::Record;
    }

    /// Everything that goes into a structure when the vCPU comes.
    fn first(&mut self, vmcb: &mut Vmcb) {
        let controls = features::get().vmx.expect("a guest has this part on a processor with VMX");
        // STI's shadow is refused where its flag is clear: it is that of MOV to SS then.
        let kind = if vmcb.save.rflags & RFLAGS_IF != 0 { BY_STI } else { BY_MOV_SS };
        self.image = image(vmcb, if vmcb.control.interrupt_shadow & 1 != 0 { kind } else { 0 });
        let state = &mut vmcb.save;
        (self.eptp, self.primary, self.time_offset) = (0, controls.primary, 0);
        // SAFETY: the controls are those that confine a guest; the maps and pages are where they say. The rest is the guest's state.
        unsafe {
            for (field, value) in [
                (fields::PIN_CONTROLS, controls.pin.into()),
                (fields::PRIMARY_CONTROLS, controls.primary.into()),
                (fields::SECONDARY_CONTROLS, controls.secondary.into()),
                (fields::EXIT_CONTROLS, controls.exit.into()),
                (fields::ENTRY_CONTROLS, entry_controls(state.efer)),
                // Not #DB: an exit for it leaves DR6 as it was (SDM 28.1).
                (fields::EXCEPTIONS, (MACHINE_CHECK | ALIGNMENT_CHECK).into()),
                (fields::MSR_BITMAP, REGISTERS.address()),
                (fields::VIRTUAL_APIC, self.apic.address()),
                (fields::TPR_THRESHOLD, 0),
                (fields::TSC_OFFSET, 0),
                (fields::LINK, u64::MAX),
                (fields::ENTRY_EVENT, 0),
                (fields::CR0_MASK, CR0_NE),
                (fields::CR4_MASK, CR4_VMXE),
                (fields::CR4_SHADOW, 0),
                (fields::GUEST_DEBUG_CONTROL, 0),
                (fields::GUEST_DR7, state.dr7),
                (fields::GUEST_GDTR_BASE, state.gdtr.base),
                (fields::GUEST_GDTR_LIMIT, state.gdtr.limit.into()),
                (fields::GUEST_IDTR_BASE, state.idtr.base),
                (fields::GUEST_IDTR_LIMIT, state.idtr.limit.into()),
            ] {
                write(field, value);
            }
            if controls.has_vpid() {
                write(fields::VPID, 1);
            }
            for (field, value) in SYSENTER.into_iter().zip(&state.system_calls[MOVED.len()..]) {
                write(field, *value);
            }
            for (number, segment) in segments(state) {
                write(fields::GUEST_SELECTOR + 2 * number, segment.selector.into());
                write(fields::GUEST_LIMIT + 2 * number, segment.limit.into());
                write(fields::GUEST_RIGHTS + 2 * number, rights(segment));
                write(fields::GUEST_BASE + 2 * number, segment.base);
            }
            for (field, value) in STATE.into_iter().zip(self.image) {
                write(field, value);
            }
        }
        self.place = Place::Both;
    }

    /// Brings into the record what can be asked for.
    #[cold]
    #[inline(never)]
    pub fn fetch(&mut self, vmcb: &mut Vmcb) {
        for (value, field) in self.image.iter_mut().zip(STATE) {
            *value = read(field);
        }
        let Vmcb { control, save } = vmcb;
        let [rip, rsp, rflags, cr0, shadow, cr3, cr4, efer, pat, code, stack, bases @ .., interruptibility] =
            self.image;
        (save.rip, save.rsp, save.rflags, save.cr3, save.g_pat) = (rip, rsp, rflags, cr3, pat);
        save.cr0 = cr0 & !CR0_NE | shadow & CR0_NE;
        save.cr4 = cr4 & !CR4_VMXE;
        save.efer = efer | EFER_SVME;
        (save.cs.attributes, save.ss.attributes) = (attributes(code), attributes(stack));
        save.cpl = (save.ss.attributes >> 5 & 0b11) as u8;
        [save.es.base, save.cs.base, save.ss.base, save.ds.base, save.fs.base, save.gs.base] = bases;
        control.interrupt_shadow = u64::from(interruptibility & SHADOW != 0);
        let next = rip.wrapping_add(read(fields::INSTRUCTION_LENGTH));
        let long = efer & EFER_LMA != 0 && save.cs.attributes & LONG != 0;
        control.next_rip = if long { next } else { next & u64::from(u32::MAX) };
        // As AMD's says it for ports.
        control.exit_info_2 = control.next_rip;
        self.place = Place::Both;
    }

    /// Puts into the structure what was changed, and what the guest is to get. The structure is current.
    pub(super) fn give_back(&mut self, vmcb: &mut Vmcb) {
        match self.place {
            Place::Record => {
                self.first(vmcb);
                Self::move_in(&vmcb.save);
            }
            Place::Both => self.give_state_back(vmcb),
            Place::Structure => {}
        }
        let Vmcb { control, .. } = vmcb;
        let window = if control.virtual_interrupts & PENDING != 0 { INTERRUPT_WINDOW } else { 0 };
        let primary = self.primary & !INTERRUPT_WINDOW | window;
        let flags = features::get().vmx.is_some_and(|controls| controls.accessed_dirty);
        let eptp = eptp(Pfn::new(control.nested_cr3 >> PAGE_SHIFT), flags);
        *self.apic.byte(VTPR) = ((control.virtual_interrupts & TPR) << 4) as u8;
        // SAFETY: the tables are its owner's to answer for; the rest is the guest's own.
        unsafe {
            if self.primary != primary {
                write(fields::PRIMARY_CONTROLS, primary.into());
            }
            if self.eptp != eptp {
                write(fields::EPT_POINTER, eptp);
            }
            if self.time_offset != control.tsc_offset {
                write(fields::TSC_OFFSET, control.tsc_offset);
            }
            if control.event_injection & VALID != 0 {
                let mut event = control.event_injection;
                if event & KIND == NON_MASKABLE {
                    // An entry in the shadow of an STI is refused (SDM 27.3.1.5).
                    write(fields::GUEST_SHADOW, read(fields::GUEST_SHADOW) & !SHADOW);
                }
                if event & ERROR_CODE != 0 {
                    // In real mode exceptions push none, and an entry with one is refused (SDM 27.2.1.3).
                    match read(fields::GUEST_CR0) & CR0_PE {
                        0 => event &= !ERROR_CODE,
                        _ => write(fields::ENTRY_ERROR, event >> 32),
                    }
                }
                write(fields::ENTRY_EVENT, event & u64::from(u32::MAX));
            }
        }
        (self.primary, self.eptp, self.time_offset) = (primary, eptp, control.tsc_offset);
    }

    /// As it was fetched.
    fn interruptibility(&self) -> u64 {
        self.image[STATE.len() - 1]
    }

    fn give_state_back(&mut self, vmcb: &Vmcb) {
        let new = image(vmcb, self.interruptibility());
        for ((field, old), new) in STATE.into_iter().zip(self.image).zip(new) {
            if old != new {
                // SAFETY: the guest's own state.
                unsafe { write(field, new) };
                if field == fields::GUEST_EFER {
                    // SAFETY: as above.
                    unsafe { write(fields::ENTRY_CONTROLS, entry_controls(new)) };
                }
            }
        }
        self.image = new;
    }

    /// It came back: the state is in the structure, and what AMD's processors tell at every exit in the record.
    pub(super) fn came_back(&mut self, vmcb: &mut Vmcb) {
        self.place = Place::Structure;
        let control = &mut vmcb.control;
        control.event_injection = 0;
        let vectoring = read(fields::VECTORING);
        control.exit_interrupt_info = match vectoring & VALID {
            0 => 0,
            _ if vectoring & ERROR_CODE != 0 => vectoring | read(fields::VECTORING_ERROR) << 32,
            _ => vectoring,
        };
        let priority = u64::from(*self.apic.byte(VTPR) >> 4);
        control.virtual_interrupts = control.virtual_interrupts & !TPR | priority;
    }

    /// Whether it came back with a second-stage fault.
    pub fn is_second_stage(&self) -> bool {
        vmx::is_second_stage(read(fields::EXIT_REASON) as u32)
    }

    /// Why it came back last. Apart, as [`Self::fetch`] is: AMD's exits are counted in instructions.
    #[cold]
    #[inline(never)]
    pub fn exit(&self) -> Exit {
        vmx::decode(&Fields {
            reason: read(fields::EXIT_REASON) as u32,
            qualification: read(fields::QUALIFICATION),
            gpa: read(fields::GUEST_PHYSICAL),
            interruption: read(fields::EXIT_EVENT) as u32,
            error: read(fields::EXIT_ERROR) as u32,
        })
    }

    /// It came back with a MOV to a control register: says whether it carries that out again, which the processor lets it do then; else the value
    /// is one that it may not have.
    ///
    /// CR0.NE is the only bit that it can change and not have: what it reads of it becomes what it wrote, and the instruction has nothing left to
    /// stop for. CR4.VMXE it may not set.
    pub fn moves(&mut self, access: ControlAccess, value: u64) -> bool {
        let ControlAccess::Write { register: 0, .. } = access else { return false };
        // SAFETY: what the guest reads of a bit that is not its own.
        unsafe { write(fields::CR0_SHADOW, value & CR0_NE) };
        true
    }
}

/// Segments by their numbers in the encodings.
fn segments(state: &mut SaveArea) -> [(u64, &mut Segment); 8] {
    let SaveArea { es, cs, ss, ds, fs, gs, ldtr, tr, .. } = state;
    [
        (fields::ES, es),
        (fields::CS, cs),
        (fields::SS, ss),
        (fields::DS, ds),
        (fields::FS, fs),
        (fields::GS, gs),
        (fields::LDTR, ldtr),
        (fields::TR, tr),
    ]
}

/// The state that can be asked for, as the structure has it, in the order of [`STATE`].
/// `interruptibility` is what the structure has, of which the record can only end the shadow.
fn image(vmcb: &Vmcb, interruptibility: u64) -> [u64; STATE.len()] {
    let SaveArea { es, cs, ss, ds, fs, gs, cr0, cr3, cr4, efer, rip, rsp, rflags, g_pat, .. } = &vmcb.save;
    [
        *rip,
        *rsp,
        *rflags,
        cr0 | CR0_NE,
        cr0 & CR0_NE,
        *cr3,
        cr4 | CR4_VMXE,
        efer & !EFER_SVME,
        *g_pat,
        rights(cs),
        rights(ss),
        es.base,
        cs.base,
        ss.base,
        ds.base,
        fs.base,
        gs.base,
        if vmcb.control.interrupt_shadow & 1 == 0 { interruptibility & !SHADOW } else { interruptibility },
    ]
}

fn entry_controls(efer: u64) -> u64 {
    let controls = features::get().vmx.map_or(0, |controls| controls.entry);
    u64::from(controls | if efer & EFER_LMA != 0 { LONG_MODE } else { 0 })
}

/// A segment's attributes as the structure has them (SDM table 25-2).
fn rights(segment: &Segment) -> u64 {
    let attributes = segment.attributes;
    let usable = if attributes & PRESENT != 0 { 0 } else { UNUSABLE };
    u64::from(attributes & 0xff) | u64::from(attributes & 0xf00) << 4 | usable
}

/// And back.
fn attributes(rights: u64) -> u16 {
    if rights & UNUSABLE != 0 { 0 } else { (rights & 0xff | rights >> 4 & 0xf00) as u16 }
}

/// What this CPU has when it comes back.
///
/// # Safety
///
/// A structure is current, and is entered on this CPU only until it is written again.
unsafe fn write_host() {
    let (root, flags) = Cr3::read_raw();
    let gdt = x86_64::instructions::tables::sgdt();
    let idt = x86_64::instructions::tables::sidt();
    let selector: u16;
    // SAFETY: reads the task register.
    unsafe { asm!("str {:x}", out(reg) selector, options(nomem, nostack, preserves_flags)) };
    // SAFETY: the task's descriptor in this CPU's own table, two words (SDM figure 8-4).
    let [low, high] =
        unsafe { core::ptr::read_unaligned((gdt.base.as_u64() + u64::from(selector)) as *const [u64; 2]) };
    let base = low >> 16 & 0xff_ffff | low >> 56 << 24 | high << 32;
    // SAFETY: PAT is there with every 64-bit processor.
    let pat = unsafe { Msr::new(PAT).read() };
    // SAFETY: what this CPU has now, and keeps.
    unsafe {
        for (field, value) in [
            (fields::HOST_ES, ES::get_reg().0.into()),
            (fields::HOST_CS, CS::get_reg().0.into()),
            (fields::HOST_SS, SS::get_reg().0.into()),
            (fields::HOST_DS, DS::get_reg().0.into()),
            (fields::HOST_TR, selector.into()),
            (fields::HOST_CR0, Cr0::read_raw()),
            (fields::HOST_CR3, root.start_address().as_u64() | u64::from(flags)),
            (fields::HOST_CR4, Cr4::read_raw()),
            (fields::HOST_EFER, Efer::read_raw()),
            (fields::HOST_PAT, pat),
            (fields::HOST_FS_BASE, FsBase::read().as_u64()),
            (fields::HOST_GS_BASE, GsBase::read().as_u64()),
            (fields::HOST_TR_BASE, base),
            (fields::HOST_GDTR_BASE, gdt.base.as_u64()),
            (fields::HOST_IDTR_BASE, idt.base.as_u64()),
        ] {
            write(field, value);
        }
    }
}
