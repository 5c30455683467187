// SPDX-License-Identifier: Apache-2.0
//! Conversions between integers and floating-point formats, and rounding to integral values (APM vol. 4, CVT*, ROUND*).
//!
//! The fast paths take operands of ordinary size, for which the host's conversion is exact or its only exception,
//! inexactness, is seen by converting back; everything else goes to [`crate::float`].

use iced_x86::{Code, Instruction};

use super::super::flags::Int;
use super::super::op::{Handler, Op, Res, handler, handler_fast};
use super::super::state::Cpu;
use super::form::{Form, M128, memory};
use super::native::{clear_flags, hardware, hardware_from_general, hardware_to_general};
use super::vector::{V, build, join, split, with_low32, with_low64};
use crate::float::*;

/// Raises PE if a result differs from what it was made of.
#[inline(always)]
fn inexact(env: &mut Env, differs: bool) {
    env.flags |= if differs { PE } else { 0 };
}

#[inline(always)]
fn nearest(env: &Env) -> bool {
    env.rounding == Rounding::NearestEven
}

/// Conversions to integers: truncating, and as MXCSR.RC says.
macro_rules! to_integer {
    ($trunc:ident $round:ident: $bits:ty, $float:ty, $int:ty, $limit:literal, $slow_trunc:ident $slow_round:ident;
     $($rest:tt)*) => {
        #[doc = concat!("Truncates `", stringify!($float), "` to `", stringify!($int), "`.")]
        #[inline(always)]
        pub fn $trunc(a: $bits, env: &mut Env) -> $int {
            let x = <$float>::from_bits(a);
            if x.abs() >= 1.0 && x.abs() < $limit {
                let r = x as $int;
                inexact(env, r as $float != x);
                r
            } else {
                $slow_trunc(a, env)
            }
        }

        #[doc = concat!("Rounds `", stringify!($float), "` to `", stringify!($int), "`.")]
        #[inline(always)]
        pub fn $round(a: $bits, env: &mut Env) -> $int {
            let x = <$float>::from_bits(a);
            if x.abs() >= 1.0 && x.abs() < $limit && nearest(env) {
                let r = x.round_ties_even();
                inexact(env, r != x);
                r as $int
            } else {
                $slow_round(a, env)
            }
        }
        to_integer! { $($rest)* }
    };
    () => {};
}

// The limits are well inside the integer's range; r as float is exact below 2^53 (2^24), above which x is integral.
to_integer! {
    trunc32_i32 round32_i32: u32, f32, i32, 1e9, f32_to_i32_trunc f32_to_i32;
    trunc32_i64 round32_i64: u32, f32, i64, 1e18, f32_to_i64_trunc f32_to_i64;
    trunc64_i32 round64_i32: u64, f64, i32, 1e9, f64_to_i32_trunc f64_to_i32;
    trunc64_i64 round64_i64: u64, f64, i64, 1e18, f64_to_i64_trunc f64_to_i64;
}

/// CVTSI2SS from 64 bits (and, extended, from 32).
#[inline(always)]
pub fn from_i64_32(v: i64, env: &mut Env) -> u32 {
    if nearest(env) {
        let r = v as f32;
        // |v| up to 2^63: i128 holds every f32 near it.
        inexact(env, r as i128 != v as i128);
        r.to_bits()
    } else {
        f32_from_i64(v, env)
    }
}

/// CVTSI2SD from 64 bits (and, extended, from 32).
#[inline(always)]
pub fn from_i64_64(v: i64, env: &mut Env) -> u64 {
    if v.unsigned_abs() <= 1 << 53 { (v as f64).to_bits() } else { f64_from_i64(v, env) }
}

/// CVTSD2SS.
#[inline(always)]
pub fn narrow64(a: u64, env: &mut Env) -> u32 {
    let x = f64::from_bits(a);
    // From 2^-125 to 2^127: neither tiny nor huge, before or after rounding.
    let exponent = a >> 52 & 0x7ff;
    if nearest(env) && exponent.wrapping_sub(1023 - 125) <= 125 + 126 {
        let r = x as f32;
        inexact(env, r as f64 != x);
        r.to_bits()
    } else {
        f64_to_f32(a, env)
    }
}

/// The rounding mode of ROUND*: `imm[1:0]`, or MXCSR's with bit 2.
#[inline(always)]
fn mode(imm: u8, env: &Env) -> Rounding {
    if imm & 4 != 0 { env.rounding } else { Rounding::from_bits(imm as u32) }
}

/// ROUND* of one element.
macro_rules! round {
    ($name:ident: $bits:ty, $float:ty, $limit:literal, $slow:ident) => {
        #[doc = concat!("ROUND of an `", stringify!($float), "`; bit 3 of `imm` keeps PE from being raised.")]
        #[inline(always)]
        pub fn $name(a: $bits, imm: u8, env: &mut Env) -> $bits {
            let exact = imm & 8 == 0;
            let x = <$float>::from_bits(a);
            if x.abs() >= 1.0 && x.abs() < $limit {
                let r = match mode(imm, env) {
                    Rounding::NearestEven => x.round_ties_even(),
                    Rounding::Down => x.floor(),
                    Rounding::Up => x.ceil(),
                    Rounding::Zero => x.trunc(),
                };
                inexact(env, exact && r != x);
                return r.to_bits();
            }
            let mut own = Env { rounding: mode(imm, env), ..*env };
            let r = $slow(a, exact, &mut own);
            env.flags = own.flags;
            r
        }
    };
}

round!(round32: u32, f32, 1e9, f32_round);
round!(round64: u64, f64, 1e18, f64_round);

/// Four elements to four.
#[inline(always)]
fn each32<T: super::vector::Lane<4>>(b: V, env: &mut Env, f: impl Fn(u32, &mut Env) -> T) -> V {
    let b = split::<u32, 4>(b);
    build(|i| f(b[i], env))
}

/// Two doubles to the two low elements, the others zero.
#[inline(always)]
fn two_low(b: V, env: &mut Env, f: impl Fn(u64, &mut Env) -> u32) -> V {
    let low = f(b[0], env);
    join([low, f(b[1], env), 0, 0])
}

/// The two low elements to two doubles.
#[inline(always)]
fn two_wide(b: V, mut f: impl FnMut(u32) -> u64) -> V {
    [f(b[0] as u32), f((b[0] >> 32) as u32)]
}

/// Scalar to a general register.
fn to_general<const SIZE: u32, T: Int>(
    form: Form,
    fast: impl Fn(V, u32) -> Option<T> + Copy + 'static,
    f: impl Fn(u64, &mut Env) -> T + Copy + 'static,
) -> Handler {
    form.sse_try::<SIZE>(
        move |cpu, op, b| match fast(b, cpu.rb.mxcsr) {
            Some(r) => {
                cpu.set_reg::<T>(op.dst, r);
                true
            }
            None => false,
        },
        move |cpu, op, b| {
            clear_flags();
            let mut env = Env::sse(cpu.rb.mxcsr);
            let r = f(b[0], &mut env);
            cpu.sse_commit(&env)?;
            cpu.set_reg::<T>(op.dst, r);
            Ok(())
        },
    )
}

/// General register or memory of type T to a scalar.
fn from_general<T: Int>(
    form: Form,
    fast: impl Fn(V, T, u32) -> Option<V> + Copy + 'static,
    f: impl Fn(V, i64, &mut Env) -> V + Copy + 'static,
) -> Handler {
    #[inline(always)]
    fn run_fast<T: Int>(cpu: &mut Cpu, op: &Op, v: Option<T>, fast: impl Fn(V, T, u32) -> Option<V>) -> bool {
        let (true, Some(v)) = (cpu.sse_enabled(), v) else { return false };
        match fast(cpu.xmm(op.dst), v, cpu.rb.mxcsr) {
            Some(r) => {
                cpu.set_xmm(op.dst, r);
                true
            }
            None => false,
        }
    }
    #[inline(always)]
    fn run<T: Int, const MEM: bool>(cpu: &mut Cpu, op: &Op, f: impl Fn(V, i64, &mut Env) -> V) -> Res {
        cpu.sse_ready()?;
        let v: T = if MEM { cpu.load(op)? } else { cpu.reg(op.src) };
        clear_flags();
        let mut env = Env::sse(cpu.rb.mxcsr);
        let r = f(cpu.xmm(op.dst), v.to_i64(), &mut env);
        cpu.sse_commit(&env)?;
        cpu.set_xmm(op.dst, r);
        Ok(())
    }
    if form.mem {
        handler_fast(
            move |cpu: &mut Cpu, op: &Op| run_fast(cpu, op, cpu.quick_load::<T, false>(op), fast),
            move |cpu: &mut Cpu, op: &Op| run::<T, true>(cpu, op, f),
        )
    } else {
        handler_fast(
            move |cpu: &mut Cpu, op: &Op| run_fast(cpu, op, Some(cpu.reg::<T>(op.src)), fast),
            move |cpu: &mut Cpu, op: &Op| run::<T, false>(cpu, op, f),
        )
    }
}

/// CVTPI2PS and CVTPI2PD. With a memory source processors leave the x87 state alone and don't look at it (the manuals
/// say so of the latter only).
fn from_mmx(form: Form, f: impl Fn(V, u64, &mut Env) -> V + Copy + 'static) -> Handler {
    #[inline(always)]
    fn run<const MEM: bool>(cpu: &mut Cpu, op: &Op, f: impl Fn(V, u64, &mut Env) -> V) -> Res {
        cpu.sse_ready()?;
        let b = if MEM {
            memory::<8>(cpu, op)?[0]
        } else {
            cpu.mmx_ready()?;
            // Processors have switched to MMX before they find a SIMD exception.
            cpu.mmx_enter();
            cpu.mm(op.src)
        };
        let mut env = Env::sse(cpu.rb.mxcsr);
        let r = f(cpu.xmm(op.dst), b, &mut env);
        cpu.sse_commit(&env)?;
        cpu.set_xmm(op.dst, r);
        Ok(())
    }
    if form.mem {
        handler(move |cpu: &mut Cpu, op: &Op| run::<true>(cpu, op, f))
    } else {
        handler(move |cpu: &mut Cpu, op: &Op| run::<false>(cpu, op, f))
    }
}

/// CVTPS2PI, CVTPD2PI and their truncating forms.
fn to_mmx<const SIZE: u32>(form: Form, f: impl Fn(V, &mut Env) -> V + Copy + 'static) -> Handler {
    #[inline(always)]
    fn run<const SIZE: u32, const MEM: bool>(cpu: &mut Cpu, op: &Op, f: impl Fn(V, &mut Env) -> V) -> Res {
        cpu.sse_ready()?;
        cpu.mmx_ready()?;
        let b = if MEM { memory::<SIZE>(cpu, op)? } else { cpu.xmm(op.src) };
        let mut env = Env::sse(cpu.rb.mxcsr);
        let r = f(b, &mut env);
        // As in `from_mmx`.
        cpu.mmx_enter();
        cpu.sse_commit(&env)?;
        cpu.set_mm(op.dst, r[0]);
        Ok(())
    }
    if form.mem {
        handler(move |cpu: &mut Cpu, op: &Op| run::<SIZE, true>(cpu, op, f))
    } else {
        handler(move |cpu: &mut Cpu, op: &Op| run::<SIZE, false>(cpu, op, f))
    }
}

/// The two low singles to two integers.
#[inline(always)]
fn two_low32(b: V, env: &mut Env, f: impl Fn(u32, &mut Env) -> i32) -> V {
    let low = f(b[0] as u32, env);
    join([low, f((b[0] >> 32) as u32, env), 0, 0])
}

/// Translates conversions.
pub fn translate(i: &Instruction, form: Form) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Cvtdq2ps_xmm_xmmm128 => form.x2f::<M128>(hardware!("cvtdq2ps"), |_, b, e| {
            each32(b, e, |x, e| from_i64_32(x as i32 as i64, e))
        }),
        Cvtps2dq_xmm_xmmm128 => form.x2f::<M128>(hardware!("cvtps2dq"), |_, b, e| each32(b, e, round32_i32)),
        Cvttps2dq_xmm_xmmm128 => {
            form.x2f::<M128>(hardware!("cvttps2dq"), |_, b, e| each32(b, e, trunc32_i32))
        }
        Cvtdq2pd_xmm_xmmm64 => form.x1::<8>(|b| two_wide(b, |x| (x as i32 as f64).to_bits())),
        Cvtpd2dq_xmm_xmmm128 => {
            form.x2f::<M128>(hardware!("cvtpd2dq"), |_, b, e| two_low(b, e, |x, e| round64_i32(x, e) as u32))
        }
        Cvttpd2dq_xmm_xmmm128 => {
            form.x2f::<M128>(hardware!("cvttpd2dq"), |_, b, e| two_low(b, e, |x, e| trunc64_i32(x, e) as u32))
        }
        Cvtps2pd_xmm_xmmm64 => {
            form.x2f::<8>(hardware!("cvtps2pd"), |_, b, e| two_wide(b, |x| f32_to_f64(x, e)))
        }
        Cvtpd2ps_xmm_xmmm128 => form.x2f::<M128>(hardware!("cvtpd2ps"), |_, b, e| two_low(b, e, narrow64)),
        Cvtss2sd_xmm_xmmm32 => {
            form.x2f::<4>(hardware!("cvtss2sd"), |a, b, e| with_low64(a, f32_to_f64(b[0] as u32, e)))
        }
        Cvtsd2ss_xmm_xmmm64 => {
            form.x2f::<8>(hardware!("cvtsd2ss"), |a, b, e| with_low32(a, narrow64(b[0], e)))
        }

        Cvtsi2ss_xmm_rm32 => from_general::<u32>(form, hardware_from_general!("cvtsi2ss", u32), |a, v, e| {
            with_low32(a, from_i64_32(v, e))
        }),
        Cvtsi2ss_xmm_rm64 => from_general::<u64>(form, hardware_from_general!("cvtsi2ss", u64), |a, v, e| {
            with_low32(a, from_i64_32(v, e))
        }),
        Cvtsi2sd_xmm_rm32 => from_general::<u32>(form, hardware_from_general!("cvtsi2sd", u32), |a, v, e| {
            with_low64(a, from_i64_64(v, e))
        }),
        Cvtsi2sd_xmm_rm64 => from_general::<u64>(form, hardware_from_general!("cvtsi2sd", u64), |a, v, e| {
            with_low64(a, from_i64_64(v, e))
        }),
        Cvtss2si_r32_xmmm32 => to_general::<4, u32>(form, hardware_to_general!("cvtss2si", u32), |b, e| {
            round32_i32(b as u32, e) as u32
        }),
        Cvtss2si_r64_xmmm32 => to_general::<4, u64>(form, hardware_to_general!("cvtss2si", u64), |b, e| {
            round32_i64(b as u32, e) as u64
        }),
        Cvttss2si_r32_xmmm32 => to_general::<4, u32>(form, hardware_to_general!("cvttss2si", u32), |b, e| {
            trunc32_i32(b as u32, e) as u32
        }),
        Cvttss2si_r64_xmmm32 => to_general::<4, u64>(form, hardware_to_general!("cvttss2si", u64), |b, e| {
            trunc32_i64(b as u32, e) as u64
        }),
        Cvtsd2si_r32_xmmm64 => {
            to_general::<8, u32>(form, hardware_to_general!("cvtsd2si", u32), |b, e| round64_i32(b, e) as u32)
        }
        Cvtsd2si_r64_xmmm64 => {
            to_general::<8, u64>(form, hardware_to_general!("cvtsd2si", u64), |b, e| round64_i64(b, e) as u64)
        }
        Cvttsd2si_r32_xmmm64 => to_general::<8, u32>(form, hardware_to_general!("cvttsd2si", u32), |b, e| {
            trunc64_i32(b, e) as u32
        }),
        Cvttsd2si_r64_xmmm64 => to_general::<8, u64>(form, hardware_to_general!("cvttsd2si", u64), |b, e| {
            trunc64_i64(b, e) as u64
        }),

        Cvtpi2ps_xmm_mmm64 => from_mmx(form, |a, b, e| {
            let low = from_i64_32(b as i32 as i64, e);
            let high = from_i64_32(b as i64 >> 32, e);
            [low as u64 | (high as u64) << 32, a[1]]
        }),
        Cvtpi2pd_xmm_mmm64 => from_mmx(form, |_, b, _| two_wide([b, 0], |x| (x as i32 as f64).to_bits())),
        Cvtps2pi_mm_xmmm64 => to_mmx::<8>(form, |b, e| two_low32(b, e, round32_i32)),
        Cvttps2pi_mm_xmmm64 => to_mmx::<8>(form, |b, e| two_low32(b, e, trunc32_i32)),
        Cvtpd2pi_mm_xmmm128 => to_mmx::<M128>(form, |b, e| two_low(b, e, |x, e| round64_i32(x, e) as u32)),
        Cvttpd2pi_mm_xmmm128 => to_mmx::<M128>(form, |b, e| two_low(b, e, |x, e| trunc64_i32(x, e) as u32)),
        _ => return None,
    })
}
