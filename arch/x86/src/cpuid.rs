//! What a guest sees of its processor: CPUID, leaf by leaf.
//!
//! Purpose: the machine's own answer, less what a guest cannot have, plus what it has from us (APM volume 3, appendix E; SDM
//! volume 2, CPUID). Everything is by permission: a leaf or a flag that is not named here is zero, so a new processor brings
//! nothing that nobody has thought of.
//!
//! What a guest never sees: SVM and VMX; MONITOR; machine checks, performance counters and debug stores; speculation controls and
//! other flags whose MSRs [`msr`](crate::msr) refuses; RDTSCP and RDPID, which would need TSC_AUX switched; protection keys,
//! AVX-512 and AMX, whose state is not switched; five-level paging; SME, SEV. What it always sees: the hypervisor's flag, x2APIC,
//! the TSC deadline, and a local APIC timer that runs in every state.
//!
//! Invariants: pure and total. A guest's answers are the same on every vCPU but for its number and CR4.OSXSAVE.

/// The four registers of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// What an answer depends on besides the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vcpu {
    /// Its number, which is its APIC's identity.
    pub id: u8,
    /// How many there are, 1–128.
    pub count: u8,
    /// Bits of guest physical addresses.
    pub physical_bits: u8,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// XCR0.
    pub xcr0: u64,
    /// The states that the world switch carries, of [`STATES`]; 0: those of FXSAVE, and the guest has no XSAVE.
    pub states: u64,
    /// There is a kvm-clock.
    pub clock: bool,
    /// It runs on shadow tables, which no process-context identifiers tell apart.
    pub shadow: bool,
}

/// The states that may be switched with XSAVE: x87, SSE, AVX.
pub const STATES: u64 = 0b111;
/// Bytes of an XSAVE area before what follows the legacy part and the header.
const XSAVE_LEGACY: u32 = 512 + 64;

/// The last leaf of each range.
const LAST_BASIC: u32 = 0xd;
const LAST_EXTENDED: u32 = 0x8000_0008;
const EXTENDED: u32 = 0x8000_0000;
/// Where hypervisors answer.
const HYPERVISOR: u32 = 0x4000_0000;

/// Bits of a word, by number.
const fn bits(numbers: &[u32]) -> u32 {
    let mut word = 0;
    let mut index = 0;
    while index < numbers.len() {
        word |= 1 << numbers[index];
        index += 1;
    }
    word
}

/// Leaf 1 ECX: SSE3, PCLMULQDQ, SSSE3, FMA, CMPXCHG16B, PCID, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE, AVX, F16C, RDRAND.
const LEAF_1_ECX: u32 = bits(&[0, 1, 9, 12, 13, 17, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
const PCID: u32 = 1 << 17;
/// In leaf 7 EBX.
const INVPCID: u32 = 1 << 10;
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const XSAVE: u32 = 1 << 26;
/// FMA, AVX, F16C; in leaf 7 AVX2; VAES, VPCLMULQDQ: what needs the upper halves.
const LEAF_1_ECX_AVX: u32 = bits(&[12, 28, 29]);
const LEAF_7_EBX_AVX: u32 = 1 << 5;
const LEAF_7_ECX_AVX: u32 = bits(&[9, 10]);
const AVX: u64 = 0b100;
const OSXSAVE: u32 = 1 << 27;
const GUEST: u32 = 1 << 31;
/// Leaf 1 EDX: FPU, VME, DE, PSE, TSC, MSR, PAE, CX8, SEP, PGE, CMOV, PAT, PSE36, CLFSH, MMX, FXSR, SSE, SSE2.
const LEAF_1_EDX: u32 = bits(&[0, 1, 2, 3, 4, 5, 6, 8, 11, 13, 15, 16, 17, 19, 23, 24, 25, 26]);
const APIC: u32 = 1 << 9;
/// So that kernels believe PAT; the MSRs say that all is write-back and nothing can be changed.
const MTRR: u32 = 1 << 12;
const HTT: u32 = 1 << 28;
/// Leaf 6 EAX: ARAT.
const LEAF_6_EAX: u32 = 1 << 2;
/// Leaf 7 EBX: FSGSBASE, BMI1, AVX2, SMEP, BMI2, ERMS, INVPCID, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB, SHA.
const LEAF_7_EBX: u32 = bits(&[0, 3, 5, 7, 8, 9, 10, 18, 19, 20, 23, 24, 29]);
/// Leaf 7 ECX: UMIP, GFNI, VAES, VPCLMULQDQ.
const LEAF_7_ECX: u32 = bits(&[2, 8, 9, 10]);
/// Leaf 7 EDX: FSRM.
const LEAF_7_EDX: u32 = 1 << 4;
/// Leaf Dh, subleaf 1 EAX: XSAVEOPT, XSAVEC, XGETBV with ECX 1. No XSAVES.
const LEAF_D1_EAX: u32 = 0b111;
/// Leaf 8000_0001h ECX: LAHF, CR8 by LOCK, ABM, SSE4A, misaligned SSE, PREFETCHW.
const LEAF_81_ECX: u32 = bits(&[0, 4, 5, 6, 7, 8]);
/// Leaf 8000_0001h EDX: SYSCALL, NX, MMXEXT, FFXSR, 1 GiB pages, long mode; and what AMD repeats of leaf 1.
const LEAF_81_EDX: u32 = bits(&[11, 20, 22, 25, 26, 29]) | LEAF_1_EDX & !bits(&[11, 19, 25, 26]);
/// Leaf 8000_0007h EDX: the TSC's rate is constant.
const LEAF_87_EDX: u32 = 1 << 8;
/// Leaf 8000_0008h EBX: CLZERO, pointers saved by FXSAVE.
const LEAF_88_EBX: u32 = bits(&[0, 2]);
/// KVM's features: both generations of the clock's MSRs, no delays for ports, a clock that is the same on every vCPU.
const CLOCK_FEATURES: u32 = bits(&[0, 1, 3, 24]);

impl Vcpu {
    const fn has_avx(&self) -> bool {
        self.states & AVX != 0
    }
}

/// The answer to `leaf` and `subleaf`, where the machine itself answers `machine(leaf, subleaf)`.
pub fn answer(leaf: u32, subleaf: u32, vcpu: &Vcpu, machine: impl Fn(u32, u32) -> Words) -> Words {
    let count = u32::from(vcpu.count);
    match leaf {
        0 => Words { eax: machine(0, 0).eax.clamp(1, LAST_BASIC), ..machine(0, 0) },
        1 => features(vcpu, machine(1, 0)),
        2 if within(leaf, &machine) => machine(2, 0),
        4 if within(leaf, &machine) => caches(machine(4, subleaf), count),
        6 => Words { eax: LEAF_6_EAX, ..Words::default() },
        7 if subleaf == 0 && within(leaf, &machine) => {
            let own = machine(7, 0);
            let (no_ebx, no_ecx) = if vcpu.has_avx() { (0, 0) } else { (LEAF_7_EBX_AVX, LEAF_7_ECX_AVX) };
            let no_ebx = no_ebx | if vcpu.shadow { INVPCID } else { 0 };
            let (ebx, ecx) = (own.ebx & LEAF_7_EBX & !no_ebx, own.ecx & LEAF_7_ECX & !no_ecx);
            Words { eax: 0, ebx, ecx, edx: own.edx & LEAF_7_EDX }
        }
        0xb => topology(subleaf, vcpu),
        0xd if vcpu.states != 0 && within(leaf, &machine) && machine(1, 0).ecx & XSAVE != 0 => {
            states(subleaf, vcpu, &machine)
        }
        HYPERVISOR if vcpu.clock => signature(HYPERVISOR + 1),
        0x4000_0001 if vcpu.clock => Words { eax: CLOCK_FEATURES, ..Words::default() },
        EXTENDED => Words { eax: machine(EXTENDED, 0).eax.clamp(EXTENDED + 1, LAST_EXTENDED), ..machine(EXTENDED, 0) },
        0x8000_0001 => {
            let own = machine(leaf, 0);
            Words { ecx: own.ecx & LEAF_81_ECX, edx: own.edx & LEAF_81_EDX, ..own }
        }
        0x8000_0002..=0x8000_0006 if within(leaf, &machine) => machine(leaf, 0),
        0x8000_0007 if within(leaf, &machine) => Words { edx: machine(leaf, 0).edx & LEAF_87_EDX, ..Words::default() },
        0x8000_0008 => {
            let own = machine(leaf, 0);
            let eax = own.eax & 0xff00 | u32::from(vcpu.physical_bits).min(own.eax & 0xff);
            Words { eax, ebx: own.ebx & LEAF_88_EBX, ecx: (count - 1) | width(count) << 12, edx: 0 }
        }
        _ => Words::default(),
    }
}

/// Whether the machine has the leaf.
fn within(leaf: u32, machine: &impl Fn(u32, u32) -> Words) -> bool {
    leaf <= machine(leaf & EXTENDED, 0).eax
}

/// Bits that number `count` vCPUs.
const fn width(count: u32) -> u32 {
    u32::BITS - (count - 1).leading_zeros()
}

fn features(vcpu: &Vcpu, own: Words) -> Words {
    let (id, count) = (u32::from(vcpu.id), u32::from(vcpu.count));
    let mut ecx = own.ecx & LEAF_1_ECX;
    if vcpu.states == 0 {
        ecx &= !XSAVE;
    }
    if !vcpu.has_avx() {
        ecx &= !LEAF_1_ECX_AVX;
    }
    if vcpu.shadow {
        ecx &= !PCID;
    }
    ecx |= X2APIC | TSC_DEADLINE | GUEST;
    if vcpu.osxsave && ecx & XSAVE != 0 {
        ecx |= OSXSAVE;
    }
    let mut edx = own.edx & LEAF_1_EDX | APIC | MTRR;
    if count > 1 {
        edx |= HTT;
    }
    Words { eax: own.eax, ebx: own.ebx & 0xffff | count << 16 | id << 24, ecx, edx }
}

/// Intel's caches: each vCPU has its own, all are of one package.
const fn caches(own: Words, count: u32) -> Words {
    if own.eax & 0x1f == 0 {
        return own;
    }
    let cores = if count > 64 { 63 } else { count - 1 };
    Words { eax: own.eax & 0x3fff | cores << 26, ..own }
}

/// One thread for each core, all cores in one package.
fn topology(subleaf: u32, vcpu: &Vcpu) -> Words {
    let count = u32::from(vcpu.count);
    let (eax, ebx, kind) = match subleaf {
        0 => (0, 1, 1),
        1 => (width(count), count, 2),
        _ => (0, 0, 0),
    };
    Words { eax, ebx, ecx: subleaf & 0xff | kind << 8, edx: u32::from(vcpu.id) }
}

/// The states of XSAVE, and how large they are in the standard form, which is also the largest compacted one.
fn states(subleaf: u32, vcpu: &Vcpu, machine: &impl Fn(u32, u32) -> Words) -> Words {
    let offered = u64::from(machine(0xd, 0).eax) & STATES & vcpu.states;
    let avx = machine(0xd, 2);
    let size = |states: u64| {
        let end = if states & 0b100 != 0 { avx.ebx.saturating_add(avx.eax) } else { 0 };
        end.max(XSAVE_LEGACY)
    };
    match subleaf {
        0 => Words { eax: offered as u32, ebx: size(vcpu.xcr0 & offered), ecx: size(offered), edx: 0 },
        1 => Words { eax: machine(0xd, 1).eax & LEAF_D1_EAX, ebx: size(vcpu.xcr0 & offered), ..Words::default() },
        2 if offered & 0b100 != 0 => Words { edx: 0, ..avx },
        _ => Words::default(),
    }
}

/// KVM's signature, whose clock this is.
const fn signature(last: u32) -> Words {
    Words {
        eax: last,
        ebx: u32::from_le_bytes(*b"KVMK"),
        ecx: u32::from_le_bytes(*b"VMKV"),
        edx: u32::from_le_bytes(*b"M\0\0\0"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const VCPU: Vcpu =
        Vcpu { id: 3, count: 4, physical_bits: 40, osxsave: true, xcr0: 7, states: 7, clock: true, shadow: false };

    /// A machine with every flag and more leaves than anybody knows.
    fn all(leaf: u32, subleaf: u32) -> Words {
        match (leaf, subleaf) {
            (0, _) => Words { eax: 0x20, ebx: 0x6874_7541, ecx: 0x444d_4163, edx: 0x6974_6e65 },
            (EXTENDED, _) => Words { eax: 0x8000_0020, ..Words::default() },
            (0x8000_0008, _) => Words { eax: 0x3030, ebx: !0, ecx: !0, edx: !0 },
            (0xd, 2) => Words { eax: 256, ebx: 576, ecx: 0, edx: 0 },
            _ => Words { eax: !0, ebx: !0, ecx: !0, edx: !0 },
        }
    }

    fn none(_: u32, _: u32) -> Words {
        Words::default()
    }

    fn ask(leaf: u32, subleaf: u32) -> Words {
        answer(leaf, subleaf, &VCPU, all)
    }

    #[test]
    fn what_a_guest_cannot_have_is_not_there() {
        assert_eq!((ask(0, 0).eax, ask(EXTENDED, 0).eax), (0xd, 0x8000_0008));
        let one = ask(1, 0);
        for (bit, name) in [(3, "MONITOR"), (5, "VMX"), (2, "DTES64"), (15, "PDCM")] {
            assert_eq!(one.ecx >> bit & 1, 0, "{name}");
        }
        for (bit, name) in [(7, "MCE"), (14, "MCA"), (21, "DS"), (22, "ACPI")] {
            assert_eq!(one.edx >> bit & 1, 0, "{name}");
        }
        let extended = ask(0x8000_0001, 0);
        for (bit, name) in
            [(2, "SVM"), (3, "ExtApicSpace"), (10, "IBS"), (22, "TopologyExtensions"), (23, "PerfCtrExtCore")]
        {
            assert_eq!(extended.ecx >> bit & 1, 0, "{name}");
        }
        assert_eq!(extended.edx >> 27 & 1, 0, "RDTSCP");
        let seven = ask(7, 0);
        assert_eq!(
            (seven.ebx & (1 << 16 | 1 << 1), seven.ecx & (1 << 3 | 1 << 16 | 1 << 22), seven.edx >> 26),
            (0, 0, 0)
        );
        for leaf in [3, 5, 8, 9, 0xa, 0xc, 0xe, 0x10, 0x12, 0x14, 0x1f, 0x20, 0x4000_0002, 0x8000_000a, 0x8000_001f, !0]
        {
            assert_eq!(ask(leaf, 0), Words::default(), "{leaf:#x}");
        }
    }

    #[test]
    fn what_a_guest_has_from_us_is_there() {
        let one = ask(1, 0);
        assert_eq!(one.ecx & (1 << 21 | 1 << 24 | 1 << 27 | 1 << 31), 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31);
        assert_eq!(one.ebx >> 16, 3 << 8 | 4);
        assert_eq!(answer(1, 0, &Vcpu { osxsave: false, ..VCPU }, all).ecx >> 27 & 1, 0);
        let bare = answer(1, 0, &VCPU, none);
        assert_eq!(
            (bare.ecx, bare.edx),
            (X2APIC | TSC_DEADLINE | GUEST, APIC | MTRR | HTT),
            "whatever the machine has"
        );
        assert_eq!(answer(6, 0, &VCPU, none).eax, 4);
        let kvm = ask(0x4000_0000, 0);
        let text = [kvm.ebx, kvm.ecx, kvm.edx].map(u32::to_le_bytes).concat();
        assert_eq!((kvm.eax, &text[..]), (0x4000_0001, &b"KVMKVMKVM\0\0\0"[..]));
        assert_eq!(ask(0x4000_0001, 0).eax, 0x100_000b);
        let shadow = Vcpu { shadow: true, ..VCPU };
        for (leaf, lost) in [(1, [0, 0, PCID]), (7, [0, INVPCID, 0])] {
            let (with, without) = (answer(leaf, 0, &VCPU, all), answer(leaf, 0, &shadow, all));
            let difference = [with.eax ^ without.eax, with.ebx ^ without.ebx, with.ecx ^ without.ecx];
            assert_eq!(difference, lost, "leaf {leaf}");
        }
        let without = Vcpu { clock: false, ..VCPU };
        assert_eq!(answer(0x4000_0000, 0, &without, all), Words::default(), "no signature without the clock");
    }

    #[test]
    fn vcpus_are_cores_of_one_package() {
        assert_eq!(ask(0xb, 0), Words { eax: 0, ebx: 1, ecx: 0x100, edx: 3 });
        assert_eq!(ask(0xb, 1), Words { eax: 2, ebx: 4, ecx: 0x201, edx: 3 });
        assert_eq!(ask(0xb, 2), Words { eax: 0, ebx: 0, ecx: 2, edx: 3 });
        assert_eq!(ask(0x8000_0008, 0).ecx, 2 << 12 | 3);
        let widths = [1, 2, 3, 4, 5, 8].map(width);
        assert_eq!(widths, [0, 1, 2, 2, 3, 3]);
        assert_eq!(answer(1, 0, &Vcpu { id: 0, count: 1, ..VCPU }, all).edx >> 28 & 1, 0);
        assert_eq!(ask(0x8000_0008, 0).eax, 0x3028, "as many bits as the guest's memory may have");
    }

    #[test]
    fn states_are_those_that_are_switched() {
        assert_eq!(ask(0xd, 0), Words { eax: 7, ebx: 832, ecx: 832, edx: 0 });
        assert_eq!(answer(0xd, 0, &Vcpu { xcr0: 3, ..VCPU }, all).ebx, 576);
        assert_eq!(ask(0xd, 1), Words { eax: 7, ebx: 832, ecx: 0, edx: 0 });
        assert_eq!(ask(0xd, 2), Words { eax: 256, ebx: 576, ecx: 0, edx: 0 });
        assert_eq!(ask(0xd, 5), Words::default());
        let none = Vcpu { states: 0, ..VCPU };
        assert_eq!(answer(0xd, 0, &none, all), Words::default());
        let (one, seven) = (answer(1, 0, &none, all), answer(7, 0, &none, all));
        assert_eq!(
            (one.ecx & (0b1011 << 26 | 1 << 12 | 1 << 29), seven.ebx & 1 << 5, seven.ecx & 0b11 << 9),
            (0, 0, 0)
        );
        let sse = Vcpu { states: 3, xcr0: 3, ..VCPU };
        assert_eq!(answer(0xd, 0, &sse, all), Words { eax: 3, ebx: 576, ecx: 576, edx: 0 });
        assert_eq!((answer(0xd, 2, &sse, all), answer(1, 0, &sse, all).ecx >> 26 & 0b111), (Words::default(), 0b011));
    }

    proptest! {
        #[test]
        fn any_machine_gives_an_answer(leaf: u32, subleaf: u32, low in 0u32..0x20, word: [u32; 4], id: u8, count in 1u8..=128) {
            let vcpu = Vcpu { id, count, ..VCPU };
            let machine = |_, _| Words { eax: word[0], ebx: word[1], ecx: word[2], edx: word[3] };
            for leaf in [leaf, low, low | EXTENDED] {
                let _ = answer(leaf, subleaf, &vcpu, machine);
            }
            prop_assert_eq!(answer(0x8000_0001, 0, &vcpu, machine).ecx >> 2 & 1, 0);
            prop_assert_eq!(answer(1, 0, &vcpu, machine).ecx >> 31, 1);
        }
    }
}
