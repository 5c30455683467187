// SPDX-License-Identifier: Apache-2.0
//! F80 arithmetic with x87 semantics (APM vol. 1, chapter 6; SDM vol. 1, chapters 4.8, 4.9 and 8).
//!
//! A function whose flags contain an unmasked pre-computation exception (IE, DE, ZE) returns a value that the
//! instruction must not write.

use super::arith::{self, Outcome};
use super::convert::{integral, to_signed};
use super::env::{DE, Env, IE, OE, PE, PRE, Rounding, UE, ZE};
use super::number::{DOUBLE, EXTENDED, F80, Format, Kind, SINGLE, Unpacked, masked, pack80, round, unpack80};
use super::sse::order;
use core::cmp::Ordering;

/// The class FXAM reports, as condition bits C3, C2, C0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// An encoding the processor doesn't support.
    Unsupported,
    /// A NaN.
    Nan,
    /// A normal number.
    Normal,
    /// An infinity.
    Infinity,
    /// A zero.
    Zero,
    /// A denormal (or pseudo-denormal).
    Denormal,
}

/// Classifies a register for FXAM and for the tag word.
pub fn f80_class(a: F80) -> Class {
    let u = unpack80(a);
    match u.kind {
        Kind::Zero => Class::Zero,
        Kind::Finite if u.denormal => Class::Denormal,
        Kind::Finite => Class::Normal,
        Kind::Inf => Class::Infinity,
        Kind::Quiet | Kind::Signaling => Class::Nan,
        Kind::Unsupported => Class::Unsupported,
    }
}

#[inline]
pub(super) fn quieted(u: Unpacked) -> F80 {
    F80 { mant: u.sig | 1 << 62, se: (u.sign as u16) << 15 | 0x7fff }
}

/// The result when an operand is a NaN or unsupported, else None. Of two NaNs the one with the larger significand
/// wins, unless one is quiet and the other signaling (then the quiet one); on a tie the positive one.
#[inline]
pub(super) fn nan2(env: &mut Env, a: Unpacked, b: Unpacked) -> Option<F80> {
    if a.kind == Kind::Unsupported || b.kind == Kind::Unsupported {
        env.raise(IE);
        return Some(F80::INDEFINITE);
    }
    if !a.is_nan() && !b.is_nan() {
        return None;
    }
    if a.kind == Kind::Signaling || b.kind == Kind::Signaling {
        env.raise(IE);
    }
    Some(quieted(match (a.kind, b.kind) {
        (Kind::Quiet, Kind::Signaling) => a,
        (Kind::Signaling, Kind::Quiet) => b,
        _ if !b.is_nan() => a,
        _ if !a.is_nan() => b,
        _ => match a.sig.cmp(&b.sig) {
            Ordering::Greater => a,
            Ordering::Less => b,
            Ordering::Equal if a.sign => b,
            Ordering::Equal => a,
        },
    }))
}

/// The same for one operand.
#[inline]
pub(super) fn nan1(env: &mut Env, a: Unpacked) -> Option<F80> {
    match a.kind {
        Kind::Unsupported => {
            env.raise(IE);
            Some(F80::INDEFINITE)
        }
        Kind::Signaling => {
            env.raise(IE);
            Some(quieted(a))
        }
        Kind::Quiet => Some(quieted(a)),
        _ => None,
    }
}

/// Whether an unmasked pre-computation exception stops the operation.
#[inline]
pub(super) fn stopped(env: &Env) -> bool {
    env.flags & !env.masks & PRE != 0
}

/// Rounds to format `f` (EXTENDED, or narrower by precision control).
pub(super) fn finish80(env: &mut Env, f: Format, outcome: Outcome) -> F80 {
    env.c1 = false;
    if stopped(env) {
        return F80::INDEFINITE;
    }
    match outcome {
        Outcome::Zero(sign) => F80::zero(sign),
        Outcome::Inf(sign) => F80::inf(sign),
        Outcome::Invalid => F80::INDEFINITE,
        Outcome::Finite { sign, exp, sig } => {
            let r = round(env, f, sign, exp, sig);
            pack80(sign, r)
        }
    }
}

#[inline]
fn controlled(env: &Env) -> Format {
    Format { prec: env.precision.bits(), ..EXTENDED }
}

macro_rules! binary80 {
    ($($(#[$doc:meta])* $name:ident: $op:expr;)+) => {$(
        $(#[$doc])*
        pub fn $name(a: F80, b: F80, env: &mut Env) -> F80 {
            let (a, b) = (unpack80(a), unpack80(b));
            env.c1 = false;
            if let Some(nan) = nan2(env, a, b) {
                return nan;
            }
            let f = controlled(env);
            let op: fn(&mut Env, Unpacked, Unpacked) -> Outcome = $op;
            let outcome = op(env, a, b);
            finish80(env, f, outcome)
        }
    )+};
}

binary80! {
    /// `a + b` under precision control.
    f80_add: arith::add;
    /// `a - b` under precision control.
    f80_sub: |env, a, b| arith::add(env, a, Unpacked { sign: !b.sign, ..b });
    /// `a * b` under precision control.
    f80_mul: arith::mul;
    /// `a / b` under precision control.
    f80_div: arith::div;
}

/// Square root under precision control.
pub fn f80_sqrt(a: F80, env: &mut Env) -> F80 {
    let a = unpack80(a);
    env.c1 = false;
    if let Some(nan) = nan1(env, a) {
        return nan;
    }
    let f = controlled(env);
    let outcome = arith::sqrt(env, a);
    finish80(env, f, outcome)
}

/// Compares; None is unordered. `signaling` (FCOM*, FTST, FCOMI*; not FUCOM*): a quiet NaN raises IE too.
pub fn f80_cmp(a: F80, b: F80, signaling: bool, env: &mut Env) -> Option<Ordering> {
    let (a, b) = (unpack80(a), unpack80(b));
    env.c1 = false;
    let kinds = [a.kind, b.kind];
    if kinds.contains(&Kind::Unsupported) || kinds.contains(&Kind::Signaling) {
        env.raise(IE);
        return None;
    }
    if kinds.contains(&Kind::Quiet) {
        if signaling {
            env.raise(IE);
        }
        return None;
    }
    if a.denormal || b.denormal {
        env.raise(DE);
    }
    Some(order(a, b))
}

fn widen(env: &mut Env, f: Format, bits: u64) -> F80 {
    let u = f.unpack(bits);
    env.c1 = false;
    match u.kind {
        Kind::Quiet | Kind::Signaling => {
            if u.kind == Kind::Signaling {
                env.raise(IE);
            }
            quieted(u)
        }
        _ => {
            if u.denormal {
                env.raise(DE);
            }
            finish80(&mut masked(env), EXTENDED, Outcome::exact(u))
        }
    }
}

/// FLD m32: exact; IE for a signaling NaN, DE for a denormal.
pub fn f80_from_f32(a: u32, env: &mut Env) -> F80 {
    widen(env, SINGLE, a.into())
}

/// FLD m64: exact; IE for a signaling NaN, DE for a denormal.
pub fn f80_from_f64(a: u64, env: &mut Env) -> F80 {
    widen(env, DOUBLE, a)
}

/// FILD: always exact.
pub fn f80_from_i64(v: i64) -> F80 {
    let u = Unpacked::integer(v < 0, v.unsigned_abs());
    finish80(&mut Env { ..Env::DEFAULT }, EXTENDED, Outcome::exact(u))
}

fn narrow(env: &mut Env, f: Format, a: F80) -> u64 {
    let u = unpack80(a);
    env.c1 = false;
    match u.kind {
        Kind::Unsupported => {
            env.raise(IE);
            f.indefinite()
        }
        Kind::Quiet | Kind::Signaling => {
            if u.kind == Kind::Signaling {
                env.raise(IE);
            }
            f.pack_nan(u.sign, u.sig)
        }
        Kind::Zero => f.zero(u.sign),
        Kind::Inf => f.inf(u.sign),
        Kind::Finite => {
            let r = round(env, f, u.sign, u.exp, u128::from(u.sig) << 64);
            if env.flags & !env.masks & (OE | UE) != 0 {
                // Nothing is stored, so nothing is inexact.
                env.flags &= !PE;
                env.c1 = false;
            }
            f.pack(u.sign, r)
        }
    }
}

/// FST m32. With OE or UE unmasked and raised nothing is to be stored.
pub fn f80_to_f32(a: F80, env: &mut Env) -> u32 {
    narrow(env, SINGLE, a) as u32
}

/// FST m64. With OE or UE unmasked and raised nothing is to be stored.
pub fn f80_to_f64(a: F80, env: &mut Env) -> u64 {
    narrow(env, DOUBLE, a)
}

macro_rules! to_integer {
    ($($(#[$doc:meta])* $name:ident $int:ty, $width:literal;)+) => {$(
        $(#[$doc])*
        pub fn $name(a: F80, env: &mut Env) -> $int {
            env.c1 = false;
            to_signed(env, unpack80(a), $width).map_or(<$int>::MIN, |v| v as $int)
        }
    )+};
}

to_integer! {
    /// FIST m16 in the current rounding mode (FISTTP: under `Rounding::Zero`).
    f80_to_i16 i16, 16;
    /// FIST m32.
    f80_to_i32 i32, 32;
    /// FISTP m64.
    f80_to_i64 i64, 64;
}

/// FRNDINT.
pub fn f80_round(a: F80, env: &mut Env) -> F80 {
    let u = unpack80(a);
    env.c1 = false;
    if let Some(nan) = nan1(env, u) {
        return nan;
    }
    if u.denormal {
        env.raise(DE);
        if stopped(env) {
            return F80::INDEFINITE;
        }
    }
    if u.kind != Kind::Finite || u.exp >= 63 {
        return a;
    }
    match integral(env.rounding, u) {
        Some((magnitude, inexact, up)) => {
            env.c1 = up;
            if inexact {
                env.raise(PE);
            }
            let v = Unpacked::integer(u.sign, magnitude);
            finish80(&mut masked(env), EXTENDED, Outcome::exact(v))
        }
        None => a,
    }
}

/// FSCALE: `a * 2^trunc(b)`.
pub fn f80_scale(a: F80, b: F80, env: &mut Env) -> F80 {
    let (ua, ub) = (unpack80(a), unpack80(b));
    env.c1 = false;
    if let Some(nan) = nan2(env, ua, ub) {
        return nan;
    }
    match (ua.kind, ub.kind) {
        (Kind::Inf, Kind::Inf) if ub.sign => {
            env.raise(IE);
            return F80::INDEFINITE;
        }
        (Kind::Zero, Kind::Inf) if !ub.sign => {
            env.raise(IE);
            return F80::INDEFINITE;
        }
        _ => {}
    }
    if ua.denormal || ub.denormal {
        env.raise(DE);
    }
    let outcome = match (ua.kind, ub.kind) {
        (Kind::Inf | Kind::Zero, _) | (_, Kind::Zero) => Outcome::exact(ua),
        (_, Kind::Inf) if ub.sign => Outcome::Zero(ua.sign),
        (_, Kind::Inf) => Outcome::Inf(ua.sign),
        _ => {
            // Anything beyond 2^16 is out of every range; keep the exponent small.
            let n = match integral(Rounding::Zero, ub) {
                Some((n, ..)) if n < 1 << 17 => n as i32,
                _ => 1 << 17,
            };
            let exp = ua.exp + if ub.sign { -n } else { n };
            Outcome::Finite { sign: ua.sign, exp, sig: u128::from(ua.sig) << 64 }
        }
    };
    finish80(env, EXTENDED, outcome)
}

/// FXTRACT: (exponent, significand). A zero raises ZE and has exponent minus infinity.
pub fn f80_extract(a: F80, env: &mut Env) -> (F80, F80) {
    let u = unpack80(a);
    env.c1 = false;
    if let Some(nan) = nan1(env, u) {
        return (nan, nan);
    }
    match u.kind {
        Kind::Zero => {
            env.raise(ZE);
            (F80::inf(true), a)
        }
        Kind::Inf => (F80::inf(false), a),
        _ => {
            if u.denormal {
                env.raise(DE);
            }
            let significand = F80 { mant: u.sig, se: (u.sign as u16) << 15 | 0x3fff };
            (f80_from_i64(u.exp.into()), significand)
        }
    }
}

/// What FPREM and FPREM1 give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remainder {
    /// The (partial) remainder.
    pub value: F80,
    /// The reduction is incomplete: C2.
    pub incomplete: bool,
    /// The three low bits of the quotient's magnitude, valid if complete (C0 = bit 2, C3 = bit 1, C1 = bit 0).
    pub quotient: u8,
}

/// FPREM (`nearest` false, quotient truncated) and FPREM1 (quotient rounded to nearest even): `a rem b`, exact.
///
/// An exponent difference D of 64 and more is reduced by 32..63 bits at a time, as Intel's processors do.
pub fn f80_remainder(a: F80, b: F80, nearest: bool, env: &mut Env) -> Remainder {
    let done = |value| Remainder { value, incomplete: false, quotient: 0 };
    let (ua, ub) = (unpack80(a), unpack80(b));
    env.c1 = false;
    if let Some(nan) = nan2(env, ua, ub) {
        return done(nan);
    }
    if ua.kind == Kind::Inf || ub.kind == Kind::Zero {
        env.raise(IE);
        return done(F80::INDEFINITE);
    }
    if ua.denormal || ub.denormal {
        env.raise(DE);
        if stopped(env) {
            return done(F80::INDEFINITE);
        }
    }
    if ua.kind == Kind::Zero {
        return done(F80::zero(ua.sign));
    }
    let difference = ua.exp - ub.exp;
    if ub.kind == Kind::Inf {
        return done(finish80(&mut masked(env), EXTENDED, Outcome::exact(ua)));
    }
    if difference < -1 {
        return done(finish80(env, EXTENDED, Outcome::exact(ua)));
    }
    // The remainder is `rest` units of 2^(exp - 63).
    let divisor = u128::from(ub.sig);
    let (mut sign, mut rest, exp, mut quotient, incomplete);
    sign = ua.sign;
    if difference >= 64 {
        let n = (difference as u32 & 31) | 32;
        rest = (u128::from(ua.sig) << n) % divisor;
        exp = ub.exp + difference - n as i32;
        quotient = 0;
        incomplete = true;
    } else {
        let (n, d);
        if difference >= 0 {
            exp = ub.exp;
            (n, d) = (u128::from(ua.sig) << difference, divisor);
        } else {
            exp = ua.exp;
            (n, d) = (u128::from(ua.sig), divisor << 1);
        }
        quotient = n / d;
        rest = n % d;
        incomplete = false;
        if nearest && (rest > d - rest || (rest == d - rest && quotient & 1 != 0)) {
            rest = d - rest;
            quotient += 1;
            sign = !sign;
        }
    }
    let value = if rest == 0 {
        F80::zero(ua.sign)
    } else {
        let shift = rest.leading_zeros();
        let outcome = Outcome::Finite { sign, exp: exp + 64 - shift as i32, sig: rest << shift };
        finish80(env, EXTENDED, outcome)
    };
    Remainder { value, incomplete, quotient: quotient as u8 & 7 }
}

/// The constants that instructions load (FLD1 … FLDZ).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Constant {
    /// 1.0 (FLD1).
    One,
    /// log2(10) (FLDL2T).
    Log2Of10,
    /// log2(e) (FLDL2E).
    Log2OfE,
    /// pi (FLDPI).
    Pi,
    /// log10(2) (FLDLG2).
    Log10Of2,
    /// ln(2) (FLDLN2).
    LnOf2,
    /// +0.0 (FLDZ).
    Zero,
}

/// A constant, rounded by the rounding control (SDM vol. 1, 8.3.8); neither flags nor C1.
pub fn f80_constant(c: Constant, rounding: Rounding) -> F80 {
    // Truncated 64-bit significand, exponent field, and whether the discarded part is above one half.
    let (mant, se, above_half): (u64, u16, bool) = match c {
        Constant::One => return F80::ONE,
        Constant::Zero => return F80::ZERO,
        Constant::Log2Of10 => (0xd49a_784b_cd1b_8afe, 0x4000, false),
        Constant::Log2OfE => (0xb8aa_3b29_5c17_f0bb, 0x3fff, true),
        Constant::Pi => (0xc90f_daa2_2168_c234, 0x4000, true),
        Constant::Log10Of2 => (0x9a20_9a84_fbcf_f798, 0x3ffd, true),
        Constant::LnOf2 => (0xb172_17f7_d1cf_79ab, 0x3ffe, true),
    };
    let up = match rounding {
        Rounding::NearestEven => above_half,
        Rounding::Up => true,
        Rounding::Down | Rounding::Zero => false,
    };
    F80 { mant: mant + u64::from(up), se }
}
