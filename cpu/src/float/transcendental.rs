// SPDX-License-Identifier: Apache-2.0
//! The x87 transcendental instructions: FSIN, FCOS, FSINCOS, FPTAN, FPATAN, F2XM1, FYL2X, FYL2XP1.
//!
//! Computed to about 120 bits and rounded once to 64 in the current rounding mode, so results are correctly rounded
//! but for about one argument in 2^50. Trigonometric arguments are reduced with the processor's 66-bit pi
//! (SDM vol. 1, 8.3.8), exactly. Precision control doesn't apply. Inexact results always raise PE.

use super::arith::Outcome;
use super::env::{DE, Env, IE, PE, UE, ZE};
use super::number::{EXTENDED, F80, Kind, Unpacked, unpack80};
use super::wide::{Wide, inverse_factorials, inverse_odds, mul_hi, series};
use super::x87::{finish80, nan1, nan2, stopped};

const PI: Wide = Wide::new(false, 1, 0xc90f_daa2_2168_c234_c4c6_628b_80dc_1cd1);
const HALF_PI: Wide = Wide::new(false, 0, PI.sig);
const LN_2: Wide = Wide::new(false, -1, 0xb172_17f7_d1cf_79ab_c9e3_b398_03f2_f6af);
/// 2 / ln 2
const TWO_LOG2_E: Wide = Wide::new(false, 1, 0xb8aa_3b29_5c17_f0bb_be87_fed0_691d_3e88);

/// Half of the 66-bit pi, in units of 2^-65.
const HALF_PI_66: u128 = 0x3_243f_6a88_85a3_08d3;

const SINE: [u128; 17] = inverse_factorials(1, 2);
const COSINE: [u128; 18] = inverse_factorials(0, 2);
const EXPONENTIAL: [u128; 31] = inverse_factorials(1, 1);
const ODDS: [u128; 26] = inverse_odds();
const ARCTANGENT: [u128; 33] = arctangents();

/// atan(k / 32) in units of 2^-127, each from the one before by
/// atan(k/32) - atan((k-1)/32) = atan(32 / (1024 + k (k-1))).
const fn arctangents() -> [u128; 33] {
    let mut out = [0; 33];
    let mut k = 1;
    while k <= 32 {
        let d = 1024 + k as u128 * (k as u128 - 1);
        // The alternating series of atan(32/d); the powers fall by at least 2^10 each.
        let mut power = (1u128 << 127) / d * 32;
        let (mut sum, mut n) = (power, 1);
        while power != 0 {
            power = power / d * 32 / d * 32;
            n += 2;
            if n & 2 != 0 {
                sum -= power / n;
            } else {
                sum += power / n;
            }
        }
        out[k] = out[k - 1] + sum;
        k += 1;
    }
    out
}

fn invalid(env: &mut Env) -> F80 {
    env.raise(IE);
    F80::INDEFINITE
}

/// Rounds an irrational result.
fn inexact(env: &mut Env, w: Wide) -> F80 {
    finish80(env, EXTENDED, Outcome::Finite { sign: w.sign, exp: w.exp, sig: w.sig | 1 })
}

/// The next 128-bit number towards zero: stands for what is a trace less than `w`.
fn trace_less(w: Wide) -> Wide {
    if w.sig == 1 << 127 {
        Wide { exp: w.exp - 1, sig: u128::MAX, ..w }
    } else {
        Wide { sig: w.sig - 1, ..w }
    }
}

/// Rounds a result that its 128 bits hold exactly: PE is raised all the same, and UE for a denormal.
fn as_if_exact(env: &mut Env, w: Wide) -> F80 {
    if w.exp < EXTENDED.emin {
        env.raise(UE);
    }
    let v = finish80(env, EXTENDED, Outcome::Finite { sign: w.sign, exp: w.exp, sig: w.sig });
    env.raise(PE);
    v
}

/// Arguments below 2^TINY differ from their own sine, tangent and arc tangent by a trace only.
const TINY: i32 = -66;

/// An argument reduced to [-pi/4, pi/4] and the quadrant it came from.
struct Reduced {
    r: Wide,
    quadrant: u128,
}

/// Reduces the magnitude of a finite non-zero `x` below 2^63.
fn reduce(x: Unpacked) -> Reduced {
    if x.exp < -1 {
        return Reduced { r: Wide::new(false, x.exp, u128::from(x.sig) << 64), quadrant: 0 };
    }
    let n = u128::from(x.sig) << (x.exp + 2).clamp(0, 64);
    let (mut quadrant, mut rest, mut sign) = (n / HALF_PI_66, n % HALF_PI_66, false);
    if rest > HALF_PI_66 / 2 {
        rest = HALF_PI_66 - rest;
        quadrant += 1;
        sign = true;
    }
    // The odd 66-bit modulus divides no 64-bit significand times a power of two.
    Reduced { r: Wide::fixed(sign, rest.max(1), 65), quadrant }
}

impl Reduced {
    fn square(&self) -> u128 {
        self.r.mul(self.r).to_fixed(128)
    }

    fn sine_of_r(&self) -> Wide {
        self.r.mul(Wide::fixed(false, series(&SINE, self.square(), true), 127))
    }

    fn cosine_of_r(&self) -> Wide {
        Wide::fixed(false, series(&COSINE, self.square(), true), 127)
    }

    fn sine(&self) -> Wide {
        let v = if self.quadrant & 1 == 0 { self.sine_of_r() } else { self.cosine_of_r() };
        if self.quadrant & 2 == 0 { v } else { v.neg() }
    }

    fn cosine(&self) -> Wide {
        Reduced { quadrant: self.quadrant + 1, ..*self }.sine()
    }
}

/// What a trigonometric instruction makes of its operand.
enum Angle {
    /// The result is this, whatever the function (NaN or invalid).
    Special(F80),
    /// |x| is 2^63 or more: C2 is set and nothing else happens.
    OutOfRange,
    Zero,
    Reduced(Reduced),
}

fn angle(env: &mut Env, x: Unpacked) -> Angle {
    env.c1 = false;
    if let Some(nan) = nan1(env, x) {
        return Angle::Special(nan);
    }
    match x.kind {
        Kind::Inf => Angle::Special(invalid(env)),
        Kind::Zero => Angle::Zero,
        _ if x.exp >= 63 => Angle::OutOfRange,
        _ => {
            if x.denormal {
                env.raise(DE);
                if stopped(env) {
                    return Angle::Special(F80::INDEFINITE);
                }
            }
            Angle::Reduced(reduce(x))
        }
    }
}

fn with_sign(w: Wide, flip: bool) -> Wide {
    Wide { sign: w.sign != flip, ..w }
}

fn signed_sine(env: &mut Env, r: &Reduced, x: Unpacked) -> F80 {
    if x.exp < TINY {
        inexact(env, trace_less(Wide::from(x)))
    } else {
        inexact(env, with_sign(r.sine(), x.sign))
    }
}

fn rounded_cosine(env: &mut Env, r: &Reduced, x: Unpacked) -> F80 {
    if x.exp < TINY {
        inexact(env, trace_less(Wide::new(false, 0, 1 << 127)))
    } else {
        inexact(env, r.cosine())
    }
}

/// FSIN; None: out of range (C2).
pub fn f80_sin(a: F80, env: &mut Env) -> Option<F80> {
    let x = unpack80(a);
    Some(match angle(env, x) {
        Angle::Special(v) => v,
        Angle::OutOfRange => return None,
        Angle::Zero => a,
        Angle::Reduced(r) => signed_sine(env, &r, x),
    })
}

/// FCOS; None: out of range (C2).
pub fn f80_cos(a: F80, env: &mut Env) -> Option<F80> {
    let x = unpack80(a);
    Some(match angle(env, x) {
        Angle::Special(v) => v,
        Angle::OutOfRange => return None,
        Angle::Zero => F80::ONE,
        Angle::Reduced(r) => rounded_cosine(env, &r, x),
    })
}

/// FSINCOS: (sine, cosine); None: out of range (C2). C1 speaks of the sine.
pub fn f80_sincos(a: F80, env: &mut Env) -> Option<(F80, F80)> {
    let x = unpack80(a);
    Some(match angle(env, x) {
        Angle::Special(v) => (v, v),
        Angle::OutOfRange => return None,
        Angle::Zero => (a, F80::ONE),
        Angle::Reduced(r) => {
            let cosine = rounded_cosine(env, &r, x);
            (signed_sine(env, &r, x), cosine)
        }
    })
}

/// FPTAN: (tangent, the 1.0 that is pushed; a NaN result is pushed twice); None: out of range (C2).
pub fn f80_tan(a: F80, env: &mut Env) -> Option<(F80, F80)> {
    let x = unpack80(a);
    Some(match angle(env, x) {
        Angle::Special(v) => (v, v),
        Angle::OutOfRange => return None,
        Angle::Zero => (a, F80::ONE),
        Angle::Reduced(_) if x.exp < TINY => (as_if_exact(env, Wide::from(x)), F80::ONE),
        Angle::Reduced(r) => {
            let tangent = r.sine().div(r.cosine());
            (inexact(env, with_sign(tangent, x.sign)), F80::ONE)
        }
    })
}

/// atan of a magnitude in (0, 1].
fn arctangent(q: Wide) -> Wide {
    let fixed = q.to_fixed(127);
    let k = ((fixed >> 121) + 1) >> 1;
    if k == 0 {
        let z = q.mul(q).to_fixed(128);
        return q.mul(Wide::fixed(false, series(&ODDS[..12], z, true), 127));
    }
    let base = ARCTANGENT.get(k as usize).copied().unwrap_or(ARCTANGENT[32]);
    let c = k << 122;
    // d = (q - c) / (1 + q c), |d| <= 1/64
    let difference = fixed.abs_diff(c);
    if difference == 0 {
        return Wide::fixed(false, base, 127);
    }
    let denominator = Wide::fixed(false, (1 << 126) + mul_hi(fixed, c), 126);
    let d = Wide::fixed(false, difference, 127).div(denominator);
    let z = d.mul(d).to_fixed(128);
    let delta = d.mul(Wide::fixed(false, series(&ODDS[..12], z, true), 127)).to_fixed(127);
    let sum = if fixed > c { base + delta } else { base - delta };
    Wide::fixed(false, sum, 127)
}

fn sum(a: Wide, b: Wide) -> Wide {
    // Never zero where it is used: |a| and |b| differ by far more than the working precision.
    a.add(b).unwrap_or(Wide::new(a.sign, a.exp - 127, 1 << 127))
}

/// FPATAN: the angle of the point (`x` = ST0, `y` = ST1), in [-pi, pi].
pub fn f80_atan2(y: F80, x: F80, env: &mut Env) -> F80 {
    let (uy, ux) = (unpack80(y), unpack80(x));
    env.c1 = false;
    if let Some(nan) = nan2(env, ux, uy) {
        return nan;
    }
    if uy.denormal || ux.denormal {
        env.raise(DE);
        if stopped(env) {
            return F80::INDEFINITE;
        }
    }
    let magnitude = match (uy.kind, ux.kind) {
        (Kind::Inf, Kind::Inf) => {
            let quarter = Wide { exp: HALF_PI.exp - 1, ..HALF_PI };
            if ux.sign { sum(HALF_PI, quarter) } else { quarter }
        }
        (Kind::Zero, _) | (_, Kind::Inf) => {
            if !ux.sign {
                return F80::zero(uy.sign);
            }
            PI
        }
        (Kind::Inf, _) | (_, Kind::Zero) => HALF_PI,
        _ => {
            let (a, b) = (Wide { sign: false, ..Wide::from(uy) }, Wide { sign: false, ..Wide::from(ux) });
            let steep = (a.exp, a.sig) > (b.exp, b.sig);
            if !ux.sign && a.exp - b.exp < TINY {
                let quotient = a.div(b);
                let exact = uy.sig % (ux.sig >> ux.sig.trailing_zeros()) == 0;
                return inexact(env, with_sign(if exact { trace_less(quotient) } else { quotient }, uy.sign));
            }
            let theta = if steep { sum(HALF_PI, arctangent(b.div(a)).neg()) } else { arctangent(a.div(b)) };
            if ux.sign { sum(PI, theta.neg()) } else { theta }
        }
    };
    inexact(env, with_sign(magnitude, uy.sign))
}

/// F2XM1: `2^x - 1` for |x| <= 1. Outside, where the result is undefined, ST0 is left as it is.
pub fn f80_2xm1(a: F80, env: &mut Env) -> F80 {
    let x = unpack80(a);
    env.c1 = false;
    if let Some(nan) = nan1(env, x) {
        return nan;
    }
    match x.kind {
        Kind::Zero => return a,
        Kind::Inf => return if x.sign { F80::ONE.neg() } else { a },
        _ => {}
    }
    if x.denormal {
        env.raise(DE);
        if stopped(env) {
            return F80::INDEFINITE;
        }
    }
    if x.exp >= 0 {
        env.raise(PE);
        return match (x.exp, x.sig) {
            (0, 0x8000_0000_0000_0000) if x.sign => F80 { mant: 1 << 63, se: 0xbffe },
            _ => a,
        };
    }
    let t = Wide::from(x).mul(LN_2);
    let factor = series(&EXPONENTIAL, t.to_fixed(128), t.sign);
    inexact(env, t.mul(Wide::fixed(false, factor, 127)))
}

/// 2 / ln 2 * atanh(s).
fn log2_of_ratio(s: Wide) -> Wide {
    let z = s.mul(s).to_fixed(128);
    s.mul(TWO_LOG2_E).mul(Wide::fixed(false, series(&ODDS, z, false), 127))
}

/// log2 of a positive number.
enum Log2 {
    /// The argument is this power of two.
    Exact(i32),
    Irrational(Wide),
}

fn log2(x: Wide) -> Log2 {
    const SQRT_2: u128 = 0xb504_f333_f9de_6484 << 64;
    if x.sig == 1 << 127 {
        return Log2::Exact(x.exp);
    }
    // m in [sqrt(1/2), sqrt(2)), in units of 2^-126
    let (e, m) = if x.sig >= SQRT_2 { (x.exp + 1, x.sig >> 2) } else { (x.exp, x.sig >> 1) };
    let one = 1 << 126;
    let s = Wide::fixed(m < one, m.abs_diff(one), 126).div(Wide::fixed(false, m + one, 126));
    let fraction = log2_of_ratio(s);
    if e == 0 {
        return Log2::Irrational(fraction);
    }
    Log2::Irrational(sum(Wide::fixed(e < 0, e.unsigned_abs().into(), 0), fraction))
}

/// `y * log2(x)` for numbers, `x` positive, `y` not zero.
fn times_log2(env: &mut Env, y: Unpacked, x: Wide) -> F80 {
    match log2(x) {
        Log2::Exact(0) => F80::zero(y.sign),
        Log2::Exact(e) => {
            let sig = u128::from(y.sig) * u128::from(e.unsigned_abs());
            let shift = sig.leading_zeros();
            let sign = y.sign != (e < 0);
            as_if_exact(env, Wide::new(sign, y.exp + 64 - shift as i32, sig << shift))
        }
        Log2::Irrational(l) => inexact(env, l.mul(Wide::from(y))),
    }
}

/// FYL2X: `y * log2(x)` with `x` = ST0, `y` = ST1.
pub fn f80_yl2x(y: F80, x: F80, env: &mut Env) -> F80 {
    let (uy, ux) = (unpack80(y), unpack80(x));
    env.c1 = false;
    if let Some(nan) = nan2(env, ux, uy) {
        return nan;
    }
    let one = ux.kind == Kind::Finite && ux.exp == 0 && ux.sig == 1 << 63;
    let below_one = ux.kind == Kind::Zero || (ux.kind == Kind::Finite && ux.exp < 0);
    match (ux.kind, uy.kind) {
        (Kind::Finite | Kind::Inf, _) if ux.sign => return invalid(env),
        (Kind::Zero, Kind::Zero) | (Kind::Inf, Kind::Zero) => return invalid(env),
        (_, Kind::Inf) if one => return invalid(env),
        (Kind::Zero, Kind::Finite) => {
            env.raise(ZE);
            return F80::inf(!uy.sign);
        }
        _ => {}
    }
    if ux.denormal || uy.denormal {
        env.raise(DE);
        if stopped(env) {
            return F80::INDEFINITE;
        }
    }
    match (ux.kind, uy.kind) {
        (_, Kind::Inf) | (Kind::Inf, _) => F80::inf(uy.sign != below_one),
        (_, Kind::Zero) => F80::zero(uy.sign != below_one),
        _ => times_log2(env, uy, Wide::from(ux)),
    }
}

/// FYL2XP1: `y * log2(x + 1)` with x = ST0, y = ST1; accurate for x near zero. The architecture defines it for
/// |x| below 1 - sqrt(1/2); beyond, this computes what the formula says while x > -1 and then leaves x alone.
pub fn f80_yl2xp1(y: F80, x80: F80, env: &mut Env) -> F80 {
    let (uy, ux) = (unpack80(y), unpack80(x80));
    env.c1 = false;
    if let Some(nan) = nan2(env, ux, uy) {
        return nan;
    }
    match (ux.kind, uy.kind) {
        (Kind::Zero, Kind::Inf) | (Kind::Inf, Kind::Zero) => return invalid(env),
        (Kind::Inf, _) if ux.sign => return invalid(env),
        _ => {}
    }
    if ux.denormal || uy.denormal {
        env.raise(DE);
        if stopped(env) {
            return F80::INDEFINITE;
        }
    }
    let sign = uy.sign != ux.sign;
    match (ux.kind, uy.kind) {
        (_, Kind::Inf) | (Kind::Inf, _) => F80::inf(sign),
        (_, Kind::Zero) | (Kind::Zero, _) => F80::zero(sign),
        _ => {
            let (x, one) = (Wide::from(ux), Wide::new(false, 0, 1 << 127));
            if ux.sign && ux.exp >= 0 {
                env.raise(PE);
                x80
            } else if ux.exp < -2 {
                // log2(1 + x) = 2 / ln 2 * atanh(x / (2 + x))
                let s = x.div(sum(Wide { exp: 1, ..one }, x));
                inexact(env, log2_of_ratio(s).mul(Wide::from(uy)))
            } else {
                times_log2(env, uy, sum(one, x))
            }
        }
    }
}
