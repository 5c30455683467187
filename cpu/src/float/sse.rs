// SPDX-License-Identifier: Apache-2.0
//! f32 and f64 arithmetic with SSE semantics (APM vol. 1, 4.10; SDM vol. 1, 4.8.3.5 and 11.5).

use super::arith::{self, Outcome};
use super::env::{DE, Env, IE, PE};
use super::number::{DOUBLE, Format, Kind, SINGLE, Unpacked, round};
use core::cmp::Ordering;

/// Takes an operand apart; under DAZ a denormal is a zero of its sign.
#[inline]
pub(super) fn operand(env: &Env, f: Format, bits: u64) -> Unpacked {
    let u = f.unpack(bits);
    if env.daz && u.denormal { Unpacked::zero(u.sign) } else { u }
}

/// The NaN result of an operation with a NaN among its operands: the first NaN, made quiet; IE for a signaling one.
#[cold]
fn propagate(env: &mut Env, f: Format, operands: &[Unpacked]) -> u64 {
    if operands.iter().any(|u| u.kind == Kind::Signaling) {
        env.raise(IE);
    }
    operands.iter().find(|u| u.is_nan()).map_or(f.indefinite(), |u| f.pack_nan(u.sign, u.sig))
}

pub(super) fn finish(env: &mut Env, f: Format, outcome: Outcome) -> u64 {
    match outcome {
        Outcome::Zero(sign) => f.zero(sign),
        Outcome::Inf(sign) => f.inf(sign),
        Outcome::Invalid => f.indefinite(),
        Outcome::Finite { sign, exp, sig } => {
            let r = round(env, f, sign, exp, sig);
            f.pack(sign, r)
        }
    }
}

type Binary = fn(&mut Env, Unpacked, Unpacked) -> Outcome;

#[cold]
#[inline(never)]
fn binary(env: &mut Env, f: Format, op: Binary, a: u64, b: u64) -> u64 {
    let (a, b) = (operand(env, f, a), operand(env, f, b));
    if a.is_nan() || b.is_nan() {
        return propagate(env, f, &[a, b]);
    }
    let outcome = op(env, a, b);
    finish(env, f, outcome)
}

fn subtract(env: &mut Env, a: Unpacked, b: Unpacked) -> Outcome {
    arith::add(env, a, Unpacked { sign: !b.sign, ..b })
}

#[cold]
#[inline(never)]
fn square_root(env: &mut Env, f: Format, a: u64) -> u64 {
    let a = operand(env, f, a);
    if a.is_nan() {
        return propagate(env, f, &[a]);
    }
    let outcome = arith::sqrt(env, a);
    finish(env, f, outcome)
}

fn fused(env: &mut Env, f: Format, v: [u64; 3]) -> u64 {
    let [a, b, c] = v.map(|bits| operand(env, f, bits));
    if a.is_nan() || b.is_nan() || c.is_nan() {
        return propagate(env, f, &[a, b, c]);
    }
    let outcome = arith::fma(env, a, b, c);
    finish(env, f, outcome)
}

fn compare(env: &mut Env, f: Format, signaling: bool, a: u64, b: u64) -> Option<Ordering> {
    let (a, b) = (operand(env, f, a), operand(env, f, b));
    if a.is_nan() || b.is_nan() {
        if signaling || a.kind == Kind::Signaling || b.kind == Kind::Signaling {
            env.raise(IE);
        }
        return None;
    }
    if a.denormal || b.denormal {
        env.raise(DE);
    }
    Some(order(a, b))
}

/// Order of two numbers that are not NaNs.
pub(super) fn order(a: Unpacked, b: Unpacked) -> Ordering {
    let key = |u: Unpacked| match u.kind {
        Kind::Zero => (0, 0, 0),
        Kind::Inf => (2, 0, 0),
        _ => (1, u.exp, u.sig),
    };
    let (zero_a, zero_b) = (a.kind == Kind::Zero, b.kind == Kind::Zero);
    if zero_a && zero_b {
        return Ordering::Equal;
    }
    match (a.sign && !zero_a, b.sign && !zero_b) {
        (false, false) => key(a).cmp(&key(b)),
        (true, true) => key(b).cmp(&key(a)),
        (true, false) => Ordering::Less,
        (false, true) => Ordering::Greater,
    }
}

/// MIN and MAX: the second operand unless the first is strictly smaller (larger); any NaN raises IE and gives the second.
fn select(env: &mut Env, f: Format, wanted: Ordering, a: u64, b: u64) -> u64 {
    let flushed = |env: &Env, bits: u64| {
        let u = f.unpack(bits);
        if env.daz && u.denormal { f.zero(u.sign) } else { bits }
    };
    if compare(env, f, true, a, b) == Some(wanted) { flushed(env, a) } else { flushed(env, b) }
}

/// Whether an ordering (None: unordered) satisfies predicate `imm` of CMPPS/VCMPPS (SDM vol. 2, table 3-1).
#[inline]
fn predicate(imm: u8, o: Option<Ordering>) -> bool {
    let (less, equal, greater) =
        (o == Some(Ordering::Less), o == Some(Ordering::Equal), o == Some(Ordering::Greater));
    let unordered = o.is_none();
    match imm & 15 {
        0 => equal,
        1 => less,
        2 => less || equal,
        3 => unordered,
        4 => !equal,
        5 => !less,
        6 => !(less || equal),
        7 => !unordered,
        8 => equal || unordered,
        9 => !(greater || equal),
        10 => !greater,
        11 => false,
        12 => less || greater,
        13 => greater || equal,
        14 => greater,
        _ => true,
    }
}

/// Whether predicate `imm` raises IE for a quiet NaN too.
#[inline]
fn predicate_signals(imm: u8) -> bool {
    // LT, LE, NLT, NLE, NGE, NGT, GE, GT signal; bit 4 inverts the choice.
    (0x6666u32 >> (imm & 15)) & 1 != u32::from(imm >> 4) & 1
}

macro_rules! format_ops {
    ($name:literal, $f:expr, $host:ty, $bits:ty,
     $add:ident $sub:ident $mul:ident $div:ident $sqrt:ident $fma:ident $min:ident $max:ident $cmp:ident $pred:ident,
     $fast:ident) => {
        mod $fast {
            use super::*;
            const FRACTION: u32 = <$host>::MANTISSA_DIGITS - 1;
            const FIELD: $bits = <$bits>::MAX >> (FRACTION + 1);
            const HALF_PRODUCT: u32 = <$host>::MANTISSA_DIGITS;

            #[inline(always)]
            fn field(v: $bits) -> $bits {
                v >> FRACTION & FIELD
            }

            /// A normal number or zero.
            #[inline(always)]
            fn plain(v: $bits) -> bool {
                field(v).wrapping_sub(1) < FIELD - 1 || v << 1 == 0
            }

            /// A normal number that rounding did not bring up from below the smallest one.
            #[inline(always)]
            fn safe(v: $bits) -> bool {
                field(v).wrapping_sub(2) < FIELD - 2
            }

            /// Bits from the integer bit to the last set bit of the significand.
            #[inline(always)]
            fn width(v: $bits) -> u32 {
                FRACTION + 1 - (v | 1 << FRACTION).trailing_zeros().min(FRACTION)
            }

            #[inline(always)]
            pub fn add(a: $bits, b: $bits, env: &Env) -> Option<$bits> {
                let (x, y) = (<$host>::from_bits(a), <$host>::from_bits(b));
                let r = x + y;
                if !(env.host_rounding() && plain(a) && plain(b) && plain(r.to_bits())) {
                    return None;
                }
                if env.flags & PE == 0 {
                    // Two-sum: the exact error of the addition. A spurious infinity only sends us the long way.
                    let t = r - x;
                    if (x - (r - t)) + (y - t) != 0.0 {
                        return None;
                    }
                }
                Some(r.to_bits())
            }

            #[inline(always)]
            pub fn mul(a: $bits, b: $bits, env: &Env) -> Option<$bits> {
                let r = (<$host>::from_bits(a) * <$host>::from_bits(b)).to_bits();
                if !(env.host_rounding() && plain(a) && plain(b)) {
                    return None;
                }
                if a << 1 == 0 || b << 1 == 0 {
                    return Some(r);
                }
                let exact = env.flags & PE != 0 || width(a) + width(b) <= HALF_PRODUCT;
                (exact && safe(r)).then_some(r)
            }

            #[inline(always)]
            pub fn div(a: $bits, b: $bits, env: &Env) -> Option<$bits> {
                let (x, y) = (<$host>::from_bits(a), <$host>::from_bits(b));
                let r = x / y;
                if !(env.host_rounding() && plain(a) && plain(b) && b << 1 != 0) {
                    return None;
                }
                if a << 1 == 0 {
                    return Some(r.to_bits());
                }
                let exact = env.flags & PE != 0
                    || (width(r.to_bits()) + width(b) <= HALF_PRODUCT && r * y == x);
                (exact && safe(r.to_bits())).then_some(r.to_bits())
            }

            #[inline(always)]
            pub fn sqrt(a: $bits, env: &Env) -> Option<$bits> {
                let x = <$host>::from_bits(a);
                if !(env.host_rounding() && plain(a) && x >= 0.0) {
                    return None;
                }
                let r = x.sqrt();
                let exact =
                    env.flags & PE != 0 || (2 * width(r.to_bits()) <= HALF_PRODUCT && r * r == x);
                exact.then_some(r.to_bits())
            }

            /// Order of two plain numbers.
            #[inline(always)]
            pub fn cmp(a: $bits, b: $bits) -> Option<Ordering> {
                if plain(a) && plain(b) {
                    <$host>::from_bits(a).partial_cmp(&<$host>::from_bits(b))
                } else {
                    None
                }
            }
        }

        #[doc = concat!($name, " `a + b`.")]
        #[inline]
        pub fn $add(a: $bits, b: $bits, env: &mut Env) -> $bits {
            match $fast::add(a, b, env) {
                Some(r) => r,
                None => binary(env, $f, arith::add, a.into(), b.into()) as $bits,
            }
        }

        #[doc = concat!($name, " `a - b`.")]
        #[inline]
        pub fn $sub(a: $bits, b: $bits, env: &mut Env) -> $bits {
            match $fast::add(a, b ^ !(<$bits>::MAX >> 1), env) {
                Some(r) => r,
                None => binary(env, $f, subtract, a.into(), b.into()) as $bits,
            }
        }

        #[doc = concat!($name, " `a * b`.")]
        #[inline]
        pub fn $mul(a: $bits, b: $bits, env: &mut Env) -> $bits {
            match $fast::mul(a, b, env) {
                Some(r) => r,
                None => binary(env, $f, arith::mul, a.into(), b.into()) as $bits,
            }
        }

        #[doc = concat!($name, " `a / b`.")]
        #[inline]
        pub fn $div(a: $bits, b: $bits, env: &mut Env) -> $bits {
            match $fast::div(a, b, env) {
                Some(r) => r,
                None => binary(env, $f, arith::div, a.into(), b.into()) as $bits,
            }
        }

        #[doc = concat!($name, " square root of `a`.")]
        #[inline]
        pub fn $sqrt(a: $bits, env: &mut Env) -> $bits {
            match $fast::sqrt(a, env) {
                Some(r) => r,
                None => square_root(env, $f, a.into()) as $bits,
            }
        }

        #[doc = concat!($name, " `a * b + c` with a single rounding; the first NaN of `a`, `b`, `c` is propagated.")]
        pub fn $fma(a: $bits, b: $bits, c: $bits, env: &mut Env) -> $bits {
            fused(env, $f, [a.into(), b.into(), c.into()]) as $bits
        }

        #[doc = concat!($name, " MIN: `a` if it is less than `b`, else `b`.")]
        pub fn $min(a: $bits, b: $bits, env: &mut Env) -> $bits {
            match $fast::cmp(a, b) {
                Some(o) => if o == Ordering::Less { a } else { b },
                None => select(env, $f, Ordering::Less, a.into(), b.into()) as $bits,
            }
        }

        #[doc = concat!($name, " MAX: `a` if it is greater than `b`, else `b`.")]
        pub fn $max(a: $bits, b: $bits, env: &mut Env) -> $bits {
            match $fast::cmp(a, b) {
                Some(o) => if o == Ordering::Greater { a } else { b },
                None => select(env, $f, Ordering::Greater, a.into(), b.into()) as $bits,
            }
        }

        #[doc = concat!($name, " comparison; None is unordered. `signaling` (COMIS*, not UCOMIS*): a quiet NaN raises IE too.")]
        #[inline]
        pub fn $cmp(a: $bits, b: $bits, signaling: bool, env: &mut Env) -> Option<Ordering> {
            match $fast::cmp(a, b) {
                Some(o) => Some(o),
                None => compare(env, $f, signaling, a.into(), b.into()),
            }
        }

        #[doc = concat!($name, " comparison by predicate `imm` (bits 4..0, as CMPPS and VCMPPS have them).")]
        #[inline]
        pub fn $pred(a: $bits, b: $bits, imm: u8, env: &mut Env) -> bool {
            predicate(imm, $cmp(a, b, predicate_signals(imm), env))
        }
    };
}

format_ops!("f32", SINGLE, f32, u32,
    f32_add f32_sub f32_mul f32_div f32_sqrt f32_fma f32_min f32_max f32_cmp f32_cmp_predicate, fast32);
format_ops!("f64", DOUBLE, f64, u64,
    f64_add f64_sub f64_mul f64_div f64_sqrt f64_fma f64_min f64_max f64_cmp f64_cmp_predicate, fast64);
