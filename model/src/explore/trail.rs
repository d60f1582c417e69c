//! A schedule as text: every decision that was not the default, so that anybody can repeat it.
//!
//! `12>1,p3=1` reads: before step 12 CPU 1 went, and the hardware's decision number 3 was possibility 1. Everything else
//! was the default. A step is an operation of any CPU, counted from the beginning; the numbers depend on the scenario,
//! the machine and the code.

use std::fmt;
use std::str::FromStr;

/// One decision that was not the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// `cpu` went at `step`.
    Switch {
        /// Which operation.
        step: u64,
        /// Who went.
        cpu: u8,
    },
    /// The hardware's decision `number` was `taken`.
    Pick {
        /// Which decision.
        number: u64,
        /// The possibility.
        taken: u8,
    },
}

/// All of a schedule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trail {
    /// In the order in which they were made.
    pub turns: Vec<Turn>,
}

/// A text is no trail.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("trail: {part:?} must read STEP>CPU or pNUMBER=TAKEN")]
pub struct TrailError {
    /// The part that is wrong.
    pub part: String,
}

impl fmt::Display for Trail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.turns.is_empty() {
            return f.write_str("-");
        }
        for (place, turn) in self.turns.iter().enumerate() {
            let comma = if place == 0 { "" } else { "," };
            match turn {
                Turn::Switch { step, cpu } => write!(f, "{comma}{step}>{cpu}")?,
                Turn::Pick { number, taken } => write!(f, "{comma}p{number}={taken}")?,
            }
        }
        Ok(())
    }
}

impl FromStr for Trail {
    type Err = TrailError;

    fn from_str(text: &str) -> Result<Self, TrailError> {
        if text == "-" {
            return Ok(Self::default());
        }
        text.split(',').map(turn).collect::<Result<_, _>>().map(|turns| Self { turns })
    }
}

fn turn(part: &str) -> Result<Turn, TrailError> {
    let error = || TrailError { part: part.to_owned() };
    if let Some((number, taken)) = part.strip_prefix('p').and_then(|pick| pick.split_once('=')) {
        let number = number.parse().map_err(|_| error())?;
        return Ok(Turn::Pick { number, taken: taken.parse().map_err(|_| error())? });
    }
    let (step, cpu) = part.split_once('>').ok_or_else(error)?;
    Ok(Turn::Switch { step: step.parse().map_err(|_| error())?, cpu: cpu.parse().map_err(|_| error())? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn turns() -> impl Strategy<Value = Turn> {
        prop_oneof![
            (any::<u64>(), any::<u8>()).prop_map(|(step, cpu)| Turn::Switch { step, cpu }),
            (any::<u64>(), any::<u8>()).prop_map(|(number, taken)| Turn::Pick { number, taken }),
        ]
    }

    proptest! {
        #[test]
        fn reading_undoes_writing(turns in prop::collection::vec(turns(), 0..20)) {
            let trail = Trail { turns };
            prop_assert_eq!(trail.to_string().parse(), Ok(trail));
        }
    }

    #[test]
    fn nonsense_is_named() {
        for text in ["", "5", "p5", "p5=x", "x>1", "1>2,,3>1"] {
            assert!(text.parse::<Trail>().is_err(), "{text:?}");
        }
        assert_eq!(
            "1>2,x".parse::<Trail>().unwrap_err().to_string(),
            "trail: \"x\" must read STEP>CPU or pNUMBER=TAKEN"
        );
    }
}
