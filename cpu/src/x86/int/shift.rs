// SPDX-License-Identifier: Apache-2.0
//! Shifts and rotates (APM vol. 3: ROL, ROR, RCL, RCR, SHL, SHR, SAR, SHLD, SHRD).
//!
//! The count is masked to 5 bits (6 for 64-bit operands). A masked count of zero leaves every flag alone.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::operand::{Ea, Place, memory, place, reg, size, sized, sized_word};
use crate::x86::flags::{Int, LazyFlags};
use crate::x86::op::{Handler, Op, Res, handler, handler_registers};
use crate::x86::state::{Cpu, reg as r};

/// A shift or rotate by a count that is masked and not zero.
pub trait Shift: Copy + 'static {
    /// Sets the flags and returns the result.
    fn run<T: Int>(lf: &mut LazyFlags, a: T, count: u32) -> T;
}

/// Bits of the count that matter.
#[inline(always)]
pub const fn count_mask<T: Int>() -> u32 {
    if T::BITS == 64 { 63 } else { 31 }
}

#[inline(always)]
fn top_bit<T: Int>(v: T) -> bool {
    v.to_i64() < 0
}

macro_rules! shifts {
    ($($name:ident |$lf:ident, $a:ident, $count:ident| $body:expr;)*) => {$(
        #[doc = concat!("The operation of ", stringify!($name), ".")]
        #[derive(Clone, Copy)]
        pub struct $name;
        impl Shift for $name {
            #[inline(always)]
            fn run<T: Int>($lf: &mut LazyFlags, $a: T, $count: u32) -> T {
                $body
            }
        }
    )*};
}

shifts! {
    Shl |lf, a, count| {
        let v = a.to_u64();
        let wide = v << count;
        let out = if T::BITS == 64 { v >> (64 - count) } else { wide >> (T::BITS & 63) };
        let r = T::from_u64(wide);
        let cf = out & 1 != 0;
        lf.set_result(r, cf, cf ^ top_bit(r), false);
        r
    };
    Shr |lf, a, count| {
        let before = a.to_u64() >> (count - 1);
        let r = T::from_u64(before >> 1);
        lf.set_result(r, before & 1 != 0, top_bit(a), false);
        r
    };
    Sar |lf, a, count| {
        let before = a.to_i64() >> (count - 1);
        let r = T::from_u64((before >> 1) as u64);
        lf.set_result(r, before & 1 != 0, false, false);
        r
    };
    Rol |lf, a, count| {
        let c = count & (T::BITS - 1);
        let v = a.to_u64();
        let r = if T::BITS == 64 {
            T::from_u64(v.rotate_left(c))
        } else {
            T::from_u64(v << c | v >> ((T::BITS - c) & 63))
        };
        let cf = r.to_u64() & 1 != 0;
        lf.set_cf_of(cf, cf ^ top_bit(r));
        r
    };
    Ror |lf, a, count| {
        let c = count & (T::BITS - 1);
        let v = a.to_u64();
        let r = if T::BITS == 64 {
            T::from_u64(v.rotate_right(c))
        } else {
            T::from_u64(v >> c | v << ((T::BITS - c) & 63))
        };
        let cf = top_bit(r);
        lf.set_cf_of(cf, cf ^ top_bit(T::from_u64(r.to_u64() << 1)));
        r
    };
    Rcl |lf, a, count| {
        let c = count % (T::BITS + 1);
        let wide = (lf.cf() as u128) << T::BITS | a.to_u64() as u128;
        let turned = wide << c | wide >> (T::BITS + 1 - c);
        let r = T::from_u64(turned as u64);
        let cf = turned >> T::BITS & 1 != 0;
        lf.set_cf_of(cf, cf ^ top_bit(r));
        r
    };
    Rcr |lf, a, count| {
        let c = count % (T::BITS + 1);
        let wide = (lf.cf() as u128) << T::BITS | a.to_u64() as u128;
        let turned = wide >> c | wide << (T::BITS + 1 - c);
        let r = T::from_u64(turned as u64);
        let cf = turned >> T::BITS & 1 != 0;
        lf.set_cf_of(cf, top_bit(r) ^ top_bit(T::from_u64(r.to_u64() << 1)));
        r
    };
}

fn reg_imm<S: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let a = cpu.reg::<T>(op.dst);
    let v = S::run(&mut cpu.lf, a, op.imm as u32);
    cpu.set_reg(op.dst, v);
    Ok(())
}

fn mem_imm<S: Shift, E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    E::modify::<T>(cpu, op, |cpu, a| S::run(&mut cpu.lf, a, op.imm as u32))
}

/// The count in CL, masked.
#[inline(always)]
fn cl<T: Int>(cpu: &Cpu) -> u32 {
    cpu.reg::<u8>(r::RCX as u8 * 8) as u32 & count_mask::<T>()
}

#[inline(always)]
fn maybe<S: Shift, T: Int>(lf: &mut LazyFlags, a: T, count: u32) -> T {
    if count == 0 { a } else { S::run(lf, a, count) }
}

fn reg_cl<S: Shift, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let count = cl::<T>(cpu);
    let a = cpu.reg::<T>(op.dst);
    let v = maybe::<S, T>(&mut cpu.lf, a, count);
    cpu.set_reg(op.dst, v);
    Ok(())
}

fn mem_cl<S: Shift, E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let count = cl::<T>(cpu);
    E::modify::<T>(cpu, op, |cpu, a| maybe::<S, T>(&mut cpu.lf, a, count))
}

/// A count of zero: no flags, but the operand is still read and written.
fn reg_zero<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.reg::<T>(op.dst);
    cpu.set_reg(op.dst, v);
    Ok(())
}

fn mem_zero<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.modify::<T>(op, |_, a| a)
}

fn shift<S: Shift>(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let n = size(i, 0);
    let d = place(i, 0)?;
    if d == Place::Reg {
        op.dst = reg(i, 0);
    }
    if i.op_kind(1) == OpKind::Register {
        return Some(match d {
            Place::Reg => sized!(n, |T| handler_registers(reg_cl::<S, T>)),
            _ => sized!(n, |T| memory!(op, |E| mem_cl::<S, E, T>)),
        });
    }
    op.imm = i.immediate8() as u64 & if n == 8 { 63 } else { 31 };
    Some(match (d, op.imm) {
        (Place::Reg, 0) => sized!(n, |T| handler_registers(reg_zero::<T>)),
        (Place::Reg, _) => sized!(n, |T| handler_registers(reg_imm::<S, T>)),
        (_, 0) => sized!(n, |T| handler(mem_zero::<T>)),
        _ => sized!(n, |T| memory!(op, |E| mem_imm::<S, E, T>)),
    })
}

// ---- SHLD, SHRD ------------------------------------------------------------------------------------------------

/// SHLD (`LEFT`) or SHRD of `a`, filling from `b`; `count` is masked and not zero.
///
/// 16-bit operands take counts beyond 16, undefined by the manual: like processors, bits of `a` come around again.
#[inline(always)]
pub fn double_shift<const LEFT: bool, T: Int>(lf: &mut LazyFlags, a: T, b: T, count: u32) -> T {
    let (va, vb) = (a.to_u64(), b.to_u64());
    let (result, out) = if T::BITS == 16 {
        let wide = va << 32 | vb << 16 | va;
        if LEFT { (wide << count >> 32, wide >> (48 - count)) } else { (wide >> count, wide >> (count - 1)) }
    } else if LEFT {
        (va << count | vb >> (T::BITS - count), va >> (T::BITS - count))
    } else {
        (va >> count | vb << (T::BITS - count), va >> (count - 1))
    };
    let r = T::from_u64(result);
    lf.set_result(r, out & 1 != 0, top_bit(r) ^ top_bit(a), false);
    r
}

/// The count of SHLD and SHRD: `aux` is 0 for CL, else it is in `imm`.
#[inline(always)]
fn double_count<T: Int>(cpu: &Cpu, op: &Op) -> u32 {
    if op.aux == 0 { cl::<T>(cpu) } else { op.imm as u32 & count_mask::<T>() }
}

fn double_reg<const LEFT: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let count = double_count::<T>(cpu, op);
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    let v = if count == 0 { a } else { double_shift::<LEFT, T>(&mut cpu.lf, a, b, count) };
    cpu.set_reg(op.dst, v);
    Ok(())
}

fn double_mem<const LEFT: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let count = double_count::<T>(cpu, op);
    let b = cpu.reg::<T>(op.src);
    cpu.modify::<T>(
        op,
        |cpu, a| {
            if count == 0 { a } else { double_shift::<LEFT, T>(&mut cpu.lf, a, b, count) }
        },
    )
}

fn double<const LEFT: bool>(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let n = size(i, 0);
    op.src = reg(i, 1);
    if i.op_kind(2) == OpKind::Immediate8 {
        op.aux = 1;
        op.imm = i.immediate8() as u64;
    }
    Some(match place(i, 0)? {
        Place::Reg => {
            op.dst = reg(i, 0);
            sized_word!(n, |T| handler_registers(double_reg::<LEFT, T>))
        }
        _ => sized_word!(n, |T| handler(double_mem::<LEFT, T>)),
    })
}

/// Translates this module's instructions.
pub fn translate(i: &Instruction, op: &mut Op) -> Option<Handler> {
    match i.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => shift::<Shl>(i, op),
        Mnemonic::Shr => shift::<Shr>(i, op),
        Mnemonic::Sar => shift::<Sar>(i, op),
        Mnemonic::Rol => shift::<Rol>(i, op),
        Mnemonic::Ror => shift::<Ror>(i, op),
        Mnemonic::Rcl => shift::<Rcl>(i, op),
        Mnemonic::Rcr => shift::<Rcr>(i, op),
        Mnemonic::Shld => double::<true>(i, op),
        Mnemonic::Shrd => double::<false>(i, op),
        _ => None,
    }
}
