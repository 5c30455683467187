// SPDX-License-Identifier: Apache-2.0
//! x87 arithmetic, comparisons and transcendental instructions (APM vol. 5).

use core::cmp::Ordering;

use super::super::flags::rf;
use super::super::op::{Op, Res};
use super::super::state::Cpu;
use super::stack::sw;
use crate::float::{self, Class, Constant, DE, Env, F80, IE};

/// Operations in the order of the ModRM.reg field of D8.
pub mod operation {
    #![allow(missing_docs)]
    pub const ADD: u8 = 0;
    pub const MUL: u8 = 1;
    pub const SUB: u8 = 4;
    pub const SUBR: u8 = 5;
    pub const DIV: u8 = 6;
    pub const DIVR: u8 = 7;
}

/// Where operand and destination are.
pub mod form {
    #![allow(missing_docs)]
    pub const M32: u8 = 0;
    pub const M64: u8 = 1;
    pub const I16: u8 = 2;
    pub const I32: u8 = 3;
    /// ST0 = ST0 op ST(i)
    pub const ST0: u8 = 4;
    /// ST(i) = ST(i) op ST0
    pub const STI: u8 = 5;
    /// The same, then pop.
    pub const POP: u8 = 6;
}

/// A memory operand as F80. A signaling NaN stays one and a denormal is only marked: the operation that uses the
/// operand decides what they raise.
struct Source {
    value: F80,
    denormal: bool,
}

fn memory<const FORM: u8>(cpu: &mut Cpu, op: &Op) -> Result<Source, super::super::op::Stop> {
    let mut env = Env::DEFAULT;
    let value = match FORM {
        form::M32 => {
            let bits = cpu.load::<u32>(op)?;
            restore_signaling(float::f80_from_f32(bits, &mut env), env)
        }
        form::M64 => {
            let bits = cpu.load::<u64>(op)?;
            restore_signaling(float::f80_from_f64(bits, &mut env), env)
        }
        form::I16 => float::f80_from_i64((cpu.load::<u16>(op)? as i16).into()),
        _ => float::f80_from_i64((cpu.load::<u32>(op)? as i32).into()),
    };
    Ok(Source { value, denormal: env.flags & DE != 0 })
}

/// Takes back the quieting of a signaling NaN by the conversion.
fn restore_signaling(v: F80, env: Env) -> F80 {
    if env.flags & IE != 0 { F80 { mant: v.mant & !(1 << 62), ..v } } else { v }
}

fn is_number(v: F80) -> bool {
    !matches!(float::f80_class(v), Class::Nan | Class::Unsupported)
}

#[inline(always)]
fn compute<const OP: u8>(a: F80, b: F80, env: &mut Env) -> F80 {
    match OP {
        operation::ADD => float::f80_add(a, b, env),
        operation::MUL => float::f80_mul(a, b, env),
        operation::SUB => float::f80_sub(a, b, env),
        operation::SUBR => float::f80_sub(b, a, env),
        operation::DIV => float::f80_div(a, b, env),
        _ => float::f80_div(b, a, env),
    }
}

/// FADD, FMUL, FSUB, FSUBR, FDIV, FDIVR and their P and I forms.
pub fn arithmetic<const OP: u8, const FORM: u8>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    let i = op.aux as usize;
    let (dst, a, b, empty, denormal);
    if FORM <= form::I32 {
        let source = memory::<FORM>(cpu, op)?;
        cpu.x87_note_data(op);
        (dst, a, b, denormal) = (0, cpu.st(0), source.value, source.denormal);
        empty = cpu.st_empty(0);
    } else {
        cpu.x87_note(op);
        empty = cpu.st_empty(0) || cpu.st_empty(i);
        (dst, a, b) = if FORM == form::ST0 { (0, cpu.st(0), cpu.st(i)) } else { (i, cpu.st(i), cpu.st(0)) };
        denormal = false;
    }
    let (write, value);
    if empty {
        (write, value) = (cpu.stack_fault(op, false), F80::INDEFINITE);
    } else {
        let mut env = cpu.x87_env();
        // Division by zero hides the denormal dividend.
        let by_zero = OP == operation::DIVR && float::f80_class(a) == Class::Zero;
        if denormal && is_number(a) && !by_zero {
            env.flags |= DE;
        }
        value = compute::<OP>(a, b, &mut env);
        write = cpu.x87_commit(op, &env);
    }
    if write {
        cpu.set_st(dst, value);
        if FORM == form::POP {
            cpu.pop_st();
        }
    }
    Ok(())
}

// ---- comparisons -----------------------------------------------------------------------------------------------

fn conditions(o: Option<Ordering>) -> u16 {
    match o {
        None => sw::C3 | sw::C2 | sw::C0,
        Some(Ordering::Less) => sw::C0,
        Some(Ordering::Equal) => sw::C3,
        Some(Ordering::Greater) => 0,
    }
}

/// Compares ST0 with `b` into C3, C2, C0 and pops `pops` times.
fn compare_with(cpu: &mut Cpu, op: &Op, b: Option<Source>, signaling: bool, pops: u8) -> Res {
    let (ordering, go_on) = match b {
        Some(b) if !cpu.st_empty(0) => {
            let a = cpu.st(0);
            let mut env = cpu.x87_env();
            let ordering = float::f80_cmp(a, b.value, signaling, &mut env);
            if b.denormal && is_number(a) {
                env.flags |= DE;
            }
            (ordering, cpu.x87_commit(op, &env))
        }
        _ => (None, cpu.stack_fault(op, false)),
    };
    // An unmasked exception only keeps the stack from being popped.
    cpu.set_conditions(sw::C0 | sw::C2 | sw::C3, conditions(ordering));
    if go_on {
        for _ in 0..pops {
            cpu.pop_st();
        }
    }
    Ok(())
}

fn register(cpu: &Cpu, i: usize) -> Option<Source> {
    (!cpu.st_empty(i)).then(|| Source { value: cpu.st(i), denormal: false })
}

/// FCOM, FCOMP, FICOM, FICOMP with a memory operand.
pub fn compare_memory<const FORM: u8, const POPS: u8>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    let b = memory::<FORM>(cpu, op)?;
    cpu.x87_note_data(op);
    compare_with(cpu, op, Some(b), true, POPS)
}

/// FCOM, FCOMP, FCOMPP, FUCOM, FUCOMP, FUCOMPP with ST(i).
pub fn compare<const SIGNALING: bool, const POPS: u8>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    let b = register(cpu, op.aux as usize);
    compare_with(cpu, op, b, SIGNALING, POPS)
}

/// FTST.
pub fn test(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    compare_with(cpu, op, Some(Source { value: F80::ZERO, denormal: false }), true, 0)
}

/// FCOMI, FCOMIP, FUCOMI, FUCOMIP: into ZF, PF, CF; OF, SF and AF are cleared. C1 stays but for a stack fault.
pub fn compare_flags<const SIGNALING: bool, const POP: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    let i = op.aux as usize;
    let (ordering, go_on) = if cpu.st_empty(0) || cpu.st_empty(i) {
        (None, cpu.stack_fault(op, false))
    } else {
        let mut env = cpu.x87_env();
        let ordering = float::f80_cmp(cpu.st(0), cpu.st(i), SIGNALING, &mut env);
        env.c1 = cpu.rb.fsw & sw::C1 != 0;
        (ordering, cpu.x87_commit(op, &env))
    };
    cpu.lf.set_all(match ordering {
        None => rf::ZF | rf::PF | rf::CF,
        Some(Ordering::Less) => rf::CF,
        Some(Ordering::Equal) => rf::ZF,
        Some(Ordering::Greater) => 0,
    });
    if go_on && POP {
        cpu.pop_st();
    }
    Ok(())
}

/// FXAM.
pub fn examine(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    let v = cpu.st(0);
    let mut bits = if cpu.st_empty(0) {
        sw::C3 | sw::C0
    } else {
        match float::f80_class(v) {
            Class::Unsupported => 0,
            Class::Nan => sw::C0,
            Class::Normal => sw::C2,
            Class::Infinity => sw::C2 | sw::C0,
            Class::Zero => sw::C3,
            Class::Denormal => sw::C3 | sw::C2,
        }
    };
    if v.sign() {
        bits |= sw::C1;
    }
    cpu.set_conditions(sw::CONDITIONS, bits);
    Ok(())
}

// ---- one operand -----------------------------------------------------------------------------------------------

/// ST0 = f(ST0).
#[inline(always)]
pub fn unary(cpu: &mut Cpu, op: &Op, f: impl FnOnce(F80, &mut Env) -> F80) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    let (write, value);
    if cpu.st_empty(0) {
        (write, value) = (cpu.stack_fault(op, false), F80::INDEFINITE);
    } else {
        let mut env = cpu.x87_env();
        value = f(cpu.st(0), &mut env);
        write = cpu.x87_commit(op, &env);
    }
    if write {
        cpu.set_st(0, value);
    }
    Ok(())
}

/// FSIN, FCOS: ST0 = f(ST0), or C2 for an operand out of range.
#[inline(always)]
pub fn trigonometric(cpu: &mut Cpu, op: &Op, f: impl Fn(F80, &mut Env) -> Option<F80>) -> Res {
    let mut c2 = 0;
    unary(cpu, op, |v, env| {
        f(v, env).unwrap_or_else(|| {
            c2 = sw::C2;
            v
        })
    })?;
    cpu.set_conditions(sw::C2, c2);
    Ok(())
}

/// FSINCOS, FPTAN, FXTRACT: ST0 is replaced by the first result and the second is pushed. The
/// trigonometric ones clear C2, and set it for None, "out of range".
#[inline(always)]
pub fn split(
    cpu: &mut Cpu,
    op: &Op,
    trigonometric: bool,
    f: impl Fn(F80, &mut Env) -> Option<(F80, F80)>,
) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    if trigonometric {
        cpu.set_conditions(sw::C2, 0);
    }
    let mut results = (F80::INDEFINITE, F80::INDEFINITE);
    let write;
    if cpu.st_empty(0) {
        write = cpu.stack_fault(op, false);
    } else if !cpu.st_empty(7) {
        write = cpu.stack_fault(op, true);
    } else {
        let mut env = cpu.x87_env();
        match f(cpu.st(0), &mut env) {
            Some(r) => {
                results = r;
                write = cpu.x87_commit(op, &env);
            }
            None => {
                cpu.set_conditions(sw::C1 | sw::C2, sw::C2);
                write = false;
            }
        }
    }
    if write {
        cpu.set_st(0, results.0);
        cpu.push_st(results.1);
    }
    Ok(())
}

// ---- two operands ----------------------------------------------------------------------------------------------

/// FPATAN, FYL2X, FYL2XP1: ST1 = f(ST1, ST0), then pop.
#[inline(always)]
pub fn binary_pop(cpu: &mut Cpu, op: &Op, f: impl Fn(F80, F80, &mut Env) -> F80) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    let (write, value);
    if cpu.st_empty(0) || cpu.st_empty(1) {
        (write, value) = (cpu.stack_fault(op, false), F80::INDEFINITE);
    } else {
        let mut env = cpu.x87_env();
        value = f(cpu.st(1), cpu.st(0), &mut env);
        write = cpu.x87_commit(op, &env);
    }
    if write {
        cpu.set_st(1, value);
        cpu.pop_st();
    }
    Ok(())
}

/// FSCALE: ST0 = f(ST0, ST1).
pub fn scale(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    let (write, value);
    if cpu.st_empty(0) || cpu.st_empty(1) {
        (write, value) = (cpu.stack_fault(op, false), F80::INDEFINITE);
    } else {
        let mut env = cpu.x87_env();
        value = float::f80_scale(cpu.st(0), cpu.st(1), &mut env);
        write = cpu.x87_commit(op, &env);
    }
    if write {
        cpu.set_st(0, value);
    }
    Ok(())
}

/// FPREM, FPREM1.
pub fn remainder<const NEAREST: bool>(cpu: &mut Cpu, op: &Op) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    if cpu.st_empty(0) || cpu.st_empty(1) {
        cpu.set_conditions(sw::C2, 0);
        if cpu.stack_fault(op, false) {
            cpu.set_st(0, F80::INDEFINITE);
        }
        return Ok(());
    }
    let mut env = cpu.x87_env();
    let r = float::f80_remainder(cpu.st(0), cpu.st(1), NEAREST, &mut env);
    let write = cpu.x87_commit(op, &env);
    if !is_number(r.value) {
        // No quotient: C0 and C3 stay.
        cpu.set_conditions(sw::C2, 0);
    } else if write {
        let q = u16::from(r.quotient);
        let mut bits = (q & 4) << 6 | (q & 2) << 13 | (q & 1) << 9;
        if r.incomplete {
            bits = sw::C2;
        }
        cpu.set_conditions(sw::CONDITIONS, bits);
    }
    if write {
        cpu.set_st(0, r.value);
    }
    Ok(())
}

/// FLD1 … FLDZ.
#[inline(always)]
pub fn constant(cpu: &mut Cpu, op: &Op, c: Constant) -> Res {
    cpu.x87_enter()?;
    cpu.x87_note(op);
    if !cpu.st_empty(7) {
        if cpu.stack_fault(op, true) {
            cpu.push_st(F80::INDEFINITE);
        }
        return Ok(());
    }
    let rounding = cpu.x87_env().rounding;
    cpu.set_conditions(sw::C1, 0);
    cpu.push_st(float::f80_constant(c, rounding));
    Ok(())
}
