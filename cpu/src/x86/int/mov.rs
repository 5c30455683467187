// SPDX-License-Identifier: Apache-2.0
//! Data movement between general registers, memory and the stack (APM vol. 3: MOV, MOVBE, MOVNTI, MOVSX, MOVSXD,
//! MOVZX, XCHG, LEA, CMOVcc, SETcc, BSWAP, CBW family, XLAT, LAHF, SAHF).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::operand::{
    Ea, Place, conditional, memory, memory_small, place, reg, size, sized, sized_word, two,
};
use crate::x86::access::Access;
use crate::x86::flags::{Int, rf};
use crate::x86::op::{Handler, Op, Res, SLOT_ZERO, handler, handler_registers};
use crate::x86::state::{Cpu, reg as r};

// ---- MOV -------------------------------------------------------------------------------------------------------

#[inline]
fn mov_reg_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.reg::<T>(op.src);
    cpu.set_reg(op.dst, v);
    Ok(())
}

#[inline]
fn mov_reg_imm<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.set_reg(op.dst, T::from_u64(op.imm));
    Ok(())
}

#[inline]
fn mov_reg_mem<E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = E::load::<T>(cpu, op)?;
    cpu.set_reg(op.dst, v);
    Ok(())
}

#[inline]
fn mov_mem_reg<E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.reg::<T>(op.src);
    E::store::<T>(cpu, op, v)
}

#[inline]
fn mov_mem_imm<E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    E::store::<T>(cpu, op, T::from_u64(op.imm))
}

/// MOV AL/eAX, moffs with a 64-bit offset, in `imm`.
#[inline]
fn mov_load_offset<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let linear = op.imm.wrapping_add(cpu.ea_base[(op.seg & 7) as usize]);
    let v = cpu.load_at::<T>(op.seg, linear)?;
    cpu.set_reg(op.dst, v);
    Ok(())
}

/// MOV moffs, AL/eAX with a 64-bit offset.
#[inline]
fn mov_store_offset<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let linear = op.imm.wrapping_add(cpu.ea_base[(op.seg & 7) as usize]);
    let v = cpu.reg::<T>(op.src);
    cpu.store_at(op.seg, linear, v)
}

/// A displacement that needs all 64 bits, as only the moffs forms have.
fn wide_offset(i: &Instruction, op: &Op) -> bool {
    op.base == SLOT_ZERO
        && op.index == SLOT_ZERO
        && op.asize == 8
        && i.memory_displacement64() != op.disp as i64 as u64
}

fn mov(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let (d, s, n) = two(i, op)?;
    Some(match (d, s) {
        (Place::Reg, Place::Reg) => sized!(n, |T| handler_registers(mov_reg_reg::<T>)),
        (Place::Reg, Place::Imm) => sized!(n, |T| handler_registers(mov_reg_imm::<T>)),
        (Place::Reg, Place::Mem) if wide_offset(i, op) => {
            op.imm = i.memory_displacement64();
            sized!(n, |T| handler(mov_load_offset::<T>))
        }
        (Place::Mem, Place::Reg) if wide_offset(i, op) => {
            op.imm = i.memory_displacement64();
            sized!(n, |T| handler(mov_store_offset::<T>))
        }
        (Place::Reg, Place::Mem) => sized!(n, |T| memory!(op, |E| mov_reg_mem::<E, T>)),
        (Place::Mem, Place::Reg) => sized!(n, |T| memory!(op, |E| mov_mem_reg::<E, T>)),
        (Place::Mem, Place::Imm) => sized!(n, |T| memory!(op, |E| mov_mem_imm::<E, T>)),
        _ => return None,
    })
}

// ---- MOVZX, MOVSX, MOVSXD --------------------------------------------------------------------------------------

#[inline(always)]
fn extend<const SIGNED: bool, S: Int, D: Int>(v: S) -> D {
    D::from_u64(if SIGNED { v.to_i64() as u64 } else { v.to_u64() })
}

#[inline]
fn extend_reg<const SIGNED: bool, S: Int, D: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.reg::<S>(op.src);
    cpu.set_reg(op.dst, extend::<SIGNED, S, D>(v));
    Ok(())
}

#[inline]
fn extend_mem<const SIGNED: bool, E: Ea, S: Int, D: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = E::load::<S>(cpu, op)?;
    cpu.set_reg(op.dst, extend::<SIGNED, S, D>(v));
    Ok(())
}

fn extending<const SIGNED: bool>(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let (_, s, n) = two(i, op)?;
    macro_rules! pick {
        ($s:ty) => {
            match s {
                Place::Reg => sized_word!(n, |D| handler_registers(extend_reg::<SIGNED, $s, D>)),
                _ => sized_word!(n, |D| memory!(op, |E| extend_mem::<SIGNED, E, $s, D>)),
            }
        };
    }
    Some(match size(i, 1) {
        // MOVSXD reads 32 bits from memory, whatever the operand size (APM vol. 3).
        2 if i.code() == Code::Movsxd_r16_rm16 => pick!(u32),
        1 => pick!(u8),
        2 => pick!(u16),
        _ => pick!(u32),
    })
}

// ---- XCHG ------------------------------------------------------------------------------------------------------

#[inline]
fn xchg_reg<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    cpu.set_reg(op.src, a);
    cpu.set_reg(op.dst, b);
    Ok(())
}

/// Locked whether it says so or not.
#[inline]
fn xchg_mem<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let new = cpu.reg::<T>(op.src);
    let mut old = new;
    cpu.modify_locked::<T>(op, |_, found| {
        old = found;
        new
    })?;
    cpu.set_reg(op.src, old);
    Ok(())
}

fn xchg(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let (d, s, n) = two(i, op)?;
    Some(match (d, s) {
        (Place::Reg, Place::Reg) => sized!(n, |T| handler_registers(xchg_reg::<T>)),
        (Place::Mem, Place::Reg) => sized!(n, |T| handler(xchg_mem::<T>)),
        (Place::Reg, Place::Mem) => {
            op.src = op.dst;
            sized!(n, |T| handler(xchg_mem::<T>))
        }
        _ => return None,
    })
}

// ---- LEA -------------------------------------------------------------------------------------------------------

#[inline]
fn lea_base<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let ea = cpu.reg::<u64>(op.base).wrapping_add(op.disp as i64 as u64);
    cpu.set_reg(op.dst, T::from_u64(ea));
    Ok(())
}

#[inline]
fn lea_index<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let ea = cpu.ea_raw(op);
    cpu.set_reg(op.dst, T::from_u64(ea));
    Ok(())
}

#[inline]
fn lea_any<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let ea = cpu.ea(op);
    cpu.set_reg(op.dst, T::from_u64(ea));
    Ok(())
}

fn lea(i: &Instruction, op: &mut Op) -> Option<Handler> {
    let (_, _, n) = two(i, op)?;
    // Truncating the result truncates the address too.
    Some(if n > op.asize as usize {
        sized_word!(n, |T| handler_registers(lea_any::<T>))
    } else if op.index == SLOT_ZERO {
        sized_word!(n, |T| handler_registers(lea_base::<T>))
    } else {
        sized_word!(n, |T| handler_registers(lea_index::<T>))
    })
}

// ---- conditions ------------------------------------------------------------------------------------------------

#[inline]
fn cmov_reg<const CC: u8, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let (new, old) = (cpu.reg::<T>(op.src), cpu.reg::<T>(op.dst));
    // Written either way: a 32-bit CMOV clears the upper half even when the condition doesn't hold.
    let v = if cpu.lf.condition(CC) { new } else { old };
    cpu.set_reg(op.dst, v);
    Ok(())
}

#[inline]
fn cmov_mem<const CC: u8, E: Ea, T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let new = E::load::<T>(cpu, op)?;
    let old = cpu.reg::<T>(op.dst);
    let v = if cpu.lf.condition(CC) { new } else { old };
    cpu.set_reg(op.dst, v);
    Ok(())
}

fn cmov(i: &Instruction, op: &mut Op, cc: u8) -> Option<Handler> {
    let (_, s, n) = two(i, op)?;
    Some(match s {
        Place::Reg => conditional!(cc, |CC| sized_word!(n, |T| handler_registers(cmov_reg::<CC, T>))),
        _ => conditional!(cc, |CC| sized_word!(n, |T| memory_small!(op, |E| cmov_mem::<CC, E, T>))),
    })
}

#[inline]
fn setcc_reg<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.lf.condition(CC) as u8;
    cpu.set_reg(op.dst, v);
    Ok(())
}

#[inline]
fn setcc_mem<const CC: u8, E: Ea>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.lf.condition(CC) as u8;
    E::store(cpu, op, v)
}

fn setcc(i: &Instruction, op: &mut Op, cc: u8) -> Option<Handler> {
    Some(match place(i, 0)? {
        Place::Reg => {
            op.dst = reg(i, 0);
            conditional!(cc, |CC| handler_registers(setcc_reg::<CC>))
        }
        _ => conditional!(cc, |CC| memory_small!(op, |E| setcc_mem::<CC, E>)),
    })
}

// ---- bytes in a register ---------------------------------------------------------------------------------------

/// Swaps the bytes of an operand.
#[inline(always)]
fn swap<T: Int>(v: T) -> T {
    T::from_u64(v.to_u64().swap_bytes() >> (64 - T::BITS))
}

#[inline]
fn bswap<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.reg::<T>(op.dst);
    // The 16-bit form is undefined; processors clear the register.
    cpu.set_reg(op.dst, if T::BITS == 16 { T::from_u64(0) } else { swap(v) });
    Ok(())
}

#[inline]
fn movbe_load<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.load::<T>(op)?;
    cpu.set_reg(op.dst, swap(v));
    Ok(())
}

#[inline]
fn movbe_store<T: Int>(cpu: &mut Cpu, op: &Op) -> Res {
    let v = cpu.reg::<T>(op.src);
    cpu.store(op, swap(v))
}

fn movbe(i: &Instruction, op: &mut Op) -> Option<Handler> {
    match two(i, op)? {
        (Place::Reg, Place::Mem, n) => Some(sized_word!(n, |T| handler(movbe_load::<T>))),
        (Place::Mem, Place::Reg, n) => Some(sized_word!(n, |T| handler(movbe_store::<T>))),
        _ => None,
    }
}

/// CBW, CWDE, CDQE: sign-extends the lower half of the accumulator.
#[inline]
fn extend_accumulator<S: Int, D: Int>(cpu: &mut Cpu, _: &Op) -> Res {
    let v = cpu.reg::<S>(0);
    cpu.set_reg(0, extend::<true, S, D>(v));
    Ok(())
}

/// CWD, CDQ, CQO: fills rDX with the accumulator's sign.
#[inline]
fn sign_to_rdx<T: Int>(cpu: &mut Cpu, _: &Op) -> Res {
    let sign = cpu.reg::<T>(0).to_i64() >> 63;
    cpu.set_reg(r::RDX as u8 * 8, T::from_u64(sign as u64));
    Ok(())
}

/// XLAT: AL = seg:[rBX + AL].
#[inline]
fn xlat(cpu: &mut Cpu, op: &Op) -> Res {
    let ea = cpu.rb.gpr[r::RBX].wrapping_add(cpu.reg::<u8>(0) as u64);
    let offset = match op.asize {
        8 => ea,
        4 => ea as u32 as u64,
        _ => ea as u16 as u64,
    };
    let linear = cpu.seg_lin(op.seg, offset, 1, Access::Read)?;
    let v = cpu.load_at::<u8>(op.seg, linear)?;
    cpu.set_reg(0, v);
    Ok(())
}

/// Offset of AH in the register file.
const AH: u8 = 1;

#[inline]
fn lahf(cpu: &mut Cpu, _: &Op) -> Res {
    let v = (cpu.lf.bits() & 0xff | rf::FIXED1) as u8;
    cpu.set_reg(AH, v);
    Ok(())
}

#[inline]
fn sahf(cpu: &mut Cpu, _: &Op) -> Res {
    let low = rf::CF | rf::PF | rf::AF | rf::ZF | rf::SF;
    let image = cpu.reg::<u8>(AH) as u64 & low | cpu.lf.bits() & rf::OF;
    cpu.lf.set_all(image);
    Ok(())
}

/// The condition code of CMOVcc.
fn cmov_condition(m: Mnemonic) -> Option<u8> {
    Some(match m {
        Mnemonic::Cmovo => 0,
        Mnemonic::Cmovno => 1,
        Mnemonic::Cmovb => 2,
        Mnemonic::Cmovae => 3,
        Mnemonic::Cmove => 4,
        Mnemonic::Cmovne => 5,
        Mnemonic::Cmovbe => 6,
        Mnemonic::Cmova => 7,
        Mnemonic::Cmovs => 8,
        Mnemonic::Cmovns => 9,
        Mnemonic::Cmovp => 10,
        Mnemonic::Cmovnp => 11,
        Mnemonic::Cmovl => 12,
        Mnemonic::Cmovge => 13,
        Mnemonic::Cmovle => 14,
        Mnemonic::Cmovg => 15,
        _ => return None,
    })
}

/// The condition code of SETcc.
fn setcc_condition(m: Mnemonic) -> Option<u8> {
    Some(match m {
        Mnemonic::Seto => 0,
        Mnemonic::Setno => 1,
        Mnemonic::Setb => 2,
        Mnemonic::Setae => 3,
        Mnemonic::Sete => 4,
        Mnemonic::Setne => 5,
        Mnemonic::Setbe => 6,
        Mnemonic::Seta => 7,
        Mnemonic::Sets => 8,
        Mnemonic::Setns => 9,
        Mnemonic::Setp => 10,
        Mnemonic::Setnp => 11,
        Mnemonic::Setl => 12,
        Mnemonic::Setge => 13,
        Mnemonic::Setle => 14,
        Mnemonic::Setg => 15,
        _ => return None,
    })
}

/// Translates this module's instructions.
pub fn translate(i: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Mov => return mov(i, op),
        Mnemonic::Movnti => return mov(i, op),
        Mnemonic::Movzx => return extending::<false>(i, op),
        Mnemonic::Movsx | Mnemonic::Movsxd => return extending::<true>(i, op),
        Mnemonic::Lea => return lea(i, op),
        Mnemonic::Xchg => return xchg(i, op),
        Mnemonic::Movbe => return movbe(i, op),
        Mnemonic::Bswap => {
            op.dst = reg(i, 0);
            sized_word!(size(i, 0), |T| handler_registers(bswap::<T>))
        }
        Mnemonic::Cbw => handler_registers(extend_accumulator::<u8, u16>),
        Mnemonic::Cwde => handler_registers(extend_accumulator::<u16, u32>),
        Mnemonic::Cdqe => handler_registers(extend_accumulator::<u32, u64>),
        Mnemonic::Cwd => handler_registers(sign_to_rdx::<u16>),
        Mnemonic::Cdq => handler_registers(sign_to_rdx::<u32>),
        Mnemonic::Cqo => handler_registers(sign_to_rdx::<u64>),
        Mnemonic::Xlatb if i.op0_kind() == OpKind::Memory => handler(xlat),
        Mnemonic::Lahf => handler_registers(lahf),
        Mnemonic::Sahf => handler_registers(sahf),
        m => {
            if let Some(cc) = cmov_condition(m) {
                return cmov(i, op, cc);
            }
            return setcc(i, op, setcc_condition(m)?);
        }
    })
}
