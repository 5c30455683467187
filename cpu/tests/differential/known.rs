// SPDX-License-Identifier: Apache-2.0
//! Where processors differ from softcpu's model, or from one another: each row with the manual's section that says so or
//! leaves it open. What a row covers is not compared on its processors; everything else is.
//!
//! Manuals: "APM" is the AMD64 Architecture Programmer's Manual, "SDM" Intel's Software Developer's Manual.

use iced_x86::{Code, CodeSize, Instruction, Mnemonic, OpKind, Register};
use softcpu::x86::decode::decode;

use crate::case::{Case, Outcome, differences, origin};
use crate::processor::Processor::{self, Amd1Ah, Amd19h, Intel6};

/// Intel's processors.
const INTEL: &[Processor] = &[Intel6];
/// All but AMD's family 1Ah.
const BEFORE_1AH: &[Processor] = &[Amd19h, Intel6];
/// Intel's, and AMD's family 1Ah, of which it is not known.
const SINCE_1AH_OR_INTEL: &[Processor] = &[Amd1Ah, Intel6];
/// AMD's.
const AMD: &[Processor] = &[Amd19h, Amd1Ah];
/// Any processor.
const ANY: &[Processor] = &[Amd19h, Amd1Ah, Intel6];

/// An instruction where it stands in memory.
pub struct Located {
    /// RIP.
    pub ip: u64,
    pub bytes: Vec<u8>,
    pub instruction: Instruction,
}

impl Located {
    /// Its prefixes, REX among them.
    fn prefixes(&self) -> &[u8] {
        let long = self.instruction.code_size() == CodeSize::Code64;
        let n = self.bytes.iter().take_while(|b| is_prefix(**b) || long && **b & 0xf0 == 0x40).count();
        &self.bytes[..n]
    }
}

/// The instructions of a case without branches, as golden vectors are.
pub fn located(case: &Case) -> Vec<Located> {
    let (mut at, mut out) = (0, Vec::new());
    while at < case.length {
        let ip = origin(case.bits) + at as u64;
        let instruction = decode(case.bits, &case.code()[at..], ip);
        let length = instruction.len().max(1);
        out.push(Located { ip, bytes: case.code()[at..at + length].to_vec(), instruction });
        at += length;
    }
    out
}

/// When a row applies.
pub enum When {
    /// The code contains such an instruction.
    Anywhere,
    /// The processor stopped at one.
    Stopped,
    /// softcpu stopped at one.
    SoftStopped,
}

/// What is not compared then.
pub enum Mask {
    /// Anything.
    All,
    /// These bits of RFLAGS.
    Flags(u64),
    /// x87 status, tags and registers.
    X87,
    /// The place within a page that CR2 tells.
    PlaceInPage,
    /// Memory, after a page fault.
    Memory,
    /// General registers and memory, after a page fault.
    Registers,
    /// Which of the instruction's exceptions it is.
    Fault,
}

/// A row.
pub struct Difference {
    /// What differs.
    pub name: &'static str,
    /// Where a manual says so, or leaves it open.
    pub manual: &'static str,
    pub on: &'static [Processor],
    pub when: When,
    /// Which instructions.
    pub what: fn(&Located) -> bool,
    /// Of the outcomes (softcpu's, then the processor's), whether they show it. Both stand as the rows before left them.
    pub shows: fn(&Outcome, &Outcome) -> bool,
    pub mask: Mask,
}

const PAGE_FAULT: u64 = 14;
const GENERAL_PROTECTION: u64 = 13;
const STACK: u64 = 12;
const UNDEFINED: u64 = 6;

const OF: u64 = 1 << 11;
const MISALIGNED_MASK: u32 = 1 << 17;
const ARITHMETIC: u64 = 0x8d5;

fn always(_: &Outcome, _: &Outcome) -> bool {
    true
}

fn page_fault(_: &Outcome, processor: &Outcome) -> bool {
    processor.vector == PAGE_FAULT
}

fn both_page_fault(soft: &Outcome, processor: &Outcome) -> bool {
    soft.vector == PAGE_FAULT && processor.vector == PAGE_FAULT
}

fn has(l: &Located, prefixes: &[u8]) -> bool {
    l.prefixes().iter().any(|b| prefixes.contains(b))
}

/// Whether a byte is a legacy prefix.
pub fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

fn mnemonic(l: &Located) -> Mnemonic {
    l.instruction.mnemonic()
}

fn repeated(l: &Located) -> bool {
    l.instruction.is_string_instruction() && has(l, &[0xf2, 0xf3])
}

fn compares(l: &Located) -> bool {
    use Mnemonic::*;
    matches!(mnemonic(l), Cmpsb | Cmpsw | Cmpsd | Cmpsq)
}

fn stores_x87(l: &Located) -> bool {
    use Mnemonic::*;
    matches!(mnemonic(l), Fst | Fstp | Fist | Fistp | Fisttp | Fbstp)
        && l.instruction.op0_kind() == OpKind::Memory
}

fn uses_mmx(l: &Located) -> bool {
    let i = &l.instruction;
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm())
}

/// The table.
pub const DIFFERENCES: &[Difference] = &[
    Difference {
        name: "0F 0D with a register operand is a NOP",
        manual: "SDM vol. 2, table A-3 (reserved NOP); APM vol. 3, PREFETCH: memory operands only, #UD",
        on: INTEL,
        when: When::Anywhere,
        what: |l| {
            let opcode = &l.bytes[l.prefixes().len()..];
            opcode.starts_with(&[0x0f, 0x0d]) && opcode.get(2) >= Some(&0xc0)
        },
        shows: always,
        mask: Mask::All,
    },
    Difference {
        name: "F3 90 is PAUSE, whatever REX.B says",
        manual: "SDM vol. 2, PAUSE; APM vol. 3, NOP: 90 with REX.B is XCHG r8, rAX",
        on: INTEL,
        when: When::Anywhere,
        what: |l| {
            mnemonic(l) == Mnemonic::Xchg
                && l.instruction.op0_register().full_register() == Register::R8
                && l.bytes.ends_with(&[0x90])
                && has(l, &[0xf3])
        },
        shows: always,
        mask: Mask::All,
    },
    Difference {
        name: "LOOPE and LOOPNE ignore repeat prefixes",
        manual: "APM vol. 3, 1.2.6 and SDM vol. 2, 2.1.1: reserved for them",
        on: INTEL,
        when: When::Anywhere,
        what: |l| matches!(mnemonic(l), Mnemonic::Loope | Mnemonic::Loopne) && has(l, &[0xf2, 0xf3]),
        shows: always,
        mask: Mask::All,
    },
    Difference {
        name: "a repeat count of zero in ECX clears the upper half of RCX",
        manual: "APM vol. 3, 1.2.6 and SDM vol. 2, REP: silent",
        on: INTEL,
        when: When::Anywhere,
        what: |l| repeated(l) && l.instruction.code_size() == CodeSize::Code64 && has(l, &[0x67]),
        shows: always,
        mask: Mask::All,
    },
    Difference {
        name: "CMPS looks at ES:[rDI] first",
        manual: "APM vol. 3 and SDM vol. 2, CMPS: silent about the order",
        on: BEFORE_1AH,
        when: When::Stopped,
        what: compares,
        shows: always,
        mask: Mask::Fault,
    },
    Difference {
        name: "accesses wrap around at the end of a 4 GiB segment",
        manual: "SDM vol. 3, 5.3: up to the implementation; APM vol. 2, 4.12: beyond the limit",
        on: INTEL,
        when: When::SoftStopped,
        what: |l| l.instruction.code_size() == CodeSize::Code32,
        shows: |soft, processor| {
            matches!((soft.vector, soft.error), (GENERAL_PROTECTION | STACK, 0))
                && processor.vector == PAGE_FAULT
                && (processor.address > 0xffff_fff0 || processor.address < 0x10)
        },
        mask: Mask::Fault,
    },
    Difference {
        name: "an x87 store that an unmasked exception suppresses leaves its destination alone",
        manual: "APM vol. 2, 8.4 and SDM vol. 1, 8.5: silent about the order",
        on: INTEL,
        when: When::SoftStopped,
        what: stores_x87,
        shows: |soft, processor| soft.state.rip != processor.state.rip,
        mask: Mask::All,
    },
    Difference {
        name: "SHA instructions want aligned operands",
        manual: "SDM vol. 2, SHA1MSG1 (exceptions type 4); APM vol. 4: none such",
        on: INTEL,
        when: When::Stopped,
        what: |l| l.instruction.cpuid_features().contains(&iced_x86::CpuidFeature::SHA),
        shows: |_, processor| processor.vector == GENERAL_PROTECTION,
        mask: Mask::All,
    },
    Difference {
        name: "RCL and RCR by as many bits as the operand and CF have leave OF",
        manual: "APM vol. 3 and SDM vol. 2, RCL: undefined for counts other than 1",
        on: INTEL,
        when: When::Anywhere,
        what: |l| {
            let size = match l.instruction.op0_kind() {
                OpKind::Register => l.instruction.op0_register().size(),
                _ => l.instruction.memory_size().size(),
            };
            matches!(mnemonic(l), Mnemonic::Rcl | Mnemonic::Rcr) && size < 4
        },
        shows: always,
        mask: Mask::Flags(OF),
    },
    Difference {
        name: "DPPS and DPPD take the NaNs of several products in another order",
        manual: "APM vol. 4 and SDM vol. 2, DPPS: silent about NaNs",
        on: INTEL,
        when: When::Anywhere,
        what: |l| matches!(mnemonic(l), Mnemonic::Dpps | Mnemonic::Dppd),
        shows: |soft, processor| soft.state.xmm != processor.state.xmm,
        mask: Mask::All,
    },
    Difference {
        name: "MOVSXD with a 16-bit operand reads 16 bits",
        manual: "SDM vol. 2, MOVSXD; APM vol. 3, MOVSXD: reg/mem32",
        on: INTEL,
        when: When::SoftStopped,
        what: |l| l.instruction.code() == Code::Movsxd_r16_rm16,
        shows: |soft, processor| soft.vector == PAGE_FAULT && processor.state.rip != soft.state.rip,
        mask: Mask::All,
    },
    Difference {
        name: "MXCSR bit 17 is reserved",
        manual: "SDM vol. 1, 10.2.3; APM vol. 2, 11.3.1: with MisAlignSse (CPUID Fn8000_0001_ECX) it masks #GP",
        on: INTEL,
        when: When::Stopped,
        what: |l| matches!(mnemonic(l), Mnemonic::Ldmxcsr | Mnemonic::Fxrstor | Mnemonic::Fxrstor64),
        shows: |soft, processor| {
            processor.vector == GENERAL_PROTECTION && soft.state.mxcsr & MISALIGNED_MASK != 0
        },
        mask: Mask::All,
    },
    Difference {
        name: "LOCK before VERW is ignored",
        manual: "APM vol. 3, 1.2.5: #UD",
        on: &[Amd19h],
        when: When::SoftStopped,
        what: |l| {
            let opcode = &l.bytes[l.prefixes().len()..];
            let verw = |modrm: &u8| *modrm < 0xc0 && modrm >> 3 & 7 == 5;
            has(l, &[0xf0]) && opcode.starts_with(&[0x0f, 0x00]) && opcode.get(2).is_some_and(verw)
        },
        shows: |soft, _| soft.vector == UNDEFINED,
        mask: Mask::All,
    },
    Difference {
        name: "MASKMOVQ and MASKMOVDQU fault for bytes that the mask selects alone",
        manual: "APM vol. 5 and SDM vol. 2, MASKMOVQ: up to the implementation",
        on: INTEL,
        when: When::SoftStopped,
        what: |l| matches!(mnemonic(l), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu),
        shows: |soft, processor| {
            soft.vector == PAGE_FAULT && (processor.vector, processor.address) != (soft.vector, soft.address)
        },
        mask: Mask::All,
    },
    Difference {
        name: "a faulting MASKMOVQ has set TOP and tags",
        manual: "APM vol. 5, 1.3.3: silent about faults",
        on: AMD,
        when: When::Stopped,
        what: |l| mnemonic(l) == Mnemonic::Maskmovq,
        shows: always,
        mask: Mask::X87,
    },
    Difference {
        name: "a faulting REPE or REPNE leaves the flags as they were before",
        manual: "SDM vol. 2, REP: as before; APM vol. 3, 1.2.6: silent",
        on: SINCE_1AH_OR_INTEL,
        when: When::Stopped,
        what: repeated,
        shows: page_fault,
        mask: Mask::Flags(ARITHMETIC),
    },
    Difference {
        name: "a faulting MMX instruction has set TOP and tags",
        manual: "APM vol. 5, 1.3.3 and SDM vol. 1, 9.5: silent about faults",
        on: INTEL,
        when: When::Stopped,
        what: uses_mmx,
        shows: always,
        mask: Mask::X87,
    },
    Difference {
        name: "the faulting byte of an environment",
        manual: "APM vol. 2, 5.4.6: any byte of the access",
        on: ANY,
        when: When::Stopped,
        what: |l| matches!(mnemonic(l), Mnemonic::Fldenv | Mnemonic::Frstor),
        shows: both_page_fault,
        mask: Mask::PlaceInPage,
    },
    Difference {
        name: "a store that faults in its second page has written the first",
        manual: "APM vol. 2, 8.1: silent about partial results",
        on: INTEL,
        when: When::Stopped,
        what: |l| {
            mnemonic(l) == Mnemonic::Movbe
                || mnemonic(l) == Mnemonic::Fbstp
                || mnemonic(l) == Mnemonic::Fstp && l.instruction.memory_size().size() == 10
        },
        shows: page_fault,
        mask: Mask::Memory,
    },
    Difference {
        name: "a faulting PUSHA or POPA has done a part",
        manual: "APM vol. 3, PUSHA and POPA: silent about partial results",
        on: INTEL,
        when: When::Stopped,
        what: |l| {
            use Mnemonic::*;
            matches!(mnemonic(l), Popa | Popad | Pusha | Pushad)
        },
        shows: page_fault,
        mask: Mask::Registers,
    },
    Difference {
        name: "BOUND: which of its exceptions comes first",
        manual: "APM vol. 2, 8.1: silent within an instruction",
        on: INTEL,
        when: When::Stopped,
        what: |l| mnemonic(l) == Mnemonic::Bound,
        shows: always,
        mask: Mask::Fault,
    },
];

/// What softcpu's outcome and the processor's differ in, but for flags that are undefined and what the rows of
/// `processor` leave open (those of all processors, when it is an unknown one).
pub fn compare(
    processor: Option<Processor>,
    code: &[Located],
    soft: &mut Outcome,
    theirs: &Outcome,
    undefined: u64,
) -> Vec<String> {
    let mut flags = undefined;
    let mut applied = Vec::new();
    for row in DIFFERENCES.iter().filter(|row| processor.is_none_or(|p| row.on.contains(&p))) {
        let at = |rip: u64| code.iter().any(|l| l.ip == rip && (row.what)(l));
        let applies = match row.when {
            When::Anywhere => code.iter().any(row.what),
            When::Stopped => at(theirs.state.rip),
            When::SoftStopped => at(soft.state.rip),
        };
        if !applies || !(row.shows)(soft, theirs) {
            continue;
        }
        applied.push(format!("not compared: {} ({})", row.name, row.manual));
        match row.mask {
            Mask::All => return Vec::new(),
            Mask::Flags(bits) => flags |= bits,
            Mask::X87 => {
                soft.state.fsw = theirs.state.fsw;
                soft.state.tags = theirs.state.tags;
                soft.state.st = theirs.state.st;
            }
            Mask::PlaceInPage => soft.address = soft.address & !0xfff | theirs.address & 0xfff,
            Mask::Memory => soft.data = theirs.data,
            Mask::Registers => {
                soft.state.gpr = theirs.state.gpr;
                soft.data = theirs.data;
            }
            Mask::Fault => {
                soft.vector = theirs.vector;
                (soft.error, soft.address) = (theirs.error, theirs.address);
            }
        }
    }
    let mut found = differences(soft, theirs, flags);
    if !found.is_empty() {
        found.extend(applied);
    }
    found
}
