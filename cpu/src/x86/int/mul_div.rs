// SPDX-License-Identifier: Apache-2.0
//! MUL, IMUL, DIV, IDIV (APM vol. 3).

use iced_x86::{Instruction, Mnemonic};

use super::operand::{Ea, Place, memory, memory_small, place, reg, size, sized, sized_word, two};
use crate::x86::flags::Int;
use crate::x86::op::{Handler, Op, Res, handler, handler_registers};
use crate::x86::state::{Cpu, reg as r, vector};

const RAX: u8 = r::RAX as u8 * 8;
const RDX: u8 = r::RDX as u8 * 8;
const AH: u8 = 1;

/// Product of two values as (low, high), and whether the high half holds more than the low one's extension.
#[inline(always)]
pub fn multiply<const SIGNED: bool, T: Int>(a: T, b: T) -> (T, T, bool) {
    let wide = if SIGNED {
        (a.to_i64() as i128).wrapping_mul(b.to_i64() as i128) as u128
    } else {
        (a.to_u64() as u128) * b.to_u64() as u128
    };
    let (low, high) = (T::from_u64(wide as u64), T::from_u64((wide >> T::BITS) as u64));
    let extension = if SIGNED { T::from_u64((low.to_i64() >> 63) as u64) } else { T::from_u64(0) };
    (low, high, high != extension)
}

/// Quotient and remainder of `high:low` by `d`, or None for #DE.
#[inline(always)]
pub fn divide<const SIGNED: bool, T: Int>(low: T, high: T, d: T) -> Option<(T, T)> {
    if d.to_u64() == 0 {
        return None;
    }
    if SIGNED {
        if T::BITS == 64 {
            let n = ((high.to_u64() as u128) << 64 | low.to_u64() as u128) as i128;
            let d = d.to_i64() as i128;
            // Nearly every dividend is a sign-extended 64-bit number.
            let (q, m) = if n == n as i64 as i128 {
                let (n, d) = (n as i64, d as i64);
                if d == -1 { (-(n as i128), 0) } else { ((n / d) as i128, (n % d) as i128) }
            } else {
                (n.wrapping_div(d), n.wrapping_rem(d))
            };
            (q == q as i64 as i128).then(|| (T::from_u64(q as u64), T::from_u64(m as u64)))
        } else {
            let n = (high.to_i64() << T::BITS) | low.to_u64() as i64;
            let d = d.to_i64();
            let q = n.wrapping_div(d);
            let t = T::from_u64(q as u64);
            (t.to_i64() == q).then(|| (t, T::from_u64(n.wrapping_rem(d) as u64)))
        }
    } else {
        if high >= d {
            return None;
        }
        if T::BITS == 64 {
            if high.to_u64() == 0 {
                let (n, d) = (low.to_u64(), d.to_u64());
                return Some((T::from_u64(n / d), T::from_u64(n % d)));
            }
            let n = (high.to_u64() as u128) << 64 | low.to_u64() as u128;
            let d = d.to_u64() as u128;
            Some((T::from_u64((n / d) as u64), T::from_u64((n % d) as u64)))
        } else {
            let n = high.to_u64() << T::BITS | low.to_u64();
            let d = d.to_u64();
            Some((T::from_u64(n / d), T::from_u64(n % d)))
        }
    }
}

/// rDX:rAX (AX for bytes) = rAX * operand.
#[inline(always)]
fn multiply_wide<const SIGNED: bool, T: Int>(cpu: &mut Cpu, b: T) {
    let a = cpu.reg::<T>(RAX);
    let (low, high, more) = multiply::<SIGNED, T>(a, b);
    cpu.set_reg(RAX, low);
    cpu.set_reg(if T::BITS == 8 { AH } else { RDX }, high);
    cpu.lf.set_result(low, more, more, false);
}

fn mul_reg<const SIGNED: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let b = cpu.reg::<T>(op.src);
    multiply_wide::<SIGNED, T>(cpu, b);
    Ok(())
}

fn mul_mem<const SIGNED: bool, E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let b = E::load::<T>(cpu, op)?;
    multiply_wide::<SIGNED, T>(cpu, b);
    Ok(())
}

#[inline(always)]
fn divide_wide<const SIGNED: bool, T: Int>(cpu: &mut Cpu, d: T) -> Res {
    let rest = if T::BITS == 8 { AH } else { RDX };
    let (low, high) = (cpu.reg::<T>(RAX), cpu.reg::<T>(rest));
    match divide::<SIGNED, T>(low, high, d) {
        Some((q, m)) => {
            cpu.set_reg(RAX, q);
            cpu.set_reg(rest, m);
            Ok(())
        }
        None => Err(cpu.fault(vector::DE, None)),
    }
}

fn div_reg<const SIGNED: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let d = cpu.reg::<T>(op.src);
    divide_wide::<SIGNED, T>(cpu, d)
}

fn div_mem<const SIGNED: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let d = cpu.load::<T>(op)?;
    divide_wide::<SIGNED, T>(cpu, d)
}

/// The product's low half goes to a register.
#[inline(always)]
fn multiply_low<T: Int>(cpu: &mut Cpu, op: &Op, a: T, b: T) {
    let (low, _, more) = multiply::<true, T>(a, b);
    cpu.set_reg(op.dst, low);
    cpu.lf.set_result(low, more, more, false);
}

fn imul_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    multiply_low(cpu, op, a, b);
    Ok(())
}

fn imul_mem<E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let b = E::load::<T>(cpu, op)?;
    let a = cpu.reg::<T>(op.dst);
    multiply_low(cpu, op, a, b);
    Ok(())
}

fn imul_reg_imm<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let a = cpu.reg::<T>(op.src);
    multiply_low(cpu, op, a, T::from_u64(op.imm));
    Ok(())
}

fn imul_mem_imm<E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let a = E::load::<T>(cpu, op)?;
    multiply_low(cpu, op, a, T::from_u64(op.imm));
    Ok(())
}

/// Where the single operand of MUL, IMUL, DIV, IDIV is.
fn one(i: &Instruction, op: &mut Op) -> Option<(Place, usize)> {
    let p = place(i, 0)?;
    if p == Place::Reg {
        op.src = reg(i, 0);
    }
    Some((p, size(i, 0)))
}

fn multiplying<const SIGNED: bool>(i: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match one(i, op)? {
        (Place::Reg, n) => sized!(n, |T| handler_registers(mul_reg::<SIGNED, T>)),
        (_, n) => sized!(n, |T| memory_small!(op, |E| mul_mem::<SIGNED, E, T>)),
    })
}

fn dividing<const SIGNED: bool>(i: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match one(i, op)? {
        (Place::Reg, n) => sized!(n, |T| handler_registers(div_reg::<SIGNED, T>)),
        (_, n) => sized!(n, |T| handler(div_mem::<SIGNED, T>)),
    })
}

/// Translates this module's instructions.
pub fn translate(i: &Instruction, op: &mut Op) -> Option<Handler> {
    match i.mnemonic() {
        Mnemonic::Mul => multiplying::<false>(i, op),
        Mnemonic::Imul if i.op_count() == 1 => multiplying::<true>(i, op),
        Mnemonic::Imul => {
            let (_, s, n) = two(i, op)?;
            if i.op_count() == 3 {
                op.imm = i.immediate(2);
            }
            Some(match (s, i.op_count()) {
                (Place::Reg, 2) => sized_word!(n, |T| handler_registers(imul_reg::<T>)),
                (Place::Reg, _) => sized_word!(n, |T| handler_registers(imul_reg_imm::<T>)),
                (_, 2) => sized_word!(n, |T| memory_small!(op, |E| imul_mem::<E, T>)),
                _ => sized_word!(n, |T| memory_small!(op, |E| imul_mem_imm::<E, T>)),
            })
        }
        Mnemonic::Div => dividing::<false>(i, op),
        Mnemonic::Idiv => dividing::<true>(i, op),
        _ => None,
    }
}
