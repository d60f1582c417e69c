//! What of a vCPU the processor works on, by what it means: who uses a [`Guest`] does not see the processor's own record.
//!
//! Protocol: [`Guest::start`] gives it the state in which it begins; [`Guest::load`] brings it to a CPU, on which [`enter_amd`](super::enter_amd) runs it
//! until [`Guest::put`]; between two entries its state is read and changed here, after a second-stage fault from [`Guest::bring`] on. An event that is [injected](Guest::inject) reaches it at the next entry.
//!
//! Invariants: EFER is the guest's own, without what the processor demands of it beside; the record is refused by the processor until the
//! guest was started.

use alloc::alloc::alloc_zeroed;
use alloc::boxed::Box;
use core::alloc::Layout;
use core::arch::asm;

use entresol_addr::Pfn;
use entresol_arch_x86::control::ControlRegisters;
use entresol_arch_x86::exit::{ControlAccess, Exit};
use entresol_arch_x86::fault::{self, SecondStage};
use entresol_arch_x86::svm;

use super::permissions::{PORTS, REGISTERS};
use super::vmcb::{self, Control, EFER_SVME, PENDING, SaveArea, TPR, VALID, Vmcb, first};
use super::{Event, Registers, Segment, Start};
use crate::flush::Tenant;
use crate::{cpu, features, vmx};

const RFLAGS_IF: u64 = 1 << 9;
/// INTERRUPT_SHADOW.
const SHADOW: u64 = 1;
/// The processor's state after a reset (APM 14.1.3, 7.8.2).
const DR6: u64 = 0xffff_0ff0;
const DR7: u64 = 0x400;
const PAT: u64 = 0x0007_0406_0007_0406;

/// EVENTINJ and EXITINTINFO (APM 15.20): the kind of event; an error code in the upper half.
const KIND: u64 = 0b111 << 8;
const NON_MASKABLE: u64 = 2 << 8 | 2;
const EXCEPTION: u64 = 3 << 8;
const ERROR_CODE: u64 = 1 << 11;
/// INT n, which is executed again. Intel's processors tell of more of them, above.
const SOFTWARE: u64 = 4 << 8;

/// Virtual interrupts: V_IGN_TPR (APM 15.21).
const IGNORE_TPR: u64 = 1 << 20;

/// What a guest sees of itself, outside the machine. The processor checks it at the next entry, and refuses what cannot be.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// By their numbers, from RAX on.
    general: [u64; 16],
    /// ES, CS, SS, DS, FS, GS, GDTR, LDTR, IDTR, TR.
    segments: [Segment; 10],
    privilege: u8,
    /// CR0, CR2, CR3, CR4.
    control: [u64; 4],
    efer: u64,
    /// Page-directory pointers, of a guest on shadow tables.
    pointers: [u64; 4],
    /// DR6, DR7.
    debug: [u64; 2],
    /// DR0 to DR3.
    breakpoints: [u64; 4],
    rip: u64,
    rflags: u64,
    /// STAR, LSTAR, CSTAR, SFMASK, KernelGSBase, SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP.
    system_calls: [u64; 8],
    pat: u64,
    time_offset: u64,
    /// The event that it gets next, as EVENTINJ has it.
    event: u64,
    /// Whether it is in the shadow of an instruction that opens it to interrupts.
    shadow: u64,
    priority: u8,
}

/// What of a vCPU the processor works on. It stays where it is: the VMCB is named by its address.
#[repr(C)]
pub struct Guest {
    pub(crate) vmcb: Vmcb,
    /// General registers.
    pub registers: Registers,
    /// Where the CPU on which it runs keeps what VMRUN does not of our own state.
    pub(super) host: u64,
    pub(super) tenant: Tenant,
    /// DR0 to DR3, while it is on no CPU.
    debug: [u64; 4],
    /// The processor is Intel's, and this is what it has.
    pub(super) intel: bool,
    pub(crate) vmx: vmx::guest::Part,
    /// What it believes of its control registers, if it runs on shadow tables.
    pub(super) own: Option<ControlRegisters>,
}

impl Guest {
    /// All zero: the processor refuses it as it is. It never lies on a stack. `None`: the heap has no room.
    pub fn new() -> Option<Box<Self>> {
        // SAFETY: the layout is not empty; all zero is a value of each part (a record, registers, a structure that no processor has
        // seen, either kind of an option of numbers), and nobody else has the memory.
        let mut guest = unsafe {
            let guest = alloc_zeroed(Layout::new::<Self>()).cast::<Self>();
            (!guest.is_null()).then(|| Box::from_raw(guest))
        }?;
        guest.intel = features::get().vmx.is_some();
        guest.own = None;
        Some(guest)
    }

    /// Gives it the state in which it begins, and keeps it away from all that it does not own.
    pub fn start(&mut self, start: &Start) {
        self.confine();
        self.own = None;
        self.registers = Registers::default();
        let state = &mut self.vmcb.save;
        *state = Vmcb::ZERO.save;
        state.cs = start.code;
        (state.ds, state.es, state.ss) = (start.data, start.data, start.data);
        state.tr = start.task;
        (state.gdtr.base, state.gdtr.limit) = (start.gdt_base, start.gdt_limit.into());
        (state.cr0, state.cr3, state.cr4) = (start.cr0, start.cr3, start.cr4);
        state.efer = start.efer | EFER_SVME;
        (state.rip, state.rflags) = (start.rip, start.rflags);
        (state.dr6, state.dr7, state.g_pat) = (DR6, DR7, PAT);
        self.vmx.restart();
        self.debug = [0; 4];
    }

    /// What the guest may do without coming back.
    fn confine(&mut self) {
        let control = &mut self.vmcb.control;
        control.intercepts = vmcb::CONFINED;
        control.iopm_base = PORTS.address();
        control.msrpm_base = REGISTERS.address();
        control.asid = 1;
        control.virtual_interrupts = vmcb::VIRTUAL_MASKING;
        control.nested = vmcb::NESTED_PAGING;
    }

    #[inline]
    pub(super) fn control(&mut self) -> &mut Control {
        &mut self.vmcb.control
    }

    #[inline]
    pub(super) fn state(&mut self) -> &mut SaveArea {
        debug_assert!(!self.vmx.is_away(), "the guest's state is asked for before it was brought");
        &mut self.vmcb.save
    }

    /// Brings its state within reach, which a second-stage fault leaves where it is: nearly all of them need nothing of it.
    #[inline]
    pub fn bring(&mut self) {
        if self.intel && self.vmx.is_away() {
            self.vmx.fetch(&mut self.vmcb);
        }
    }

    /// It becomes as `other`, of which its virtual machine is a copy; on no CPU.
    pub fn become_copy(&mut self, other: &Self) {
        self.vmcb.clone_from(&other.vmcb);
        self.registers = other.registers.clone();
        self.tenant = Tenant::default();
        self.debug = other.debug;
        self.own = other.own;
    }

    /// What the guest sees of itself, outside the machine.
    pub fn save(&self) -> Saved {
        let SaveArea { es, cs, ss, ds, fs, gs, gdtr, ldtr, idtr, tr, cpl, efer, cr4, cr3, cr0, dr7, dr6, .. } =
            self.vmcb.save;
        let SaveArea { rflags, rip, rsp, rax, system_calls, cr2, g_pat, .. } = self.vmcb.save;
        let Registers { rcx, rdx, rbx, rbp, rsi, rdi, r: [r8, r9, r10, r11, r12, r13, r14, r15] } = self.registers;
        Saved {
            general: [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15],
            segments: [es, cs, ss, ds, fs, gs, gdtr, ldtr, idtr, tr],
            privilege: cpl,
            control: self.own.map_or([cr0, cr2, cr3, cr4], |own| [own.cr0, cr2, own.cr3, own.cr4]),
            efer: self.own.map_or(efer & !EFER_SVME, |own| own.efer),
            pointers: self.own.map_or([0; 4], |own| own.pointers),
            debug: [dr6, dr7],
            breakpoints: self.debug,
            rip,
            rflags,
            system_calls,
            pat: g_pat,
            time_offset: self.vmcb.control.tsc_offset,
            event: self.vmcb.control.event_injection,
            shadow: self.vmcb.control.interrupt_shadow & SHADOW,
            priority: (self.vmcb.control.virtual_interrupts & TPR) as u8,
        }
    }

    /// Gives it a state that was saved, to run on shadow tables or not; what keeps it away from all that it does not own is not from there.
    pub fn restore(&mut self, saved: &Saved, shaded: bool) {
        self.confine();
        self.own = None;
        let state = &mut self.vmcb.save;
        *state = Vmcb::ZERO.save;
        [state.es, state.cs, state.ss, state.ds, state.fs, state.gs, state.gdtr, state.ldtr, state.idtr, state.tr] =
            saved.segments;
        [state.cr0, state.cr2, state.cr3, state.cr4] = saved.control;
        // Of some registers we load what the processor refuses us in place of the guest.
        [state.dr6, state.dr7] = saved.debug.map(|value| value & u64::from(u32::MAX));
        (state.cpl, state.efer) = (saved.privilege, saved.efer | EFER_SVME);
        (state.rip, state.rflags) = (saved.rip, saved.rflags);
        state.g_pat = saved.pat;
        let [star, lstar, cstar, mask, base, sysenter @ ..] = saved.system_calls;
        let [lstar, cstar, base] = [lstar, cstar, base].map(canonical);
        let [code, stack, entry] = sysenter;
        state.system_calls =
            [star, lstar, cstar, mask & u64::from(u32::MAX), base, code, canonical(stack), canonical(entry)];
        self.debug = saved.breakpoints;
        self.vmx.restart();
        self.set_generals(&saved.general);
        let control = &mut self.vmcb.control;
        control.tsc_offset = saved.time_offset;
        control.event_injection = saved.event;
        control.interrupt_shadow = saved.shadow & SHADOW;
        control.virtual_interrupts |= u64::from(saved.priority) & TPR;
        if shaded {
            self.shade();
            if let Some(own) = &mut self.own {
                own.pointers = saved.pointers;
            }
        }
    }

    /// It comes to CPU `cpu`, which we are on, and stays until [`Self::put`].
    pub fn load(&mut self, cpu: usize) {
        self.host = cpu::host_rest(cpu) as u64;
        cpu::flush_of(cpu).load(cpu, &mut self.tenant);
        let [dr0, dr1, dr2, dr3] = self.debug;
        // SAFETY: addresses of breakpoints; DR7, which arms them, is the guest's while it runs and clear while we do.
        unsafe {
            asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}",
                in(reg) dr0, in(reg) dr1, in(reg) dr2, in(reg) dr3, options(nomem, nostack, preserves_flags));
        }
        if self.intel {
            self.vmx.load();
        }
    }

    /// The second stage that it runs on: the frame of the root of its tables.
    #[inline]
    pub fn set_root(&mut self, root: Pfn) {
        self.vmcb.control.nested_cr3 = root.base().get();
    }

    /// This CPU, which runs it, runs it no more.
    pub fn put(&mut self) {
        let [dr0, dr1, dr2, dr3]: [u64; 4];
        // SAFETY: reads registers.
        unsafe {
            asm!("mov {}, dr0", "mov {}, dr1", "mov {}, dr2", "mov {}, dr3",
                out(reg) dr0, out(reg) dr1, out(reg) dr2, out(reg) dr3, options(nomem, nostack, preserves_flags));
        }
        self.debug = [dr0, dr1, dr2, dr3];
        if self.intel {
            self.vmx.put(&mut self.vmcb);
        }
    }
}

/// The canonical address of 48 bits that is most like `address`.
fn canonical(address: u64) -> u64 {
    ((address << 16) as i64 >> 16) as u64
}

/// Why it came back.
impl Guest {
    /// Whether an event was being delivered to it.
    #[inline]
    pub fn was_delivering(&self) -> bool {
        self.vmcb.control.exit_interrupt_info & VALID != 0
    }

    /// The second-stage fault that it came back with last on Intel's processors, if it was one.
    pub fn extended_fault(&self) -> Option<SecondStage> {
        match self.vmx.is_second_stage().then(|| self.vmx.exit())? {
            Exit::Memory(fault) => Some(fault),
            _ => None,
        }
    }

    /// The same on AMD's.
    #[inline]
    pub fn nested_fault(&self) -> Option<SecondStage> {
        let Control { exit_code, exit_info_1, exit_info_2, .. } = self.vmcb.control;
        svm::is_nested_fault(exit_code).then(|| fault::nested(exit_info_1, exit_info_2))
    }

    /// Why it came back last.
    #[inline]
    pub fn exit(&self) -> Exit {
        if self.intel {
            return self.vmx.exit();
        }
        let Control { exit_code, exit_info_1, exit_info_2, .. } = self.vmcb.control;
        svm::decode(exit_code, exit_info_1, exit_info_2, features::get().decode_assists)
    }

    /// It came back with an IN or OUT: the address behind that.
    #[inline]
    pub fn behind_port(&self) -> u64 {
        // APM 15.10.2.
        self.vmcb.control.exit_info_2
    }

    /// It came back with an access to a control register: whether it carries that out again, and then can. Else it may not have what it wrote.
    #[cold]
    pub fn moves(&mut self, access: ControlAccess) -> bool {
        let ControlAccess::Write { general: Some(general), .. } = access else { return false };
        let value = *self.general(general);
        self.intel && self.vmx.moves(access, value)
    }

    /// It goes on behind the instruction that it came back with, which has `length` bytes without prefixes.
    #[inline]
    pub fn skip(&mut self, length: u64) {
        let rip = self.state().rip;
        let next = self.control().next_rip;
        let told = features::get().next_rip && next != 0;
        let next = if told { next } else { rip.wrapping_add(length) };
        self.go_on(next);
    }

    /// It goes on at `rip`: out of an interrupt shadow, with the trap that its own single step wants left to the processor.
    #[inline]
    pub fn go_on(&mut self, rip: u64) {
        self.state().rip = rip;
        self.control().interrupt_shadow = 0;
    }
}

/// Events for it.
impl Guest {
    /// The event that the last exit interrupted is delivered again.
    #[cold]
    #[inline(never)]
    pub fn redeliver(&mut self) {
        let event = self.control().exit_interrupt_info;
        if event & KIND < SOFTWARE {
            self.control().event_injection = event;
        }
    }

    /// It gets `event` at the next entry, in the place of any that it was to get.
    #[inline]
    pub fn inject(&mut self, event: Event) {
        self.control().event_injection = VALID
            | match event {
                Event::Interrupt(vector) => vector.into(),
                Event::NonMaskable => NON_MASKABLE,
                Event::Exception { vector, error: None } => EXCEPTION | u64::from(vector),
                Event::Exception { vector, error: Some(code) } => {
                    EXCEPTION | ERROR_CODE | u64::from(vector) | u64::from(code) << 32
                }
            };
    }

    /// Whether it gets an event at the next entry.
    #[inline]
    pub fn is_injecting(&mut self) -> bool {
        self.control().event_injection & VALID != 0
    }

    /// Whether it is open to interrupts where it is.
    #[inline]
    pub fn is_open(&mut self) -> bool {
        self.is_enabled() && self.control().interrupt_shadow & 1 == 0
    }

    /// Whether its RFLAGS.IF is set.
    #[inline]
    pub fn is_enabled(&mut self) -> bool {
        self.state().rflags & RFLAGS_IF != 0
    }

    /// Its CR8: bits 7:4 of its controller's task priority.
    #[inline]
    pub fn priority(&mut self) -> u8 {
        (self.control().virtual_interrupts & 0xf) as u8
    }

    /// Its CR8, as its controller has it.
    #[inline]
    pub fn set_task_priority(&mut self, priority: u8) {
        let control = self.control();
        control.virtual_interrupts = control.virtual_interrupts & !TPR | u64::from(priority & 0xf);
    }

    /// Its CR8, and whether it comes back as soon as it is open to interrupts, whatever that says.
    #[inline]
    pub fn set_priority(&mut self, priority: u8, window: bool) {
        let control = self.control();
        let pending = if window { PENDING | IGNORE_TPR } else { 0 };
        let kept = control.virtual_interrupts & !(TPR | PENDING | IGNORE_TPR);
        control.virtual_interrupts = kept | u64::from(priority & 0xf) | pending;
        control.intercepts.first = control.intercepts.first & !first::VINTR | if window { first::VINTR } else { 0 };
    }
}

/// Its state.
impl Guest {
    /// General register `number` (0 RAX to 15), whole.
    #[inline]
    pub fn general(&mut self, number: u8) -> &mut u64 {
        match number & 15 {
            0 => &mut self.vmcb.save.rax,
            1 => &mut self.registers.rcx,
            2 => &mut self.registers.rdx,
            3 => &mut self.registers.rbx,
            4 => &mut self.state().rsp,
            5 => &mut self.registers.rbp,
            6 => &mut self.registers.rsi,
            7 => &mut self.registers.rdi,
            high => &mut self.registers.r[usize::from(high) - 8],
        }
    }

    /// RAX.
    #[inline]
    pub fn rax(&mut self) -> &mut u64 {
        &mut self.vmcb.save.rax
    }

    /// All general registers, by their numbers.
    pub fn generals(&mut self) -> [u64; 16] {
        let Registers { rcx, rdx, rbx, rbp, rsi, rdi, r: [r8, r9, r10, r11, r12, r13, r14, r15] } = self.registers;
        let SaveArea { rax, rsp, .. } = *self.state();
        [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15]
    }

    /// Sets them.
    pub fn set_generals(&mut self, generals: &[u64; 16]) {
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r @ ..] = *generals;
        self.registers = Registers { rcx, rdx, rbx, rbp, rsi, rdi, r };
        let state = self.state();
        (state.rax, state.rsp) = (rax, rsp);
    }

    /// The next instruction's offset in its code segment.
    #[inline]
    pub fn rip(&mut self) -> u64 {
        self.state().rip
    }

    /// RFLAGS.
    #[inline]
    pub fn rflags(&mut self) -> &mut u64 {
        &mut self.state().rflags
    }

    /// CR0.
    #[inline]
    pub fn cr0(&mut self) -> u64 {
        self.own.map_or(self.state().cr0, |own| own.cr0)
    }

    /// CR3.
    #[inline]
    pub fn cr3(&mut self) -> u64 {
        self.own.map_or(self.state().cr3, |own| own.cr3)
    }

    /// CR4.
    #[inline]
    pub fn cr4(&mut self) -> u64 {
        self.own.map_or(self.state().cr4, |own| own.cr4)
    }

    /// CR2.
    #[inline]
    pub fn cr2(&mut self) -> u64 {
        self.state().cr2
    }

    /// Sets CR2.
    #[inline]
    pub fn set_cr2(&mut self, linear: u64) {
        self.vmcb.save.cr2 = linear;
    }

    /// EFER.
    #[inline]
    pub fn efer(&mut self) -> u64 {
        self.own.map_or(self.state().efer & !EFER_SVME, |own| own.efer)
    }

    /// Sets EFER; LMA is as it was. Not for a guest on shadow tables.
    #[inline]
    pub fn set_efer(&mut self, efer: u64) {
        self.state().efer = efer | EFER_SVME;
    }

    /// The page attribute table.
    #[inline]
    pub fn pat(&mut self) -> &mut u64 {
        &mut self.state().g_pat
    }

    /// As [`Self::time_offset`], to be looked at.
    #[inline]
    pub fn time(&self) -> u64 {
        self.vmcb.control.tsc_offset
    }

    /// What is added to what it reads of the time stamp counter.
    #[inline]
    pub fn time_offset(&mut self) -> &mut u64 {
        &mut self.control().tsc_offset
    }

    /// Its privilege level.
    #[inline]
    pub fn privilege(&mut self) -> u8 {
        self.state().cpl
    }

    /// CS.
    #[inline]
    pub fn code(&mut self) -> Segment {
        self.state().cs
    }

    /// Bases of ES, CS, SS, DS, FS and GS.
    pub fn bases(&mut self) -> [u64; 6] {
        let state = self.state();
        [state.es.base, state.cs.base, state.ss.base, state.ds.base, state.fs.base, state.gs.base]
    }
}
