//! `cargo run --release --package entresol-fuzz`: searches until time is up, and shows what it finds.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use entresol_fuzz::search::{self, Search, run};
use entresol_fuzz::{interrupts, subject};

/// Search for a sequence of operations that the code and a naive reference see differently
///
/// Exit status: 0 nothing was found; 1 something was; 2 wrong command line.
#[derive(Parser)]
struct Options {
    /// What to search
    #[arg(value_enum, long, default_value_t = Subject::Core)]
    subject: Subject,
    /// The seed: the same one searches the same way
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How long to search
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Run only this input, written as hexadecimal digits
    #[arg(long, value_parser = bytes)]
    input: Option<Bytes>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Subject {
    /// The core, on a flat machine
    Core,
    /// The interrupt controllers of an x86-64 machine
    Interrupts,
}

impl Subject {
    fn run(self) -> search::Subject {
        match self {
            Self::Core => subject::run,
            Self::Interrupts => interrupts::run,
        }
    }
}

#[derive(Clone)]
struct Bytes(Vec<u8>);

fn bytes(text: &str) -> Result<Bytes, String> {
    let digits: Option<Vec<u8>> = text.chars().map(|digit| digit.to_digit(16).map(|value| value as u8)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0).ok_or("must be pairs of hexadecimal digits")?;
    Ok(Bytes(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()))
}

fn main() -> ExitCode {
    let options = Options::parse();
    let subject = options.subject.run();
    if let Some(Bytes(input)) = options.input {
        return match run(subject, &input) {
            Ok(()) => ExitCode::SUCCESS,
            Err(what) => {
                println!("{what}");
                ExitCode::FAILURE
            }
        };
    }
    let (mut search, started) = (Search::new(subject, options.seed), Instant::now());
    let limit = Duration::from_secs(options.seconds);
    let mut found = None;
    while found.is_none() && started.elapsed() < limit {
        found = search.step();
    }
    let (kept, reached) = search.reached();
    let rate = search.runs() as f64 / started.elapsed().as_secs_f64();
    println!("{} runs, {rate:.0} a second; {kept} inputs kept, {reached} transitions reached", search.runs());
    let Some(found) = found else { return ExitCode::SUCCESS };
    let input: String = found.input.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("found after {} runs: {}\nagain: --input {input}", found.runs, found.what);
    ExitCode::FAILURE
}
