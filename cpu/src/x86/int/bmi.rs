// SPDX-License-Identifier: Apache-2.0
//! BMI1 and BMI2 (APM vol. 3: ANDN, BEXTR, BLSI, BLSMSK, BLSR, BZHI, MULX, PDEP, PEXT, RORX, SARX, SHLX, SHRX).
//!
//! VEX-encoded: #UD in real and virtual-8086 mode.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind};

use super::operand::{reg, size};
use crate::x86::flags::{Int, LazyFlags};
use crate::x86::op::{Handler, Op, Res, handler, handler_registers};
use crate::x86::state::{Cpu, reg as r};
use crate::x86::translate::Context;

/// An operation on the ModRM operand and the second register (or immediate).
trait Vex: Copy + 'static {
    fn run<T: Int>(lf: &mut LazyFlags, rm: T, v: T) -> T;
}

/// Scatters the low bits of `v` to where `mask` has ones.
pub fn deposit(v: u64, mut mask: u64) -> u64 {
    let mut out = 0;
    let mut bit = 1;
    while mask != 0 {
        let low = mask & mask.wrapping_neg();
        if v & bit != 0 {
            out |= low;
        }
        mask ^= low;
        bit <<= 1;
    }
    out
}

/// Gathers the bits of `v` where `mask` has ones.
pub fn extract(v: u64, mut mask: u64) -> u64 {
    let mut out = 0;
    let mut bit = 1;
    while mask != 0 {
        let low = mask & mask.wrapping_neg();
        if v & low != 0 {
            out |= bit;
        }
        mask ^= low;
        bit <<= 1;
    }
    out
}

macro_rules! vex {
    ($($name:ident |$lf:ident, $rm:ident, $v:ident| $body:expr;)*) => {$(
        #[derive(Clone, Copy)]
        struct $name;
        impl Vex for $name {
            #[inline(always)]
            fn run<T: Int>($lf: &mut LazyFlags, $rm: T, $v: T) -> T {
                $body
            }
        }
    )*};
}

vex! {
    Andn |lf, rm, v| {
        let n = T::from_u64(!v.to_u64() & rm.to_u64());
        lf.set_logic(n);
        n
    };
    Bextr |lf, rm, v| {
        let (start, length) = (v.to_u64() as u8, (v.to_u64() >> 8) as u8);
        let from = rm.to_u64().checked_shr(start as u32).unwrap_or(0);
        let n = T::from_u64(if length < 64 { from & ((1 << length) - 1) } else { from });
        lf.set_logic(n);
        n
    };
    Blsi |lf, rm, _v| {
        let n = T::from_u64(rm.to_u64() & rm.to_u64().wrapping_neg());
        lf.set_result(n, rm.to_u64() != 0, false, false);
        n
    };
    Blsmsk |lf, rm, _v| {
        let n = T::from_u64(rm.to_u64() ^ rm.to_u64().wrapping_sub(1));
        lf.set_result(n, rm.to_u64() == 0, false, false);
        n
    };
    Blsr |lf, rm, _v| {
        let n = T::from_u64(rm.to_u64() & rm.to_u64().wrapping_sub(1));
        lf.set_result(n, rm.to_u64() == 0, false, false);
        n
    };
    Bzhi |lf, rm, v| {
        let index = v.to_u64() as u8 as u32;
        let beyond = index >= T::BITS;
        let n = if beyond { rm } else { T::from_u64(rm.to_u64() & ((1 << index) - 1)) };
        lf.set_result(n, beyond, false, false);
        n
    };
    Pdep |_lf, rm, v| T::from_u64(deposit(v.to_u64(), rm.to_u64()));
    Pext |_lf, rm, v| T::from_u64(extract(v.to_u64(), rm.to_u64()));
    Rorx |_lf, rm, v| {
        let count = v.to_u64() as u32 & (T::BITS - 1);
        let a = rm.to_u64();
        T::from_u64(if T::BITS == 64 {
            a.rotate_right(count)
        } else {
            (a as u32).rotate_right(count) as u64
        })
    };
    Sarx |_lf, rm, v| T::from_u64((rm.to_i64() >> (v.to_u64() as u32 & (T::BITS - 1))) as u64);
    Shlx |_lf, rm, v| T::from_u64(rm.to_u64() << (v.to_u64() as u32 & (T::BITS - 1)));
    Shrx |_lf, rm, v| T::from_u64(rm.to_u64() >> (v.to_u64() as u32 & (T::BITS - 1)));
}

/// #UD where VEX prefixes aren't recognized.
#[inline(always)]
fn check<const LONG: bool>(cpu: &mut Cpu) -> Res {
    if !LONG && cpu.real_or_v86() { Err(cpu.ud()) } else { Ok(()) }
}

/// `dst`, `src` = ModRM operand, `aux` = the other register.
fn vex_reg<V: Vex, const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    check::<LONG>(cpu)?;
    let (rm, v) = (cpu.reg::<T>(op.src), cpu.reg::<T>(op.aux));
    let n = V::run(&mut cpu.lf, rm, v);
    cpu.set_reg(op.dst, n);
    Ok(())
}

fn vex_mem<V: Vex, const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    check::<LONG>(cpu)?;
    let rm = cpu.load::<T>(op)?;
    let v = cpu.reg::<T>(op.aux);
    let n = V::run(&mut cpu.lf, rm, v);
    cpu.set_reg(op.dst, n);
    Ok(())
}

fn rorx_reg<const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    check::<LONG>(cpu)?;
    let rm = cpu.reg::<T>(op.src);
    let n = Rorx::run(&mut cpu.lf, rm, T::from_u64(op.imm));
    cpu.set_reg(op.dst, n);
    Ok(())
}

fn rorx_mem<const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    check::<LONG>(cpu)?;
    let rm = cpu.load::<T>(op)?;
    let n = Rorx::run(&mut cpu.lf, rm, T::from_u64(op.imm));
    cpu.set_reg(op.dst, n);
    Ok(())
}

/// High half to `dst`, low half to `aux`; the high half wins when they are the same.
#[inline(always)]
fn mulx_with<T: Int>(cpu: &mut Cpu, op: &Op, b: T) {
    let a = cpu.reg::<T>(r::RDX as u8 * 8);
    let wide = a.to_u64() as u128 * b.to_u64() as u128;
    cpu.set_reg(op.aux, T::from_u64(wide as u64));
    cpu.set_reg(op.dst, T::from_u64((wide >> T::BITS) as u64));
}

fn mulx_reg<const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    check::<LONG>(cpu)?;
    let b = cpu.reg::<T>(op.src);
    mulx_with(cpu, op, b);
    Ok(())
}

fn mulx_mem<const LONG: bool, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    check::<LONG>(cpu)?;
    let b = cpu.load::<T>(op)?;
    mulx_with(cpu, op, b);
    Ok(())
}

/// `wide!(long, bytes, |LONG, T| expression)`: 32 and 64-bit operands.
macro_rules! wide {
    ($long:expr, $n:expr, |$l:ident, $t:ident| $e:expr) => {
        match ($long, $n) {
            (true, 8) => {
                const $l: bool = true;
                type $t = u64;
                $e
            }
            (true, _) => {
                const $l: bool = true;
                type $t = u32;
                $e
            }
            _ => {
                const $l: bool = false;
                type $t = u32;
                $e
            }
        }
    };
}

fn vex<V: Vex>(i: &Instruction, op: &mut Op, long: bool, rm: u32, v: u32) -> Handler {
    op.dst = reg(i, 0);
    if v < i.op_count() {
        op.aux = reg(i, v);
    }
    if i.op_kind(rm) == OpKind::Register {
        op.src = reg(i, rm);
        wide!(long, size(i, 0), |LONG, T| handler_registers(vex_reg::<V, LONG, T>))
    } else {
        wide!(long, size(i, 0), |LONG, T| handler(vex_mem::<V, LONG, T>))
    }
}

/// Translates this module's instructions.
pub fn translate(i: &Instruction, op: &mut Op, cx: &Context) -> Option<Handler> {
    if i.code().encoding() != EncodingKind::VEX {
        return None;
    }
    let long = cx.code_size == 8;
    Some(match i.mnemonic() {
        Mnemonic::Andn => vex::<Andn>(i, op, long, 2, 1),
        Mnemonic::Bextr => vex::<Bextr>(i, op, long, 1, 2),
        Mnemonic::Blsi => vex::<Blsi>(i, op, long, 1, 0),
        Mnemonic::Blsmsk => vex::<Blsmsk>(i, op, long, 1, 0),
        Mnemonic::Blsr => vex::<Blsr>(i, op, long, 1, 0),
        Mnemonic::Bzhi => vex::<Bzhi>(i, op, long, 1, 2),
        Mnemonic::Pdep => vex::<Pdep>(i, op, long, 2, 1),
        Mnemonic::Pext => vex::<Pext>(i, op, long, 2, 1),
        Mnemonic::Sarx => vex::<Sarx>(i, op, long, 1, 2),
        Mnemonic::Shlx => vex::<Shlx>(i, op, long, 1, 2),
        Mnemonic::Shrx => vex::<Shrx>(i, op, long, 1, 2),
        Mnemonic::Rorx => {
            op.dst = reg(i, 0);
            op.imm = i.immediate8() as u64;
            if i.op1_kind() == OpKind::Register {
                op.src = reg(i, 1);
                wide!(long, size(i, 0), |LONG, T| handler_registers(rorx_reg::<LONG, T>))
            } else {
                wide!(long, size(i, 0), |LONG, T| handler(rorx_mem::<LONG, T>))
            }
        }
        Mnemonic::Mulx => {
            op.dst = reg(i, 0);
            op.aux = reg(i, 1);
            if i.op2_kind() == OpKind::Register {
                op.src = reg(i, 2);
                wide!(long, size(i, 0), |LONG, T| handler_registers(mulx_reg::<LONG, T>))
            } else {
                wide!(long, size(i, 0), |LONG, T| handler(mulx_mem::<LONG, T>))
            }
        }
        _ => return None,
    })
}
