//! Intel's exits: the exit reason, its qualification, and what goes with it (SDM appendix C, and 28.2 for each).
//!
//! Invariants: pure; any values are accepted.

use crate::exit::{ControlAccess, Exit, Io};
use crate::fault;

/// Basic exit reasons (SDM appendix C).
mod reason {
    pub const EXCEPTION: u16 = 0;
    pub const INTERRUPT: u16 = 1;
    pub const TRIPLE_FAULT: u16 = 2;
    pub const INTERRUPT_WINDOW: u16 = 7;
    pub const CPUID: u16 = 10;
    pub const GETSEC: u16 = 11;
    pub const HLT: u16 = 12;
    pub const INVD: u16 = 13;
    pub const INVLPG: u16 = 14;
    pub const RDPMC: u16 = 15;
    pub const RDTSC: u16 = 16;
    pub const VMCALL: u16 = 18;
    pub const VMCLEAR: u16 = 19;
    pub const VMXON: u16 = 27;
    pub const CONTROL: u16 = 28;
    pub const IO: u16 = 30;
    pub const RDMSR: u16 = 31;
    pub const WRMSR: u16 = 32;
    pub const INVALID_STATE: u16 = 33;
    pub const MSR_LOADING: u16 = 34;
    pub const MWAIT: u16 = 36;
    pub const MONITOR: u16 = 39;
    pub const PAUSE: u16 = 40;
    pub const VIOLATION: u16 = 48;
    pub const MISCONFIGURATION: u16 = 49;
    pub const INVEPT: u16 = 50;
    pub const RDTSCP: u16 = 51;
    pub const INVVPID: u16 = 53;
    pub const WBINVD: u16 = 54;
    pub const XSETBV: u16 = 55;
}

/// Exit reason bit 31: the entry failed, the guest has not run (SDM 27.8).
const ENTRY_FAILED: u32 = 1 << 31;
/// VM-exit interruption information (SDM 25.9.2).
mod interruption {
    pub const VECTOR: u32 = 0xff;
    pub const TYPE: u32 = 0b111 << 8;
    pub const NMI: u32 = 2 << 8;
    pub const HAS_ERROR: u32 = 1 << 11;
}
const PAGE_FAULT: u8 = 14;

/// The fields of the VMCS that say why the guest stopped. What an exit does not define may hold anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Fields {
    /// Exit reason.
    pub reason: u32,
    /// Exit qualification.
    pub qualification: u64,
    /// Guest-physical address.
    pub gpa: u64,
    /// VM-exit interruption information.
    pub interruption: u32,
    /// VM-exit interruption error code.
    pub error: u32,
}

/// Whether it is a second-stage fault: what [`decode`] says of it then. Asked before that by who wants nothing else.
pub const fn is_second_stage(reason: u32) -> bool {
    reason & ENTRY_FAILED == 0 && matches!(reason as u16, reason::VIOLATION | reason::MISCONFIGURATION)
}

/// Whether it is a non-maskable interrupt of the machine: by exit reason and interruption information. It is not kept pending.
pub const fn is_non_maskable(reason: u32, interruption: u32) -> bool {
    reason & ENTRY_FAILED == 0
        && reason as u16 == reason::EXCEPTION
        && interruption & interruption::TYPE == interruption::NMI
}

/// Why the guest stopped.
pub const fn decode(fields: &Fields) -> Exit {
    let Fields { reason, qualification, gpa, .. } = *fields;
    if reason & ENTRY_FAILED != 0 {
        return match reason as u16 {
            reason::INVALID_STATE | reason::MSR_LOADING => Exit::InvalidState,
            _ => Exit::Other(reason as u64),
        };
    }
    match reason as u16 {
        reason::VIOLATION => Exit::Memory(fault::violation(qualification, gpa)),
        reason::MISCONFIGURATION => Exit::Memory(fault::misconfiguration(gpa)),
        reason::INTERRUPT => Exit::Interrupt,
        reason::IO => Exit::Io(io(qualification)),
        reason::RDMSR => Exit::ReadMsr,
        reason::WRMSR => Exit::WriteMsr,
        reason::HLT => Exit::Halt,
        reason::INTERRUPT_WINDOW => Exit::InterruptWindow,
        reason::CPUID => Exit::Cpuid,
        reason::VMCALL => Exit::Hypercall,
        reason::CONTROL => Exit::Control(control(qualification)),
        reason::EXCEPTION => exception(fields),
        reason::INVLPG => Exit::InvalidatePage(Some(qualification)),
        reason::VMCLEAR..=reason::VMXON | reason::INVEPT | reason::INVVPID | reason::GETSEC => Exit::Virtualisation,
        reason::RDPMC => Exit::ReadCounter,
        reason::XSETBV => Exit::SetExtended,
        reason::WBINVD => Exit::WriteBackCaches,
        reason::INVD => Exit::InvalidateCaches,
        reason::RDTSC => Exit::ReadTime,
        reason::RDTSCP => Exit::ReadTimeAndCpu,
        reason::PAUSE => Exit::Pause,
        reason::MONITOR => Exit::Monitor,
        reason::MWAIT => Exit::MonitorWait,
        reason::TRIPLE_FAULT => Exit::Shutdown,
        _ => Exit::Other(reason as u64),
    }
}

const fn exception(fields: &Fields) -> Exit {
    let information = fields.interruption;
    if information & interruption::TYPE == interruption::NMI {
        return Exit::NonMaskable;
    }
    let vector = (information & interruption::VECTOR) as u8;
    let error = if information & interruption::HAS_ERROR != 0 { fields.error } else { 0 };
    let address = if vector == PAGE_FAULT { fields.qualification } else { 0 };
    Exit::Exception { vector, error, address }
}

/// Qualification of a port access (SDM table 28-5).
const fn io(qualification: u64) -> Io {
    Io {
        port: (qualification >> 16) as u16,
        size: match qualification & 0b111 {
            0 => 1,
            1 => 2,
            _ => 4,
        },
        write: qualification & 1 << 3 == 0,
        string: qualification & 1 << 4 != 0,
        repeat: qualification & 1 << 5 != 0,
    }
}

/// Qualification of a control-register access (SDM table 28-3).
const fn control(qualification: u64) -> ControlAccess {
    let register = qualification as u8 & 15;
    let general = Some((qualification >> 8) as u8 & 15);
    match qualification >> 4 & 0b11 {
        0 => ControlAccess::Write { register, general },
        1 => ControlAccess::Read { register, general },
        2 => ControlAccess::ClearTaskSwitched,
        _ => ControlAccess::LoadMachineStatus((qualification >> 16) as u16),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(reason: u32, qualification: u64) -> Exit {
        decode(&Fields { reason, qualification, gpa: 0x5000, ..Fields::default() })
    }

    #[test]
    fn ports_by_the_manual() {
        let out = Io { port: 0x3f8, size: 1, write: true, string: false, repeat: false };
        assert_eq!(exit(30, 0x03f8_0000), Exit::Io(out));
        assert_eq!(exit(30, 0x03f8_0009), Exit::Io(Io { size: 2, write: false, ..out }));
        assert_eq!(exit(30, 0x03f8_0033), Exit::Io(Io { size: 4, string: true, repeat: true, ..out }));
    }

    #[test]
    fn control_registers_by_the_manual() {
        assert_eq!(exit(28, 0x703), Exit::Control(ControlAccess::Write { register: 3, general: Some(7) }));
        assert_eq!(exit(28, 0xf14), Exit::Control(ControlAccess::Read { register: 4, general: Some(15) }));
        assert_eq!(exit(28, 0x20), Exit::Control(ControlAccess::ClearTaskSwitched));
        assert_eq!(exit(28, 0x1_0030), Exit::Control(ControlAccess::LoadMachineStatus(1)));
    }

    #[test]
    fn exceptions_and_interrupts_are_told_apart() {
        let page_fault = Fields {
            interruption: 1 << 31 | 1 << 11 | 3 << 8 | 14,
            error: 6,
            qualification: 0x1234,
            ..Fields::default()
        };
        assert_eq!(decode(&page_fault), Exit::Exception { vector: 14, error: 6, address: 0x1234 });
        let undefined = Fields { interruption: 1 << 31 | 3 << 8 | 6, error: 9, ..page_fault };
        assert_eq!(decode(&undefined), Exit::Exception { vector: 6, error: 0, address: 0 });
        let nmi = Fields { interruption: 1 << 31 | 2 << 8 | 2, ..page_fault };
        assert_eq!(decode(&nmi), Exit::NonMaskable);
    }

    #[test]
    fn instructions_of_vmx_are_told_apart_from_calls() {
        for reason in [11, 19, 20, 21, 22, 23, 24, 25, 26, 27, 50, 53] {
            assert_eq!(exit(reason, 0), Exit::Virtualisation, "{reason}");
        }
        assert_eq!((exit(18, 0), exit(15, 0), exit(17, 0)), (Exit::Hypercall, Exit::ReadCounter, Exit::Other(17)));
    }

    #[test]
    fn what_is_asked_first_is_what_is_decoded() {
        for reason in (0..70).flat_map(|reason| [reason, 1 << 31 | reason]) {
            let memory = matches!(exit(reason, 0b11 << 7), Exit::Memory(_));
            assert_eq!(is_second_stage(reason), memory, "{reason:#x}");
            for interruption in (0..8).map(|kind| 1 << 31 | kind << 8 | 2) {
                let fields = Fields { reason, interruption, ..Fields::default() };
                let told = is_non_maskable(reason, interruption);
                assert_eq!(told, decode(&fields) == Exit::NonMaskable, "{reason:#x} {interruption:#x}");
            }
        }
    }

    #[test]
    fn a_failed_entry_is_our_mistake() {
        assert_eq!(exit(1 << 31 | 33, 0), Exit::InvalidState);
        assert_eq!(exit(1 << 31 | 34, 0), Exit::InvalidState);
        assert_eq!(exit(1 << 31 | 41, 0), Exit::Other(1 << 31 | 41));
        assert!(matches!(exit(48, 0b11 << 7 | 1), Exit::Memory(fault::SecondStage::Fault(_))));
        assert!(matches!(exit(49, 0), Exit::Memory(fault::SecondStage::Refused(_))));
        assert_eq!(exit(9, 0), Exit::Other(9));
    }
}
