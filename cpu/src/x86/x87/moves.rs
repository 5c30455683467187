// SPDX-License-Identifier: Apache-2.0
//! x87 loads, stores, exchanges, conditional moves and stack management (APM vol. 5).

use super::super::access::Access;
use super::super::op::{Op, Res};
use super::super::state::Cpu;
use super::stack::sw;
use crate::float::{self, Env, F80, IE, OE, Rounding, UE};

/// Formats in memory.
pub mod format {
    #![allow(missing_docs)]
    pub const F32: u8 = 0;
    pub const F64: u8 = 1;
    pub const F80: u8 = 2;
    pub const I16: u8 = 3;
    pub const I32: u8 = 4;
    pub const I64: u8 = 5;
    pub const BCD: u8 = 6;
}

/// Alignment of the ten bytes of an m80 operand (SDM vol. 3, interrupt 17).
const TEN_ALIGN: u64 = 8;

/// Reads the ten bytes of an m80 operand.
fn load_ten(cpu: &mut Cpu, op: &Op) -> Result<[u8; 10], super::super::op::Stop> {
    let linear = cpu.aligned_operand(op, 10, TEN_ALIGN, Access::Read)?;
    let mut bytes = [0; 10];
    cpu.read_bytes(cpu.mmu, op.seg, linear, &mut bytes)?;
    Ok(bytes)
}

fn store_ten(cpu: &mut Cpu, op: &Op, bytes: &[u8; 10]) -> Res {
    let linear = cpu.aligned_operand(op, 10, TEN_ALIGN, Access::Write)?;
    cpu.write_bytes(cpu.mmu, op.seg, linear, bytes)
}

/// The image of an F80 in memory.
pub fn image(v: F80) -> [u8; 10] {
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&v.mant.to_le_bytes());
    bytes[8..].copy_from_slice(&v.se.to_le_bytes());
    bytes
}

/// An F80 from its image.
pub fn from_image(bytes: &[u8]) -> F80 {
    let mut wide = [0; 16];
    let n = bytes.len().min(10);
    wide[..n].copy_from_slice(&bytes[..n]);
    F80::from_bits(u128::from_le_bytes(wide))
}

/// FLD, FILD, FBLD.
pub fn load<const FORMAT: u8>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    let mut env = cpu.x87_env();
    let value = match FORMAT {
        format::F32 => float::f80_from_f32(cpu.load::<u32>(op)?, &mut env),
        format::F64 => float::f80_from_f64(cpu.load::<u64>(op)?, &mut env),
        format::F80 => from_image(&load_ten(cpu, op)?),
        format::I16 => float::f80_from_i64((cpu.load::<u16>(op)? as i16).into()),
        format::I32 => float::f80_from_i64((cpu.load::<u32>(op)? as i32).into()),
        format::I64 => float::f80_from_i64(cpu.load::<u64>(op)? as i64),
        _ => float::f80_from_bcd(&load_ten(cpu, op)?),
    };
    cpu.x87_note_data(op);
    if !cpu.st_empty(7) {
        if cpu.stack_fault(op, true) {
            cpu.push_st(F80::INDEFINITE);
        }
    } else {
        // An unmasked denormal exception doesn't stop a load.
        let invalid = env.flags & !env.masks & IE != 0;
        cpu.x87_commit(op, &env);
        if !invalid {
            cpu.push_st(value);
        }
    }
    Ok(())
}

/// Raises what a store to the operand would raise.
#[cold]
fn prepare_store<const FORMAT: u8>(cpu: &mut Cpu, op: &Op) -> Res {
    let size = match FORMAT {
        format::I16 => 2,
        format::F32 | format::I32 => 4,
        format::F64 | format::I64 => 8,
        _ => 10,
    };
    let linear = if size == 10 {
        cpu.aligned_operand(op, size, TEN_ALIGN, Access::Write)?
    } else {
        cpu.lin(op, size, Access::Write)?
    };
    cpu.prepare_write(op.seg, linear, size)
}

/// FST, FSTP, FIST, FISTP, FISTTP, FBSTP. An unmasked invalid, overflow or underflow exception keeps memory and stack
/// as they are.
pub fn store<const FORMAT: u8, const POP: bool, const TRUNCATE: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    let empty = cpu.st_empty(0);
    let mut env = cpu.x87_env();
    if TRUNCATE {
        env.rounding = Rounding::Zero;
    }
    let v = if empty { F80::INDEFINITE } else { cpu.st(0) };
    let mut bytes = [0u8; 10];
    let number: u64 = match FORMAT {
        format::F32 => float::f80_to_f32(v, &mut env).into(),
        format::F64 => float::f80_to_f64(v, &mut env),
        format::I16 => (float::f80_to_i16(v, &mut env) as u16).into(),
        format::I32 => (float::f80_to_i32(v, &mut env) as u32).into(),
        format::I64 => float::f80_to_i64(v, &mut env) as u64,
        format::F80 => {
            bytes = image(v);
            0
        }
        _ => {
            bytes = float::f80_to_bcd(v, &mut env);
            0
        }
    };
    if empty {
        env = Env { flags: IE, c1: false, ..env };
    }
    let stores = env.flags & !env.masks & (IE | OE | UE) == 0;
    if stores {
        match FORMAT {
            format::F32 | format::I32 => cpu.store(op, number as u32)?,
            format::F64 | format::I64 => cpu.store(op, number)?,
            format::I16 => cpu.store(op, number as u16)?,
            _ => store_ten(cpu, op, &bytes)?,
        }
    } else {
        // Nothing is stored, but the destination's own faults come first.
        prepare_store::<FORMAT>(cpu, op)?;
    }
    cpu.x87_note_data(op);
    if empty {
        cpu.stack_fault(op, false);
    } else {
        cpu.x87_commit(op, &env);
    }
    if stores && POP {
        cpu.pop_st();
    }
    Ok(())
}

/// FLD ST(i).
pub fn load_register(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    let i = op.aux as usize;
    let v = cpu.st(i);
    if !cpu.st_empty(7) || cpu.st_empty(i) {
        let overflow = !cpu.st_empty(i);
        if cpu.stack_fault(op, overflow) {
            cpu.push_st(F80::INDEFINITE);
        }
        return Ok(());
    }
    cpu.set_conditions(sw::C1, 0);
    cpu.push_st(v);
    Ok(())
}

/// FST ST(i), FSTP ST(i).
pub fn store_register<const POP: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    let v = if cpu.st_empty(0) {
        if !cpu.stack_fault(op, false) {
            return Ok(());
        }
        F80::INDEFINITE
    } else {
        cpu.set_conditions(sw::C1, 0);
        cpu.st(0)
    };
    cpu.set_st(op.aux as usize, v);
    if POP {
        cpu.pop_st();
    }
    Ok(())
}

/// FSTPNCE: FSTP ST(i) that pops an empty stack in silence.
pub fn store_register_quietly(cpu: &mut Cpu, op: &Op) -> Res {
    if cpu.st_empty(0) {
        cpu.x87_enter()?;
        cpu.x87_note(op);
        cpu.set_conditions(sw::C1, 0);
        cpu.pop_st();
        return Ok(());
    }
    store_register::<true>(cpu, op)
}

/// FXCH.
pub fn exchange(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    let i = op.aux as usize;
    let (mut a, mut b) = (cpu.st(0), cpu.st(i));
    if cpu.st_empty(0) || cpu.st_empty(i) {
        let (empty_a, empty_b) = (cpu.st_empty(0), cpu.st_empty(i));
        if !cpu.stack_fault(op, false) {
            return Ok(());
        }
        if empty_a {
            a = F80::INDEFINITE;
        }
        if empty_b {
            b = F80::INDEFINITE;
        }
    } else {
        cpu.set_conditions(sw::C1, 0);
    }
    cpu.set_st(0, b);
    cpu.set_st(i, a);
    Ok(())
}

/// FCMOVcc; the condition code is in `src`.
pub fn conditional(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    let i = op.aux as usize;
    if cpu.st_empty(0) || cpu.st_empty(i) {
        if cpu.stack_fault(op, false) {
            cpu.set_st(0, F80::INDEFINITE);
        }
    } else if cpu.lf.condition(op.src) {
        let v = cpu.st(i);
        cpu.set_st(0, v);
    }
    Ok(())
}

/// FFREE, and FFREEP which also pops.
pub fn free<const POP: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    cpu.set_conditions(sw::C1, 0);
    cpu.free_st(op.aux as usize);
    if POP {
        cpu.pop_st();
    }
    Ok(())
}

/// FINCSTP (`STEP` 1), FDECSTP (`STEP` 7).
pub fn rotate<const STEP: usize>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    cpu.set_conditions(sw::C1, 0);
    cpu.set_st_top(cpu.st_top() + STEP);
    Ok(())
}
