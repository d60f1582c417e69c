//! Decoding against what LLVM's assembler says of the same words, and data against the manual's pseudocode.

use std::format;
use std::string::{String, ToString};

use proptest::prelude::*;

use super::*;

/// The instruction in assembler's notation. Mnemonics that differ in ordering, in a hint or in an offset's encoding are
/// one to us: see [`normal`].
fn text(instruction: &Instruction) -> String {
    let address = &instruction.address;
    let name = match instruction.operation {
        Operation::Transfer(_) => "",
        Operation::Zero => "dc zva",
        Operation::Maintain(CacheOp::Invalidate) => "dc ivac",
        Operation::Maintain(CacheOp::InstructionAddress) => "ic ivau",
        Operation::Maintain(CacheOp::CleanToUnification) => "dc cvau",
        Operation::Maintain(CacheOp::CleanInvalidate) => "dc civac",
        Operation::Maintain(_) => "dc cvac",
    };
    let Operation::Transfer(transfer) = instruction.operation else {
        let Offset::Register { index, .. } = address.offset else { panic!("it names its address by register") };
        return format!("{name}, {}", general(index, true, "xzr"));
    };
    let mut all = format!("{} {}", mnemonic(&transfer), register(&transfer, transfer.first));
    if let Some(second) = transfer.second {
        all += &format!(", {}", register(&transfer, second));
    }
    let offset = match address.offset {
        Offset::Immediate(0) if address.writeback == Writeback::None => String::new(),
        Offset::Immediate(bytes) => format!(", #{bytes}"),
        Offset::Register { index, extend, shift } => {
            let (wide, name) = match extend {
                Extend::Uxtw => (false, ", uxtw"),
                Extend::Sxtw => (false, ", sxtw"),
                Extend::None if shift == 0 => (true, ""),
                Extend::None => (true, ", lsl"),
            };
            let shift = if shift == 0 { String::new() } else { format!(" #{shift}") };
            format!(", {}{name}{shift}", general(index, wide, "xzr"))
        }
    };
    let Base::Register(base) = address.base else {
        assert_eq!(address.base, Base::Pc);
        let Offset::Immediate(bytes) = address.offset else { panic!("a literal's offset is immediate") };
        return format!("{all}, #{bytes}");
    };
    let base = general(base, true, "sp");
    all + &match address.writeback {
        Writeback::None => format!(", [{base}{offset}]"),
        Writeback::Pre => format!(", [{base}{offset}]!"),
        Writeback::Post => format!(", [{base}]{offset}"),
    }
}

fn mnemonic(transfer: &Transfer) -> String {
    let way = if transfer.load { "ld" } else { "st" };
    let kind = if transfer.unprivileged { "tr" } else { "r" };
    let Bank::General { sign_extend, .. } = transfer.bank else {
        return format!("{way}{}", if transfer.second.is_some() { "p" } else { "r" });
    };
    let sign = if sign_extend { "s" } else { "" };
    let size = match (transfer.size, sign_extend) {
        (1, _) => "b",
        (2, _) => "h",
        (4, true) => "w",
        _ => "",
    };
    let kind = if transfer.second.is_some() { "p" } else { kind };
    format!("{way}{kind}{sign}{size}")
}

fn register(transfer: &Transfer, number: u8) -> String {
    match transfer.bank {
        Bank::Vector => format!("{}{number}", ["b", "h", "s", "d", "q"][transfer.size.trailing_zeros() as usize]),
        Bank::General { sign_extend: true, wide } => general(number, wide, "xzr"),
        Bank::General { .. } => general(number, transfer.size == 8, "xzr"),
    }
}

fn general(number: u8, wide: bool, thirty_one: &str) -> String {
    match (number, wide) {
        (31, true) => thirty_one.to_string(),
        (31, false) => format!("w{}", &thirty_one[1..]),
        (_, true) => format!("x{number}"),
        (_, false) => format!("w{number}"),
    }
}

/// Assembler's text without what does not matter to a device.
fn normal(text: &str) -> String {
    let (mnemonic, operands) = text.split_once(char::is_whitespace).expect("every load and store has operands");
    let mut name = mnemonic.to_string();
    for (ordered, plain) in [("ldapur", "ldr"), ("ldapr", "ldr"), ("ldlar", "ldr"), ("ldar", "ldr"), ("ldur", "ldr")] {
        name = name.replace(ordered, plain);
    }
    for (ordered, plain) in [("stlur", "str"), ("stllr", "str"), ("stlr", "str"), ("stur", "str")] {
        name = name.replace(ordered, plain);
    }
    name = name.replace("ldnp", "ldp").replace("stnp", "stp");
    // LSL and SXTX by nothing say nothing.
    let operands = operands.trim().replace("sxtx", "lsl").replace("tw #0]", "tw]");
    format!("{name} {}", operands.replace("lsl #0]", "lsl]").replace(", lsl]", "]"))
}

/// LLVM 14's disassembly of random words, one of each shape: `llvm-mc` knows nothing of us.
const DECODED: &str = include_str!("words.txt");
/// The same, of what the module leaves out: its table, and what is CONSTRAINED UNPREDICTABLE.
const REFUSED: &str = include_str!("refused.txt");

fn rows(table: &'static str) -> impl Iterator<Item = (u32, &'static str)> {
    table.lines().map(|line| {
        let (word, text) = line.split_once(' ').expect("a word and its text");
        (u32::from_str_radix(word, 16).expect("a word in hexadecimal"), text)
    })
}

#[test]
fn every_shape_reads_as_the_assembler_wrote_it() {
    assert!(rows(DECODED).count() > 300);
    for (word, expected) in rows(DECODED) {
        let decoded = decode(word).unwrap_or_else(|| panic!("{word:#010x} {expected} is not decoded"));
        assert_eq!(text(&decoded), normal(expected), "{word:#010x}");
    }
    for (word, expected) in [
        (0xd50b_7427, "dc zva, x7"),
        (0xd508_7623, "dc ivac, x3"),
        (0xd50b_7a3f, "dc cvac, xzr"),
        (0xd50b_7b20, "dc cvau, x0"),
        (0xd50b_7e20, "dc civac, x0"),
        (0xd50b_7c25, "dc cvac, x5"), // cvap
        (0xd50b_7520, "ic ivau, x0"),
    ] {
        assert_eq!(text(&decode(word).unwrap()), expected, "{word:#010x}");
    }
}

#[test]
fn what_is_left_out_is_left_out() {
    assert!(rows(REFUSED).count() > 50);
    for (word, expected) in rows(REFUSED) {
        assert_eq!(decode(word), None, "{word:#010x} {expected}");
    }
    // nop; b .; add x0, x1, x2; dc isw, x0; ic iallu; tlbi vmalle1; at s1e1r, x0; udf; all ones.
    for word in [0xd503_201f, 0x1400_0000, 0x8b02_0020, 0xd508_7640, 0xd508_751f, 0xd508_871f, 0xd508_7800, 0, u32::MAX]
    {
        assert_eq!(decode(word), None, "{word:#010x}");
    }
}

#[test]
fn addresses_follow_the_addressing_mode() {
    let resolve = |word| decode(word).unwrap().address.resolve(0x1000, |index| [0, 0, 0xffff_fffe][usize::from(index)]);
    let plain = |address| Resolved { address, base: None };
    assert_eq!(resolve(0xf940_0420), plain(0x1008), "ldr x0, [x1, #8]");
    assert_eq!(resolve(0xf840_8420), Resolved { address: 0x1000, base: Some(0x1008) }, "ldr x0, [x1], #8");
    assert_eq!(resolve(0xf85f_8c20), Resolved { address: 0xff8, base: Some(0xff8) }, "ldr x0, [x1, #-8]!");
    assert_eq!(resolve(0xf862_d820), plain(0xff0), "ldr x0, [x1, w2, sxtw #3]");
    assert_eq!(resolve(0xf862_5820), plain(0x8_0000_0ff0), "ldr x0, [x1, w2, uxtw #3]");
    assert_eq!(resolve(0xa9ff_0820), Resolved { address: 0xff0, base: Some(0xff0) }, "ldp x0, x2, [x1, #-16]!");
}

fn transfer(word: u32) -> Transfer {
    match decode(word).expect("decodes").operation {
        Operation::Transfer(transfer) => transfer,
        other => panic!("{word:#x} is {other:?}"),
    }
}

#[test]
fn loads_fill_registers_as_the_manual_says() {
    let mut bytes = [0; MAX_BYTES];
    (0..).zip(&mut bytes).for_each(|(index, byte)| *byte = 0x80 + index);
    for (word, little, big) in [
        (0x3940_0020, 0x80, 0x80),                                   // ldrb w0, [x1]
        (0x39c0_0020, 0xffff_ff80, 0xffff_ff80),                     // ldrsb w0, [x1]
        (0x3980_0020, 0xffff_ffff_ffff_ff80, 0xffff_ffff_ffff_ff80), // ldrsb x0, [x1]
        (0x7940_0020, 0x8180, 0x8081),                               // ldrh w0, [x1]
        (0x79c0_0020, 0xffff_8180, 0xffff_8081),                     // ldrsh w0, [x1]
        (0xb940_0020, 0x8382_8180, 0x8081_8283),                     // ldr w0, [x1]
        (0xb980_0020, 0xffff_ffff_8382_8180, 0xffff_ffff_8081_8283), // ldrsw x0, [x1]
        (0xf940_0020, 0x8786_8584_8382_8180, 0x8081_8283_8485_8687), // ldr x0, [x1]
    ] {
        assert_eq!(transfer(word).loaded(&bytes, 0, false), [little, 0], "{word:#x}");
        assert_eq!(transfer(word).loaded(&bytes, 0, true), [big, 0], "{word:#x}");
    }
    // ldp q0, q2, [x1]: the second, and the first in the other order.
    let pair = transfer(0xad40_0820);
    assert_eq!(pair.loaded(&bytes, 1, false), [0x9796_9594_9392_9190, 0x9f9e_9d9c_9b9a_9998]);
    assert_eq!(pair.loaded(&bytes, 0, true), [0x8889_8a8b_8c8d_8e8f, 0x8081_8283_8485_8687]);
}

proptest! {
    #[test]
    fn no_word_leads_out_of_bounds(word: u32, base: u64, index: u64, bytes: [u8; MAX_BYTES]) {
        for word in [word, word & !(1 << 25) | 1 << 27] {
            let Some(instruction) = decode(word) else { continue };
            let resolved = instruction.address.resolve(base, |number| if number < 32 { index } else { panic!() });
            prop_assert_eq!(resolved.base.is_some(), instruction.address.writeback != Writeback::None);
            let Operation::Transfer(transfer) = instruction.operation else { continue };
            prop_assert!(matches!(transfer.size, 1 | 2 | 4 | 8 | 16) && transfer.length() <= MAX_BYTES);
            prop_assert!(transfer.first < 32 && transfer.second.is_none_or(|second| second < 32));
            for index in 0..=usize::from(transfer.second.is_some()) {
                transfer.loaded(&bytes, index, word & 1 != 0);
            }
        }
    }

    #[test]
    fn what_is_stored_is_what_a_load_finds(value: [u64; 2], other: [u64; 2], big: bool, scale in 0u8..=4) {
        let size = 1 << scale;
        let transfer = Transfer {
            load: true, size, first: 0, second: Some(1), bank: Bank::Vector, unprivileged: false,
        };
        let mut bytes = [0xa5; MAX_BYTES];
        transfer.store(&mut bytes, 0, value, big);
        transfer.store(&mut bytes, 1, other, big);
        let kept = |[low, high]: [u64; 2]| match size {
            16 => [low, high],
            _ => [data::extend(low, size, false, true), 0],
        };
        prop_assert_eq!(transfer.loaded(&bytes, 0, big), kept(value));
        prop_assert_eq!(transfer.loaded(&bytes, 1, big), kept(other));
        prop_assert!(bytes[transfer.length()..].iter().all(|byte| *byte == 0xa5));
    }

    #[test]
    fn pieces_are_aligned_and_cover_each_byte_once(address: u64, scale in 0u8..=4, pair: bool) {
        let (element, length) = (1 << scale, 1usize << scale << u32::from(pair));
        let mut next = 0;
        for piece in data::pieces(address, length, element) {
            prop_assert_eq!(piece.offset, next);
            prop_assert_eq!(piece.address, address.wrapping_add(next as u64));
            prop_assert!(matches!(piece.size, 1 | 2 | 4 | 8) && piece.address % u64::from(piece.size) == 0);
            let last = next + usize::from(piece.size) - 1;
            prop_assert_eq!(next / usize::from(element), last / usize::from(element), "two elements in one piece");
            next = last + 1;
        }
        prop_assert_eq!(next, length);
        let whole = data::pieces(address & !15, length, element).count();
        prop_assert_eq!(whole, length / usize::from(element.min(8)), "an aligned element is one access, a Q two");
    }
}
