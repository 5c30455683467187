// SPDX-License-Identifier: Apache-2.0
//! Packed decimal (FBLD, FBSTP): 18 digits, two to a byte, and a sign byte.

use super::convert::integral;
use super::env::{Env, IE, PE};
use super::number::{F80, Kind, unpack80};
use super::x87::f80_from_i64;

/// The packed-decimal indefinite value.
const INDEFINITE: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0xff];
const LIMIT: u64 = 1_000_000_000_000_000_000;

/// FBLD: exact. Digits above nine, which the manuals leave undefined, count with their value.
pub fn f80_from_bcd(bytes: &[u8; 10]) -> F80 {
    let magnitude = bytes[..9]
        .iter()
        .rev()
        .fold(0i64, |v, &byte| v * 100 + i64::from(byte >> 4) * 10 + i64::from(byte & 15));
    let value = f80_from_i64(magnitude);
    if bytes[9] & 0x80 != 0 { value.neg() } else { value }
}

/// FBSTP: rounds to an integer; what has more than 18 digits, or is no number, is indefinite and raises IE.
pub fn f80_to_bcd(a: F80, env: &mut Env) -> [u8; 10] {
    let u = unpack80(a);
    env.c1 = false;
    let rounded = match u.kind {
        Kind::Zero | Kind::Finite => integral(env.rounding, u),
        _ => None,
    };
    let Some((mut rest, inexact, up)) = rounded.filter(|r| r.0 < LIMIT) else {
        env.raise(IE);
        return INDEFINITE;
    };
    env.c1 = up;
    if inexact {
        env.raise(PE);
    }
    let mut out = [0; 10];
    for byte in &mut out[..9] {
        *byte = (rest % 10 + (rest / 10 % 10) * 16) as u8;
        rest /= 100;
    }
    out[9] = (u.sign as u8) << 7;
    out
}
