// SPDX-License-Identifier: Apache-2.0
//! Conversions between f32, f64 and integers, rounding to integral values, and the reciprocal estimates of SSE.
//!
//! Truncating variants (CVTT*) are the plain ones under `Env { rounding: Rounding::Zero, .. }`; the `_trunc` functions
//! say that in one word. Out-of-range values, infinities and NaNs give the "integer indefinite" value and IE.

use super::arith::Outcome;
use super::env::{DE, Env, IE, PE, Rounding};
use super::number::{DOUBLE, Format, Kind, SINGLE, Unpacked, round, rounds_up};
use super::sse::{finish, operand};

/// A finite number rounded to an integer below 2^64: magnitude, whether it is inexact, whether it was rounded up.
/// None: the magnitude needs more than 64 bits.
pub(super) fn integral(mode: Rounding, u: Unpacked) -> Option<(u64, bool, bool)> {
    if u.kind == Kind::Zero {
        return Some((0, false, false));
    }
    if u.exp > 63 {
        return None;
    }
    let shift = (63 - u.exp).min(100) as u32; // further out, all that counts is "below one half"
    let wide = u128::from(u.sig) << 64 >> shift.min(64);
    // `shift` above 64 only concerns magnitudes below 1/2: keep them below one half and not zero.
    let wide = if shift > 64 { u128::from(u.sig >> 1) } else { wide };
    let (whole, lost) = ((wide >> 64) as u64, wide & u128::from(u64::MAX));
    let up = rounds_up(mode, u.sign, whole & 1 != 0, lost, 1 << 63);
    let sum = whole.checked_add(u64::from(up))?;
    Some((sum, lost != 0, up))
}

/// Rounds to a signed integer of `bits` bits; None is the invalid case (IE raised), else PE (and C1) are set.
pub(super) fn to_signed(env: &mut Env, u: Unpacked, bits: u32) -> Option<i64> {
    let limit = 1u64 << (bits - 1);
    let rounded = match u.kind {
        Kind::Zero | Kind::Finite => integral(env.rounding, u),
        _ => None,
    };
    match rounded {
        Some((magnitude, inexact, up)) if magnitude < limit || (u.sign && magnitude == limit) => {
            env.c1 = up;
            if inexact {
                env.raise(PE);
            }
            let v = magnitude as i64;
            Some(if u.sign { v.wrapping_neg() } else { v })
        }
        _ => {
            env.raise(IE);
            None
        }
    }
}

fn from_signed(env: &mut Env, f: Format, v: i64) -> u64 {
    finish(env, f, Outcome::exact(Unpacked::integer(v < 0, v.unsigned_abs())))
}

fn round_format(env: &mut Env, f: Format, bits: u64, exact: bool) -> u64 {
    let u = operand(env, f, bits);
    match u.kind {
        Kind::Signaling => {
            env.raise(IE);
            f.pack_nan(u.sign, u.sig)
        }
        Kind::Zero => f.zero(u.sign),
        Kind::Finite if u.exp < 63 => match integral(env.rounding, u) {
            Some((magnitude, inexact, _)) => {
                if inexact && exact {
                    env.raise(PE);
                }
                let v = Unpacked::integer(u.sign, magnitude);
                let mut quiet = *env;
                finish(&mut quiet, f, Outcome::exact(v))
            }
            None => bits,
        },
        _ => bits,
    }
}

macro_rules! integer_conversions {
    ($f:expr, $bits:ty, $($int:ty, $width:literal, $to:ident, $trunc:ident, $from:ident);+) => {$(
        /// Converts to a signed integer in the current rounding mode; `MIN` and IE if it doesn't fit.
        pub fn $to(a: $bits, env: &mut Env) -> $int {
            let u = operand(env, $f, a.into());
            to_signed(env, u, $width).map_or(<$int>::MIN, |v| v as $int)
        }

        /// Converts to a signed integer by truncation; `MIN` and IE if it doesn't fit.
        pub fn $trunc(a: $bits, env: &mut Env) -> $int {
            let mut zero = Env { rounding: Rounding::Zero, ..*env };
            let v = $to(a, &mut zero);
            env.flags = zero.flags;
            v
        }

        /// Converts from a signed integer.
        pub fn $from(v: $int, env: &mut Env) -> $bits {
            from_signed(env, $f, v.into()) as $bits
        }
    )+};
}

integer_conversions!(SINGLE, u32,
    i32, 32, f32_to_i32, f32_to_i32_trunc, f32_from_i32;
    i64, 64, f32_to_i64, f32_to_i64_trunc, f32_from_i64);
integer_conversions!(DOUBLE, u64,
    i32, 32, f64_to_i32, f64_to_i32_trunc, f64_from_i32;
    i64, 64, f64_to_i64, f64_to_i64_trunc, f64_from_i64);

/// Rounds an f32 to an integral value in `env.rounding`; `exact` raises PE for a change (ROUNDSS imm bit 3 clear).
pub fn f32_round(a: u32, exact: bool, env: &mut Env) -> u32 {
    round_format(env, SINGLE, a.into(), exact) as u32
}

/// Rounds an f64 to an integral value in `env.rounding`; `exact` raises PE for a change (ROUNDSD imm bit 3 clear).
pub fn f64_round(a: u64, exact: bool, env: &mut Env) -> u64 {
    round_format(env, DOUBLE, a, exact)
}

fn widen_or_narrow(env: &mut Env, from: Format, to: Format, bits: u64) -> u64 {
    let u = operand(env, from, bits);
    match u.kind {
        Kind::Signaling | Kind::Quiet => {
            if u.kind == Kind::Signaling {
                env.raise(IE);
            }
            to.pack_nan(u.sign, u.sig)
        }
        Kind::Finite => {
            if u.denormal {
                env.raise(DE);
            }
            let r = round(env, to, u.sign, u.exp, u128::from(u.sig) << 64);
            to.pack(u.sign, r)
        }
        _ => finish(env, to, Outcome::exact(u)),
    }
}

/// CVTSS2SD.
pub fn f32_to_f64(a: u32, env: &mut Env) -> u64 {
    let field = a >> 23 & 0xff;
    if field.wrapping_sub(1) < 0xfe {
        return f64::from(f32::from_bits(a)).to_bits();
    }
    widen_or_narrow(env, SINGLE, DOUBLE, a.into())
}

/// CVTSD2SS.
pub fn f64_to_f32(a: u64, env: &mut Env) -> u32 {
    widen_or_narrow(env, DOUBLE, SINGLE, a) as u32
}

/// RCPSS and RCPPS: the reciprocal to 12 bits, correctly rounded (the architecture asks for 1.5 * 2^-12). No flags;
/// denormals count as zeros whatever DAZ says, tiny results are flushed.
pub fn f32_rcp_estimate(a: u32) -> u32 {
    estimate(a, false)
}

/// RSQRTSS and RSQRTPS: the reciprocal square root to 12 bits, correctly rounded. No flags; denormals count as zeros.
pub fn f32_rsqrt_estimate(a: u32) -> u32 {
    estimate(a, true)
}

fn estimate(a: u32, root: bool) -> u32 {
    let u = operand(&Env { daz: true, ..Env::DEFAULT }, SINGLE, a.into());
    match u.kind {
        Kind::Quiet | Kind::Signaling => a | 1 << 22,
        Kind::Zero => SINGLE.inf(u.sign) as u32,
        _ if root && u.sign => SINGLE.indefinite() as u32,
        Kind::Finite => {
            let x = f64::from(f32::from_bits(a));
            let y = if root { 1.0 / x.sqrt() } else { 1.0 / x };
            let y = DOUBLE.unpack(y.to_bits());
            let mut env = Env { ftz: true, ..Env::DEFAULT };
            let r = round(&mut env, Format { prec: 12, ..SINGLE }, y.sign, y.exp, u128::from(y.sig) << 64);
            SINGLE.pack(y.sign, r) as u32
        }
        _ => SINGLE.zero(u.sign) as u32,
    }
}
