//! AMD's exits: EXITCODE, EXITINFO1 and EXITINFO2 of the VMCB (APM appendix C, and 15.7–15.25 for each).
//!
//! Invariants: pure; any values are accepted.

use crate::exit::{ControlAccess, Exit, Io};
use crate::fault;

/// EXITCODE (APM appendix C).
mod code {
    pub const READ_CR0: u64 = 0x00;
    pub const READ_CR15: u64 = 0x0f;
    pub const WRITE_CR0: u64 = 0x10;
    pub const WRITE_CR15: u64 = 0x1f;
    pub const EXCEPTION_0: u64 = 0x40;
    pub const EXCEPTION_31: u64 = 0x5f;
    pub const INTR: u64 = 0x60;
    pub const NMI: u64 = 0x61;
    pub const VINTR: u64 = 0x64;
    pub const RDTSC: u64 = 0x6e;
    pub const RDPMC: u64 = 0x6f;
    pub const CPUID: u64 = 0x72;
    pub const INVD: u64 = 0x76;
    pub const PAUSE: u64 = 0x77;
    pub const HLT: u64 = 0x78;
    pub const INVLPG: u64 = 0x79;
    pub const INVLPGA: u64 = 0x7a;
    pub const IOIO: u64 = 0x7b;
    pub const MSR: u64 = 0x7c;
    pub const SHUTDOWN: u64 = 0x7f;
    pub const VMRUN: u64 = 0x80;
    pub const VMMCALL: u64 = 0x81;
    pub const VMLOAD: u64 = 0x82;
    pub const SKINIT: u64 = 0x86;
    pub const RDTSCP: u64 = 0x87;
    pub const WBINVD: u64 = 0x89;
    pub const MONITOR: u64 = 0x8a;
    pub const MWAIT: u64 = 0x8b;
    pub const MWAIT_ARMED: u64 = 0x8c;
    pub const XSETBV: u64 = 0x8d;
    pub const NPF: u64 = 0x400;
    pub const INVALID: u64 = u64::MAX;
    /// The same from QEMU's TCG, which stores its lower half only.
    pub const INVALID_HALF: u64 = u32::MAX as u64;
}

const PAGE_FAULT: u8 = 14;
/// EXITINFO1 of a MOV to or from a control register, with decode assists: the general register is told (APM 15.33.1).
const MOV: u64 = 1 << 63;

/// Whether it was a nested page fault: what [`fault::nested`] reads of EXITINFO1 and EXITINFO2 then. Asked before [`decode`] by who counts
/// instructions.
#[inline]
pub const fn is_nested_fault(exit_code: u64) -> bool {
    exit_code == code::NPF
}

/// Whether it was a page fault of the guest's: EXITINFO1 is its error code and EXITINFO2 its address then (APM 15.12.15).
#[inline]
pub const fn is_page_fault(exit_code: u64) -> bool {
    exit_code == code::EXCEPTION_0 + PAGE_FAULT as u64
}

/// Why the guest stopped. `decode_assists`: CPUID 8000_000A EDX bit 7.
pub const fn decode(exit_code: u64, info1: u64, info2: u64, decode_assists: bool) -> Exit {
    match exit_code {
        code::NPF => Exit::Memory(fault::nested(info1, info2)),
        code::INTR => Exit::Interrupt,
        code::IOIO => Exit::Io(io(info1)),
        code::MSR if info1 & 1 == 0 => Exit::ReadMsr,
        code::MSR => Exit::WriteMsr,
        code::HLT => Exit::Halt,
        code::VINTR => Exit::InterruptWindow,
        code::CPUID => Exit::Cpuid,
        code::VMMCALL => Exit::Hypercall,
        code::NMI => Exit::NonMaskable,
        code::READ_CR0..=code::READ_CR15 => Exit::Control(ControlAccess::Read {
            register: exit_code as u8 & 15,
            general: general(info1, decode_assists),
        }),
        code::WRITE_CR0..=code::WRITE_CR15 => Exit::Control(ControlAccess::Write {
            register: exit_code as u8 & 15,
            general: general(info1, decode_assists),
        }),
        code::EXCEPTION_0..=code::EXCEPTION_31 => {
            let vector = (exit_code - code::EXCEPTION_0) as u8;
            let address = if vector == PAGE_FAULT { info2 } else { 0 };
            Exit::Exception { vector, error: info1 as u32, address }
        }
        code::INVLPG => Exit::InvalidatePage(if decode_assists { Some(info1) } else { None }),
        code::INVLPGA | code::VMRUN | code::VMLOAD..=code::SKINIT => Exit::Virtualisation,
        code::RDPMC => Exit::ReadCounter,
        code::XSETBV => Exit::SetExtended,
        code::WBINVD => Exit::WriteBackCaches,
        code::INVD => Exit::InvalidateCaches,
        code::RDTSC => Exit::ReadTime,
        code::RDTSCP => Exit::ReadTimeAndCpu,
        code::PAUSE => Exit::Pause,
        code::MONITOR => Exit::Monitor,
        code::MWAIT | code::MWAIT_ARMED => Exit::MonitorWait,
        code::SHUTDOWN => Exit::Shutdown,
        code::INVALID | code::INVALID_HALF => Exit::InvalidState,
        other => Exit::Other(other),
    }
}

const fn general(info1: u64, decode_assists: bool) -> Option<u8> {
    if decode_assists && info1 & MOV != 0 { Some(info1 as u8 & 15) } else { None }
}

/// EXITINFO1 of a port access (APM 15.10.2).
const fn io(info1: u64) -> Io {
    Io {
        port: (info1 >> 16) as u16,
        // One of SZ8, SZ16, SZ32 in bits 6:4 is set.
        size: match info1 >> 4 & 0b111 {
            0b001 => 1,
            0b010 => 2,
            _ => 4,
        },
        write: info1 & 1 << 0 == 0,
        string: info1 & 1 << 2 != 0,
        repeat: info1 & 1 << 3 != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_by_the_manual() {
        let out = Io { port: 0x3f8, size: 1, write: true, string: false, repeat: false };
        assert_eq!(decode(0x7b, 0x03f8_0210, 0x1000, false), Exit::Io(out));
        assert_eq!(decode(0x7b, 0x03f8_0221, 0, false), Exit::Io(Io { size: 2, write: false, ..out }));
        let outs = Io { size: 4, string: true, repeat: true, ..out };
        assert_eq!(decode(0x7b, 0x03f8_024c, 0, false), Exit::Io(outs));
    }

    #[test]
    fn operands_only_where_the_processor_tells_them() {
        let info = 1 << 63 | 7;
        for (assists, general) in [(true, Some(7)), (false, None)] {
            assert_eq!(decode(0x10, info, 0, assists), Exit::Control(ControlAccess::Write { register: 0, general }));
            assert_eq!(decode(0x03, info, 0, assists), Exit::Control(ControlAccess::Read { register: 3, general }));
        }
        assert_eq!(decode(0x79, 0x7000, 0, true), Exit::InvalidatePage(Some(0x7000)));
        assert_eq!(decode(0x79, 0x7000, 0, false), Exit::InvalidatePage(None));
        // LMSW and CLTS leave the bit clear: the instruction must be read.
        assert_eq!(decode(0x10, 7, 0, true), Exit::Control(ControlAccess::Write { register: 0, general: None }));
    }

    #[test]
    fn exceptions_carry_what_they_push() {
        assert_eq!(decode(0x4e, 6, 0x1234, false), Exit::Exception { vector: 14, error: 6, address: 0x1234 });
        assert_eq!(decode(0x4d, 8, 0x1234, false), Exit::Exception { vector: 13, error: 8, address: 0 });
    }

    #[test]
    fn registers_and_faults_are_told_apart() {
        assert_eq!(decode(0x7c, 0, 0, false), Exit::ReadMsr);
        assert_eq!(decode(0x7c, 1, 0, false), Exit::WriteMsr);
        assert!(matches!(decode(0x400, 6, 0x1000, false), Exit::Memory(fault::SecondStage::Fault(_))));
        assert_eq!(decode(u64::MAX, 0, 0, false), Exit::InvalidState);
        assert_eq!(decode(u32::MAX.into(), 0, 0, false), Exit::InvalidState);
        for virtualisation in [0x7a, 0x80, 0x82, 0x83, 0x84, 0x85, 0x86] {
            assert_eq!(decode(virtualisation, 0, 0, false), Exit::Virtualisation);
        }
        for unknown in [0x20, 0x62, 0x70, 0x88, 0x401, 0x1_0000_0000, u64::MAX - 1] {
            assert_eq!(decode(unknown, 0, 0, true), Exit::Other(unknown));
        }
    }
}
