// SPDX-License-Identifier: Apache-2.0
//! The events that counters know (PPR for AMD Family 17h, "Core Performance Monitor Counters"), and what an instruction
//! has of them. All others count nothing.
//!
//! This processor runs one instruction in each cycle, which is one op, and predicts each branch: a cycle is an
//! instruction that has retired, and nothing is ever mispredicted.

use iced_x86::{
    Code, CpuidFeature, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

use crate::x86::decode::{amend, decoder};

/// Bits of [`OpEvents::is`].
pub mod is {
    #![allow(missing_docs)]
    pub const BRANCH: u8 = 1;
    pub const CONDITIONAL: u8 = 2;
    pub const FAR: u8 = 4;
    pub const NEAR_RETURN: u8 = 8;
    pub const INDIRECT: u8 = 16;
    pub const X87: u8 = 32;
    pub const MMX: u8 = 64;
    pub const SSE: u8 = 128;
}

/// What one instruction has.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct OpEvents {
    /// What kind of instruction it is, as [`is`].
    pub is: u8,
    /// Operands in memory that are read; by each iteration if it [`repeats`](OpEvents::repeats).
    pub loads: u8,
    /// Operands in memory that are written.
    pub stores: u8,
    /// Operands in memory that are read and then written.
    pub modifies: u8,
    /// With a REP prefix, as often as the counter register says, of this many bytes; else 0.
    pub repeats: u8,
}

/// Whether the instruction is done as often as RCX says.
#[inline]
pub fn repeats(i: &Instruction) -> bool {
    i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix())
}

/// Bytes of the counter register of a repeated string instruction: those of its addresses.
fn address_size(i: &Instruction) -> u8 {
    for n in 0..i.op_count() {
        match i.op_kind(n) {
            OpKind::MemorySegSI | OpKind::MemoryESDI => return 2,
            OpKind::MemorySegESI | OpKind::MemoryESEDI => return 4,
            _ => {}
        }
    }
    8
}

/// Which kind of branch, if it is one. INT n and its kin are counted as the events that they deliver.
fn branch(i: &Instruction) -> u8 {
    use Mnemonic::*;
    let near_return = matches!(i.mnemonic(), Ret);
    match i.mnemonic() {
        Retf | Iret | Iretd | Iretq | Syscall | Sysret | Sysretq | Sysenter | Sysexit | Sysexitq => {
            return is::BRANCH | is::FAR;
        }
        Int | Int1 | Int3 | Into => return 0,
        _ => {}
    }
    if i.is_jmp_far() || i.is_call_far() || i.is_jmp_far_indirect() || i.is_call_far_indirect() {
        return is::BRANCH | is::FAR;
    }
    if near_return {
        return is::BRANCH | is::NEAR_RETURN;
    }
    match i.flow_control() {
        FlowControl::ConditionalBranch => is::BRANCH | is::CONDITIONAL,
        FlowControl::UnconditionalBranch => is::BRANCH,
        _ if i.is_jmp_near_indirect() || i.is_call_near_indirect() => is::BRANCH | is::INDIRECT,
        _ if i.is_call_near() => is::BRANCH,
        _ => 0,
    }
}

/// Which registers it computes with.
fn arithmetic(i: &Instruction) -> u8 {
    let mut vector = 0;
    for n in 0..i.op_count() {
        let r = if i.op_kind(n) == OpKind::Register { i.op_register(n) } else { Register::None };
        if r.is_st() {
            return is::X87;
        }
        if r.is_mm() {
            vector |= is::MMX;
        }
        if r.is_vector_register() {
            vector |= is::SSE;
        }
    }
    let x87 = i
        .cpuid_features()
        .iter()
        .any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387));
    vector | if x87 && i.code() != Code::Wait { is::X87 } else { 0 }
}

/// What each of a block's instructions has, up to `count`; `code_size` 2, 4 or 8.
pub fn of_code(code: &[u8], code_size: u8, count: usize) -> Box<[OpEvents]> {
    let mut d = decoder(code_size as u32 * 8, code, 0);
    let mut factory = InstructionInfoFactory::new();
    let mut all = vec![OpEvents::default(); count].into_boxed_slice();
    for op in &mut all {
        let at = d.position();
        let mut i = d.decode();
        amend(&mut i, &code[at.min(code.len())..]);
        if i.is_invalid() {
            // It never retires, nor does what would be behind it.
            break;
        }
        op.is = branch(&i) | arithmetic(&i);
        for memory in factory.info(&i).used_memory() {
            match memory.access() {
                OpAccess::Read | OpAccess::CondRead => op.loads += 1,
                OpAccess::Write | OpAccess::CondWrite => op.stores += 1,
                OpAccess::ReadWrite | OpAccess::ReadCondWrite => op.modifies += 1,
                OpAccess::None | OpAccess::NoMemAccess => {}
            }
        }
        if repeats(&i) {
            op.repeats = address_size(&i);
        }
    }
    all
}

/// What a counter counts: a sum.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Event {
    /// Each instruction.
    pub instructions: bool,
    /// Each instruction that is one of these ([`is`]).
    pub is: u8,
    /// Each branch that is taken.
    pub taken: bool,
    /// Exceptions and interrupts that are delivered.
    pub deliveries: bool,
    /// For each operand in memory that is read, written, both.
    pub loads: u8,
    /// The same, written.
    pub stores: u8,
    /// The same, read and written.
    pub modifies: u8,
}

impl Event {
    /// The event of a PERF_CTL's event number and unit mask.
    pub fn new(number: u16, unit: u8) -> Event {
        let none = Event::default();
        let bit = |n: u8| unit >> n & 1;
        match number {
            // LsDispatch: loads, stores, and what is both.
            0x029 => Event { loads: bit(0), stores: bit(1), modifies: bit(2), ..none },
            // LsDcAccesses: all accesses to the data cache for loads and stores.
            0x040 => Event { loads: 1, stores: 1, modifies: 2, ..none },
            // LsNotHaltedCyc; ExRetInstr; ExRetOps.
            0x076 | 0x0C0 | 0x0C1 => Event { instructions: true, ..none },
            // ExRetBrn and ExRetBrnTkn: exceptions and interrupts are among them. ExRetBrnFar too.
            0x0C2 => Event { is: is::BRANCH, deliveries: true, ..none },
            0x0C4 => Event { taken: true, deliveries: true, ..none },
            0x0C6 => Event { is: is::FAR, deliveries: true, ..none },
            // ExRetNearRet.
            0x0C8 => Event { is: is::NEAR_RETURN, ..none },
            // ExRetMmxFpInstr.
            0x0CB => {
                let kinds = [is::X87, is::MMX, is::SSE];
                Event { is: (0..3).map(|n| bit(n) * kinds[n as usize]).sum(), ..none }
            }
            // ExRetIndBrchInstr; ExRetCond.
            0x0CC => Event { is: is::INDIRECT, ..none },
            0x0D1 => Event { is: is::CONDITIONAL, ..none },
            // This processor's own: ExRetBrn without exceptions and interrupts.
            0xFC2 => Event { is: is::BRANCH, ..none },
            _ => none,
        }
    }

    /// Whether it is a matter of the number of instructions alone.
    pub fn is_simple(&self) -> bool {
        *self == Event { instructions: self.instructions, ..Event::default() }
    }

    /// How many of it an op has that has `retired`, or has done `times` iterations so far; `taken` if it branched.
    #[inline]
    pub fn of(&self, op: &OpEvents, times: u64, retired: bool, taken: bool) -> u64 {
        let memory = self.loads as u64 * op.loads as u64
            + self.stores as u64 * op.stores as u64
            + self.modifies as u64 * op.modifies as u64;
        let one = self.instructions as u64
            + (self.is & op.is != 0) as u64
            + (self.taken && taken && op.is & is::BRANCH != 0) as u64;
        memory * times + if retired { one } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(code: &[u8]) -> OpEvents {
        of_code(code, 8, 1)[0]
    }

    #[test]
    fn operands_in_memory_are_what_the_instruction_reads_and_writes() {
        let memory = |code: &[u8]| {
            let e = one(code);
            (e.loads, e.stores, e.modifies, e.repeats)
        };
        assert_eq!(memory(&[0x48, 0x8b, 0x03]), (1, 0, 0, 0), "mov rax, [rbx]");
        assert_eq!(memory(&[0x48, 0x89, 0x03]), (0, 1, 0, 0), "mov [rbx], rax");
        assert_eq!(memory(&[0x48, 0x01, 0x03]), (0, 0, 1, 0), "add [rbx], rax");
        assert_eq!(memory(&[0x48, 0x8d, 0x03]), (0, 0, 0, 0), "lea rax, [rbx]");
        assert_eq!(memory(&[0x50]), (0, 1, 0, 0), "push rax");
        assert_eq!(memory(&[0xff, 0x33]), (1, 1, 0, 0), "push qword [rbx]");
        assert_eq!(memory(&[0xc3]), (1, 0, 0, 0), "ret");
        assert_eq!(memory(&[0xf3, 0x48, 0xa5]), (1, 1, 0, 8), "rep movsq");
        assert_eq!(memory(&[0x67, 0xf3, 0xab]), (0, 1, 0, 4), "a32 rep stosd");
        assert_eq!(memory(&[0xa6]), (2, 0, 0, 0), "cmpsb");
    }

    #[test]
    fn branches_are_of_their_kind() {
        let cases: [(&[u8], u8); 12] = [
            (&[0xeb, 0], is::BRANCH),
            (&[0x74, 0], is::BRANCH | is::CONDITIONAL),
            (&[0xe2, 0xfe], is::BRANCH | is::CONDITIONAL),
            (&[0xe8, 0, 0, 0, 0], is::BRANCH),
            (&[0xff, 0xd0], is::BRANCH | is::INDIRECT),
            (&[0xff, 0xe0], is::BRANCH | is::INDIRECT),
            (&[0xc3], is::BRANCH | is::NEAR_RETURN),
            (&[0x48, 0xcf], is::BRANCH | is::FAR),
            (&[0x0f, 0x05], is::BRANCH | is::FAR),
            (&[0xcd, 0x80], 0),
            (&[0x0f, 0x01, 0xd9], 0),
            (&[0x90], 0),
        ];
        for (code, expected) in cases {
            assert_eq!(one(code).is, expected, "{code:02x?}");
        }
    }

    #[test]
    fn arithmetic_is_of_its_registers() {
        assert_eq!(one(&[0xd9, 0xe8]).is, is::X87, "fld1");
        assert_eq!(one(&[0x0f, 0xfe, 0xc1]).is, is::MMX, "paddd mm0, mm1");
        assert_eq!(one(&[0x66, 0x0f, 0xfe, 0xc1]).is, is::SSE, "paddd xmm0, xmm1");
    }
}
