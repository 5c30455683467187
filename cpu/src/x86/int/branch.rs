// SPDX-License-Identifier: Apache-2.0
//! Near control transfers (APM vol. 3: JMP, CALL, RET near, Jcc, LOOPcc, JrCXZ).
//!
//! Targets are checked before anything is pushed or popped: canonical in 64-bit code, within the limit of CS
//! elsewhere, #GP(0) of the branch otherwise.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::operand::{Any, Ea, conditional, memory, reg, sized_word};
use super::stack::{Fast, Legacy, Long, Stack, stacked};
use crate::engine::chain::{note_call, take_return};
use crate::x86::flags::Int;
use crate::x86::op::{Handler, LINK_NONE, LINK_RETURN, Op, Res, Stop, handler, handler_registers};
use crate::x86::state::{Cpu, reg as r, sreg};
use crate::x86::translate::Context;

/// Checks a target of `T`'s width and truncates it; `LONG` = 64-bit code.
#[inline(always)]
fn checked<const LONG: bool, T: Int>(cpu: &mut Cpu, target: u64) -> Result<u64, Stop> {
    let target = T::from_u64(target).to_u64();
    let good = if LONG {
        T::BITS < 64 || ((target << 16) as i64 >> 16) as u64 == target
    } else {
        target <= cpu.seg[sreg::CS].limit as u64
    };
    if good { Ok(target) } else { Err(cpu.gp(0)) }
}

/// The target of a direct branch: `imm` from the block's start.
#[inline(always)]
fn direct<const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Result<u64, Stop> {
    let target = cpu.rb.gpr[17].wrapping_add(op.imm);
    checked::<LONG, T>(cpu, target)
}

/// The block exit of a direct branch. With a 16-bit operand in 64-bit code the target is not at a fixed distance.
const fn taken_link<const LONG: bool, T: Int>() -> u8 {
    if LONG && T::BITS == 16 { LINK_NONE } else { 0 }
}

/// Goes on behind a branch that is not taken.
#[inline(always)]
fn fall_through<const LONG: bool>(cpu: &mut Cpu, op: &Op) -> Stop {
    let next = cpu.next_ip(op);
    let next = if LONG { next } else { cpu.mask_ip(next) };
    cpu.jump(next, 1)
}

/// Two ways rather than one with a choice of targets: the host's processor then goes on before it knows the condition.
#[inline(always)]
pub(super) fn taken_if<const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op, taken: bool) -> Res {
    if taken {
        let target = direct::<LONG, T>(cpu, op)?;
        Err(cpu.jump(target, const { taken_link::<LONG, T>() }))
    } else {
        Err(fall_through::<LONG>(cpu, op))
    }
}

fn jmp<const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    taken_if::<LONG, T>(cpu, op, true)
}

fn jcc<const CC: u8, const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let taken = cpu.lf.condition(CC);
    taken_if::<LONG, T>(cpu, op, taken)
}

#[inline]
fn call<S: Stack, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let target = cpu.rb.gpr[17].wrapping_add(op.imm);
    let target = checked_by::<S, T>(cpu, target)?;
    let next = cpu.next_ip(op);
    S::push::<T>(cpu, op, T::from_u64(next))?;
    if S::LONG && T::BITS == 64 {
        note_call(cpu, next);
    }
    let link = if S::LONG { taken_link::<true, T>() } else { taken_link::<false, T>() };
    Err(cpu.jump(target, link))
}

/// [`checked`], by the stack's mode.
#[inline(always)]
fn checked_by<S: Stack, T: Int>(cpu: &mut Cpu, target: u64) -> Result<u64, Stop> {
    if S::LONG { checked::<true, T>(cpu, target) } else { checked::<false, T>(cpu, target) }
}

#[inline(always)]
fn go<const CALL: bool, S: Stack, T: Int>(cpu: &mut Cpu, op: &Op, target: T) -> Res {
    let target = checked_by::<S, T>(cpu, target.to_u64())?;
    if CALL {
        let next = cpu.next_ip(op);
        S::push::<T>(cpu, op, T::from_u64(next))?;
        if S::LONG && T::BITS == 64 {
            note_call(cpu, next);
        }
    }
    Err(cpu.jump(target, LINK_NONE))
}

#[inline]
fn indirect_reg<const CALL: bool, S: Stack, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let target = cpu.reg::<T>(op.src);
    go::<CALL, S, T>(cpu, op, target)
}

#[inline]
fn indirect_mem<const CALL: bool, S: Stack, E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let target = E::load::<T>(cpu, op)?;
    go::<CALL, S, T>(cpu, op, target)
}

/// RET, with `imm` bytes more to release.
#[inline]
fn ret<S: Stack, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let target = S::top::<T>(cpu, op)?;
    if S::LONG && T::BITS == 64 && take_return(cpu, target.to_u64()) {
        S::release(cpu, T::BYTES as u64 + op.imm);
        return Err(cpu.jump(target.to_u64(), LINK_RETURN));
    }
    let target = checked_by::<S, T>(cpu, target.to_u64())?;
    S::release(cpu, T::BYTES as u64 + op.imm);
    Err(cpu.jump(target, LINK_NONE))
}

/// LOOP: 2, LOOPE: 1, LOOPNE: 0; `C` = the counter.
fn loop_<const KIND: u8, const LONG: bool, C: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    const RCX: u8 = r::RCX as u8 * 8;
    let count = C::from_u64(cpu.reg::<C>(RCX).to_u64().wrapping_sub(1));
    let taken = count.to_u64() != 0 && (KIND == 2 || cpu.lf.zf() == (KIND == 1));
    let target = if taken { Some(direct::<LONG, T>(cpu, op)?) } else { None };
    cpu.set_reg(RCX, count);
    Err(match target {
        Some(target) => cpu.jump(target, const { taken_link::<LONG, T>() }),
        None => fall_through::<LONG>(cpu, op),
    })
}

fn jrcxz<const LONG: bool, C: Int, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let taken = cpu.reg::<C>(r::RCX as u8 * 8).to_u64() == 0;
    taken_if::<LONG, T>(cpu, op, taken)
}

/// `moded!(long, bytes, |LONG, T| expression)`
macro_rules! moded {
    ($long:expr, $n:expr, |$l:ident, $t:ident| $e:expr) => {
        if $long {
            const $l: bool = true;
            match $n {
                2 => {
                    type $t = u16;
                    $e
                }
                _ => {
                    type $t = u64;
                    $e
                }
            }
        } else {
            const $l: bool = false;
            match $n {
                2 => {
                    type $t = u16;
                    $e
                }
                _ => {
                    type $t = u32;
                    $e
                }
            }
        }
    };
}

/// Bytes of the counter register of LOOPcc and JrCXZ.
fn counter_size(c: Code) -> Option<usize> {
    Some(match c {
        Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Jcxz_rel8_16
        | Code::Jcxz_rel8_32 => 2,
        Code::Loopne_rel8_16_ECX
        | Code::Loopne_rel8_32_ECX
        | Code::Loopne_rel8_64_ECX
        | Code::Loope_rel8_16_ECX
        | Code::Loope_rel8_32_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loop_rel8_16_ECX
        | Code::Loop_rel8_32_ECX
        | Code::Loop_rel8_64_ECX
        | Code::Jecxz_rel8_16
        | Code::Jecxz_rel8_32
        | Code::Jecxz_rel8_64 => 4,
        Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Jrcxz_rel8_16
        | Code::Jrcxz_rel8_64 => 8,
        _ => return None,
    })
}

/// Bytes of the operand of a near branch.
fn width(i: &Instruction) -> usize {
    match i.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        OpKind::Register => i.op0_register().size(),
        _ => i.memory_size().size(),
    }
}

fn indirect<const CALL: bool>(i: &Instruction, op: &mut Op, long: bool) -> Handler {
    let n = width(i);
    if i.op0_kind() == OpKind::Register {
        op.src = reg(i, 0);
        sized_word!(n, |T| stacked!(long, |S| indirect_reg::<CALL, S, T>))
    } else if long {
        sized_word!(
            n,
            |T| memory!(op, |E| { indirect_mem::<CALL, Fast, E, T> } or { indirect_mem::<CALL, Long, E, T> })
        )
    } else {
        sized_word!(n, |T| handler(indirect_mem::<CALL, Legacy, Any, T>))
    }
}

/// Translates this module's instructions.
pub fn translate(i: &Instruction, op: &mut Op, cx: &Context) -> Option<Handler> {
    let long = cx.code_size == 8;
    let near = matches!(i.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    if near {
        // Relative to the block's start, because that was the decoder's idea of its address.
        op.imm = i.near_branch_target();
    }
    let n = width(i);
    if i.is_jcc_short_or_near() {
        let cc = (i.condition_code() as u8).checked_sub(1)?;
        return Some(conditional!(cc, |CC| moded!(long, n, |LONG, T| handler_registers(jcc::<CC, LONG, T>))));
    }
    if i.is_jmp_short_or_near() {
        return Some(moded!(long, n, |LONG, T| handler_registers(jmp::<LONG, T>)));
    }
    if i.is_call_near() {
        return Some(sized_word!(n, |T| stacked!(long, |S| call::<S, T>)));
    }
    if i.is_jmp_near_indirect() {
        return Some(indirect::<false>(i, op, long));
    }
    if i.is_call_near_indirect() {
        return Some(indirect::<true>(i, op, long));
    }
    match i.mnemonic() {
        Mnemonic::Ret => {
            let n = match i.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                Code::Retnd | Code::Retnd_imm16 => 4,
                _ => 8,
            };
            op.imm = if i.op_count() == 0 { 0 } else { i.immediate16() as u64 };
            Some(sized_word!(n, |T| stacked!(long, |S| ret::<S, T>)))
        }
        Mnemonic::Loop => {
            let c = counter_size(i.code())?;
            Some(moded!(long, n, |LONG, T| sized_word!(c, |C| handler_registers(loop_::<2, LONG, C, T>))))
        }
        Mnemonic::Loope | Mnemonic::Loopne => {
            let c = counter_size(i.code())?;
            // As for string instructions, REPE and REPNE say which; AMD's processors heed them here, too.
            let until_not_equal =
                i.has_repe_prefix() || i.mnemonic() == Mnemonic::Loope && !i.has_repne_prefix();
            Some(if until_not_equal {
                moded!(long, n, |LONG, T| sized_word!(c, |C| handler_registers(loop_::<1, LONG, C, T>)))
            } else {
                moded!(long, n, |LONG, T| sized_word!(c, |C| handler_registers(loop_::<0, LONG, C, T>)))
            })
        }
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => {
            let c = counter_size(i.code())?;
            Some(moded!(long, n, |LONG, T| sized_word!(c, |C| handler_registers(jrcxz::<LONG, C, T>))))
        }
        _ => None,
    }
}
