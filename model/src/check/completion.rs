//! An instruction takes effect once, or is an abort and has none ("cache-ops": an MMIO exit is completed on re-entry; an abort
//! injected after an exit cancels both register and PC).
//!
//! Watches each access of a vCPU when it is over: what it then sees of itself against what it saw before.

use crate::guest::context::{Context, INSTRUCTION};
use crate::litmus::outcome::Value;

/// An access ended as `end`, and `value` is what it loads, if it is a load that ends.
pub fn ended(before: Context, after: Context, end: Value, value: Option<u64>) -> Option<String> {
    let expected = match end {
        Value::Abort => Context { aborts: before.aborts + 1, ..before },
        // The owner sees the instruction before it was executed.
        Value::Exit => before,
        _ => Context { pc: before.pc + INSTRUCTION, loaded: value.unwrap_or(before.loaded), ..before },
    };
    (after != expected).then(|| format!("an access that ended as {end} left {after:x?}, not {expected:x?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: Context = Context { pc: 8, loaded: 3, aborts: 0 };

    #[test]
    fn a_load_is_one_step_and_its_value() {
        let after = Context { pc: 12, loaded: 7, ..BEFORE };
        assert_eq!(ended(BEFORE, after, Value::Mmio, Some(7)), None);
        assert!(
            ended(BEFORE, Context { pc: 16, ..after }, Value::Mmio, Some(7)).is_some(),
            "an instruction is skipped"
        );
        assert!(ended(BEFORE, Context { pc: 8, ..after }, Value::Mmio, Some(7)).is_some(), "it is done twice");
        assert!(ended(BEFORE, after, Value::Mmio, Some(8)).is_some(), "another value");
        assert!(ended(BEFORE, after, Value::Done, None).is_some(), "a store changes no register");
    }

    #[test]
    fn an_abort_changes_neither_register_nor_pc() {
        let after = Context { aborts: 1, ..BEFORE };
        assert_eq!(ended(BEFORE, after, Value::Abort, Some(7)), None);
        assert!(ended(BEFORE, Context { loaded: 7, ..after }, Value::Abort, Some(7)).is_some());
        assert!(ended(BEFORE, Context { pc: 12, ..after }, Value::Abort, None).is_some());
        assert!(ended(BEFORE, BEFORE, Value::Abort, None).is_some(), "no abort came");
        assert!(ended(BEFORE, after, Value::Exit, None).is_some());
    }
}
