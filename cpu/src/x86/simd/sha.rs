// SPDX-License-Identifier: Apache-2.0
//! SHA-1 and SHA-256 instructions (APM vol. 4; FIPS 180-4).
//!
//! The manual names words from the top of the register down for SHA-1; arrays here are lowest element first.

use super::vector::{V, join, split};

/// SHA1RNDS4: four rounds with function and constant `imm[1:0]`.
pub fn sha1rnds4(abcd: V, we: V, imm: u8) -> V {
    let [mut d, mut c, mut b, mut a] = split::<u32, 4>(abcd);
    let w = split::<u32, 4>(we);
    let choose = |b: u32, c: u32, d: u32| b & c ^ !b & d;
    let parity = |b: u32, c: u32, d: u32| b ^ c ^ d;
    let majority = |b: u32, c: u32, d: u32| b & c ^ b & d ^ c & d;
    // W of the first round already contains E.
    let mut e = 0u32;
    for i in 0..4 {
        let (f, k) = match imm & 3 {
            0 => (choose(b, c, d), 0x5a82_7999u32),
            1 => (parity(b, c, d), 0x6ed9_eba1),
            2 => (majority(b, c, d), 0x8f1b_bcdc),
            _ => (parity(b, c, d), 0xca62_c1d6),
        };
        let next = f.wrapping_add(a.rotate_left(5)).wrapping_add(w[3 - i]).wrapping_add(e).wrapping_add(k);
        (e, d, c, b, a) = (d, c, b.rotate_left(30), a, next);
    }
    join([d, c, b, a])
}

/// SHA1NEXTE.
pub fn sha1nexte(a: V, b: V) -> V {
    let (a, mut b) = (split::<u32, 4>(a), split::<u32, 4>(b));
    b[3] = b[3].wrapping_add(a[3].rotate_left(30));
    join(b)
}

/// SHA1MSG1.
pub fn sha1msg1(a: V, b: V) -> V {
    [a[0] ^ b[1], a[1] ^ a[0]]
}

/// SHA1MSG2.
pub fn sha1msg2(a: V, b: V) -> V {
    let (a, b) = (split::<u32, 4>(a), split::<u32, 4>(b));
    let w16 = (a[3] ^ b[2]).rotate_left(1);
    let w17 = (a[2] ^ b[1]).rotate_left(1);
    let w18 = (a[1] ^ b[0]).rotate_left(1);
    let w19 = (a[0] ^ w16).rotate_left(1);
    join([w19, w18, w17, w16])
}

/// SHA256RNDS2: two rounds; the third operand (XMM0) holds their W + K.
pub fn sha256rnds2(cdgh: V, abef: V, wk: V) -> V {
    let [mut h, mut g, mut d, mut c] = split::<u32, 4>(cdgh);
    let [mut f, mut e, mut b, mut a] = split::<u32, 4>(abef);
    for k in [wk[0] as u32, (wk[0] >> 32) as u32] {
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let t1 = h.wrapping_add(s1).wrapping_add(e & f ^ !e & g).wrapping_add(k);
        let t2 = s0.wrapping_add(a & b ^ a & c ^ b & c);
        (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(t1), c, b, a, t1.wrapping_add(t2));
    }
    join([f, e, b, a])
}

/// SHA256MSG1.
pub fn sha256msg1(a: V, b: V) -> V {
    let (a, b) = (split::<u32, 4>(a), split::<u32, 4>(b));
    let sigma = |x: u32| x.rotate_right(7) ^ x.rotate_right(18) ^ x >> 3;
    let next = [a[1], a[2], a[3], b[0]];
    super::vector::build::<u32, 4>(|i| a[i].wrapping_add(sigma(next[i])))
}

/// SHA256MSG2.
pub fn sha256msg2(a: V, b: V) -> V {
    let (a, b) = (split::<u32, 4>(a), split::<u32, 4>(b));
    let sigma = |x: u32| x.rotate_right(17) ^ x.rotate_right(19) ^ x >> 10;
    let w16 = a[0].wrapping_add(sigma(b[2]));
    let w17 = a[1].wrapping_add(sigma(b[3]));
    join([w16, w17, a[2].wrapping_add(sigma(w16)), a[3].wrapping_add(sigma(w17))])
}
