//! Messages keep their meaning on the way, both writers of JSON agree, and nonsense is told by name.

use alloc::borrow::Cow;
use std::boxed::Box;
use std::format;
use std::string::{String, ToString};
use std::vec::Vec;

use proptest::prelude::*;
use serde::Serialize;

use super::*;

fn refused(line: &str) -> (Option<u64>, Error) {
    let Malformed { id, error } = Request::parse(line.as_bytes()).expect_err(line);
    (id, error)
}

/// What the bounded writer makes of a message, checked against the reference writer.
fn line(message: &impl Serialize, encoded: &[u8]) -> String {
    let text = String::from_utf8(encoded.to_vec()).expect("JSON is text");
    let line = text.strip_suffix('\n').expect("a newline at the end");
    assert!(!line.contains('\n'), "{line}");
    let reference: serde_json::Value = serde_json::to_value(message).expect("keys are texts");
    assert_eq!(serde_json::from_str::<serde_json::Value>(line).expect("JSON"), reference);
    line.to_string()
}

fn through_request(request: &Request<'_>) -> String {
    let mut buffer = [0; MAX_LINE];
    line(request, request.encode(&mut buffer).expect("room"))
}

fn through_message(message: &Message<'_>) -> String {
    assert_eq!(&message.clone().into_owned(), message);
    let mut buffer = [0; MAX_LINE];
    line(message, message.encode(&mut buffer).expect("room"))
}

#[test]
fn requests_look_as_documented() {
    let vm = || Cow::Borrowed("web");
    let data = Bytes::from(&b"ls\n"[..]);
    let table = [
        (Op::Hello, r#"{"id":7,"op":"hello"}"#),
        (Op::Ps, r#"{"id":7,"op":"ps"}"#),
        (Op::Stats { vm: vm() }, r#"{"id":7,"op":"stats","vm":"web"}"#),
        (Op::Slots { vm: vm(), from: 0 }, r#"{"id":7,"op":"slots","vm":"web"}"#),
        (Op::Slots { vm: vm(), from: 9 }, r#"{"id":7,"op":"slots","vm":"web","from":9}"#),
        (
            Op::SetSlot {
                vm: vm(),
                slot: Alias { number: 5, base: 1 << 36, size: 4096, offset: 8192, read_only: true },
            },
            r#"{"id":7,"op":"set-slot","vm":"web","slot":5,"base":68719476736,"size":4096,"offset":8192,"read_only":true}"#,
        ),
        (Op::Posted { vm: vm() }, r#"{"id":7,"op":"posted","vm":"web"}"#),
        (Op::Young { vm: vm(), base: 4096, size: 8192 }, r#"{"id":7,"op":"young","vm":"web","base":4096,"size":8192}"#),
        (
            Op::Dirty { vm: vm(), what: Dirty::Start { manual: true, ahead: false, ring: Some(256) } },
            r#"{"id":7,"op":"dirty-start","vm":"web","manual":true,"ahead":false,"ring":256}"#,
        ),
        (
            Op::Dirty { vm: vm(), what: Dirty::Get(PagePlace { slot: 2, page: 64 }) },
            r#"{"id":7,"op":"dirty-get","vm":"web","slot":2,"page":64}"#,
        ),
        (
            Op::Dirty { vm: vm(), what: Dirty::Since(PagePlace { slot: 2, page: 65 }) },
            r#"{"id":7,"op":"dirty-since","vm":"web","slot":2,"page":65}"#,
        ),
        (
            Op::Dirty {
                vm: vm(),
                what: Dirty::Clear { at: PagePlace { slot: 0, page: 128 }, bits: Bytes::from(&[1, 0x80][..]) },
            },
            r#"{"id":7,"op":"dirty-clear","vm":"web","slot":0,"page":128,"bits":"AYA="}"#,
        ),
        (Op::Dirty { vm: vm(), what: Dirty::Harvest }, r#"{"id":7,"op":"dirty-harvest","vm":"web"}"#),
        (Op::Dirty { vm: vm(), what: Dirty::Mark }, r#"{"id":7,"op":"dirty-mark","vm":"web"}"#),
        (Op::Dirty { vm: vm(), what: Dirty::Unmark }, r#"{"id":7,"op":"dirty-unmark","vm":"web"}"#),
        (Op::Dirty { vm: vm(), what: Dirty::Stop }, r#"{"id":7,"op":"dirty-stop","vm":"web"}"#),
        (Op::Balloon { vm: vm(), size: 4096 }, r#"{"id":7,"op":"balloon","vm":"web","size":4096}"#),
        (Op::Reclaim { vm: vm(), size: 8192 }, r#"{"id":7,"op":"reclaim","vm":"web","size":8192}"#),
        (Op::SwapOff, r#"{"id":7,"op":"swap-off"}"#),
        (Op::SwapOn, r#"{"id":7,"op":"swap-on"}"#),
        (
            Op::ReadTags { vm: vm(), gpa: 4096, size: 8192 },
            r#"{"id":7,"op":"tags-read","vm":"web","gpa":4096,"size":8192}"#,
        ),
        (
            Op::WriteTags { vm: vm(), gpa: 4096, tags: Bytes::from(&[1, 0x80][..]) },
            r#"{"id":7,"op":"tags-write","vm":"web","gpa":4096,"tags":"AYA="}"#,
        ),
        (Op::Pause { vm: vm() }, r#"{"id":7,"op":"pause","vm":"web"}"#),
        (Op::Resume { vm: vm() }, r#"{"id":7,"op":"resume","vm":"web"}"#),
        (Op::Audit, r#"{"id":7,"op":"audit"}"#),
        (Op::Poison { vm: "a".into(), gpa: 0x4020_0000 }, r#"{"id":7,"op":"poison","vm":"a","gpa":1075838976}"#),
        (Op::Probe { vm: vm(), address: 0x4000_0000 }, r#"{"id":7,"op":"probe","vm":"web","address":1073741824}"#),
        (Op::Kill { vm: vm() }, r#"{"id":7,"op":"kill","vm":"web"}"#),
        (Op::Fork { vm: vm(), name: "copy".into(), count: None }, r#"{"id":7,"op":"fork","vm":"web","name":"copy"}"#),
        (
            Op::Fork { vm: vm(), name: "copy".into(), count: Some(0) },
            r#"{"id":7,"op":"fork","vm":"web","name":"copy","count":0}"#,
        ),
        (Op::Merge { rounds: None }, r#"{"id":7,"op":"merge"}"#),
        (Op::Merge { rounds: Some(2) }, r#"{"id":7,"op":"merge","rounds":2}"#),
        (Op::Console { vm: vm() }, r#"{"id":7,"op":"console","vm":"web"}"#),
        (Op::Detach, r#"{"id":7,"op":"detach"}"#),
        (Op::Input { vm: vm(), data }, r#"{"id":7,"op":"input","vm":"web","data":"bHMK"}"#),
        (Op::Shutdown, r#"{"id":7,"op":"shutdown"}"#),
    ];
    for (op, expected) in table {
        let request = Request { id: 7, op };
        assert_eq!(through_request(&request), expected);
        assert_eq!(Request::parse(expected.as_bytes()), Ok(request));
    }
}

#[test]
fn order_of_keys_and_white_space_do_not_matter() {
    let request = Request::parse(br#" { "vm" : "web" , "op":"pause", "id": 0 } "#).expect("right");
    assert_eq!(request, Request { id: 0, op: Op::Pause { vm: "web".into() } });
}

#[test]
fn each_wrong_request_names_what_is_wrong() {
    #[rustfmt::skip]
    let table = [
        ("", None, Code::Malformed, "not a request: EOF while parsing a value at line 1 column 0"),
        ("[]", None, Code::Malformed, "not a request: invalid type: sequence, expected a JSON object at line 1 column 0"),
        ("{} {}", None, Code::Malformed, "not a request: trailing characters at line 1 column 4"),
        ("{\"id\":1", None, Code::Malformed, "not a request: EOF while parsing an object at line 1 column 7"),
        (r#"{"op":"ps"}"#, None, Code::BadField, "id = (missing): must be a whole number below 2^53"),
        (r#"{"id":-1,"op":"ps"}"#, None, Code::BadField, "id = a negative number: must be a whole number below 2^53"),
        (r#"{"id":9007199254740992,"op":"ps"}"#, None, Code::BadField, "id = 9007199254740992: must be a whole number below 2^53"),
        (r#"{"id":1,"id":2,"op":"ps"}"#, None, Code::BadField, "id = given twice: must be given once"),
        (r#"{"id":1}"#, Some(1), Code::BadField, "op = (missing): must be a text"),
        (r#"{"id":1,"op":5}"#, Some(1), Code::BadField, "op = 5: must be a text"),
        (r#"{"id":1,"op":"fly","vm":"web"}"#, Some(1), Code::UnknownOp, "op = \"fly\": must be an operation that this hypervisor knows"),
        (r#"{"id":1,"op":"stats"}"#, Some(1), Code::BadField, "vm = (missing): must be a text"),
        (r#"{"id":1,"op":"stats","vm":null}"#, Some(1), Code::BadField, "vm = null: must be a text"),
        (r#"{"id":1,"op":"stats","vm":[[1],{}]}"#, Some(1), Code::BadField, "vm = a list: must be a text"),
        (r#"{"id":1,"op":"stats","vm":{"a":[]}}"#, Some(1), Code::BadField, "vm = an object: must be a text"),
        (r#"{"id":1,"op":"ps","vm":"web"}"#, Some(1), Code::BadField, "vm = \"web\": must be a field that \"ps\" knows"),
        (r#"{"id":1,"op":"fork","vm":"web"}"#, Some(1), Code::BadField, "name = (missing): must be a text"),
        (r#"{"id":1,"op":"slots","vm":"web","from":4294967296}"#, Some(1), Code::BadField, "from = 4294967296: must be a whole number below 2^32"),
        (r#"{"id":1,"op":"set-slot","vm":"web","slot":1,"base":0,"size":0}"#, Some(1), Code::BadField, "offset = (missing): must be a whole number below 2^53"),
        (r#"{"id":1,"op":"set-slot","vm":"web","slot":1,"base":9007199254740992,"size":0,"offset":0}"#, Some(1), Code::BadField, "base = 9007199254740992: must be a whole number below 2^53"),
        (r#"{"id":1,"op":"set-slot","vm":"web","slot":1,"base":0,"size":0,"offset":0,"read_only":1}"#, Some(1), Code::BadField, "read_only = 1: must be true or false"),
        (r#"{"id":1,"op":"stats","vm":true}"#, Some(1), Code::BadField, "vm = true: must be a text"),
        (r#"{"id":1,"op":"slots","vm":"web","from":1.5}"#, Some(1), Code::BadField, "from = a fraction: must be a whole number below 2^32"),
    ];
    for (line, id, code, message) in table {
        let (read, error) = refused(line);
        assert_eq!((read, error.code, error.message.as_str()), (id, code, message), "{line}");
    }
}

#[test]
fn input_is_checked() {
    let (id, error) = refused(r#"{"id":3,"op":"input","vm":"web","data":"???"}"#);
    assert_eq!((id, error.code, error.field.as_deref()), (Some(3), Code::BadField, Some("data")));
    let long = Bytes(vec_of(CONSOLE_CHUNK + 1).into());
    let request = Request { id: 3, op: Op::Input { vm: "web".into(), data: long } };
    let (_, error) = refused(&through_request(&request));
    assert_eq!(error.message, "data = 8193 bytes: must be at most 8192 bytes");
}

fn vec_of(length: usize) -> Vec<u8> {
    (0..length).map(|n| n as u8).collect()
}

#[test]
fn deep_and_wide_lines_are_refused_without_building_them() {
    let deep = format!(r#"{{"id":1,"op":"ps","x":{}"#, "[".repeat(60_000));
    assert_eq!(refused(&deep).1.code, Code::Malformed);
    let wide: Vec<String> = (0..1000).map(|n| format!("\"k{n}\":0")).collect();
    let (_, error) = refused(&format!("{{{}}}", wide.join(",")));
    assert!(error.message.contains("more than 16 keys"), "{}", error.message);
}

#[test]
fn responses_and_events_look_as_documented() {
    let row = VmRow {
        name: "web".into(),
        state: State::Paused,
        reason: Some("OutOfMemory".into()),
        vcpus: 2,
        memory: 1 << 29,
        resident: 4096,
    };
    let slot = SlotRow {
        id: 0,
        base: 1 << 30,
        size: 1 << 29,
        object: 3,
        kind: "anonymous".into(),
        flags: ["dirty-log".into()].into(),
    };
    let write = PostedWrite { address: 0x0c00_0000, size: 8, value: Hex(u64::MAX) };
    let posted = Posted { writes: [write].into(), doorbells: [Rings { address: 0x0c00_1000, rings: 3 }].into() };
    let ok = |answer| Message::Response(Response { id: Some(7), result: Ok(answer) });
    let error = Error::no_such_vm("db");
    #[rustfmt::skip]
    let table = [
        (ok(Answer::Done), r#"{"id":7,"ok":"done"}"#),
        (ok(Answer::Accepted(5)), r#"{"id":7,"ok":{"accepted":5}}"#),
        (ok(Answer::Hello(Hello { name: "entresol".into(), version: "0.1.0".into(), protocol: 1 })), r#"{"id":7,"ok":{"hello":{"name":"entresol","version":"0.1.0","protocol":1}}}"#),
        (ok(Answer::Ps([row].into())), r#"{"id":7,"ok":{"ps":[{"name":"web","state":"paused","reason":"OutOfMemory","vcpus":2,"memory":536870912,"resident":4096}]}}"#),
        (ok(Answer::Slots(SlotPage { rows: [slot].into(), next: Some(1) })), r#"{"id":7,"ok":{"slots":{"rows":[{"id":0,"base":1073741824,"size":536870912,"object":3,"kind":"anonymous","flags":["dirty-log"]}],"next":1}}}"#),
        (ok(Answer::Posted(posted)), r#"{"id":7,"ok":{"posted":{"writes":[{"address":201326592,"size":8,"value":"0xffffffffffffffff"}],"doorbells":[{"address":201330688,"rings":3}]}}}"#),
        (Message::Response(Response { id: None, result: Err(Error::new(Code::LineTooLong, "a line is longer than 5 bytes")) }), r#"{"id":null,"error":{"code":"line-too-long","message":"a line is longer than 5 bytes"}}"#),
        (Message::Response(Response { id: Some(7), result: Err(error) }), r#"{"id":7,"error":{"code":"no-such-vm","message":"vm = \"db\": must be the name of a virtual machine","field":"vm","value":"\"db\"","rule":"must be the name of a virtual machine"}}"#),
        (Message::Event(Event::Console { vm: "web".into(), data: Bytes::from(&b"\xff\x00"[..]) }), r#"{"event":{"console":{"vm":"web","data":"/wA="}}}"#),
        (Message::Event(Event::Dropped { vm: "web".into(), bytes: 12 }), r#"{"event":{"dropped":{"vm":"web","bytes":12}}}"#),
        (Message::Event(Event::InputReady { vm: "web".into() }), r#"{"event":{"input-ready":{"vm":"web"}}}"#),
        (Message::Event(Event::Doorbell { vm: "web".into() }), r#"{"event":{"doorbell":{"vm":"web"}}}"#),
        (Message::Event(Event::State { vm: "web".into(), state: State::Stopped, reason: None }), r#"{"event":{"state":{"vm":"web","state":"stopped"}}}"#),
    ];
    for (message, expected) in table {
        assert_eq!(through_message(&message), expected);
        assert_eq!(Message::parse(expected.as_bytes()), Ok(message));
    }
}

#[test]
fn stats_read_back() {
    let guest = [("free-memory".into(), 18)].into();
    let stats = Stats {
        faults: Faults { translation: 1, permission: 2, access_flag: 3, fresh: 4, populated: 5, ..Faults::default() },
        entries: Entries { size_4k: 6, size_2m: 7, size_1g: u64::MAX },
        table_pages: 8,
        tlb: Tlb { ipa: 9, range: 10, vmid: 11, all: 12 },
        exits: [("wfi".into(), 13), ("data-abort".into(), 14)].into(),
        resident_frames: 15,
        stored_frames: 22,
        free_frames: 16,
        poisoned_frames: 25,
        unclaimed_mmio: 17,
        balloon: Some(Balloon { target: 19, actual: 20, updates: 21, guest, ..Balloon::default() }),
        merge: Merge { scanned: 18, offered: 19, joined: 20, vacated: 21, broken: 22, differed: 23, copied: 24 },
    };
    let answer = Answer::Stats(Box::new(stats));
    let message = Message::Response(Response { id: Some(0), result: Ok(answer) });
    assert_eq!(Message::parse(through_message(&message).as_bytes()), Ok(message));
}

#[test]
fn readers_accept_what_a_newer_hypervisor_adds() {
    let newer = br#"{"id":1,"ok":{"ps":[{"name":"a","state":"migrating","vcpus":1,"memory":0,"resident":0,"new":[1]}]},"more":1}"#;
    let Ok(Message::Response(Response { result: Ok(Answer::Ps(rows)), .. })) = Message::parse(newer) else {
        panic!("not read");
    };
    assert_eq!(rows[0].state, State::Other);
    let refusal = br#"{"id":1,"error":{"code":"too-hot","message":"it is"}}"#;
    let Ok(Message::Response(Response { result: Err(error), .. })) = Message::parse(refusal) else {
        panic!("not read");
    };
    assert_eq!(error.code, Code::Other);
}

#[test]
fn a_number_that_is_no_text_of_one_is_refused() {
    for value in ["\"12\"", "\"0x\"", "\"0x+1\"", "\"0x1ffffffffffffffff\"", "12"] {
        assert!(serde_json::from_str::<Hex>(value).is_err(), "{value}");
    }
}

#[test]
fn lines_that_are_no_message_are_refused() {
    for line in ["", "{}", "[]", r#"{"id":1}"#, r#"{"id":1,"ok":"done","event":{"input-ready":{"vm":"a"}}}"#] {
        assert!(Message::parse(line.as_bytes()).is_err(), "{line}");
    }
}

#[test]
fn the_largest_messages_fit_into_a_line() {
    let name = "a".repeat(crate::config::MAX_NAME);
    let data = vec_of(CONSOLE_CHUNK);
    let event = Message::Event(Event::Console { vm: name.as_str().into(), data: Bytes::from(&data[..]) });
    through_message(&event);
    let row = || VmRow {
        name: name.as_str().into(),
        state: State::Running,
        reason: Some("OutOfMemory".into()),
        vcpus: 8,
        memory: u64::MAX,
        resident: u64::MAX,
    };
    let rows = (0..crate::config::MAX_VMS).map(|_| row()).collect();
    through_message(&Message::Response(Response { id: Some(ID_LIMIT - 1), result: Ok(Answer::Ps(rows)) }));
    let slot = || SlotRow {
        id: u32::MAX,
        base: u64::MAX,
        size: u64::MAX,
        object: u64::MAX,
        kind: "anonymous".into(),
        flags: ["read-only".into(), "dirty-log".into()].into(),
    };
    let write = PostedWrite { address: u64::MAX, size: 8, value: Hex(u64::MAX) };
    let rings = Rings { address: u64::MAX, rings: u64::MAX };
    let posted =
        Posted { writes: [write; POSTED_WRITES].into(), doorbells: [rings; crate::config::MAX_DOORBELLS].into() };
    through_message(&Message::Response(Response { id: Some(ID_LIMIT - 1), result: Ok(Answer::Posted(posted)) }));
    let page = SlotPage { rows: (0..SLOTS_PER_ANSWER).map(|_| slot()).collect(), next: Some(u32::MAX) };
    through_message(&Message::Response(Response { id: Some(ID_LIMIT - 1), result: Ok(Answer::Slots(page)) }));
}

#[test]
fn what_does_not_fit_says_so() {
    let message = Message::Event(Event::InputReady { vm: "web".into() });
    let whole = through_message(&message).len() + 1;
    for room in 0..whole {
        assert_eq!(message.encode(&mut [0; 64][..room]), Err(TooLong { limit: room }));
    }
    assert!(message.encode(&mut [0; 64][..whole]).is_ok());
}

proptest! {
    #[test]
    fn requests_read_as_written(id in 0..ID_LIMIT, vm in ".{0,40}", data in prop::collection::vec(any::<u8>(), 0..200), from: u32, which in 0..15_u8) {
        let vm = Cow::Owned(vm);
        let op = match which {
            0 => Op::Hello,
            1 => Op::Ps,
            2 => Op::Stats { vm },
            3 => Op::Slots { vm, from },
            4 => Op::Pause { vm },
            5 => Op::Resume { vm },
            6 => Op::Kill { vm },
            7 => Op::Console { vm },
            8 => Op::Detach,
            10 => Op::Posted { vm },
            11 => Op::SetSlot {
                vm,
                slot: Alias { number: from, base: id, size: id / 2, offset: id / 3, read_only: from % 2 == 0 },
            },
            9 => Op::Input { vm, data: Bytes(data.into()) },
            13 => Op::Merge { rounds: (from % 2 == 0).then_some(from) },
            12 => Op::Fork { name: vm.clone(), vm, count: (from % 2 == 0).then_some(from) },
            _ => Op::Shutdown,
        };
        let request = Request { id, op };
        let line = through_request(&request);
        prop_assert_eq!(Request::parse(line.as_bytes()), Ok(request));
    }

    #[test]
    fn console_output_reads_as_printed(vm in ".{0,40}", data in prop::collection::vec(any::<u8>(), 0..500)) {
        let message = Message::Event(Event::Console { vm: vm.into(), data: Bytes(data.into()) });
        let line = through_message(&message);
        prop_assert_eq!(Message::parse(line.as_bytes()), Ok(message));
    }

    /// Whatever a line holds, its refusal fits into a line.
    #[test]
    fn any_refusal_can_be_sent(line in prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        ("\\PC{0,9}", 1..3000_usize).prop_map(|(text, times)| serde_json::json!({ "id": 1, "op": text.repeat(times) }).to_string().into_bytes()),
        ("[\u{1}-\u{1f}a]{1,9}", 1..3000_usize).prop_map(|(text, times)| serde_json::json!({ "id": 1, "op": "ps", text.repeat(times): 0 }).to_string().into_bytes()),
        "\\PC{0,9}".prop_map(|text| serde_json::json!(text.repeat(3000)).to_string().into_bytes()),
    ]) {
        if let Err(malformed) = Request::parse(&line) {
            let mut buffer = [0; MAX_LINE];
            prop_assert!(Message::Response(malformed.into()).encode(&mut buffer).is_ok());
        }
    }

    #[test]
    fn any_bytes_are_read_without_panic(line in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(message) = Message::parse(&line) {
            through_message(&message);
        }
    }

    /// However a stream is cut into pieces, the lines that come out are the lines of the whole.
    #[test]
    fn pieces_do_not_change_lines(
        text in prop::collection::vec(prop_oneof![4 => Just(b'a'), 1 => Just(b'\n'), 1 => Just(b'\r'), 1 => any::<u8>()], 0..300),
        cuts in prop::collection::vec(0..300_usize, 0..20),
        limit in 1..12_usize,
    ) {
        let expected: Vec<Result<Vec<u8>, LineTooLong>> = whole_lines(&text, limit);
        let mut cuts: Vec<usize> = cuts.into_iter().map(|at| at.min(text.len())).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let mut lines = Lines::new(limit).expect("heap");
        let mut read = Vec::new();
        for piece in cuts.windows(2) {
            let mut rest = &text[piece[0]..piece[1]];
            while let Some(line) = lines.next(&mut rest) {
                read.push(line.map(<[u8]>::to_vec));
            }
            prop_assert!(rest.is_empty());
        }
        prop_assert_eq!(read, expected);
    }
}

/// The lines of a text, as the framing is documented, found the plain way.
fn whole_lines(text: &[u8], limit: usize) -> Vec<Result<Vec<u8>, LineTooLong>> {
    let pieces: Vec<&[u8]> = text.split(|&byte| byte == b'\n').collect();
    let (unfinished, finished) = pieces.split_last().expect("split gives at least one piece");
    let whole = finished.iter().filter_map(|line| {
        if line.len() > limit {
            return Some(Err(LineTooLong { limit }));
        }
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        (!line.is_empty()).then(|| Ok(line.to_vec()))
    });
    whole.chain((unfinished.len() > limit).then_some(Err(LineTooLong { limit }))).collect()
}
