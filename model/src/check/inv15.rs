//! INV-15: every guest instruction makes progress: a bounded number of traps, then it retires, exits or faults.
//!
//! Watches each trap, and every moment at which no CPU can go on.

/// Traps that one instruction may take. Each trap without progress waits for another CPU's change, of which a scenario
/// has few.
pub const TRAPS: u32 = 64;

/// One instruction has trapped `traps` times.
pub fn trapped(traps: u32, gpa: u64) -> Option<String> {
    (traps > TRAPS).then(|| format!("one access to {gpa:#x} trapped {traps} times"))
}

/// No CPU can go on; `waits` says what each waits for.
pub fn stuck(waits: &str) -> String {
    if waits.is_empty() {
        return "a step outside the CPUs' scripts waits for another CPU".to_owned();
    }
    format!("no CPU can go on: {waits}")
}
