// SPDX-License-Identifier: Apache-2.0
//! PUSH, POP, PUSHA, POPA, ENTER, LEAVE (APM vol. 3). PUSHF and POPF are system instructions.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Ea, Place, addressed, load, place, reg, sized_word};
use crate::x86::access::Access;
use crate::x86::flags::Int;
use crate::x86::op::{Handler, Op, Res, Stop, handler};
use crate::x86::state::{Cpu, reg as r, sreg};
use crate::x86::translate::{Context, segment};

const SS: u8 = sreg::SS as u8;

/// Pushes; `LONG` = 64-bit code.
#[inline(always)]
pub fn push<const LONG: bool, T: Int>(cpu: &mut Cpu, v: T) -> Res {
    if LONG {
        let sp = cpu.rb.gpr[r::RSP].wrapping_sub(T::BYTES as u64);
        cpu.store_at(SS, sp, v)?;
        cpu.rb.gpr[r::RSP] = sp;
        Ok(())
    } else {
        cpu.push(v)
    }
}

/// Reads the top of the stack; `LONG` = 64-bit code.
#[inline(always)]
pub fn top<const LONG: bool, T: Int>(cpu: &mut Cpu) -> Result<T, Stop> {
    if LONG {
        let sp = cpu.rb.gpr[r::RSP];
        cpu.load_at(SS, sp)
    } else {
        cpu.peek(0)
    }
}

/// Moves the stack pointer up by `n` bytes.
#[inline(always)]
pub fn release<const LONG: bool>(cpu: &mut Cpu, n: u64) {
    let sp = cpu.rb.gpr[r::RSP].wrapping_add(n);
    if LONG {
        cpu.rb.gpr[r::RSP] = sp;
    } else {
        cpu.set_sp(sp);
    }
}

fn push_reg<const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.reg::<T>(op.src);
    push::<LONG, T>(cpu, v)
}

fn push_imm<const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    push::<LONG, T>(cpu, T::from_u64(op.imm))
}

fn push_mem<const LONG: bool, E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = load::<E, T>(cpu, op)?;
    push::<LONG, T>(cpu, v)
}

/// The selector, zero-extended to the operand size.
fn push_segment<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.seg[op.src as usize % 6].selector;
    cpu.push(T::from_u64(v as u64))
}

fn pop_reg<const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = top::<LONG, T>(cpu)?;
    release::<LONG>(cpu, T::BYTES as u64);
    cpu.set_reg(op.dst, v);
    Ok(())
}

/// The destination's address is computed with the stack pointer of after the pop.
fn pop_mem<const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let before = cpu.rb.gpr[r::RSP];
    let v = top::<LONG, T>(cpu)?;
    release::<LONG>(cpu, T::BYTES as u64);
    let done = cpu.store(op, v);
    if done.is_err() {
        cpu.rb.gpr[r::RSP] = before;
    }
    done
}

/// Operand bytes of a push or pop.
fn moved(i: &Instruction) -> i32 {
    i.stack_pointer_increment().abs()
}

fn pushing(i: &Instruction, op: &mut Op, cx: &Context) -> Option<Handler> {
    let n = moved(i);
    if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() {
        op.src = segment(i.op0_register());
        return Some(sized_word!(n, |T| handler(push_segment::<T>)));
    }
    let long = cx.code_size == 8;
    Some(match place(i, 0)? {
        Place::Reg => {
            op.src = reg(i, 0);
            if long {
                sized_word!(n, |T| handler(push_reg::<true, T>))
            } else {
                sized_word!(n, |T| handler(push_reg::<false, T>))
            }
        }
        Place::Imm => {
            op.imm = i.immediate(0);
            if long {
                sized_word!(n, |T| handler(push_imm::<true, T>))
            } else {
                sized_word!(n, |T| handler(push_imm::<false, T>))
            }
        }
        Place::Mem if long => addressed!(op, |E| sized_word!(n, |T| handler(push_mem::<true, E, T>))),
        Place::Mem => addressed!(op, |E| sized_word!(n, |T| handler(push_mem::<false, E, T>))),
    })
}

fn popping(i: &Instruction, op: &mut Op, cx: &Context) -> Option<Handler> {
    let n = moved(i);
    let long = cx.code_size == 8;
    Some(match place(i, 0)? {
        Place::Reg => {
            op.dst = reg(i, 0);
            if long {
                sized_word!(n, |T| handler(pop_reg::<true, T>))
            } else {
                sized_word!(n, |T| handler(pop_reg::<false, T>))
            }
        }
        _ if long => sized_word!(n, |T| handler(pop_mem::<true, T>)),
        _ => sized_word!(n, |T| handler(pop_mem::<false, T>)),
    })
}

// ---- PUSHA, POPA (16 and 32-bit code only) ---------------------------------------------------------------------

fn pusha<T: Int>(cpu: &mut Cpu, _: &Op) -> Res {
    let size = T::BYTES as u64;
    let sp = cpu.rb.gpr[r::RSP];
    // Nothing is written before all eight can be.
    let mut at = [0; 8];
    for (n, linear) in at.iter_mut().enumerate() {
        let sp = sp.wrapping_sub(size * (n as u64 + 1));
        *linear = cpu.stack_lin(sp, T::BYTES, Access::Write)?;
        cpu.prepare_write(SS, *linear, T::BYTES)?;
    }
    for (n, linear) in at.iter().enumerate() {
        let v = cpu.reg::<T>(n as u8 * 8);
        cpu.store_at(SS, *linear, v)?;
    }
    cpu.set_sp(sp.wrapping_sub(size * 8));
    Ok(())
}

fn popa<T: Int>(cpu: &mut Cpu, _: &Op) -> Res {
    let mut values = [T::from_u64(0); 8];
    for (n, v) in values.iter_mut().enumerate() {
        *v = cpu.peek::<T>(T::BYTES as u64 * n as u64)?;
    }
    let sp = cpu.rb.gpr[r::RSP].wrapping_add(T::BYTES as u64 * 8);
    for (n, v) in values.iter().rev().enumerate() {
        if n != r::RSP {
            cpu.set_reg(n as u8 * 8, *v);
        }
    }
    cpu.set_sp(sp);
    Ok(())
}

// ---- ENTER, LEAVE ----------------------------------------------------------------------------------------------

/// ENTER: `imm` = bytes to allocate, `aux` = nesting level.
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
    cpu.probe_write(SS, last, 1)?;
    cpu.set_reg(r::RBP as u8 * 8, T::from_u64(frame));
    cpu.set_sp(sp);
    Ok(())
}

fn leave<const LONG: bool, T: Int>(cpu: &mut Cpu, _: &Op) -> Res {
    let bp = cpu.rb.gpr[r::RBP];
    let linear = if LONG { bp } else { cpu.stack_lin(bp, T::BYTES, Access::Read)? };
    let v = cpu.load_at::<T>(SS, linear)?;
    let sp = bp.wrapping_add(T::BYTES as u64);
    if LONG {
        cpu.rb.gpr[r::RSP] = sp;
    } else {
        cpu.set_sp(sp);
    }
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
        Mnemonic::Leave => match (i.code(), cx.code_size) {
            (iced_x86::Code::Leavew, 8) => handler(leave::<true, u16>),
            (iced_x86::Code::Leavew, _) => handler(leave::<false, u16>),
            (iced_x86::Code::Leaved, _) => handler(leave::<false, u32>),
            _ => handler(leave::<true, u64>),
        },
        _ => return None,
    })
}
