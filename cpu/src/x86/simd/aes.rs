// SPDX-License-Identifier: Apache-2.0
//! AES rounds and carry-less multiplication (APM vol. 4; FIPS 197).
//!
//! Portable functions with tables made at compile time; [`super::native`] uses the host's instructions where it has them.

use super::vector::{V, join, split};

const fn xtime(x: u8) -> u8 {
    (x << 1) ^ ((x >> 7) * 0x1b)
}

const fn gf_mul(a: u8, b: u8) -> u8 {
    let (mut a, mut b, mut r) = (a, b, 0);
    while b != 0 {
        r ^= (b & 1) * a;
        a = xtime(a);
        b >>= 1;
    }
    r
}

/// The S-box: multiplicative inverse, then the affine map.
const SBOX: [u8; 256] = {
    let mut t = [0; 256];
    // p runs through all powers of the generator 3, q through those of its inverse.
    let (mut p, mut q) = (1u8, 1u8);
    loop {
        p ^= xtime(p);
        q ^= q << 1;
        q ^= q << 2;
        q ^= q << 4;
        q ^= (q >> 7) * 0x09;
        let x = q ^ q.rotate_left(1) ^ q.rotate_left(2) ^ q.rotate_left(3) ^ q.rotate_left(4);
        t[p as usize] = x ^ 0x63;
        if p == 1 {
            break;
        }
    }
    t[0] = 0x63;
    t
};

const INVERSE_SBOX: [u8; 256] = {
    let mut t = [0; 256];
    let mut i = 0;
    while i < 256 {
        t[SBOX[i] as usize] = i as u8;
        i += 1;
    }
    t
};

/// A column of the (inverse) MixColumns matrix times `x`, as a little-endian word.
const fn column(x: u8, m: [u8; 4]) -> u32 {
    u32::from_le_bytes([gf_mul(x, m[0]), gf_mul(x, m[1]), gf_mul(x, m[2]), gf_mul(x, m[3])])
}

/// MixColumns of SubBytes of a byte in row 0.
static ENCRYPT: [u32; 256] = {
    let mut t = [0; 256];
    let mut i = 0;
    while i < 256 {
        t[i] = column(SBOX[i], [2, 1, 1, 3]);
        i += 1;
    }
    t
};

/// InvMixColumns of a byte in row 0.
static UNMIX: [u32; 256] = {
    let mut t = [0; 256];
    let mut i = 0;
    while i < 256 {
        t[i] = column(i as u8, [14, 9, 13, 11]);
        i += 1;
    }
    t
};

/// InvMixColumns of InvSubBytes of a byte in row 0.
static DECRYPT: [u32; 256] = {
    let mut t = [0; 256];
    let mut i = 0;
    while i < 256 {
        t[i] = column(INVERSE_SBOX[i], [14, 9, 13, 11]);
        i += 1;
    }
    t
};

/// The byte of row `r` that ShiftRows (`step` 1) or InvShiftRows (`step` 3) brings to column `c`.
#[inline(always)]
fn shifted(s: &[u8; 16], c: usize, r: usize, step: usize) -> u8 {
    s[((c + r * step) & 3) * 4 + r]
}

#[inline(always)]
fn mixed(t: &[u32; 256], step: usize, state: V, key: V) -> V {
    let s = split::<u8, 16>(state);
    let k = split::<u32, 4>(key);
    let word = |c: usize| {
        let row = |r: usize| t[shifted(&s, c, r, step) as usize].rotate_left(8 * r as u32);
        row(0) ^ row(1) ^ row(2) ^ row(3) ^ k[c]
    };
    join([word(0), word(1), word(2), word(3)])
}

#[inline(always)]
fn unmixed(t: &[u8; 256], step: usize, state: V, key: V) -> V {
    let s = split::<u8, 16>(state);
    let r = super::vector::build::<u8, 16>(|i| t[shifted(&s, i / 4, i % 4, step) as usize]);
    [r[0] ^ key[0], r[1] ^ key[1]]
}

/// AESENC.
pub fn aesenc(state: V, key: V) -> V {
    mixed(&ENCRYPT, 1, state, key)
}

/// AESENCLAST.
pub fn aesenclast(state: V, key: V) -> V {
    unmixed(&SBOX, 1, state, key)
}

/// AESDEC.
pub fn aesdec(state: V, key: V) -> V {
    mixed(&DECRYPT, 3, state, key)
}

/// AESDECLAST.
pub fn aesdeclast(state: V, key: V) -> V {
    unmixed(&INVERSE_SBOX, 3, state, key)
}

/// AESIMC.
pub fn aesimc(b: V) -> V {
    mixed(&UNMIX, 0, b, [0; 2])
}

/// AESKEYGENASSIST.
pub fn aeskeygenassist(b: V, imm: u8) -> V {
    let sub = |x: u32| u32::from_le_bytes(x.to_le_bytes().map(|b| SBOX[b as usize]));
    let b = split::<u32, 4>(b);
    let (x1, x3) = (sub(b[1]), sub(b[3]));
    join([x1, x1.rotate_right(8) ^ imm as u32, x3, x3.rotate_right(8) ^ imm as u32])
}

/// PCLMULQDQ: the words that `imm` bits 0 and 4 pick, multiplied over GF(2).
pub fn pclmulqdq(a: V, b: V, imm: u8) -> V {
    let (x, y) = (a[imm as usize & 1], b[imm as usize >> 4 & 1]);
    // Multiples 0..15 of x, then four bits of y at a time.
    let mut t = [0u128; 16];
    for i in 1..16 {
        t[i] = if i & 1 != 0 { t[i - 1] ^ x as u128 } else { t[i / 2] << 1 };
    }
    let r = (0..16).rev().fold(0u128, |r, n| r << 4 ^ t[(y >> (4 * n)) as usize & 15]);
    super::vector::narrow(r)
}
