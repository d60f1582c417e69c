//! `entresol lab` as a person calls it: what it prints, what it writes, and its status.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn lab(arguments: &[&str]) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_entresol"));
    // From the repository's root, so that litmus files have the names that the documentation gives them.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    program.arg("lab").args(arguments).current_dir(root).stdin(Stdio::null());
    program.output().expect("it starts")
}

fn out(output: &Output) -> &str {
    str::from_utf8(&output.stdout).expect("text")
}

fn err(output: &Output) -> &str {
    str::from_utf8(&output.stderr).expect("text")
}

/// The words of a `lab replay` command that a run printed, quotes removed.
fn replay_of(output: &Output) -> Vec<&str> {
    let line =
        out(output).lines().find_map(|line| line.strip_prefix("again: entresol lab ")).expect("how to repeat it");
    line.split(' ').map(|word| word.trim_matches('\'')).collect()
}

#[test]
fn an_exhaustive_search_ends_and_counts() {
    let output = lab(&["run", "lab/two-vcpus.toml", "--exhaustive", "--places"]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let text = out(&output);
    let summary = text.lines().next().expect("a summary");
    assert!(summary.starts_with("two vCPUs: ") && summary.contains("with at most 3 preemptions"), "{summary}");
    assert!(text.lines().any(|line| line.contains("decided at ") && line.contains("core/table/src/")), "{text}");
}

#[test]
fn the_stale_read_of_2018_is_found_repeated_and_drawn() {
    let folder = tempfile::tempdir().expect("a folder");
    let page = folder.path().join("trace.html");
    let html = page.to_str().expect("a plain path");
    let planted = ["lab/mmu-off.toml", "--plant", "Z-A1", "--only", "INV-11"];
    let found = lab(&[&["run"], &planted[..], &["--html", html]].concat());
    assert_eq!(found.status.code(), Some(1), "{}", err(&found));
    assert!(out(&found).contains("INV-11: a read of word 0 of frame 0 of object 0 returned 0xdeadf4eedeadf4ee"));
    let drawn = fs::read_to_string(&page).expect("the page was written");
    assert!(drawn.starts_with("<!doctype html>") && drawn.contains("0xdeadf4eedeadf4ee"), "{drawn}");
    let again = lab(&replay_of(&found));
    assert_eq!(again.status.code(), Some(1));
    assert!(out(&again).contains("found: INV-11"), "{}", out(&again));
}

#[test]
fn with_forced_write_back_the_same_bug_does_no_harm_in_any_schedule() {
    let output = lab(&["run", "lab/mmu-off.toml", "--plant", "Z-A1", "--machine", "fwb", "--exhaustive"]);
    assert_eq!(output.status.code(), Some(0), "{}", out(&output));
    assert!(out(&output).contains("there are"), "every schedule, whatever its preemptions: {}", out(&output));
}

#[test]
fn without_the_bug_the_same_decisions_find_nothing() {
    let found = lab(&["run", "lab/invalidate.toml", "--plant", "Z-A4"]);
    assert_eq!(found.status.code(), Some(1), "{}", out(&found));
    let mut words = replay_of(&found);
    let planted = words.iter().position(|word| *word == "--plant").expect("it names the bug");
    words.drain(planted..planted + 2);
    let clean = lab(&words);
    assert_eq!(clean.status.code(), Some(0), "{}", out(&clean));
    assert!(out(&clean).ends_with("nothing was found\n"));
}

#[test]
fn a_seed_gives_the_same_schedules_again() {
    let run = || {
        let output = lab(&["run", "lab/invalidate.toml", "--plant", "Z-A5", "--seeds", "20000", "--seed", "7"]);
        assert_eq!(output.status.code(), Some(1), "{}", out(&output));
        out(&output).lines().find(|line| line.starts_with("found by")).map(|line| line.contains("PCT")).expect("found")
    };
    assert_eq!(run(), run());
}

#[test]
fn every_request_for_a_frame_can_be_refused() {
    let output = lab(&["run", "lab/one-page.toml", "--seeds", "2000", "--starve"]);
    assert_eq!(output.status.code(), Some(0), "{}", out(&output));
    assert!(out(&output).contains("every request for a frame refused in turn: "), "{}", out(&output));
}

#[test]
fn what_only_a_refused_request_shows_is_found_and_repeated() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("alone.toml");
    // One CPU alone: without a refusal it gives nothing up.
    let slot = "[[slot]]\nid = 0\ngpa = 0x1000\nframes = 1\nobject = \"ram\"";
    let text = format!(
        "name = \"alone\"\nabout = \"one load\"\n[[object]]\nname = \"ram\"\nframes = 1\n{slot}\n[[cpu]]\nsteps = [\"load 0x1000\"]"
    );
    fs::write(&path, text).expect("written");
    let planted = [path.to_str().expect("a plain path"), "--plant", "Z-A8"];
    let calm = lab(&[&["run"], &planted[..]].concat());
    assert_eq!(calm.status.code(), Some(0), "nobody gives up: {}", out(&calm));
    let found = lab(&[&["run"], &planted[..], &["--starve"]].concat());
    assert_eq!(found.status.code(), Some(1), "{}", out(&found));
    assert!(out(&found).contains("found by starved") && out(&found).contains("INV-7"), "{}", out(&found));
    let words = replay_of(&found);
    assert!(words.contains(&"--refuse"), "{words:?}");
    let again = lab(&words);
    assert!(out(&again).contains("found: INV-7"), "{}", out(&again));
}

#[test]
fn a_scenario_that_never_shows_what_it_is_about_fails() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("vain.toml");
    let text =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../lab/two-vcpus.toml")).expect("it is there");
    fs::write(&path, text.replace("\"r0 == 7\"", "\"r0 == 8\"")).expect("written");
    let output = lab(&["run", path.to_str().expect("a plain path"), "--seeds", "100"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(out(&output).contains("r0 == 8"), "{}", out(&output));
}

#[test]
fn one_exhibit_of_the_zoo_is_a_row() {
    let output = lab(&["zoo", "Z-A6", "--no-control"]);
    assert_eq!(output.status.code(), Some(0), "{}", err(&output));
    let row: Vec<&str> = out(&output).lines().last().expect("a row").split_whitespace().collect();
    assert!(row[0] == "Z-A6" && row.contains(&"INV-2") && row.contains(&"split.toml"), "{row:?}");
}

#[test]
fn mistakes_are_named() {
    for (arguments, part) in [
        (&["run", "lab/mmu-off.toml", "--plant", "Z-Q9"][..], "bug \"Z-Q9\": must be one of Z-A1"),
        (&["run", "lab/mmu-off.toml", "--only", "INV-99"], "checker \"INV-99\": must be one of INV-1"),
        (&["run", "lab/absent.toml"], "lab/absent.toml"),
        (&["run", "Cargo.toml"], "unknown field"),
        (&["replay", "lab/mmu-off.toml", "nonsense"], "must read STEP>CPU or pNUMBER=TAKEN"),
        (&["run", "lab/mmu-off.toml", "--exhaustive", "--seeds", "5"], "cannot be used with"),
    ] {
        let output = lab(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(err(&output).contains(part), "{arguments:?}: {}", err(&output));
        assert!(output.stdout.is_empty());
    }
}
