// SPDX-License-Identifier: Apache-2.0
//! Numbers taken apart, and the one rounding routine that puts them together again.

use super::env::{ALL, Env, OE, PE, Rounding, UE};

/// An x87 extended-precision register image: 64-bit significand with explicit integer bit, then sign and exponent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct F80 {
    /// Significand; bit 63 is the integer bit.
    pub mant: u64,
    /// Sign in bit 15, biased exponent in bits 14..0.
    pub se: u16,
}

impl F80 {
    /// Exponent bias.
    pub const BIAS: i32 = 16383;
    /// Positive zero.
    pub const ZERO: F80 = F80 { mant: 0, se: 0 };
    /// One.
    pub const ONE: F80 = F80 { mant: 1 << 63, se: 0x3fff };
    /// The x87 "indefinite" quiet NaN, the masked response to an invalid operation.
    pub const INDEFINITE: F80 = F80 { mant: 0xc000_0000_0000_0000, se: 0xffff };

    /// From the 16 bytes of a register image (the upper six are ignored).
    #[inline]
    pub const fn from_bits(bits: u128) -> F80 {
        F80 { mant: bits as u64, se: (bits >> 64) as u16 }
    }

    /// The 80-bit image, zero extended.
    #[inline]
    pub const fn to_bits(self) -> u128 {
        (self.se as u128) << 64 | self.mant as u128
    }

    /// Sign bit.
    #[inline]
    pub const fn sign(self) -> bool {
        self.se & 0x8000 != 0
    }

    /// Infinity of the given sign.
    #[inline]
    pub const fn inf(sign: bool) -> F80 {
        F80 { mant: 1 << 63, se: if sign { 0xffff } else { 0x7fff } }
    }

    /// Zero of the given sign.
    #[inline]
    pub const fn zero(sign: bool) -> F80 {
        F80 { mant: 0, se: (sign as u16) << 15 }
    }

    /// The absolute value (FABS).
    #[inline]
    pub const fn abs(self) -> F80 {
        F80 { mant: self.mant, se: self.se & 0x7fff }
    }

    /// The value with its sign changed (FCHS).
    #[inline]
    pub const fn neg(self) -> F80 {
        F80 { mant: self.mant, se: self.se ^ 0x8000 }
    }
}

/// What an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Zero,
    Finite,
    Inf,
    Quiet,
    Signaling,
    /// An F80 encoding that no processor since the 387 supports (unnormal, pseudo-NaN, pseudo-infinity).
    Unsupported,
}

/// An operand taken apart. A finite one is `sig / 2^63 * 2^exp` with bit 63 of `sig` set;
/// a NaN keeps its significand, left aligned with the integer bit at 63.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unpacked {
    pub sign: bool,
    pub kind: Kind,
    /// The encoding was a denormal (or pseudo-denormal).
    pub denormal: bool,
    pub exp: i32,
    pub sig: u64,
}

impl Unpacked {
    #[inline]
    pub fn is_nan(self) -> bool {
        matches!(self.kind, Kind::Quiet | Kind::Signaling)
    }

    pub const fn finite(sign: bool, exp: i32, sig: u64) -> Unpacked {
        Unpacked { sign, kind: Kind::Finite, denormal: false, exp, sig }
    }

    pub const fn zero(sign: bool) -> Unpacked {
        Unpacked { sign, kind: Kind::Zero, denormal: false, exp: 0, sig: 0 }
    }

    /// The integer `sign * magnitude`.
    pub fn integer(sign: bool, magnitude: u64) -> Unpacked {
        if magnitude == 0 {
            return Unpacked::zero(sign);
        }
        let shift = magnitude.leading_zeros();
        Unpacked::finite(sign, 63 - shift as i32, magnitude << shift)
    }
}

/// A destination format: significand width and exponent range.
#[derive(Clone, Copy, Debug)]
pub(super) struct Format {
    /// Significand bits, integer bit included.
    pub prec: u32,
    pub emin: i32,
    pub emax: i32,
    /// Exponent adjustment of the unmasked overflow and underflow response; 0: there is none.
    pub wrap: i32,
}

pub(super) const SINGLE: Format = Format { prec: 24, emin: -126, emax: 127, wrap: 0 };
pub(super) const DOUBLE: Format = Format { prec: 53, emin: -1022, emax: 1023, wrap: 0 };
pub(super) const EXTENDED: Format = Format { prec: 64, emin: -16382, emax: 16383, wrap: 24576 };

impl Format {
    /// Stored fraction bits of an interchange format (f32, f64).
    #[inline]
    const fn fraction(self) -> u32 {
        self.prec - 1
    }

    #[inline]
    const fn exp_mask(self) -> u64 {
        (self.emax as u64) * 2 + 1
    }

    #[inline]
    const fn sign_shift(self) -> u32 {
        if self.prec == 24 { 31 } else { 63 }
    }

    /// The default NaN ("real indefinite").
    #[inline]
    pub const fn indefinite(self) -> u64 {
        1 << self.sign_shift() | self.exp_mask() << self.fraction() | 1 << (self.fraction() - 1)
    }

    #[inline]
    pub const fn inf(self, sign: bool) -> u64 {
        (sign as u64) << self.sign_shift() | self.exp_mask() << self.fraction()
    }

    #[inline]
    pub const fn zero(self, sign: bool) -> u64 {
        (sign as u64) << self.sign_shift()
    }

    /// Takes apart an f32 or f64.
    #[inline]
    pub fn unpack(self, bits: u64) -> Unpacked {
        let sign = bits >> self.sign_shift() & 1 != 0;
        let field = bits >> self.fraction() & self.exp_mask();
        let left = 64 - self.prec;
        let sig = (bits & ((1 << self.fraction()) - 1)) << left;
        if field == 0 {
            if sig == 0 {
                return Unpacked::zero(sign);
            }
            let shift = sig.leading_zeros();
            return Unpacked {
                sign,
                kind: Kind::Finite,
                denormal: true,
                exp: self.emin - shift as i32,
                sig: sig << shift,
            };
        }
        let sig = sig | 1 << 63;
        if field == self.exp_mask() {
            let kind = if sig << 1 == 0 {
                Kind::Inf
            } else if sig & 1 << 62 != 0 {
                Kind::Quiet
            } else {
                Kind::Signaling
            };
            return Unpacked { sign, kind, denormal: false, exp: 0, sig };
        }
        Unpacked::finite(sign, field as i32 - self.emax, sig)
    }

    /// Puts an f32 or f64 together from a rounded value.
    #[inline]
    pub fn pack(self, sign: bool, r: Rounded) -> u64 {
        let s = self.zero(sign);
        match r {
            Rounded::Inf => self.inf(sign),
            Rounded::Zero => s,
            Rounded::Finite { exp, sig } => {
                let frac = sig >> (64 - self.prec) & ((1 << self.fraction()) - 1);
                let field = if sig >> 63 == 0 { 0 } else { (exp + self.emax) as u64 };
                s | field << self.fraction() | frac
            }
        }
    }

    /// A NaN's significand (integer bit at 63) in this format, made quiet.
    #[inline]
    pub fn pack_nan(self, sign: bool, sig: u64) -> u64 {
        let frac = (sig | 1 << 62) >> (64 - self.prec) & ((1 << self.fraction()) - 1);
        self.inf(sign) | frac
    }
}

/// Takes apart an F80.
#[inline]
pub(super) fn unpack80(v: F80) -> Unpacked {
    let sign = v.sign();
    let field = i32::from(v.se & 0x7fff);
    if field == 0 {
        if v.mant == 0 {
            return Unpacked::zero(sign);
        }
        let shift = v.mant.leading_zeros();
        return Unpacked {
            sign,
            kind: Kind::Finite,
            denormal: true,
            exp: EXTENDED.emin - shift as i32,
            sig: v.mant << shift,
        };
    }
    let kind = if v.mant >> 63 == 0 {
        Kind::Unsupported
    } else if field != 0x7fff {
        Kind::Finite
    } else if v.mant << 1 == 0 {
        Kind::Inf
    } else if v.mant & 1 << 62 != 0 {
        Kind::Quiet
    } else {
        Kind::Signaling
    };
    Unpacked { sign, kind, denormal: false, exp: field - F80::BIAS, sig: v.mant }
}

/// Puts an F80 together from a rounded value.
#[inline]
pub(super) fn pack80(sign: bool, r: Rounded) -> F80 {
    match r {
        Rounded::Inf => F80::inf(sign),
        Rounded::Zero => F80::zero(sign),
        Rounded::Finite { exp, sig } => {
            let field = if sig >> 63 == 0 { 0 } else { (exp + F80::BIAS) as u16 & 0x7fff };
            F80 { mant: sig, se: (sign as u16) << 15 | field }
        }
    }
}

/// A value that fits a format. A denormal has bit 63 of `sig` clear and `exp == emin`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rounded {
    Zero,
    Inf,
    Finite { exp: i32, sig: u64 },
}

/// Right shift that keeps lost bits visible in bit 0.
#[inline]
pub(super) fn shift_right_jam(v: u128, n: u32) -> u128 {
    if n == 0 {
        v
    } else if n < 128 {
        v >> n | u128::from(v << (128 - n) != 0)
    } else {
        u128::from(v != 0)
    }
}

/// Whether rounding in direction `mode` increases the magnitude, given the last kept bit and the lost part
/// relative to half of it.
#[inline]
pub(super) fn rounds_up(mode: Rounding, sign: bool, odd: bool, lost: u128, half: u128) -> bool {
    match mode {
        Rounding::NearestEven => lost > half || (lost == half && odd),
        Rounding::Down => sign && lost != 0,
        Rounding::Up => !sign && lost != 0,
        Rounding::Zero => false,
    }
}

struct Cut {
    sig: u64,
    carry: i32,
    inexact: bool,
    up: bool,
}

/// Rounds `sig` at `prec` bits below bit 127; a carry out leaves the top bit alone set.
#[inline]
fn cut(mode: Rounding, sign: bool, sig: u128, prec: u32) -> Cut {
    let shift = 128 - prec;
    let lost = sig & ((1 << shift) - 1);
    let kept = (sig >> shift) as u64;
    let up = rounds_up(mode, sign, kept & 1 != 0, lost, 1 << (shift - 1));
    let left = 64 - prec;
    let (sum, over) = (kept << left).overflowing_add(u64::from(up) << left);
    let sig = if over { 1 << 63 } else { sum };
    Cut { sig, carry: i32::from(over), inexact: lost != 0, up }
}

/// Rounds the finite non-zero value `sig / 2^127 * 2^exp` (bit 127 of `sig` set, bit 0 sticky) to format `f` and
/// raises what this raises. Unmasked overflow and underflow give the wrapped result where the format has one, else
/// a value that must not be written; PE then tells whether rounding with an unbounded exponent was inexact. Tininess is detected after rounding, as x86 does (SDM vol. 1, 4.9.1.5).
pub(super) fn round(env: &mut Env, f: Format, sign: bool, exp: i32, sig: u128) -> Rounded {
    let free = cut(env.rounding, sign, sig, f.prec);
    let free_exp = exp + free.carry;
    if exp < f.emin {
        let tiny = free_exp < f.emin;
        if tiny && env.masks & UE == 0 {
            env.raise(if free.inexact { UE | PE } else { UE });
            let wrapped = free_exp + f.wrap;
            if wrapped >= f.emin {
                env.c1 = free.up;
                return Rounded::Finite { exp: wrapped, sig: free.sig };
            }
            if f.wrap != 0 {
                env.raise(PE); // FSCALE can go further than the adjustment reaches
            }
            env.c1 = false;
            return Rounded::Zero;
        } else if tiny && env.ftz {
            env.raise(UE | PE);
            return Rounded::Zero;
        }
        let shifted = shift_right_jam(sig, f.emin.saturating_sub(exp) as u32);
        let d = cut(env.rounding, sign, shifted, f.prec);
        env.c1 = d.up;
        if d.inexact {
            env.raise(if tiny { UE | PE } else { PE });
        }
        return if d.sig == 0 { Rounded::Zero } else { Rounded::Finite { exp: f.emin, sig: d.sig } };
    }
    if free_exp > f.emax {
        env.raise(OE);
        if env.masks & OE == 0 {
            if free.inexact {
                env.raise(PE);
            }
            let wrapped = free_exp - f.wrap;
            if wrapped <= f.emax {
                env.c1 = free.up;
                return Rounded::Finite { exp: wrapped, sig: free.sig };
            }
            if f.wrap != 0 {
                env.raise(PE);
            }
            env.c1 = true;
            return Rounded::Inf;
        }
        env.raise(PE);
        return overflow(env, f, sign);
    }
    env.c1 = free.up;
    if free.inexact {
        env.raise(PE);
    }
    Rounded::Finite { exp: free_exp, sig: free.sig }
}

/// The masked response to overflow: infinity or the largest finite number.
fn overflow(env: &mut Env, f: Format, sign: bool) -> Rounded {
    let to_inf = match env.rounding {
        Rounding::NearestEven => true,
        Rounding::Down => sign,
        Rounding::Up => !sign,
        Rounding::Zero => false,
    };
    env.c1 = to_inf;
    if to_inf { Rounded::Inf } else { Rounded::Finite { exp: f.emax, sig: u64::MAX << (64 - f.prec) } }
}

/// Marks everything masked for an inner step whose flags are wanted without traps.
#[inline]
pub(super) fn masked(env: &Env) -> Env {
    Env { masks: ALL, ..*env }
}
