// SPDX-License-Identifier: Apache-2.0
//! A comparison and the conditional jump behind it as one handler, in 64-bit code.
//!
//! The jump's op stays where it is: the comparison's handler does the jump's work as well and, whatever comes of it,
//! stops there. A comparison whose page isn't in the TLB runs by itself, and the jump behind it too.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::alu::{self, And, Binary, Cmp, Dec, Test, Unary};
use super::branch::taken_if;
use super::operand::{Any, Based, Ea, Place, place, size};
use crate::x86::flags::{Int, LazyFlags};
use crate::x86::op::{Handler, Op, Res, flag, handler_fused};
use crate::x86::state::Cpu;

/// A comparison: an operation on two values whose flags are asked for at once.
pub trait Compare: Binary {
    /// Whether condition `CC` holds after the operation on `a` and `b`, of which `lf` has the flags.
    #[inline(always)]
    fn holds<const CC: u8, T: Int>(lf: &LazyFlags, _a: T, _b: T) -> bool {
        lf.condition(CC)
    }
}

impl Compare for And {}
impl Compare for Test {}
impl Compare for Cmp {
    #[inline(always)]
    fn holds<const CC: u8, T: Int>(lf: &LazyFlags, a: T, b: T) -> bool {
        let holds = match CC >> 1 {
            1 => a < b,
            2 => a == b,
            3 => a <= b,
            6 => a.to_i64() < b.to_i64(),
            7 => a.to_i64() <= b.to_i64(),
            _ => return lf.condition(CC),
        };
        holds ^ (CC & 1 != 0)
    }
}

#[inline(always)]
fn compare<A: Compare, const CC: u8, T: Int>(cpu: &mut Cpu, op: &Op, jump: &Op, a: T, b: T) -> Res {
    let v = A::run(&mut cpu.lf, a, b);
    if A::WRITES {
        cpu.set_reg(op.dst, v);
    }
    let taken = A::holds::<CC, T>(&cpu.lf, a, b);
    taken_if::<true, u64>(cpu, jump, taken)
}

fn reg_reg<A: Compare, const CC: u8, T: Int>(cpu: &mut Cpu, op: &Op, jump: &Op) -> Res {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    compare::<A, CC, T>(cpu, op, jump, a, b)
}

fn reg_imm<A: Compare, const CC: u8, T: Int>(cpu: &mut Cpu, op: &Op, jump: &Op) -> Res {
    let a = cpu.reg::<T>(op.dst);
    compare::<A, CC, T>(cpu, op, jump, a, T::from_u64(op.imm))
}

fn reg_mem<A: Compare, const CC: u8, T: Int>(cpu: &mut Cpu, op: &Op, jump: &Op) -> Res {
    let b = Based::load::<T>(cpu, op)?;
    let a = cpu.reg::<T>(op.dst);
    compare::<A, CC, T>(cpu, op, jump, a, b)
}

fn mem_reg<A: Compare, const CC: u8, T: Int>(cpu: &mut Cpu, op: &Op, jump: &Op) -> Res {
    let a = Based::load::<T>(cpu, op)?;
    let b = cpu.reg::<T>(op.src);
    compare::<A, CC, T>(cpu, op, jump, a, b)
}

fn mem_imm<A: Compare, const CC: u8, T: Int>(cpu: &mut Cpu, op: &Op, jump: &Op) -> Res {
    let a = Based::load::<T>(cpu, op)?;
    compare::<A, CC, T>(cpu, op, jump, a, T::from_u64(op.imm))
}

fn dec<const CC: u8, T: Int>(cpu: &mut Cpu, op: &Op, jump: &Op) -> Res {
    let a = cpu.reg::<T>(op.dst);
    let v = Dec::run(&mut cpu.lf, a);
    cpu.set_reg(op.dst, v);
    let taken = cpu.lf.condition(CC);
    taken_if::<true, u64>(cpu, jump, taken)
}

/// `picked!(cc, bytes, [conditions], |CC, T| handler)`: for the sizes 1, 4 and 8; None for other conditions and sizes.
macro_rules! picked {
    ($cc:expr, $n:expr, [$($c:literal)*], |$k:ident, $t:ident| $e:expr) => {
        match $cc {
            $($c => {
                const $k: u8 = $c;
                match $n {
                    1 => { type $t = u8; Some($e) }
                    4 => { type $t = u32; Some($e) }
                    8 => { type $t = u64; Some($e) }
                    _ => None,
                }
            })*
            _ => None,
        }
    };
}

/// The handler for the op of `first` if `second` is a conditional jump to a 64-bit target and they go together.
pub fn fuse(first: &Instruction, op: &Op, second: &Instruction) -> Option<Handler> {
    if !second.is_jcc_short_or_near()
        || second.op0_kind() != OpKind::NearBranch64
        || op.has(flag::LOCK | flag::LEGACY_EA)
    {
        return None;
    }
    let cc = (second.condition_code() as u8).checked_sub(1)?;
    let n = size(first, 0);
    let d = place(first, 0)?;
    if first.mnemonic() == Mnemonic::Dec {
        return match d {
            Place::Reg => {
                picked!(cc, n, [4 5 8 9], |CC, T| handler_fused(dec::<CC, T>, alu::unary_reg::<Dec, T>))
            }
            _ => None,
        };
    }
    let s = place(first, 1)?;
    match (first.mnemonic(), d, s) {
        (Mnemonic::Cmp, Place::Reg, Place::Reg) => picked!(cc, n, [2 3 4 5 6 7 8 9 12 13 14 15], |CC, T| {
            handler_fused(reg_reg::<Cmp, CC, T>, alu::reg_reg::<Cmp, T>)
        }),
        (Mnemonic::Cmp, Place::Reg, Place::Imm) => picked!(cc, n, [2 3 4 5 6 7 8 9 12 13 14 15], |CC, T| {
            handler_fused(reg_imm::<Cmp, CC, T>, alu::reg_imm::<Cmp, T>)
        }),
        (Mnemonic::Cmp, Place::Reg, Place::Mem) => picked!(cc, n, [2 3 4 5 6 7 12 13 14 15], |CC, T| {
            handler_fused(reg_mem::<Cmp, CC, T>, alu::reg_mem::<Cmp, Any, T>)
        }),
        (Mnemonic::Cmp, Place::Mem, Place::Reg) => picked!(cc, n, [2 3 4 5 6 7 12 13 14 15], |CC, T| {
            handler_fused(mem_reg::<Cmp, CC, T>, alu::mem_reg::<Cmp, Any, T>)
        }),
        (Mnemonic::Cmp, Place::Mem, Place::Imm) => picked!(cc, n, [2 3 4 5 6 7 12 13 14 15], |CC, T| {
            handler_fused(mem_imm::<Cmp, CC, T>, alu::mem_imm::<Cmp, Any, T>)
        }),
        (Mnemonic::Test, Place::Reg, Place::Reg) => picked!(cc, n, [4 5 8 9 14 15], |CC, T| {
            handler_fused(reg_reg::<Test, CC, T>, alu::reg_reg::<Test, T>)
        }),
        (Mnemonic::Test, Place::Reg, Place::Imm) => picked!(cc, n, [4 5 8 9], |CC, T| {
            handler_fused(reg_imm::<Test, CC, T>, alu::reg_imm::<Test, T>)
        }),
        (Mnemonic::Test, Place::Mem, Place::Imm) => picked!(cc, n, [4 5 8 9], |CC, T| {
            handler_fused(mem_imm::<Test, CC, T>, alu::mem_imm::<Test, Any, T>)
        }),
        (Mnemonic::And, Place::Reg, Place::Imm) => picked!(cc, n, [4 5], |CC, T| {
            handler_fused(reg_imm::<And, CC, T>, alu::reg_imm::<And, T>)
        }),
        _ => None,
    }
}
