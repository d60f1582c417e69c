//! INV-15: every guest instruction makes progress: a bounded number of traps, then it retires, exits or faults.
//!
//! Watches each trap, and every moment at which no CPU can go on.

/// Traps that one instruction may take while others work. Each trap without progress waits for another CPU's change, of which a scenario
/// has few.
pub const TRAPS: u32 = 64;

/// Traps that one instruction may take while no other CPU does anything: a translation fault, and a permission fault if
/// what it needs was not known before ("cache-ops").
pub const UNDISTURBED: u32 = 2;

/// One instruction has trapped `traps` times; `alone`: no other CPU did anything since its first.
pub fn trapped(traps: u32, alone: bool, gpa: u64) -> Option<String> {
    let most = if alone { UNDISTURBED } else { TRAPS };
    (traps > most).then(|| format!("one access to {gpa:#x} trapped {traps} times"))
}

/// No CPU can go on; `waits` says what each waits for.
pub fn stuck(waits: &str) -> String {
    if waits.is_empty() {
        return "a step outside the CPUs' scripts waits for another CPU".to_owned();
    }
    format!("no CPU can go on: {waits}")
}
