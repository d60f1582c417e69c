//! Instructions assembled by hand, from the manual's tables, and what they do told a second time without a decoder.

use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

const RIP: u64 = 0xffff_ffff_8100_0ff8;
const BASE: u64 = 0xffff_c900_0000_1000;

/// Bytes of memory; what is not there is a fault. Every access is written down.
#[derive(Clone, Default)]
struct Memory {
    bytes: BTreeMap<u64, u8>,
    log: Vec<(bool, u64, u64)>,
    /// Whether stores are refused.
    read_only: bool,
}

impl Memory {
    fn with(at: u64, bytes: &[u8]) -> Self {
        let bytes = bytes.iter().enumerate().map(|(index, byte)| (at.wrapping_add(index as u64), *byte)).collect();
        Self { bytes, ..Self::default() }
    }

    fn number(&self, at: u64, width: u64) -> Option<u64> {
        (0..width)
            .rev()
            .try_fold(0, |value, index| Some(value << 8 | u64::from(*self.bytes.get(&at.wrapping_add(index))?)))
    }

    fn put(&mut self, at: u64, width: u64, value: u64) {
        for index in 0..width {
            self.bytes.insert(at.wrapping_add(index), (value >> (8 * index)) as u8);
        }
    }
}

impl Bus for Memory {
    type Error = u64;

    fn load(&mut self, linear: u64, width: Width) -> Result<u64, u64> {
        self.log.push((false, linear, width.bytes()));
        self.number(linear, width.bytes()).ok_or(linear)
    }

    fn store(&mut self, linear: u64, width: Width, value: u64) -> Result<(), u64> {
        self.log.push((true, linear, width.bytes()));
        self.number(linear, width.bytes()).filter(|_| !self.read_only).ok_or(linear)?;
        self.put(linear, width.bytes(), value);
        Ok(())
    }
}

fn long(code: &[u8]) -> Result<Instruction, Unsupported> {
    Instruction::decode(code, RIP, CodeSize::Bits64)
}

/// How an instruction names its operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    ToMemory,
    FromMemory,
    Immediate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// 0–7: ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, as opcodes number them.
    Arithmetic(u8),
    Test,
    Move,
    Exchange,
    /// Signed?
    Extend(bool),
}

#[derive(Clone, Copy, Debug)]
struct Case {
    what: What,
    form: Form,
    width: u64,
    /// 0–15; there is always REX, so bytes are low ones.
    register: u8,
    /// Of an extension.
    narrow: u64,
    immediate: i32,
}

/// A case as bytes: prefixes, REX, opcode, ModRM with R11 + disp8, immediate (SDM volume 2, 2.1 and appendix B).
fn assemble(case: &Case) -> Vec<u8> {
    let Case { what, form, width, register, immediate, .. } = *case;
    let wide = u8::from(width != 1);
    let (opcode, in_modrm): (Vec<u8>, u8) = match (what, form) {
        (What::Arithmetic(number), Form::ToMemory) => (vec![number << 3 | wide], register),
        (What::Arithmetic(number), Form::FromMemory) => (vec![number << 3 | 2 | wide], register),
        (What::Arithmetic(number), Form::Immediate) => (vec![0x80 | wide], number),
        (What::Test, Form::Immediate) => (vec![0xf6 | wide], 0),
        (What::Test, _) => (vec![0x84 | wide], register),
        (What::Move, Form::ToMemory) => (vec![0x88 | wide], register),
        (What::Move, Form::FromMemory) => (vec![0x8a | wide], register),
        (What::Move, Form::Immediate) => (vec![0xc6 | wide], 0),
        (What::Exchange, _) => (vec![0x86 | wide], register),
        (What::Extend(true), _) if case.narrow == 4 => (vec![0x63], register),
        (What::Extend(signed), _) => {
            (vec![0x0f, if signed { 0xbe } else { 0xb6 } | u8::from(case.narrow != 1)], register)
        }
    };
    let mut code = if width == 2 { vec![0x66] } else { vec![] };
    // REX.B is always there, for R11.
    code.push(0x41 | u8::from(width == 8) << 3 | (in_modrm >> 3) << 2);
    code.extend(opcode);
    code.extend([0x40 | (in_modrm & 7) << 3 | 3, 0x10]);
    if form == Form::Immediate {
        code.extend(&immediate.to_le_bytes()[..width.min(4) as usize]);
    }
    code
}

/// What it does, in wide integers.
fn expected(case: &Case, registers: &Registers, memory: &Memory) -> (Registers, Memory) {
    let (mut after, mut changed) = (*registers, memory.clone());
    let at = registers.general[11].wrapping_add(0x10);
    let bits = case.width as u32 * 8;
    let modulus = 1i128 << bits;
    let narrow = |value: i128| value.rem_euclid(modulus);
    let signed = |value: i128| if value >= modulus / 2 { value - modulus } else { value };
    let index = usize::from(case.register);
    let in_register = i128::from(registers.general[index]).rem_euclid(modulus);
    let in_memory = i128::from(memory.number(at, case.width).unwrap());
    let number = narrow(i128::from(if case.width == 1 { i32::from(case.immediate as i8) } else { case.immediate }));
    let mut set_register = |value: i128| {
        let old = after.general[index];
        after.general[index] = match case.width {
            8 | 4 => value as u64,
            width => old >> (8 * width) << (8 * width) | value as u64,
        };
    };
    match case.what {
        What::Extend(with_sign) => {
            let value = i128::from(memory.number(at, case.narrow).unwrap());
            let half = 1i128 << (case.narrow * 8 - 1);
            set_register(narrow(if with_sign && value >= half { value - 2 * half } else { value }));
        }
        What::Move => match case.form {
            Form::ToMemory => changed.put(at, case.width, in_register as u64),
            Form::FromMemory => set_register(in_memory),
            Form::Immediate => changed.put(at, case.width, number as u64),
        },
        What::Exchange => {
            changed.put(at, case.width, in_register as u64);
            set_register(in_memory);
        }
        What::Arithmetic(_) | What::Test => {
            let (left, right) = match case.form {
                Form::ToMemory => (in_memory, in_register),
                Form::FromMemory => (in_register, in_memory),
                Form::Immediate => (in_memory, number),
            };
            let carry = i128::from(registers.rflags & 1);
            let kind = if let What::Arithmetic(kind) = case.what { kind } else { 8 };
            // The result without bounds, without sign and with it; and of the lowest four bits.
            let bound = |op: fn(i128, i128, i128) -> i128, carry| {
                (op(left, right, carry), op(signed(left), signed(right), carry), op(left % 16, right % 16, carry))
            };
            let plain = |value: i128| (value, signed(value), value % 16);
            let add: fn(i128, i128, i128) -> i128 = |left, right, carry| left + right + carry;
            let subtract: fn(i128, i128, i128) -> i128 = |left, right, carry| left - right - carry;
            let (unsigned, with_sign, nibble) = match kind {
                0 => bound(add, 0),
                1 => plain(left | right),
                2 => bound(add, carry),
                3 => bound(subtract, carry),
                4 | 8 => plain(left & right),
                6 => plain(left ^ right),
                _ => bound(subtract, 0),
            };
            let value = narrow(unsigned);
            let flags = [
                (0, unsigned != value),
                (2, (value as u8).count_ones().is_multiple_of(2)),
                (4, !(0..16).contains(&nibble)),
                (6, value == 0),
                (7, value >= modulus / 2),
                (11, with_sign != signed(value)),
            ];
            for (bit, on) in flags {
                after.rflags = after.rflags & !(1 << bit) | u64::from(on) << bit;
            }
            match (kind, case.form) {
                (7 | 8, _) => {}
                (_, Form::FromMemory) => set_register(value),
                _ => changed.put(at, case.width, value as u64),
            }
        }
    }
    after.rip = registers.rip + assemble(case).len() as u64;
    (after, changed)
}

fn cases() -> impl Strategy<Value = Case> {
    let what = prop_oneof![
        (0u8..8).prop_map(What::Arithmetic),
        Just(What::Test),
        Just(What::Move),
        Just(What::Exchange),
        any::<bool>().prop_map(What::Extend),
    ];
    let form = prop_oneof![Just(Form::ToMemory), Just(Form::FromMemory), Just(Form::Immediate)];
    let immediate = prop_oneof![any::<i32>(), -2i32..3, Just(i32::MIN), Just(0x7f), Just(0x80)];
    (what, form, 0u32..4, 0u8..16, 0u32..3, immediate).prop_filter_map(
        "there is such an instruction",
        |(what, form, size, register, narrow, immediate)| {
            let (width, narrow) = (1 << size, 1 << narrow);
            let form = match what {
                What::Exchange | What::Extend(_) => Form::FromMemory,
                What::Test if form == Form::FromMemory => Form::ToMemory,
                _ => form,
            };
            let extends = matches!(what, What::Extend(_));
            let right = !extends || narrow < width && (narrow != 4 || what == What::Extend(true) && width == 8);
            right.then_some(Case { what, form, width, register, narrow, immediate })
        },
    )
}

/// Numbers whose flags are interesting.
fn numbers() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0u64..3,
        Just(u64::MAX),
        Just(1 << 63),
        Just(0x7fff_ffff),
        Just(0x8000_8080),
        Just(0x7f7f)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn every_form_does_what_the_manual_says(
        case in cases(),
        values in prop::collection::vec(numbers(), 16),
        content in numbers(),
        flags in 0u64..0x1000,
    ) {
        let mut registers = Registers { rip: RIP, rflags: flags | 2, ..Registers::default() };
        registers.general.copy_from_slice(&values);
        registers.general[11] = BASE;
        let memory = Memory::with(BASE + 0x10, &content.to_le_bytes());
        let (registers_after, memory_after) = expected(&case, &registers, &memory);
        let code = assemble(&case);
        let instruction = long(&code).map_err(|error| TestCaseError::fail(format!("{code:x?}: {error}")))?;
        let (mut got, mut bus) = (registers, memory.clone());
        prop_assert_eq!(instruction.execute(&mut got, &mut bus), Ok(Progress::Done));
        prop_assert_eq!(got, registers_after, "{:x?}", code);
        prop_assert_eq!(&bus.bytes, &memory_after.bytes);
        let width = instruction.access_width().bytes();
        prop_assert!(bus.log.iter().all(|(_, at, bytes)| (*at, *bytes) == (BASE + 0x10, width)));
        // A bus that refuses leaves the registers.
        let (mut got, mut bus) = (registers, Memory { read_only: true, ..memory.clone() });
        if instruction.execute(&mut got, &mut bus).is_err() {
            prop_assert_eq!((got, bus.bytes), (registers, memory.bytes));
        }
        // Every shorter code is cut off.
        for end in 0..code.len() {
            prop_assert_eq!(long(&code[..end]).err(), Some(Unsupported::Truncated));
        }
    }

    /// No bytes and no registers do harm, in any mode.
    #[test]
    fn any_code(code in prop::collection::vec(any::<u8>(), 0..16), values in prop::collection::vec(any::<u64>(), 24), mode in 0..3) {
        let size = [CodeSize::Bits16, CodeSize::Bits32, CodeSize::Bits64][mode as usize];
        if let Ok(instruction) = Instruction::decode(&code, values[16], size) {
            let mut registers = Registers { rip: values[16], rflags: values[17], ..Registers::default() };
            registers.general.copy_from_slice(&values[..16]);
            registers.bases.copy_from_slice(&values[18..]);
            let before = registers;
            struct Anything;
            impl Bus for Anything {
                type Error = ();
                fn load(&mut self, linear: u64, width: Width) -> Result<u64, ()> {
                    if linear.is_multiple_of(5) { Err(()) } else { Ok(linear & width.mask()) }
                }
                fn store(&mut self, linear: u64, width: Width, value: u64) -> Result<(), ()> {
                    assert_eq!(value & !width.mask(), 0, "no bits that are not stored");
                    if linear.is_multiple_of(7) { Err(()) } else { Ok(()) }
                }
            }
            if instruction.execute(&mut registers, &mut Anything).is_err() {
                prop_assert_eq!(registers, before);
            }
        }
    }
}

/// Code that names memory in one of all ways: prefixes, an opcode, and bytes that the decoder makes of it what it may.
fn naming_memory() -> impl Strategy<Value = Vec<u8>> {
    let prefix = prop::sample::select(vec![vec![], vec![0x67], vec![0x64], vec![0x65, 0x67], vec![0x2e], vec![0x66]]);
    let rex = prop_oneof![Just(vec![]), (0x40u8..0x50).prop_map(|rex| vec![rex])];
    let opcodes: [&[u8]; 11] =
        [&[0x88], &[0x8b], &[0x01], &[0x3a], &[0xa0], &[0xa3], &[0xc7], &[0xaa], &[0xa5], &[0xad], &[0x0f, 0xb6]];
    let opcode = prop::sample::select(opcodes.map(<[u8]>::to_vec).to_vec());
    let rest = prop::collection::vec(any::<u8>(), 10);
    (prefix, rex, opcode, rest).prop_map(|parts| [parts.0, parts.1, parts.2, parts.3].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    /// What is added up for an address is what the decoder adds up.
    #[test]
    fn addresses_are_the_decoders(
        code in naming_memory(), general in prop::array::uniform16(numbers()), bases in prop::array::uniform6(numbers()),
        mode in prop::sample::select(vec![CodeSize::Bits16, CodeSize::Bits32, CodeSize::Bits64]),
    ) {
        use iced_x86::{Decoder, DecoderOptions, OpKind, Register};
        let registers = Registers { general, rip: RIP, rflags: 0, bases };
        let Ok(instruction) = Instruction::decode(&code, RIP, mode) else { return Ok(()) };
        let decoded = Decoder::with_ip(mode.bits(), &code, RIP, DecoderOptions::NONE).decode();
        let value = |register: Register, _, _| {
            let segment = (register as usize).wrapping_sub(Register::ES as usize);
            if segment < 6 {
                return Some(if mode == CodeSize::Bits64 && segment < 4 { 0 } else { bases[segment] });
            }
            registers::part(register).map(|part| registers.get(part))
        };
        let addresses: Vec<u64> = (0..decoded.op_count())
            .filter(|operand| decoded.op_kind(*operand) >= OpKind::MemorySegSI)
            .map(|operand| decoded.virtual_address(operand, 0, value).unwrap() & mode.linear())
            .collect();
        let [memory, destination] = [&instruction.memory, &instruction.destination]
            .map(|address| instruction.linear(address, &registers));
        let expected = match instruction.operation {
            Operation::Copy => vec![destination, memory],
            Operation::Fill => vec![destination],
            _ => vec![memory],
        };
        prop_assert_eq!(addresses, expected, "{:x?}", code);
        prop_assert_eq!(instruction.length(), decoded.len());
    }

    /// An instruction is recalled with all of its words as they were, and with one changed it is not.
    #[test]
    fn what_is_recalled_is_what_is_there(
        rips in prop::collection::vec(0u64..64, 1..20), count in 0..=memo::MOST_WORDS, changed in 0..memo::MOST_WORDS,
    ) {
        let mut memo = memo::Memo::new();
        let at = |word: u64| entresol_addr::Hpa::new(word * 8);
        let word = |number: u64| memo::Held { at: at(number), value: number * 3 };
        let place = |rip| memo::Place { rip, ..memo::Place::default() };
        // MOV [RAX], CL with a displacement that says which it is.
        let instruction = |rip: u64| Instruction::decode(&[0x88, 0x48, rip as u8], rip, CodeSize::Bits64).unwrap();
        let mut last = BTreeMap::new();
        for (turn, rip) in rips.iter().enumerate() {
            memo.keep(&place(*rip), turn, (0..count as u64).map(word), &instruction(*rip));
            last.insert(*rip, turn);
        }
        let load = |from: entresol_addr::Hpa| from.get() / 8 * 3;
        prop_assert_eq!(memo.recall(&place(rips[rips.len() - 1]), |_| true, load), Some(&instruction(rips[rips.len() - 1])));
        for (rip, turn) in last {
            // Another may have taken its way.
            let mut asked = None;
            let found = memo.recall(&place(rip), |kept| { asked = Some(*kept); true }, load).copied();
            prop_assert!(found.is_none_or(|found| found == instruction(rip) && asked == Some(turn)));
            prop_assert_eq!(memo.recall(&place(rip), |_| false, load), None, "what is not kept");
            let other = |from| if from == at(changed as u64) { u64::MAX } else { load(from) };
            prop_assert_eq!(memo.recall(&place(rip), |_| true, other).is_some(), found.is_some() && changed >= count);
            for place in [
                memo::Place { root: 1, ..place(rip) }, memo::Place { user: true, ..place(rip) },
                memo::Place { base: 1, ..place(rip) }, memo::Place { cr0: 1, ..place(rip) },
                memo::Place { cr4: 1, ..place(rip) }, memo::Place { efer: 1, ..place(rip) },
                memo::Place { attributes: 1, ..place(rip) },
            ] {
                prop_assert_eq!(memo.recall(&place, |_| true, load), None);
            }
        }
    }
}

#[test]
fn more_words_than_there_is_room_for_are_not_kept() {
    let mut memo = memo::Memo::new();
    let instruction = long(&[0x88, 0x08]).unwrap();
    let words = (0..=memo::MOST_WORDS as u64).map(|at| memo::Held { at: entresol_addr::Hpa::new(at * 8), value: 0 });
    memo.keep(&memo::Place::default(), (), words, &instruction);
    assert_eq!(memo.recall(&memo::Place::default(), |()| true, |_| 0), None);
}

fn registers(pairs: &[(usize, u64)]) -> Registers {
    let mut registers = Registers { rip: RIP, rflags: 2, ..Registers::default() };
    for (index, value) in pairs {
        registers.general[*index] = *value;
    }
    registers
}

/// Runs until it is done.
fn run(code: &[u8], registers: &mut Registers, memory: &mut Memory) -> u32 {
    let mut steps = 0;
    loop {
        steps += 1;
        match long(code).unwrap().execute(registers, memory).unwrap() {
            Progress::Done => return steps,
            Progress::Again => assert_eq!(registers.rip, RIP),
        }
    }
}

#[test]
fn strings_go_one_step_at_a_time() {
    let (mut memory, filler) = (Memory::with(BASE, &[0; 64]), [(0, 0x1122_3344_5566_7788), (1, 3), (7, BASE)]);
    let mut it = registers(&filler);
    assert_eq!(run(&[0xf3, 0xab], &mut it, &mut memory), 3, "REP STOSD");
    assert_eq!((it.general[1], it.general[7], it.rip), (0, BASE + 12, RIP + 2));
    assert_eq!((memory.number(BASE + 8, 8), memory.number(BASE, 4)), (Some(0x5566_7788), Some(0x5566_7788)));
    let mut it = registers(&[(1, 2), (6, BASE + 8), (7, BASE + 32)]);
    it.rflags |= 1 << 10;
    assert_eq!(run(&[0xf3, 0x48, 0xa5], &mut it, &mut memory), 2, "REP MOVSQ, downwards");
    assert_eq!((it.general[6], it.general[7]), (BASE - 8, BASE + 16));
    assert_eq!(memory.number(BASE + 24, 8), memory.number(BASE, 8));
    let mut it = registers(&[(1, 0), (7, 0)]);
    assert_eq!(run(&[0xf3, 0xaa], &mut it, &mut memory), 1, "nothing to do touches nothing");
    assert_eq!((it.general[7], it.rip), (0, RIP + 2));
    let mut it = registers(&[(0, !0), (6, BASE)]);
    assert_eq!(run(&[0x66, 0xad], &mut it, &mut memory), 1, "LODSW");
    assert_eq!((it.general[0], it.general[6]), (0xffff_ffff_ffff_7788, BASE + 2));
    let mut it = registers(&[(1, 0xf_0000_0002), (6, 5 << 32 | 0x1000), (7, 0x2000)]);
    let mut low = Memory::with(0x1000, &[7; 0x1010]);
    assert_eq!(run(&[0x67, 0xf3, 0xa4], &mut it, &mut low), 2, "32-bit addresses and count");
    assert_eq!((it.general[1], it.general[6], it.general[7]), (0, 0x1002, 0x2002));
}

#[test]
fn a_string_that_faults_in_the_middle_stays_there() {
    let mut memory = Memory::with(BASE, &[0; 8]);
    let mut it = registers(&[(0, 0x41), (1, 3), (7, BASE + 7)]);
    let stos = long(&[0xf3, 0xaa]).unwrap();
    assert_eq!(stos.execute(&mut it, &mut memory), Ok(Progress::Again));
    let before = it;
    assert_eq!(stos.execute(&mut it, &mut memory), Err(BASE + 8));
    assert_eq!((it, it.general[1], it.rip), (before, 2, RIP));
}

#[test]
fn addresses_are_made_as_the_processor_makes_them() {
    let at = |code: &[u8], size, it: &Registers| {
        let mut memory = Memory::default();
        let instruction = Instruction::decode(code, it.rip, size).unwrap();
        instruction.execute(&mut it.clone(), &mut memory).unwrap_err()
    };
    let mut it = registers(&[(0, 0x1_0000_0100), (3, 0x20), (5, 0x300), (6, 0xfff0)]);
    it.bases = [0x10_0000, 0x20_0000, 0x30_0000, 0x40_0000, 0x50_0000, 0x60_0000];
    let wide = CodeSize::Bits64;
    assert_eq!(at(&[0x8b, 0x44, 0x98, 0xf0], wide, &it), 0x1_0000_0170, "[rax + rbx*4 - 16]");
    assert_eq!(at(&[0x67, 0x8b, 0x44, 0x98, 0xf0], wide, &it), 0x170, "the same by 32 bits");
    assert_eq!(at(&[0x8b, 0x05, 0x10, 0, 0, 0], wide, &it), RIP + 6 + 0x10, "[rip + 16]");
    assert_eq!(at(&[0x65, 0x8b, 0x03], wide, &it), 0x60_0020, "gs");
    assert_eq!(at(&[0x2e, 0x8b, 0x03], wide, &it), 0x20, "cs has no base in 64-bit code");
    assert_eq!(at(&[0xa1, 1, 2, 3, 4, 5, 6, 7, 0], wide, &it), 0x0007_0605_0403_0201, "a whole address");
    assert_eq!(at(&[0x8b, 0x03], CodeSize::Bits32, &it), 0x40_0020, "ds");
    assert_eq!(at(&[0x8b, 0x45, 0x01], CodeSize::Bits32, &it), 0x30_0301, "ss by ebp");
    assert_eq!(at(&[0xf3, 0xaa], CodeSize::Bits32, &Registers { general: [1; 16], ..it }), 0x10_0001, "es");
    assert_eq!(at(&[0x8b, 0x00], CodeSize::Bits16, &it), 0x41_0010 & !0x1_0000, "[bx + si] wraps at 64 KiB");
    it.bases[3] = 0xffff_ffff;
    assert_eq!(at(&[0x8b, 0x03], CodeSize::Bits32, &it), 0x1f, "a linear address of 32 bits wraps");
}

#[test]
fn the_next_instruction_is_where_the_mode_says() {
    let next = |size, rip| {
        let mut it = Registers { rip, ..registers(&[(3, BASE & 0xffff), (7, BASE & 0xffff)]) };
        let mut memory = Memory::with(BASE & 0xffff, &[0; 8]);
        Instruction::decode(&[0x8a, 0x1f], rip, size).unwrap().execute(&mut it, &mut memory).unwrap();
        it.rip
    };
    assert_eq!(next(CodeSize::Bits16, 0xfffe), 0);
    assert_eq!(next(CodeSize::Bits32, 0xffff_fffe), 0);
    assert_eq!(next(CodeSize::Bits64, RIP), RIP + 2);
    let sizes = [(true, true, false), (true, false, true), (false, true, false), (false, true, true)];
    let sizes = sizes.map(|(long, l, d)| CodeSize::of(long, l, d).bits());
    assert_eq!(sizes, [64, 32, 16, 32]);
}

#[test]
fn high_bytes_are_bytes() {
    let mut memory = Memory::with(BASE, &[0x5a; 4]);
    let mut it = registers(&[(2, 0x1122_3344), (3, BASE)]);
    run(&[0x8a, 0x33], &mut it, &mut memory);
    assert_eq!(it.general[2], 0x1122_5a44, "MOV DH, [RBX]");
    it = registers(&[(2, 0x1122_3344), (3, BASE)]);
    run(&[0x88, 0x33], &mut it, &mut memory);
    assert_eq!(memory.number(BASE, 4), Some(0x5a5a_5a33));
}

#[test]
fn what_is_not_carried_out_has_its_reason() {
    use Unsupported::*;
    #[rustfmt::skip]
    let table: &[(&[u8], Unsupported)] = &[
        (&[], Truncated),
        (&[0x8b], Truncated),
        (&[0x0f, 0x0b], NoMemory),
        (&[0x06, 0x90], Invalid),
        (&[0xf0, 0x8b, 0x03], Invalid),
        (&[0x66; 15], Invalid),
        (&[0x89, 0xd8], NoMemory),
        (&[0x0f, 0xb6, 0xc3], NoMemory),
        (&[0x90], NoMemory),
        (&[0x0f, 0xab, 0x03], BitString),
        (&[0xf0, 0x0f, 0xba, 0x2b, 1], BitString),
        (&[0xf0, 0x0f, 0xb1, 0x0b], Atomic),
        (&[0x0f, 0xc1, 0x0b], Atomic),
        (&[0xf0, 0x0f, 0xc7, 0x0b], Atomic),
        (&[0x0f, 0x28, 0x03], Vector),
        (&[0x0f, 0x6f, 0x03], Vector),
        (&[0x66, 0x0f, 0x6e, 0x03], Vector),
        (&[0xd9, 0x03], Vector),
        (&[0xff, 0x33], ControlFlow),
        (&[0xff, 0x13], ControlFlow),
        (&[0xff, 0x23], ControlFlow),
        (&[0x6c], Port),
        (&[0xf3, 0x6f], Port),
        (&[0x8e, 0x1b], System),
        (&[0x8c, 0x1b], System),
        (&[0x0f, 0x01, 0x13], System),
        (&[0xf3, 0xa6], Comparison),
        (&[0xa7], Comparison),
        (&[0xf2, 0xae], Comparison),
        (&[0xff, 0x03], Other),
        (&[0xc1, 0x23, 3], Other),
    ];
    for (code, why) in table {
        assert_eq!(long(code).err(), Some(*why), "{code:x?}");
    }
    let texts: std::collections::BTreeSet<String> = table.iter().map(|(_, why)| format!("{why}")).collect();
    assert_eq!(texts.len(), 11, "each has words of its own");
}

#[test]
fn bytes_come_from_two_pages_at_most() {
    let mut asked = Vec::new();
    let mut read = |at: u64, to: &mut [u8], missing: u64| {
        asked.push((at, to.len()));
        to.fill(0x90);
        if at == missing { Err(at) } else { Ok(()) }
    };
    assert_eq!(fetch(0x1000, |at, to| read(at, to, 0)).unwrap().as_slice(), [0x90; 15]);
    let two = fetch(0x1ffd, |at, to| read(at, to, 0)).unwrap();
    assert_eq!((two.as_slice().len(), two.stopped), (15, None));
    let cut = fetch(0x1ffd, |at, to| read(at, to, 0x2000)).unwrap();
    assert_eq!((cut.as_slice().len(), cut.stopped), (3, Some(0x2000)));
    assert_eq!(fetch(0x1ffd, |at, to| read(at, to, 0x1ffd)).err(), Some(0x1ffd));
    assert_eq!(fetch(u64::MAX, |at, to| read(at, to, 1)).unwrap().as_slice().len(), 15, "and around the end");
    assert_eq!(
        asked,
        [(0x1000, 15), (0x1ffd, 3), (0x2000, 12), (0x1ffd, 3), (0x2000, 12), (0x1ffd, 3), (u64::MAX, 1), (0, 14)]
    );
    prepare();
}
