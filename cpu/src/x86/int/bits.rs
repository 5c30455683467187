// SPDX-License-Identifier: Apache-2.0
//! Bit tests, scans, counts (APM vol. 3: BT, BTS, BTR, BTC, BSF, BSR, TZCNT, LZCNT, POPCNT).

use iced_x86::{Instruction, Mnemonic};

use super::operand::{Place, sized_word, two};
use crate::x86::access::Access;
use crate::x86::flags::{Int, LazyFlags};
use crate::x86::op::{Handler, Op, Res, flag, handler, handler_registers};
use crate::x86::state::Cpu;

// ---- BT, BTS, BTR, BTC -----------------------------------------------------------------------------------------

const TEST: u8 = 0;
const SET: u8 = 1;
const RESET: u8 = 2;
const COMPLEMENT: u8 = 3;

/// Changes bit `bit` (below T::BITS) and sets CF to what it was.
#[inline(always)]
fn change<const KIND: u8, T: Int>(lf: &mut LazyFlags, v: T, bit: u32) -> T {
    let mask = 1u64 << bit;
    let v = v.to_u64();
    lf.set_cf(v & mask != 0);
    T::from_u64(match KIND {
        SET => v | mask,
        RESET => v & !mask,
        COMPLEMENT => v ^ mask,
        _ => v,
    })
}

fn bt_reg_reg<const KIND: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let bit = cpu.reg::<T>(op.src).to_u64() as u32 & (T::BITS - 1);
    let v = cpu.reg::<T>(op.dst);
    let v = change::<KIND, T>(&mut cpu.lf, v, bit);
    if KIND != TEST {
        cpu.set_reg(op.dst, v);
    }
    Ok(())
}

fn bt_reg_imm<const KIND: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.reg::<T>(op.dst);
    let v = change::<KIND, T>(&mut cpu.lf, v, op.imm as u32 & (T::BITS - 1));
    if KIND != TEST {
        cpu.set_reg(op.dst, v);
    }
    Ok(())
}

fn bt_mem_imm<const KIND: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let access = if KIND == TEST { Access::Read } else { Access::Write };
    let linear = cpu.lin(op, T::BYTES, access)?;
    bt_at::<KIND, T>(cpu, op, linear, op.imm as u32 & (T::BITS - 1))
}

/// The bit offset in a register is signed and reaches beyond the operand.
fn bt_mem_reg<const KIND: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let offset = cpu.reg::<T>(op.src).to_i64();
    let bytes = (offset >> T::BITS.trailing_zeros()).wrapping_mul(T::BYTES as i64) as u64;
    let access = if KIND == TEST { Access::Read } else { Access::Write };
    let linear = if op.has(flag::LEGACY_EA) {
        let ea = cpu.ea(op).wrapping_add(bytes);
        let ea = match op.asize {
            8 => ea,
            4 => ea as u32 as u64,
            _ => ea as u16 as u64,
        };
        cpu.seg_lin(op.seg, ea, T::BYTES, access)?
    } else {
        cpu.ea_raw(op).wrapping_add(bytes).wrapping_add(cpu.ea_base[(op.seg & 7) as usize])
    };
    bt_at::<KIND, T>(cpu, op, linear, offset as u32 & (T::BITS - 1))
}

#[inline(always)]
fn bt_at<const KIND: u8, T: Int>(cpu: &mut Cpu, op: &Op, linear: u64, bit: u32) -> Res {
    if KIND == TEST {
        let v = cpu.load_at::<T>(op.seg, linear)?;
        change::<KIND, T>(&mut cpu.lf, v, bit);
        Ok(())
    } else if op.has(flag::LOCK) {
        cpu.modify_locked_at::<T>(op.seg, linear, |cpu, v| change::<KIND, T>(&mut cpu.lf, v, bit))
    } else {
        cpu.modify_at::<T>(op.seg, linear, |cpu, v| change::<KIND, T>(&mut cpu.lf, v, bit))
    }
}

fn bit_test<const KIND: u8>(i: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match two(i, op)? {
        (Place::Reg, Place::Reg, n) => sized_word!(n, |T| handler_registers(bt_reg_reg::<KIND, T>)),
        (Place::Reg, _, n) => sized_word!(n, |T| handler_registers(bt_reg_imm::<KIND, T>)),
        (_, Place::Reg, n) => sized_word!(n, |T| handler(bt_mem_reg::<KIND, T>)),
        (_, _, n) => sized_word!(n, |T| handler(bt_mem_imm::<KIND, T>)),
    })
}

// ---- scans and counts ------------------------------------------------------------------------------------------

/// What becomes of the destination: None leaves it alone.
trait Scan: Copy + 'static {
    fn run<T: Int>(lf: &mut LazyFlags, v: T) -> Option<T>;
}

#[inline(always)]
fn trailing<T: Int>(v: T) -> u32 {
    v.to_u64().trailing_zeros().min(T::BITS)
}

#[inline(always)]
fn leading<T: Int>(v: T) -> u32 {
    v.to_u64().leading_zeros() - (64 - T::BITS)
}

macro_rules! scans {
    ($($name:ident |$lf:ident, $v:ident| $body:expr;)*) => {$(
        #[derive(Clone, Copy)]
        struct $name;
        impl Scan for $name {
            #[inline(always)]
            fn run<T: Int>($lf: &mut LazyFlags, $v: T) -> Option<T> {
                $body
            }
        }
    )*};
}

scans! {
    Bsf |lf, v| {
        lf.set_logic(v);
        (v.to_u64() != 0).then(|| T::from_u64(trailing(v) as u64))
    };
    Bsr |lf, v| {
        lf.set_logic(v);
        (v.to_u64() != 0).then(|| T::from_u64((T::BITS - 1 - leading(v)) as u64))
    };
    Tzcnt |lf, v| {
        let n = T::from_u64(trailing(v) as u64);
        lf.set_result(n, v.to_u64() == 0, false, false);
        Some(n)
    };
    Lzcnt |lf, v| {
        let n = T::from_u64(leading(v) as u64);
        lf.set_result(n, v.to_u64() == 0, false, false);
        Some(n)
    };
    Popcnt |lf, v| {
        // Only ZF can be set: a result of 0 would give PF, 1 doesn't.
        let zero = v.to_u64() == 0;
        lf.res = !zero as i64;
        lf.aux = (zero as u32) << 8;
        Some(T::from_u64(v.to_u64().count_ones() as u64))
    };
}

fn scan_reg<S: Scan, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.reg::<T>(op.src);
    if let Some(n) = S::run(&mut cpu.lf, v) {
        cpu.set_reg(op.dst, n);
    }
    Ok(())
}

fn scan_mem<S: Scan, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.load::<T>(op)?;
    if let Some(n) = S::run(&mut cpu.lf, v) {
        cpu.set_reg(op.dst, n);
    }
    Ok(())
}

fn scan<S: Scan>(i: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match two(i, op)? {
        (_, Place::Reg, n) => sized_word!(n, |T| handler_registers(scan_reg::<S, T>)),
        (_, _, n) => sized_word!(n, |T| handler(scan_mem::<S, T>)),
    })
}

/// Translates this module's instructions.
pub fn translate(i: &Instruction, op: &mut Op) -> Option<Handler> {
    match i.mnemonic() {
        Mnemonic::Bt => bit_test::<TEST>(i, op),
        Mnemonic::Bts => bit_test::<SET>(i, op),
        Mnemonic::Btr => bit_test::<RESET>(i, op),
        Mnemonic::Btc => bit_test::<COMPLEMENT>(i, op),
        Mnemonic::Bsf => scan::<Bsf>(i, op),
        Mnemonic::Bsr => scan::<Bsr>(i, op),
        Mnemonic::Tzcnt => scan::<Tzcnt>(i, op),
        Mnemonic::Lzcnt => scan::<Lzcnt>(i, op),
        Mnemonic::Popcnt => scan::<Popcnt>(i, op),
        _ => None,
    }
}
