// SPDX-License-Identifier: Apache-2.0
//! Moving elements about: unpack, shuffle, blend, insert, extract (APM vol. 4).

use super::vector::{V, build, join, split};

/// PUNPCKL* and PUNPCKH*.
macro_rules! unpack {
    ($($low:ident $high:ident: $t:ty, $n:literal;)*) => {$(
        #[doc = concat!(stringify!($low), ".")]
        #[inline(always)]
        pub fn $low(a: V, b: V) -> V {
            let (a, b) = (split::<$t, $n>(a), split::<$t, $n>(b));
            build::<$t, $n>(|i| if i & 1 == 0 { a[i / 2] } else { b[i / 2] })
        }
        #[doc = concat!(stringify!($high), ".")]
        #[inline(always)]
        pub fn $high(a: V, b: V) -> V {
            let (a, b) = (split::<$t, $n>(a), split::<$t, $n>(b));
            build::<$t, $n>(|i| if i & 1 == 0 { a[$n / 2 + i / 2] } else { b[$n / 2 + i / 2] })
        }
    )*};
}

unpack! {
    punpcklbw punpckhbw: u8, 16;
    punpcklwd punpckhwd: u16, 8;
    punpckldq punpckhdq: u32, 4;
}

/// PUNPCKLQDQ, UNPCKLPD, MOVLHPS.
#[inline(always)]
pub fn punpcklqdq(a: V, b: V) -> V {
    [a[0], b[0]]
}

/// PUNPCKHQDQ, UNPCKHPD.
#[inline(always)]
pub fn punpckhqdq(a: V, b: V) -> V {
    [a[1], b[1]]
}

/// Two bits of `imm` for element `i`.
#[inline(always)]
fn two(imm: u8, i: usize) -> usize {
    (imm >> (2 * i) & 3) as usize
}

/// The byte shuffle (PSHUFB control) that does PSHUFD with each immediate.
pub static PSHUFD: [V; 256] = {
    let mut t = [[0; 2]; 256];
    let mut imm = 0;
    while imm < 256 {
        let mut i = 0;
        while i < 4 {
            let from = (imm >> (2 * i) & 3) as u64 * 4;
            t[imm][i / 2] |= (from * 0x0101_0101 + 0x0302_0100) << (32 * (i & 1));
            i += 1;
        }
        imm += 1;
    }
    t
};

/// PSHUFD.
#[inline(always)]
pub fn pshufd(b: V, imm: u8) -> V {
    let b = split::<u32, 4>(b);
    build::<u32, 4>(|i| b[two(imm, i)])
}

/// PSHUFW, and the half of PSHUFLW and PSHUFHW that moves.
#[inline(always)]
pub fn pshufw(b: u64, imm: u8) -> u64 {
    let word = |i| (b >> (16 * two(imm, i)) & 0xffff) << (16 * i);
    word(0) | word(1) | word(2) | word(3)
}

/// SHUFPS.
#[inline(always)]
pub fn shufps(a: V, b: V, imm: u8) -> V {
    let (a, b) = (split::<u32, 4>(a), split::<u32, 4>(b));
    join([a[two(imm, 0)], a[two(imm, 1)], b[two(imm, 2)], b[two(imm, 3)]])
}

/// SHUFPD.
#[inline(always)]
pub fn shufpd(a: V, b: V, imm: u8) -> V {
    [a[imm as usize & 1], b[imm as usize >> 1 & 1]]
}

/// MOVSLDUP.
#[inline(always)]
pub fn movsldup(b: V) -> V {
    b.map(|x| x & 0xffff_ffff | x << 32)
}

/// MOVSHDUP.
#[inline(always)]
pub fn movshdup(b: V) -> V {
    b.map(|x| x >> 32 | x & !0xffff_ffff)
}

/// Elements of `b` where `imm` has a one, of `a` elsewhere.
macro_rules! blend {
    ($($name:ident: $t:ty, $n:literal;)*) => {$(
        #[doc = concat!(stringify!($name), ".")]
        #[inline(always)]
        pub fn $name(a: V, b: V, imm: u8) -> V {
            let (a, b) = (split::<$t, $n>(a), split::<$t, $n>(b));
            build::<$t, $n>(|i| if imm >> i & 1 != 0 { b[i] } else { a[i] })
        }
    )*};
}

blend! {
    pblendw: u16, 8;
    blendps: u32, 4;
    blendpd: u64, 2;
}

/// Elements of `b` where the top bit of the mask's is set, of `a` elsewhere.
macro_rules! blend_variable {
    ($($name:ident: $t:ty, $n:literal;)*) => {$(
        #[doc = concat!(stringify!($name), ".")]
        #[inline(always)]
        pub fn $name(a: V, b: V, mask: V) -> V {
            let (a, b, m) = (split::<$t, $n>(a), split::<$t, $n>(b), split::<$t, $n>(mask));
            build::<$t, $n>(|i| if m[i] < 0 { b[i] } else { a[i] })
        }
    )*};
}

blend_variable! {
    pblendvb: i8, 16;
    blendvps: i32, 4;
    blendvpd: i64, 2;
}

/// Element `imm` (modulo their number) of `v`.
#[inline(always)]
pub fn extract<T: super::vector::Lane<N>, const N: usize>(v: V, imm: u8) -> T {
    split::<T, N>(v)[imm as usize & (N - 1)]
}

/// `v` with element `imm` (modulo their number) replaced.
#[inline(always)]
pub fn insert<T: super::vector::Lane<N>, const N: usize>(v: V, x: T, imm: u8) -> V {
    let mut v = split::<T, N>(v);
    v[imm as usize & (N - 1)] = x;
    join(v)
}

/// INSERTPS of element `x`: to element `imm[5:4]`, then zeros where `imm[3:0]` says.
#[inline(always)]
pub fn insertps(a: V, x: u32, imm: u8) -> V {
    let a = split::<u32, 4>(insert::<u32, 4>(a, x, imm >> 4));
    build::<u32, 4>(|i| if imm >> i & 1 != 0 { 0 } else { a[i] })
}
