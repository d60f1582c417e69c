//! Why a guest stopped, whichever processor says so.
//!
//! Purpose: one vocabulary for [`svm`](crate::svm) and [`vmx`](crate::vmx), so that one program can answer both. What a
//! processor does not tell (AMD's without decode assists names no operands) is `None`, and whoever answers decodes the
//! instruction.

use crate::fault::SecondStage;

/// A port access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Io {
    /// The port.
    pub port: u16,
    /// Bytes: 1, 2 or 4.
    pub size: u8,
    /// OUT, not IN.
    pub write: bool,
    /// INS or OUTS: the data is in memory.
    pub string: bool,
    /// With a REP prefix.
    pub repeat: bool,
}

/// An access to a control register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlAccess {
    /// MOV from it; into which general register (0–15), if the processor says.
    Read {
        /// Which control register.
        register: u8,
        /// Into what.
        general: Option<u8>,
    },
    /// MOV to it; from which general register, if the processor says.
    Write {
        /// Which control register.
        register: u8,
        /// From what.
        general: Option<u8>,
    },
    /// CLTS.
    ClearTaskSwitched,
    /// LMSW with this value.
    LoadMachineStatus(u16),
}

/// Why a guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// A second-stage fault.
    Memory(SecondStage),
    /// The guest's own exception that we asked for: vector, and the error code if it has one. A page fault's address is in the
    /// processor's own field.
    Exception {
        /// 0–31.
        vector: u8,
        /// What the exception would push.
        error: u32,
        /// CR2 of a page fault, else 0.
        address: u64,
    },
    /// An interrupt for us.
    Interrupt,
    /// A non-maskable interrupt for us.
    NonMaskable,
    /// The guest can take an interrupt now.
    InterruptWindow,
    /// A port.
    Io(Io),
    /// A control register.
    Control(ControlAccess),
    /// RDMSR.
    ReadMsr,
    /// WRMSR.
    WriteMsr,
    /// CPUID.
    Cpuid,
    /// HLT.
    Halt,
    /// INVLPG of this linear address, if the processor says.
    InvalidatePage(Option<u64>),
    /// VMMCALL or VMCALL.
    Hypercall,
    /// An instruction of the processor's virtualisation, of which CPUID says that there is none.
    Virtualisation,
    /// RDPMC.
    ReadCounter,
    /// XSETBV.
    SetExtended,
    /// WBINVD or WBNOINVD.
    WriteBackCaches,
    /// INVD.
    InvalidateCaches,
    /// RDTSC.
    ReadTime,
    /// RDTSCP.
    ReadTimeAndCpu,
    /// PAUSE in a loop.
    Pause,
    /// MONITOR.
    Monitor,
    /// MWAIT.
    MonitorWait,
    /// A triple fault.
    Shutdown,
    /// The state that we gave is not one that a guest can be in.
    InvalidState,
    /// Nothing that we asked for; the processor's own number.
    Other(u64),
}
