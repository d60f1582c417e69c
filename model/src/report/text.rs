//! A trace as text, a column for each CPU.

use std::fmt::Write;

use super::Trace;

/// Characters of a CPU's column.
const WIDTH: usize = 64;

/// The trace of a schedule on `cpus` CPUs.
pub fn render(trace: &Trace, cpus: usize) -> String {
    let mut text = String::new();
    let names: Vec<String> = (0..cpus).map(|cpu| format!("{:WIDTH$}", format!("CPU {cpu}"))).collect();
    let line = |text: &mut String, content: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}", content.trim_end());
    };
    line(&mut text, format!(" step | {}", names.join("| ")));
    for event in &trace.events {
        let Some(cpu) = event.cpu else {
            line(&mut text, format!("      | {}", event.what));
            continue;
        };
        for (row, part) in wrap(&event.what).into_iter().enumerate() {
            let step = if row == 0 { event.step.to_string() } else { String::new() };
            let columns: Vec<String> =
                (0..cpus).map(|column| format!("{:WIDTH$}", if column == cpu { part.as_str() } else { "" })).collect();
            line(&mut text, format!("{step:>5} | {}", columns.join("| ")));
        }
    }
    text
}

/// A text in lines that fit a column.
fn wrap(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let last = lines.last_mut().expect("there is one");
        if last.is_empty() {
            last.push_str(word);
        } else if last.chars().count() + 1 + word.chars().count() <= WIDTH {
            last.push(' ');
            last.push_str(word);
        } else {
            lines.push(format!("  {word}"));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::super::Event;
    use super::*;

    #[test]
    fn each_cpu_has_its_column() {
        let event = |cpu, what: &str| Event { step: 3, cpu, what: what.to_owned(), place: None, pages: Vec::new() };
        let events = vec![event(None, "setup"), event(Some(0), "left"), event(Some(1), &"long ".repeat(20))];
        let text = render(&Trace { events, watched: Vec::new() }, 2);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("setup") && lines[2].find("left") < Some(10));
        assert!(lines[3].find("long").unwrap() > WIDTH && lines.len() == 5, "wrapped");
    }
}
