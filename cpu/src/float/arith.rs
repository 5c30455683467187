// SPDX-License-Identifier: Apache-2.0
//! Add, multiply, divide, square root and fused multiply-add on numbers taken apart; exact up to a sticky bit.
//! NaN operands have been dealt with before (their rules differ between SSE and x87).

use super::env::{DE, Env, IE, Rounding, ZE};
use super::number::{Kind, Unpacked, shift_right_jam};

/// A result before rounding.
#[derive(Clone, Copy, Debug)]
pub(super) enum Outcome {
    Zero(bool),
    Inf(bool),
    /// `sig / 2^127 * 2^exp`, bit 127 set, bit 0 sticky.
    Finite {
        sign: bool,
        exp: i32,
        sig: u128,
    },
    /// Invalid operation (IE has been raised): the format's default NaN.
    Invalid,
}

impl Outcome {
    /// Normalises a non-zero magnitude `sig / 2^127 * 2^exp`.
    #[inline]
    fn finite(sign: bool, exp: i32, sig: u128) -> Outcome {
        let shift = sig.leading_zeros();
        Outcome::Finite { sign, exp: exp - shift as i32, sig: sig << shift }
    }

    /// The operand itself, exactly.
    #[inline]
    pub fn exact(v: Unpacked) -> Outcome {
        match v.kind {
            Kind::Zero => Outcome::Zero(v.sign),
            Kind::Finite => Outcome::Finite { sign: v.sign, exp: v.exp, sig: u128::from(v.sig) << 64 },
            _ => Outcome::Inf(v.sign),
        }
    }
}

#[inline]
fn invalid(env: &mut Env) -> Outcome {
    env.raise(IE);
    Outcome::Invalid
}

#[inline]
fn denormals(env: &mut Env, any: bool) {
    if any {
        env.raise(DE);
    }
}

/// `a + b`.
pub(super) fn add(env: &mut Env, a: Unpacked, b: Unpacked) -> Outcome {
    match (a.kind, b.kind) {
        (Kind::Inf, Kind::Inf) => {
            return if a.sign == b.sign { Outcome::Inf(a.sign) } else { invalid(env) };
        }
        _ => denormals(env, a.denormal || b.denormal),
    }
    match (a.kind, b.kind) {
        (Kind::Inf, _) => Outcome::Inf(a.sign),
        (_, Kind::Inf) => Outcome::Inf(b.sign),
        (Kind::Zero, Kind::Zero) => {
            Outcome::Zero(if a.sign == b.sign { a.sign } else { env.rounding == Rounding::Down })
        }
        (Kind::Zero, _) => Outcome::exact(b),
        (_, Kind::Zero) => Outcome::exact(a),
        _ => {
            let x = (a.sign, a.exp, u128::from(a.sig) << 64);
            let y = (b.sign, b.exp, u128::from(b.sig) << 64);
            sum(env, x, y)
        }
    }
}

/// Sum of two non-zero numbers (sign, exponent, significand with bit 127 set and the low two bits clear).
fn sum(env: &Env, a: (bool, i32, u128), b: (bool, i32, u128)) -> Outcome {
    let (a, b) = if (a.1, a.2) >= (b.1, b.2) { (a, b) } else { (b, a) };
    let (sign, exp, big) = a;
    let small = shift_right_jam(b.2 >> 1, a.1.abs_diff(b.1));
    if sign == b.0 {
        return Outcome::finite(sign, exp + 1, (big >> 1) + small);
    }
    let difference = (big >> 1) - small;
    if difference == 0 {
        return Outcome::Zero(env.rounding == Rounding::Down);
    }
    Outcome::finite(sign, exp + 1, difference)
}

/// `a * b`.
pub(super) fn mul(env: &mut Env, a: Unpacked, b: Unpacked) -> Outcome {
    let sign = a.sign != b.sign;
    match (a.kind, b.kind) {
        (Kind::Inf, Kind::Zero) | (Kind::Zero, Kind::Inf) => return invalid(env),
        _ => denormals(env, a.denormal || b.denormal),
    }
    match (a.kind, b.kind) {
        (Kind::Inf, _) | (_, Kind::Inf) => Outcome::Inf(sign),
        (Kind::Zero, _) | (_, Kind::Zero) => Outcome::Zero(sign),
        _ => Outcome::finite(sign, a.exp + b.exp + 1, u128::from(a.sig) * u128::from(b.sig)),
    }
}

/// `a / b`.
pub(super) fn div(env: &mut Env, a: Unpacked, b: Unpacked) -> Outcome {
    let sign = a.sign != b.sign;
    match (a.kind, b.kind) {
        (Kind::Inf, Kind::Inf) | (Kind::Zero, Kind::Zero) => return invalid(env),
        (Kind::Finite, Kind::Zero) => {
            env.raise(ZE);
            return Outcome::Inf(sign);
        }
        _ => denormals(env, a.denormal || b.denormal),
    }
    match (a.kind, b.kind) {
        (Kind::Inf, _) => Outcome::Inf(sign),
        (Kind::Zero, _) => Outcome::Zero(sign),
        (_, Kind::Inf) => Outcome::Zero(sign),
        _ => {
            // Both have bit 63 set: the quotient of the shifted significands has 64 or 65 bits, and two more
            // come from the remainder.
            let (n, d) = (u128::from(a.sig) << 63, u128::from(b.sig));
            let (q, r) = (n / d, n % d);
            let (q2, r2) = ((r << 2) / d, (r << 2) % d);
            let quotient = (q << 2 | q2) << 1 | u128::from(r2 != 0);
            // quotient / 2^66 = a.sig / b.sig; 2^127 is the unit of `sig`.
            Outcome::finite(sign, a.exp - b.exp + 61, quotient)
        }
    }
}

/// The square root of `a`.
pub(super) fn sqrt(env: &mut Env, a: Unpacked) -> Outcome {
    match a.kind {
        Kind::Zero => return Outcome::Zero(a.sign),
        _ if a.sign => return invalid(env),
        Kind::Inf => return Outcome::Inf(false),
        _ => denormals(env, a.denormal),
    }
    // value = sig * 2^(exp - 63); with an even exponent 2k, root = sqrt(sig << n) * 2^..., 66 bits of root wanted.
    let odd = a.exp & 1 != 0;
    // radicand in [2^126, 2^128): root in [2^63, 2^64), remainder gives the rest.
    let radicand = u128::from(a.sig) << if odd { 64 } else { 63 };
    let root = isqrt(radicand);
    let rest = radicand - root * root;
    // Two more bits: does (root + 1/2)^2 = root^2 + root + 1/4 fit below the radicand?
    let half = rest > root;
    let sticky = rest != 0;
    let sig = root << 2 | u128::from(half) << 1 | u128::from(sticky);
    // sig / 2^65 in [1, 2) is the root's significand.
    Outcome::finite(false, a.exp.div_euclid(2) + 62, sig)
}

/// Floor of the square root, for `v >= 2^126`.
fn isqrt(v: u128) -> u128 {
    // The guess is right to about 50 bits on any IEEE host; one Newton step brings it within one of the floor, and
    // the correction doesn't depend on how good the guess was.
    let guess = (((v >> 64) as f64).sqrt() * 4294967296.0) as u64;
    let guess = u128::from(guess.max(1));
    let mut root = ((guess + v / guess) >> 1).min(u128::from(u64::MAX));
    while root.checked_mul(root).is_none_or(|s| s > v) {
        root -= 1;
    }
    while (root + 1).checked_mul(root + 1).is_some_and(|s| s <= v) {
        root += 1;
    }
    root
}

/// `a * b + c` with one rounding. Significands of the operands have at most 53 bits (f32 and f64).
pub(super) fn fma(env: &mut Env, a: Unpacked, b: Unpacked, c: Unpacked) -> Outcome {
    let sign = a.sign != b.sign;
    match (a.kind, b.kind) {
        (Kind::Inf, Kind::Zero) | (Kind::Zero, Kind::Inf) => return invalid(env),
        (Kind::Inf, _) | (_, Kind::Inf) if c.kind == Kind::Inf && c.sign != sign => return invalid(env),
        _ => denormals(env, a.denormal || b.denormal || c.denormal),
    }
    match (a.kind, b.kind, c.kind) {
        (Kind::Inf, ..) | (_, Kind::Inf, _) => Outcome::Inf(sign),
        (.., Kind::Inf) => Outcome::Inf(c.sign),
        (Kind::Zero, ..) | (_, Kind::Zero, _) => {
            if c.kind == Kind::Zero {
                Outcome::Zero(if sign == c.sign { sign } else { env.rounding == Rounding::Down })
            } else {
                Outcome::exact(c)
            }
        }
        _ => {
            let product = u128::from(a.sig) * u128::from(b.sig);
            let shift = product.leading_zeros();
            let exp = a.exp + b.exp + 1 - shift as i32;
            if c.kind == Kind::Zero {
                return Outcome::Finite { sign, exp, sig: product << shift };
            }
            sum(env, (sign, exp, product << shift), (c.sign, c.exp, u128::from(c.sig) << 64))
        }
    }
}
