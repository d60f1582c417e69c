//! What a vCPU sees of itself: how far it is, what it loaded last, and which aborts it took.
//!
//! The core's [`Completion`](entresol_mmu::Completion) acts on it as it does on a real vCPU; the checker `completion` compares.

use entresol_mmu::Instruction;

/// Bytes of an instruction.
pub const INSTRUCTION: u64 = 4;

/// The registers of a vCPU, as far as accesses change them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Context {
    /// The address of the next instruction, and the return address of an abort that was taken in place of it.
    pub pc: u64,
    /// What was loaded last.
    pub loaded: u64,
    /// Aborts taken.
    pub aborts: u64,
}

impl Instruction for Context {
    fn load(&mut self, value: u64) {
        self.loaded = value;
    }

    fn advance(&mut self) {
        self.pc += INSTRUCTION;
    }

    fn abort(&mut self) {
        self.aborts += 1;
    }
}
