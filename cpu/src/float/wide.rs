// SPDX-License-Identifier: Apache-2.0
//! 128-bit working precision for the transcendental functions.

use super::number::{Unpacked, shift_right_jam};

/// A non-zero number `sig / 2^127 * 2^exp` with bit 127 of `sig` set. Operations truncate: an error of a few units
/// of 2^-127, which 64-bit results never see except one time in 2^60.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wide {
    pub sign: bool,
    pub exp: i32,
    pub sig: u128,
}

/// High half of the 256-bit product.
pub(super) const fn mul_hi(a: u128, b: u128) -> u128 {
    const LOW: u128 = u64::MAX as u128;
    let (ah, al, bh, bl) = (a >> 64, a & LOW, b >> 64, b & LOW);
    let (hl, lh) = (ah * bl, al * bh);
    let middle = ((al * bl) >> 64) + (hl & LOW) + (lh & LOW);
    ah * bh + (hl >> 64) + (lh >> 64) + (middle >> 64)
}

/// One 64-bit digit of a quotient: `r * 2^64 / d` and its remainder, for `r < d` and bit 127 of `d` set.
const fn div_digit(r: u128, d: u128) -> (u128, u128) {
    let (high, low) = (d >> 64, d & u64::MAX as u128);
    let mut q = r / high;
    if q > u64::MAX as u128 {
        q = u64::MAX as u128;
    }
    let mut rest = r - q * high;
    while rest >> 64 == 0 && q * low > rest << 64 {
        q -= 1;
        rest += high;
    }
    (q, (rest << 64).wrapping_sub(q * low))
}

impl Wide {
    pub const fn new(sign: bool, exp: i32, sig: u128) -> Wide {
        Wide { sign, exp, sig }
    }

    /// The finite number `u`.
    pub fn from(u: Unpacked) -> Wide {
        Wide::new(u.sign, u.exp, u128::from(u.sig) << 64)
    }

    /// `n / 2^point` for a non-zero `n`.
    pub const fn fixed(sign: bool, n: u128, point: i32) -> Wide {
        let shift = n.leading_zeros();
        Wide::new(sign, 127 - point - shift as i32, n << shift)
    }

    /// The magnitude as a fixed-point fraction in units of 2^-point, truncated; it must fit.
    pub fn to_fixed(self, point: i32) -> u128 {
        let shift = 127 - point - self.exp;
        debug_assert!(shift >= 0);
        self.sig.checked_shr(shift.max(0) as u32).unwrap_or(0)
    }

    pub const fn neg(self) -> Wide {
        Wide { sign: !self.sign, ..self }
    }

    pub const fn mul(self, other: Wide) -> Wide {
        let p = mul_hi(self.sig, other.sig);
        let sign = self.sign != other.sign;
        let exp = self.exp + other.exp;
        if p >> 127 != 0 { Wide::new(sign, exp + 1, p) } else { Wide::new(sign, exp, p << 1) }
    }

    pub const fn div(self, other: Wide) -> Wide {
        let (n, borrow) = if self.sig >= other.sig { (self.sig >> 1, 0) } else { (self.sig, 1) };
        let (high, r) = div_digit(n, other.sig);
        let (low, _) = div_digit(r, other.sig);
        Wide::new(self.sign != other.sign, self.exp - other.exp - borrow, high << 64 | low)
    }

    /// The sum, or None for zero.
    pub fn add(self, other: Wide) -> Option<Wide> {
        let (a, b) =
            if (self.exp, self.sig) >= (other.exp, other.sig) { (self, other) } else { (other, self) };
        let big = a.sig >> 1;
        let small = shift_right_jam(b.sig >> 1, a.exp.abs_diff(b.exp));
        let sum = if a.sign == b.sign { big + small } else { big - small };
        (sum != 0).then(|| Wide::fixed(a.sign, sum, 126 - a.exp))
    }
}

/// `c[0] ± z c[1] + z² c[2] ± …` with coefficients in units of 2^-127 and `z` of 2^-128. With `alternate` the signs
/// alternate; the coefficients must fall. A tiny `z` still leaves its trace in the last bit.
pub(super) fn series(c: &[u128], z: u128, alternate: bool) -> u128 {
    let step = |acc: u128, &c: &u128| {
        let term = mul_hi(acc, z).max(1);
        if alternate { c.saturating_sub(term) } else { c.saturating_add(term) }
    };
    c.iter().rev().fold(0, step)
}

/// Coefficients 1/(first)!, 1/(first + step)!, … in units of 2^-127.
pub(super) const fn inverse_factorials<const N: usize>(first: u32, step: u32) -> [u128; N] {
    let mut out = [0; N];
    let (mut term, mut n, mut i) = (1u128 << 127, 1, 0);
    while i < N {
        while n <= first + step * i as u32 {
            term /= n as u128;
            n += 1;
        }
        out[i] = term;
        i += 1;
    }
    out
}

/// Coefficients 1, 1/3, 1/5, … in units of 2^-127.
pub(super) const fn inverse_odds<const N: usize>() -> [u128; N] {
    let mut out = [0; N];
    let mut i = 0;
    while i < N {
        out[i] = (1 << 127) / (2 * i as u128 + 1);
        i += 1;
    }
    out
}
