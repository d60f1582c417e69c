//! `--arch`, as commands take it.

use clap::ValueEnum;
use entresol_wire::config::Arch;

/// The architecture of a machine and its guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Named {
    /// The hypervisor at EL2, on QEMU's `virt`
    #[value(name = "aarch64", alias = "arm64")]
    Arm64,
    /// The hypervisor on AMD's SVM, on QEMU's `microvm`
    #[value(name = "x86_64", alias = "x86-64")]
    X86,
}

impl From<Named> for Arch {
    fn from(named: Named) -> Self {
        match named {
            Named::Arm64 => Self::Arm64,
            Named::X86 => Self::X86,
        }
    }
}
