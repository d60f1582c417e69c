//! The grammar: every verb is read, and every mistake is named.

use entresol_addr::{Gfn, Gpa};

use super::{Names, Step, StepError, VERBS};
use crate::guest::operation::Operation;

fn parse(text: &str) -> Result<Step, StepError> {
    let (vms, objects) = (["a".to_owned(), "b".to_owned()], ["ram".to_owned()]);
    Step::parse(text, Names { vms: &vms, objects: &objects })
}

#[test]
fn every_verb_is_read() {
    let arguments = [
        ("GPA", "0x2000"),
        ("VALUE", "7"),
        ("PAGES", "2"),
        ("ID", "1"),
        ("VM", "b"),
        ("OBJECT", "ram"),
        ("BASE", "ram"),
        ("FRAME", "3"),
        ("COUNT", "1"),
        ("OFFSET", "0"),
        ("[ro]", "ro"),
        ("on|off", "off"),
        ("data|fetch", "fetch"),
        ("ivac|cvac|civac|cvau", "civac"),
        ("log|none", "log"),
        ("open|private", "open"),
        ("MASK", "1"),
        ("CPU", "0"),
        ("SLOT", "0"),
    ];
    for (form, _) in VERBS {
        let text = arguments.iter().fold(form.to_owned(), |text, (from, to)| text.replace(from, to));
        assert!(parse(&text).is_ok(), "{text}: {:?}", parse(&text));
    }
}

#[test]
fn names_and_results() {
    let step = parse("b: load 0x1008 -> r1").unwrap();
    let expected = Step::Guest { vm: 1, what: Operation::Load, gpa: Gpa::new(0x1008), to: Some("r1".to_owned()) };
    assert_eq!(step, expected);
    assert_eq!(step.page(), Some((1, Gfn::new(1))));
}

#[test]
fn mistakes_are_named() {
    for (text, rule) in [
        ("lod 0x1000", "must be one of load"),
        ("load", "GPA is missing"),
        ("load x", "must be a number"),
        ("load 0x1001", "multiple of 8"),
        ("zap 0x1008 1", "multiple of 4096"),
        ("zap 0x1000 0", "at least 1"),
        ("c: load 0x1000", "name of a virtual machine"),
        ("punch disk 0 1", "name of an object"),
        ("reap -> r1", "has no result"),
        ("out 0x1000", "PAGES is missing"),
        ("reap now", "must not stand there"),
        ("mmu maybe", "must be on or off"),
        ("log take 0", "must be get, read or clear"),
        ("log get 65536", "ID 65536 is too large"),
        ("dc ivau 0x1000", "must be ivac or cvac or civac or cvau"),
        ("ic ivac 0x1000", "must be ivau"),
        ("walk store 0x1000", "must be data or fetch"),
        ("tlbi 0x1000", "must not stand there"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(rule) && error.contains(text), "{error}");
    }
}
