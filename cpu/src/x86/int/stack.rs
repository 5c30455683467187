// SPDX-License-Identifier: Apache-2.0
//! PUSH, POP, PUSHA, POPA, ENTER, LEAVE (APM vol. 3). PUSHF, POPF and segment registers belong to `system`.

use iced_x86::{Instruction, Mnemonic};

use super::operand::{Any, Ea, Place, memory, place, reg, sized_word};
use crate::x86::access::Access;
use crate::x86::flags::Int;
use crate::x86::op::{Handler, Op, Res, Stop, handler};
use crate::x86::state::{Cpu, reg as r, sreg};
use crate::x86::translate::Context;

const SS: u8 = sreg::SS as u8;

/// How the stack is accessed for an op; chosen once, at translation.
pub trait Stack: Copy + 'static {
    /// 64-bit code.
    const LONG: bool;
    /// Pushes.
    fn push<T: Int>(cpu: &mut Cpu, op: &Op, v: T) -> Res;
    /// Reads where a stack pointer leads.
    fn at<T: Int>(cpu: &mut Cpu, op: &Op, sp: u64) -> Result<T, Stop>;
    /// Reads the top.
    #[inline(always)]
    fn top<T: Int>(cpu: &mut Cpu, op: &Op) -> Result<T, Stop> {
        Self::at(cpu, op, cpu.rb.gpr[r::RSP])
    }
    /// Moves the stack pointer up by `n` bytes.
    fn release(cpu: &mut Cpu, n: u64);
}

/// 64-bit code, fast half: gives up with [`Stop::Slow`] when the page isn't in the TLB.
#[derive(Clone, Copy)]
pub struct Fast;
/// 64-bit code.
#[derive(Clone, Copy)]
pub struct Long;
/// 16 and 32-bit code.
#[derive(Clone, Copy)]
pub struct Legacy;

impl Stack for Fast {
    const LONG: bool = true;
    #[inline(always)]
    fn push<T: Int>(cpu: &mut Cpu, op: &Op, v: T) -> Res {
        let sp = cpu.rb.gpr[r::RSP].wrapping_sub(T::BYTES as u64);
        cpu.engine.store(op, sp, v).ok_or(Stop::Slow)?;
        cpu.rb.gpr[r::RSP] = sp;
        Ok(())
    }
    #[inline(always)]
    fn at<T: Int>(cpu: &mut Cpu, op: &Op, sp: u64) -> Result<T, Stop> {
        cpu.engine.load(op, sp).ok_or(Stop::Slow)
    }
    #[inline(always)]
    fn release(cpu: &mut Cpu, n: u64) {
        cpu.rb.gpr[r::RSP] = cpu.rb.gpr[r::RSP].wrapping_add(n);
    }
}

impl Stack for Long {
    const LONG: bool = true;
    #[inline(always)]
    fn push<T: Int>(cpu: &mut Cpu, _: &Op, v: T) -> Res {
        let sp = cpu.rb.gpr[r::RSP].wrapping_sub(T::BYTES as u64);
        cpu.store_at(SS, sp, v)?;
        cpu.rb.gpr[r::RSP] = sp;
        Ok(())
    }
    #[inline(always)]
    fn at<T: Int>(cpu: &mut Cpu, _: &Op, sp: u64) -> Result<T, Stop> {
        cpu.load_at(SS, sp)
    }
    #[inline(always)]
    fn release(cpu: &mut Cpu, n: u64) {
        cpu.rb.gpr[r::RSP] = cpu.rb.gpr[r::RSP].wrapping_add(n);
    }
}

impl Stack for Legacy {
    const LONG: bool = false;
    #[inline(always)]
    fn push<T: Int>(cpu: &mut Cpu, _: &Op, v: T) -> Res {
        cpu.push(v)
    }
    #[inline(always)]
    fn at<T: Int>(cpu: &mut Cpu, _: &Op, sp: u64) -> Result<T, Stop> {
        let linear = cpu.stack_lin(sp, T::BYTES, Access::Read)?;
        cpu.load_at(SS, linear)
    }
    #[inline(always)]
    fn release(cpu: &mut Cpu, n: u64) {
        let sp = cpu.rb.gpr[r::RSP].wrapping_add(n);
        cpu.set_sp(sp);
    }
}

/// `stacked!(long, |S| function::<S>)`: the handler for the mode's stack.
macro_rules! stacked {
    ($long:expr, |$s:ident| $f:expr) => {
        if $long {
            $crate::x86::op::handler_pair(
                {
                    type $s = $crate::x86::int::stack::Fast;
                    $f
                },
                {
                    type $s = $crate::x86::int::stack::Long;
                    $f
                },
            )
        } else {
            type $s = $crate::x86::int::stack::Legacy;
            $crate::x86::op::handler($f)
        }
    };
}
pub(super) use stacked;

#[inline]
fn push_reg<S: Stack, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.reg::<T>(op.src);
    S::push::<T>(cpu, op, v)
}

#[inline]
fn push_imm<S: Stack, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    S::push::<T>(cpu, op, T::from_u64(op.imm))
}

#[inline]
fn push_mem<S: Stack, E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = E::load::<T>(cpu, op)?;
    S::push::<T>(cpu, op, v)
}

#[inline]
fn pop_reg<S: Stack, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = S::top::<T>(cpu, op)?;
    S::release(cpu, T::BYTES as u64);
    cpu.set_reg(op.dst, v);
    Ok(())
}

/// The destination's address is computed with the stack pointer of after the pop.
#[inline]
fn pop_mem<S: Stack, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let before = cpu.rb.gpr[r::RSP];
    let v = S::top::<T>(cpu, op)?;
    S::release(cpu, T::BYTES as u64);
    let after = cpu.rb.gpr[r::RSP];
    let linear = cpu.lin(op, T::BYTES, Access::Write);
    // Nothing has changed yet when the store fails.
    cpu.rb.gpr[r::RSP] = before;
    cpu.store_at(op.seg, linear?, v)?;
    cpu.rb.gpr[r::RSP] = after;
    Ok(())
}

/// Operand bytes of a push or pop.
fn moved(i: &Instruction) -> i32 {
    i.stack_pointer_increment().abs()
}

fn pushing(i: &Instruction, op: &mut Op, cx: &Context) -> Option<Handler> {
    let n = moved(i);
    let long = cx.code_size == 8;
    Some(match place(i, 0)? {
        Place::Reg => {
            op.src = reg(i, 0);
            sized_word!(n, |T| stacked!(long, |S| push_reg::<S, T>))
        }
        Place::Imm => {
            op.imm = i.immediate(0);
            sized_word!(n, |T| stacked!(long, |S| push_imm::<S, T>))
        }
        Place::Mem if long => {
            sized_word!(n, |T| memory!(op, |E| { push_mem::<Fast, E, T> } or { push_mem::<Long, E, T> }))
        }
        Place::Mem => sized_word!(n, |T| handler(push_mem::<Legacy, Any, T>)),
    })
}

fn popping(i: &Instruction, op: &mut Op, cx: &Context) -> Option<Handler> {
    let n = moved(i);
    let long = cx.code_size == 8;
    Some(match place(i, 0)? {
        Place::Reg => {
            op.dst = reg(i, 0);
            sized_word!(n, |T| stacked!(long, |S| pop_reg::<S, T>))
        }
        _ if long => sized_word!(n, |T| handler(pop_mem::<Long, T>)),
        _ => sized_word!(n, |T| handler(pop_mem::<Legacy, T>)),
    })
}

// ---- PUSHA, POPA (16 and 32-bit code only) ---------------------------------------------------------------------

/// Registers are pushed one by one; a fault finds those before it in memory (as on processors: the manual is silent) and
/// the stack pointer as it was, so that the instruction can restart.
#[inline]
fn pusha<T: Int>(cpu: &mut Cpu, _: &Op) -> Res {
    let mut sp = cpu.rb.gpr[r::RSP];
    for n in 0..8 {
        sp = sp.wrapping_sub(T::BYTES as u64);
        let linear = cpu.stack_lin(sp, T::BYTES, Access::Write)?;
        let v = cpu.reg::<T>(n * 8);
        cpu.store_at(SS, linear, v)?;
    }
    cpu.set_sp(sp);
    Ok(())
}

/// As PUSHA does: a fault finds the registers before it loaded.
#[inline]
fn popa<T: Int>(cpu: &mut Cpu, _: &Op) -> Res {
    for n in 0..8 {
        let v = cpu.peek::<T>(T::BYTES as u64 * n)?;
        let register = 7 - n as usize;
        if register != r::RSP {
            cpu.set_reg(register as u8 * 8, v);
        }
    }
    let sp = cpu.rb.gpr[r::RSP].wrapping_add(T::BYTES as u64 * 8);
    cpu.set_sp(sp);
    Ok(())
}

// ---- ENTER, LEAVE ----------------------------------------------------------------------------------------------

/// ENTER: `imm` = bytes to allocate, `aux` = nesting level.
#[inline]
fn enter<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let size = T::BYTES as u64;
    let level = op.aux & 31;
    let mut sp = cpu.rb.gpr[r::RSP];
    let mut push = |cpu: &mut Cpu, v: T| -> Res {
        sp = sp.wrapping_sub(size);
        let linear = cpu.stack_lin(sp, T::BYTES, Access::Write)?;
        cpu.store_at(SS, linear, v)
    };
    let bp = cpu.rb.gpr[r::RBP];
    push(cpu, T::from_u64(bp))?;
    let frame = cpu.rb.gpr[r::RSP].wrapping_sub(size);
    if level > 0 {
        for n in 1..level as u64 {
            let linear = cpu.stack_lin(bp.wrapping_sub(size * n), T::BYTES, Access::Read)?;
            let v = cpu.load_at::<T>(SS, linear)?;
            push(cpu, v)?;
        }
        push(cpu, T::from_u64(frame))?;
    }
    let sp = sp.wrapping_sub(op.imm);
    // The stack must be writable where it ends now.
    let last = cpu.stack_lin(sp, T::BYTES, Access::Write)?;
    cpu.probe_write(SS, last, T::BYTES)?;
    cpu.set_reg(r::RBP as u8 * 8, T::from_u64(frame));
    cpu.set_sp(sp);
    Ok(())
}

/// LEAVE: the frame is read before anything changes.
#[inline]
fn leave<S: Stack, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let bp = cpu.rb.gpr[r::RBP];
    let v = S::at::<T>(cpu, op, bp)?;
    if S::LONG {
        cpu.rb.gpr[r::RSP] = bp;
    } else {
        cpu.set_sp(bp);
    }
    S::release(cpu, T::BYTES as u64);
    cpu.set_reg(r::RBP as u8 * 8, v);
    Ok(())
}

/// Translates this module's instructions.
pub fn translate(i: &Instruction, op: &mut Op, cx: &Context) -> Option<Handler> {
    let entering = |op: &mut Op, h: Handler| {
        op.imm = i.immediate16() as u64;
        op.aux = i.immediate8_2nd();
        Some(h)
    };
    Some(match i.mnemonic() {
        Mnemonic::Push => return pushing(i, op, cx),
        Mnemonic::Pop => return popping(i, op, cx),
        Mnemonic::Pusha => handler(pusha::<u16>),
        Mnemonic::Pushad => handler(pusha::<u32>),
        Mnemonic::Popa => handler(popa::<u16>),
        Mnemonic::Popad => handler(popa::<u32>),
        Mnemonic::Enter => {
            return match i.code() {
                iced_x86::Code::Enterw_imm16_imm8 => entering(op, handler(enter::<u16>)),
                iced_x86::Code::Enterd_imm16_imm8 => entering(op, handler(enter::<u32>)),
                _ => entering(op, handler(enter::<u64>)),
            };
        }
        Mnemonic::Leave => {
            let n = match i.code() {
                iced_x86::Code::Leavew => 2,
                iced_x86::Code::Leaved => 4,
                _ => 8,
            };
            let long = cx.code_size == 8;
            sized_word!(n, |T| stacked!(long, |S| leave::<S, T>))
        }
        _ => return None,
    })
}
