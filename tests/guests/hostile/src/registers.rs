//! MRS, MSR and SYS with any encoding, known and unknown, and any value.
//!
//! Left out, because they only stop the CPU that executes them: SCTLR_EL1 and SCTLR2_EL1 (endianness, translation),
//! VBAR_EL1, SPSel, GCSCR_EL1 (returns would fault), waiting for something that need not come (WFE, WFI, WFET, WFIT).
//! SYS operands are addresses outside the program, because DC ZVA and its like write there. ICC_BPR1_EL1 gets values
//! without its reserved bits: QEMU 10.0 ends itself at the next interrupt otherwise (an assertion of its own on the virtual
//! binary point), whatever runs at EL2.

use crate::Attacker;

/// An encoding as (op0, op1, CRn, CRm, op2).
type Encoding = (u32, u32, u32, u32, u32);

const ICC_BPR1_EL1: Encoding = (3, 0, 12, 12, 3);

/// Registers that a hypervisor keeps for itself or must emulate.
const KNOWN: [Encoding; 44] = [
    (3, 0, 2, 0, 0),   // TTBR0_EL1
    (3, 0, 2, 0, 1),   // TTBR1_EL1
    (3, 0, 2, 0, 2),   // TCR_EL1
    (3, 0, 10, 2, 0),  // MAIR_EL1
    (3, 0, 13, 0, 1),  // CONTEXTIDR_EL1
    (3, 0, 1, 0, 1),   // ACTLR_EL1
    (3, 0, 1, 0, 2),   // CPACR_EL1
    (3, 4, 2, 1, 0),   // VTTBR_EL2
    (3, 4, 2, 1, 2),   // VTCR_EL2
    (3, 4, 1, 1, 0),   // HCR_EL2
    (3, 4, 1, 0, 0),   // SCTLR_EL2
    (3, 4, 2, 0, 0),   // TTBR0_EL2
    (3, 4, 12, 0, 0),  // VBAR_EL2
    (3, 5, 1, 0, 0),   // SCTLR_EL12
    (3, 6, 1, 1, 0),   // SCR_EL3
    (3, 4, 4, 0, 1),   // ELR_EL2
    (3, 0, 12, 12, 0), // ICC_IAR1_EL1
    (3, 0, 12, 12, 1), // ICC_EOIR1_EL1
    (3, 0, 12, 11, 1), // ICC_DIR_EL1
    (3, 0, 12, 11, 5), // ICC_SGI1R_EL1
    (3, 0, 12, 11, 6), // ICC_ASGI1R_EL1
    (3, 0, 12, 11, 7), // ICC_SGI0R_EL1
    ICC_BPR1_EL1,
    (3, 0, 12, 12, 4), // ICC_CTLR_EL1
    (3, 0, 12, 12, 5), // ICC_SRE_EL1
    (3, 0, 12, 12, 7), // ICC_IGRPEN1_EL1
    (3, 0, 4, 6, 0),   // ICC_PMR_EL1
    (3, 0, 12, 9, 0),  // ICC_AP1R0_EL1
    (3, 4, 12, 11, 0), // ICH_HCR_EL2
    (3, 4, 12, 12, 0), // ICH_LR0_EL2
    (3, 3, 14, 3, 0),  // CNTV_TVAL_EL0
    (3, 3, 14, 3, 1),  // CNTV_CTL_EL0
    (3, 3, 14, 3, 2),  // CNTV_CVAL_EL0
    (3, 3, 14, 2, 1),  // CNTP_CTL_EL0
    (3, 3, 14, 2, 2),  // CNTP_CVAL_EL0
    (3, 4, 14, 0, 3),  // CNTVOFF_EL2
    (3, 4, 14, 2, 1),  // CNTHP_CTL_EL2
    (3, 3, 9, 12, 0),  // PMCR_EL0
    (3, 3, 9, 13, 0),  // PMCCNTR_EL0
    (2, 0, 0, 2, 2),   // MDSCR_EL1
    (2, 0, 1, 0, 4),   // OSLAR_EL1
    (2, 0, 0, 0, 5),   // DBGBCR0_EL1
    (3, 0, 12, 0, 2),  // RMR_EL1
    (3, 2, 0, 0, 0),   // CSSELR_EL1
];

/// TLB and cache maintenance of every level and regime.
const SYSTEM: [Encoding; 16] = [
    (1, 0, 8, 7, 0),  // TLBI VMALLE1
    (1, 0, 8, 3, 0),  // TLBI VMALLE1IS
    (1, 0, 8, 3, 1),  // TLBI VAE1IS
    (1, 0, 8, 3, 2),  // TLBI ASIDE1IS
    (1, 0, 8, 2, 1),  // TLBI RVAE1IS
    (1, 4, 8, 0, 1),  // TLBI IPAS2E1IS
    (1, 4, 8, 7, 4),  // TLBI ALLE1
    (1, 4, 8, 7, 6),  // TLBI VMALLS12E1
    (1, 4, 8, 7, 0),  // TLBI ALLE2
    (1, 6, 8, 7, 0),  // TLBI ALLE3
    (1, 0, 7, 6, 2),  // DC ISW
    (1, 0, 7, 14, 2), // DC CISW
    (1, 3, 7, 4, 1),  // DC ZVA
    (1, 0, 7, 1, 0),  // IC IALLUIS
    (1, 0, 7, 8, 0),  // AT S1E1R
    (1, 4, 7, 8, 4),  // AT S12E1R
];

pub fn attack(attacker: &mut Attacker) {
    let encoding = match attacker.rng.below(4) {
        0 => attacker.rng.pick(&KNOWN),
        1 => attacker.rng.pick(&SYSTEM),
        _ => {
            let random = attacker.rng.draw() as u32;
            (random & 3, random >> 2 & 7, random >> 5 & 15, random >> 9 & 15, random >> 13 & 7)
        }
    };
    let read = attacker.rng.below(2) == 0;
    if is_left_out(encoding, read) {
        return;
    }
    let (op0, op1, crn, crm, op2) = encoding;
    // MSR of PSTATE fields, hints and barriers have no register: Rt must be 31 there.
    let target = if op0 == 0 && attacker.rng.below(4) != 0 { 31 } else { attacker.rng.below(18) as u32 };
    let instruction =
        0xd500_0000 | u32::from(read) << 21 | op0 << 19 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5 | target;
    let mut registers = [0; 18];
    for register in &mut registers {
        *register = if op0 == 1 { address(attacker) } else { value(attacker) };
    }
    if encoding == ICC_BPR1_EL1 {
        registers.iter_mut().for_each(|value| *value &= 7);
    }
    attacker.execute(instruction, &registers);
}

fn is_left_out((op0, op1, crn, crm, op2): Encoding, read: bool) -> bool {
    match (op0, op1, crn, crm, op2) {
        // WFE, WFI.
        (0, 3, 2, 0, 2 | 3) => true,
        // WFET, WFIT, and what is allocated beside them.
        (0, 3, 1, 0, _) => true,
        // MSR SPSel, #imm: CRm is the operand.
        (0, 0, 4, _, 5) => true,
        _ if read => false,
        (3, 0, 1, 0, 0 | 3) | (3, 0, 12, 0, 0) | (3, 0, 4, 2, 0) | (3, 0, 2, 5, 0) => true,
        _ => false,
    }
}

/// Mostly few bits, because fields have few valid values.
fn value(attacker: &mut Attacker) -> u64 {
    let random = attacker.rng.draw();
    match attacker.rng.below(4) {
        0 => random,
        1 => 1 << (random & 63),
        2 => random & 0xff,
        _ => attacker.outside(),
    }
}

/// For SYS: outside, or data that nobody needs.
fn address(attacker: &mut Attacker) -> u64 {
    if attacker.rng.below(2) == 0 { attacker.outside() } else { attacker.data() }
}
