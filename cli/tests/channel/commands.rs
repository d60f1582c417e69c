//! `entresol ctl` against a fake hypervisor.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use crate::fake::{Fake, Manner};
use entresol_cli::client::{Client, ClientError};
use entresol_wire::control::{Answer, Op};

const LIMIT: Duration = Duration::from_secs(60);

fn ctl(fake: &Fake, arguments: &[&str]) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_entresol"));
    program.arg("ctl").args(arguments).env("ENTRESOL_SOCKET", fake.socket()).stdin(Stdio::null());
    program.output().expect("it starts")
}

fn text(bytes: &[u8]) -> &str {
    str::from_utf8(bytes).expect("text")
}

#[test]
fn tables_are_for_people() {
    let fake = Fake::start(Manner::Good);
    let ps = ctl(&fake, &["ps"]);
    let table = "\
NAME  STATE                 VCPUS  MEMORY  RESIDENT
web   running                   2    512M        8K
db    paused (OutOfMemory)      2    512M        8K
";
    assert_eq!((text(&ps.stdout), ps.status.code()), (table, Some(0)));
    let stats = ctl(&fake, &["stats", "web"]);
    assert!(text(&stats.stdout).lines().any(|line| line.split_whitespace().eq(["exits", "wfi", "6"])));
    let posted = ctl(&fake, &["posted", "web"]);
    let table = "\
WHAT     ADDRESS  SIZE  VALUE
write  0xc000000     4   0x2a
rings  0xc001000     -      7
";
    assert_eq!((text(&posted.stdout), posted.status.code()), (table, Some(0)));
    let slots = ctl(&fake, &["slots", "web"]);
    assert_eq!(text(&slots.stdout).lines().count(), 1 + 3);
}

/// Tags are asked for in parts, and what is done before a failure is said.
#[test]
fn tags_go_as_far_as_memory_does() {
    let fake = Fake::start(Manner::Good);
    let read = |gpa: &str, size: &str| ctl(&fake, &["tags", "read", "web", gpa, size]);
    let all = read("0x40000000", "400K");
    assert_eq!((all.status.code(), text(&all.stdout).lines().count()), (Some(0), 100));
    assert!(text(&all.stdout).lines().all(|line| line.len() == 256));
    let beyond = read("0x40000000", "404K");
    assert_eq!((beyond.status.code(), text(&beyond.stdout).lines().count()), (Some(1), 100));
    assert!(text(&beyond.stderr).contains("after 100 pages: "), "{}", text(&beyond.stderr));
    let outside = read("0x50000000", "4K");
    assert_eq!((outside.status.code(), outside.stdout.len()), (Some(1), 0));
    assert!(text(&outside.stderr).contains("must be memory"));
    assert_eq!(read("0x40000000", "100").status.code(), Some(2));
    let write = |size: &str| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_entresol"));
        program.args(["ctl", "tags", "write", "web", "0x40000000", size]).env("ENTRESOL_SOCKET", fake.socket());
        let streams = program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = streams.spawn().expect("it starts");
        // One that refuses its arguments does not read.
        let _ = child.stdin.take().expect("a pipe").write_all(&all.stdout);
        child.wait_with_output().expect("it ends")
    };
    let written = write("400K");
    assert_eq!((written.status.code(), text(&written.stdout)), (Some(0), "100 pages\n"));
    let less = write("4K");
    assert_eq!(less.status.code(), Some(2));
    assert!(text(&less.stderr).contains("25600 digits: must be 256"), "{}", text(&less.stderr));
}

#[test]
fn json_is_for_programs() {
    let fake = Fake::start(Manner::Good);
    let json = |arguments: &[&str]| -> serde_json::Value {
        let output = ctl(&fake, arguments);
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(text(&output.stdout).lines().count(), 1);
        serde_json::from_slice(&output.stdout).expect("JSON")
    };
    assert_eq!(json(&["ps", "--json"])[1]["reason"], "OutOfMemory");
    assert_eq!(json(&["--json", "stats", "web"])["exits"]["wfi"], 6);
    let slots = json(&["slots", "web", "--json"]);
    let ids: Vec<_> = slots.as_array().expect("rows").iter().map(|row| row["id"].as_u64()).collect();
    assert_eq!(ids, [Some(0), Some(1), Some(2)]);
    assert_eq!(json(&["kill", "web", "--json"]), "done");
}

#[test]
fn every_command_asks_what_it_should() {
    let fake = Fake::start(Manner::Good);
    for command in ["pause", "resume", "kill"] {
        let output = ctl(&fake, &[command, "web"]);
        assert_eq!((output.status.code(), output.stdout.len(), output.stderr.len()), (Some(0), 0, 0));
        assert_eq!([fake.said(), fake.said()], ["hello", command]);
    }
    let slot = ["set-slot", "web", "5", "--base", "0x1000000000", "--size", "64K", "--read-only"];
    assert_eq!(ctl(&fake, &slot).status.code(), Some(0));
    let asked = "set-slot Alias { number: 5, base: 68719476736, size: 65536, offset: 0, read_only: true }";
    assert_eq!([fake.said(), fake.said()], ["hello", asked]);
    assert_eq!(ctl(&fake, &["set-slot", "web", "5", "--base", "0xg", "--size", "0"]).status.code(), Some(2));
    assert_eq!(ctl(&fake, &["balloon", "web", "64M"]).status.code(), Some(0));
    assert_eq!([fake.said(), fake.said()], ["hello", "balloon 67108864"]);
    let reclaimed = ctl(&fake, &["reclaim", "web", "4K"]);
    assert_eq!((reclaimed.status.code(), &*String::from_utf8_lossy(&reclaimed.stdout)), (Some(0), "4K left\n"));
    assert_eq!([fake.said(), fake.said()], ["hello", "reclaim 4096"]);
    let off = ctl(&fake, &["swap", "off"]);
    assert_eq!((off.status.code(), &*String::from_utf8_lossy(&off.stdout)), (Some(0), "8K came back\n"));
    let on = ctl(&fake, &["swap", "on"]);
    assert_eq!((on.status.code(), on.stdout.len(), text(&on.stderr).contains("no disk")), (Some(1), 0, true));
    assert_eq!([fake.said(), fake.said(), fake.said(), fake.said()], ["hello", "swap-off", "hello", "swap-on"]);
    for arguments in [&["fork", "web", "copy"][..], &["fork", "web", "copy", "--count", "3"]] {
        assert_eq!(ctl(&fake, arguments).status.code(), Some(0));
        assert_eq!([fake.said(), fake.said()], ["hello", "fork"]);
    }
    for arguments in [&["fork", "web", "other"][..], &["fork", "web", "copy", "--count", "2"]] {
        let output = ctl(&fake, arguments);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
        assert!(text(&output.stderr).contains("must be copy"));
        assert_eq!([fake.said(), fake.said()], ["hello", "fork"]);
    }
    assert_eq!(ctl(&fake, &["shutdown"]).status.code(), Some(0));
    assert_eq!([fake.said(), fake.said()], ["hello", "shutdown"]);
    assert_eq!(ctl(&fake, &["slots", "web"]).status.code(), Some(0));
    assert_eq!([fake.said(), fake.said(), fake.said()], ["hello", "slots 0", "slots 2"]);
}

#[test]
fn an_audit_that_finds_something_fails_and_a_probe_says_what_it_met() {
    let fake = Fake::start(Manner::Good);
    let audit = ctl(&fake, &["audit"]);
    assert_eq!(audit.status.code(), Some(1));
    let table = text(&audit.stdout);
    assert!(table.contains("wrong") && table.ends_with("frame 0x47e00 is one that is wrong\n"), "{table}");
    let probe = |vm| text(&ctl(&fake, &["probe", vm, "0x40200000"]).stdout).to_owned();
    assert_eq!(probe("web"), "frame 0x47e00, private: the read faulted: syndrome 0x96000006, address 0x47e00000\n");
    assert_eq!(probe("db"), "frame 0x47e00, not private: the read went through\n");
}

#[test]
fn a_bad_frame_is_named_and_a_refusal_says_the_rule() {
    let fake = Fake::start(Manner::Good);
    let poison = |vm, gpa| ctl(&fake, &["poison", vm, gpa]);
    assert_eq!(text(&poison("web", "0x40200fff").stdout), "frame 0x40200, private, is never used again\n");
    assert_eq!(text(&poison("db", "1M").stdout), "frame 0x100, not private, is never used again\n");
    let refused = poison("db", "0");
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(text(&refused.stderr), "entresol: refused: gpa = 0x0: must be memory\n");
}

#[test]
fn refusals_end_with_status_1() {
    let fake = Fake::start(Manner::Good);
    let output = ctl(&fake, &["stats", "wbe"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stderr), "entresol: refused: vm = \"wbe\": must be the name of a virtual machine\n");
    let output = ctl(&fake, &["pause", "db", "--json"]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    let error: serde_json::Value = serde_json::from_slice(&output.stderr).expect("JSON");
    assert_eq!(error["code"], "wrong-state");
}

#[test]
fn remains_of_another_session_are_passed_over() {
    let fake = Fake::start(Manner::Remains);
    let mut client = Client::connect(&fake.socket(), LIMIT).expect("a session");
    assert_eq!(client.hello().map(|hello| hello.name.as_ref()), Some("entresol"));
    assert_eq!(client.event(), None);
    assert!(matches!(client.call(Op::Ps), Ok(Answer::Ps(rows)) if rows.len() == 2));
}

#[test]
fn nobody_there_ends_with_status_3() {
    let fake = Fake::start(Manner::Good);
    let absent = fake.folder().join("absent.sock");
    let output = ctl(&fake, &["--socket", absent.to_str().expect("UTF-8"), "ps"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("no hypervisor listens at"), "{}", text(&output.stderr));
    let left = fake.folder().join("left.sock");
    drop(UnixListener::bind(&left).expect("a socket"));
    let error = Client::connect(&left, LIMIT).expect_err("nobody listens");
    assert!(matches!(error, ClientError::NoHypervisor { .. }), "{error}");
}

#[test]
fn a_second_client_is_told_that_the_channel_is_busy() {
    let fake = Fake::start(Manner::Good);
    let first = Client::connect(&fake.socket(), LIMIT).expect("a session");
    let output = ctl(&fake, &["ps"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("busy: another `entresol ctl` is connected"), "{}", text(&output.stderr));
    drop(first);
    assert_eq!(ctl(&fake, &["ps"]).status.code(), Some(0));
}

#[test]
fn silence_is_told_after_the_limit() {
    let fake = Fake::start(Manner::Silent);
    let error = Client::connect(&fake.socket(), Duration::from_millis(50)).expect_err("silence");
    assert!(matches!(error, ClientError::NoAnswer { .. }), "{error}");
    let output = ctl(&fake, &["--timeout", "1", "ps"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("no answer within 1s"), "{}", text(&output.stderr));
}

#[test]
fn another_protocol_is_refused() {
    let fake = Fake::start(Manner::Newer);
    let output = ctl(&fake, &["ps"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("has version 2, not 1"), "{}", text(&output.stderr));
}

#[test]
fn a_machine_that_goes_away_is_told_but_not_after_shutdown() {
    let fake = Fake::start(Manner::Closing);
    let output = ctl(&fake, &["ps"]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(text(&output.stderr), "entresol: the hypervisor closed the control channel\n");
    assert_eq!(ctl(&fake, &["shutdown"]).status.code(), Some(0));
}

#[test]
fn wrong_commands_end_with_status_2() {
    let fake = Fake::start(Manner::Good);
    for wrong in [&["fork", "web"][..], &["stats"], &["ps", "--timeout", "0"], &[]] {
        assert_eq!(ctl(&fake, wrong).status.code(), Some(2), "{wrong:?}");
    }
}

#[test]
fn merge_waits_for_the_rounds_that_it_asks_for() {
    let fake = Fake::start(Manner::Good);
    let merge = ctl(&fake, &["merge", "--rounds", "2"]);
    let shown = text(&merge.stdout);
    let line = |what: &str| shown.lines().find(|line| line.starts_with(what)).expect(what).split_whitespace().last();
    assert_eq!((line("rounds left"), line("nanoseconds a page")), (Some("0"), Some("50")));
    assert_eq!(merge.status.code(), Some(0));
}
