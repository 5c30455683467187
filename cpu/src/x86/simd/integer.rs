// SPDX-License-Identifier: Apache-2.0
//! Integer arithmetic, logic, comparison and shifts on vectors (APM vol. 4).
//!
//! Every function works on one 128-bit lane and has the name of its instruction. Those that treat each element alone
//! serve the MMX form too, on the low half.

use super::vector::{V, build, join, map1, map2, narrow, split, wide};

/// Functions that apply one scalar function to every pair of elements.
macro_rules! pairwise {
    ($($name:ident: $t:ty, $f:expr;)*) => {$(
        #[doc = concat!(stringify!($name), " per `", stringify!($t), "`.")]
        #[inline(always)]
        pub fn $name(a: V, b: V) -> V {
            map2::<$t, _>(a, b, $f)
        }
    )*};
}

pairwise! {
    paddb: u8, u8::wrapping_add;
    paddw: u16, u16::wrapping_add;
    paddd: u32, u32::wrapping_add;
    paddq: u64, u64::wrapping_add;
    paddsb: i8, i8::saturating_add;
    paddsw: i16, i16::saturating_add;
    paddusb: u8, u8::saturating_add;
    paddusw: u16, u16::saturating_add;
    psubb: u8, u8::wrapping_sub;
    psubw: u16, u16::wrapping_sub;
    psubd: u32, u32::wrapping_sub;
    psubq: u64, u64::wrapping_sub;
    psubsb: i8, i8::saturating_sub;
    psubsw: i16, i16::saturating_sub;
    psubusb: u8, u8::saturating_sub;
    psubusw: u16, u16::saturating_sub;
    pmullw: u16, u16::wrapping_mul;
    pmulld: u32, u32::wrapping_mul;
    pmulhw: i16, |x, y| ((x as i32 * y as i32) >> 16) as i16;
    pmulhuw: u16, |x, y| ((x as u32 * y as u32) >> 16) as u16;
    pmulhrsw: i16, |x, y| ((((x as i32 * y as i32) >> 14) + 1) >> 1) as i16;
    pmuludq: u64, |x, y| (x & 0xffff_ffff) * (y & 0xffff_ffff);
    pmuldq: i64, |x, y| (x as i32 as i64) * (y as i32 as i64);
    pavgb: u8, |x, y| ((x as u16 + y as u16 + 1) >> 1) as u8;
    pavgw: u16, |x, y| ((x as u32 + y as u32 + 1) >> 1) as u16;
    pminub: u8, u8::min;
    pminuw: u16, u16::min;
    pminud: u32, u32::min;
    pminsb: i8, i8::min;
    pminsw: i16, i16::min;
    pminsd: i32, i32::min;
    pmaxub: u8, u8::max;
    pmaxuw: u16, u16::max;
    pmaxud: u32, u32::max;
    pmaxsb: i8, i8::max;
    pmaxsw: i16, i16::max;
    pmaxsd: i32, i32::max;
    pcmpeqb: u8, |x, y| if x == y { u8::MAX } else { 0 };
    pcmpeqw: u16, |x, y| if x == y { u16::MAX } else { 0 };
    pcmpeqd: u32, |x, y| if x == y { u32::MAX } else { 0 };
    pcmpeqq: u64, |x, y| if x == y { u64::MAX } else { 0 };
    pcmpgtb: i8, |x, y| if x > y { -1 } else { 0 };
    pcmpgtw: i16, |x, y| if x > y { -1 } else { 0 };
    pcmpgtd: i32, |x, y| if x > y { -1 } else { 0 };
    pcmpgtq: i64, |x, y| if x > y { -1 } else { 0 };
    psignb: i8, |x, y| x.wrapping_mul(y.signum());
    psignw: i16, |x, y| x.wrapping_mul(y.signum());
    psignd: i32, |x, y| x.wrapping_mul(y.signum());
    pand: u64, |x, y| x & y;
    pandn: u64, |x, y| !x & y;
    por: u64, |x, y| x | y;
    pxor: u64, |x, y| x ^ y;
}

/// PABSB.
#[inline(always)]
pub fn pabsb(b: V) -> V {
    map1(b, i8::wrapping_abs)
}

/// PABSW.
#[inline(always)]
pub fn pabsw(b: V) -> V {
    map1(b, i16::wrapping_abs)
}

/// PABSD.
#[inline(always)]
pub fn pabsd(b: V) -> V {
    map1(b, i32::wrapping_abs)
}

/// PMADDWD.
#[inline(always)]
pub fn pmaddwd(a: V, b: V) -> V {
    let (a, b) = (split::<i16, 8>(a), split::<i16, 8>(b));
    build(|i| {
        let lo = a[2 * i] as i32 * b[2 * i] as i32;
        lo.wrapping_add(a[2 * i + 1] as i32 * b[2 * i + 1] as i32)
    })
}

/// PMADDUBSW: unsigned bytes of `a` times signed bytes of `b`.
#[inline(always)]
pub fn pmaddubsw(a: V, b: V) -> V {
    let (a, b) = (split::<u8, 16>(a), split::<i8, 16>(b));
    build(|i| {
        let lo = a[2 * i] as i32 * b[2 * i] as i32;
        saturate_i16(lo + a[2 * i + 1] as i32 * b[2 * i + 1] as i32)
    })
}

/// PSADBW.
#[inline(always)]
pub fn psadbw(a: V, b: V) -> V {
    let (a, b) = (split::<u8, 16>(a), split::<u8, 16>(b));
    build(|i| (0..8).map(|k| a[8 * i + k].abs_diff(b[8 * i + k]) as u64).sum::<u64>())
}

/// MPSADBW.
pub fn mpsadbw(a: V, b: V, imm: u8) -> V {
    let (a, b) = (split::<u8, 16>(a), split::<u8, 16>(b));
    let (a0, b0) = ((imm >> 2 & 1) as usize * 4, (imm & 3) as usize * 4);
    build(|i| (0..4).map(|k| a[a0 + i + k].abs_diff(b[b0 + k]) as u16).sum::<u16>())
}

/// PHMINPOSUW.
pub fn phminposuw(b: V) -> V {
    let b = split::<u16, 8>(b);
    let (mut least, mut at) = (b[0], 0u64);
    for (i, &x) in b.iter().enumerate() {
        if x < least {
            (least, at) = (x, i as u64);
        }
    }
    [least as u64 | at << 16, 0]
}

/// PTEST: ZF = no bit common, CF = no bit of `b` outside `a`, as an RFLAGS image.
#[inline(always)]
pub fn ptest(a: V, b: V) -> u64 {
    let zf = (a[0] & b[0] | a[1] & b[1]) == 0;
    let cf = (!a[0] & b[0] | !a[1] & b[1]) == 0;
    (zf as u64) << 6 | cf as u64
}

// ---- horizontal ------------------------------------------------------------------------------------------------

/// Applies `f` to neighbours: first those of `a`, then those of `b`, `half` results each.
macro_rules! horizontal {
    ($($name:ident: $t:ty, $n:literal, $f:expr;)*) => {$(
        #[doc = concat!(stringify!($name), " of neighbouring `", stringify!($t), "`.")]
        #[inline(always)]
        pub fn $name(a: V, b: V) -> V {
            let (a, b) = (split::<$t, $n>(a), split::<$t, $n>(b));
            let f = $f;
            build::<$t, $n>(|i| {
                let (v, i) = if i < $n / 2 { (&a, 2 * i) } else { (&b, 2 * i - $n) };
                f(v[i], v[i + 1])
            })
        }
    )*};
}

horizontal! {
    phaddw: i16, 8, i16::wrapping_add;
    phaddd: i32, 4, i32::wrapping_add;
    phaddsw: i16, 8, i16::saturating_add;
    phsubw: i16, 8, i16::wrapping_sub;
    phsubd: i32, 4, i32::wrapping_sub;
    phsubsw: i16, 8, i16::saturating_sub;
}

// ---- packing ---------------------------------------------------------------------------------------------------

#[inline(always)]
fn saturate_i16(x: i32) -> i16 {
    x.clamp(i16::MIN as i32, i16::MAX as i32) as i16
}

/// PACKSSWB.
#[inline(always)]
pub fn packsswb(a: V, b: V) -> V {
    let (a, b) = (split::<i16, 8>(a), split::<i16, 8>(b));
    build(|i| (if i < 8 { a[i] } else { b[i - 8] }).clamp(i8::MIN as i16, i8::MAX as i16) as i8)
}

/// PACKUSWB.
#[inline(always)]
pub fn packuswb(a: V, b: V) -> V {
    let (a, b) = (split::<i16, 8>(a), split::<i16, 8>(b));
    build(|i| (if i < 8 { a[i] } else { b[i - 8] }).clamp(0, 255) as u8)
}

/// PACKSSDW.
#[inline(always)]
pub fn packssdw(a: V, b: V) -> V {
    let (a, b) = (split::<i32, 4>(a), split::<i32, 4>(b));
    build(|i| saturate_i16(if i < 4 { a[i] } else { b[i - 4] }))
}

/// PACKUSDW.
#[inline(always)]
pub fn packusdw(a: V, b: V) -> V {
    let (a, b) = (split::<i32, 4>(a), split::<i32, 4>(b));
    build(|i| (if i < 4 { a[i] } else { b[i - 4] }).clamp(0, 65535) as u16)
}

// ---- shifts ----------------------------------------------------------------------------------------------------

/// Shifts of every element by the low 64 bits of `count`; counts beyond the element's width give 0 or, arithmetic,
/// copies of the sign.
macro_rules! shifts {
    ($($left:ident $right:ident $bits:literal: $t:ty;)*) => {$(
        #[doc = concat!(stringify!($left), ".")]
        #[inline(always)]
        pub fn $left(a: V, count: V) -> V {
            if count[0] < $bits { map1::<$t, _>(a, |x| x << count[0]) } else { [0; 2] }
        }
        #[doc = concat!(stringify!($right), ".")]
        #[inline(always)]
        pub fn $right(a: V, count: V) -> V {
            if count[0] < $bits { map1::<$t, _>(a, |x| x >> count[0]) } else { [0; 2] }
        }
    )*};
}

shifts! {
    psllw psrlw 16: u16;
    pslld psrld 32: u32;
    psllq psrlq 64: u64;
}

/// PSRAW.
#[inline(always)]
pub fn psraw(a: V, count: V) -> V {
    let n = count[0].min(15);
    map1::<i16, _>(a, |x| x >> n)
}

/// PSRAD.
#[inline(always)]
pub fn psrad(a: V, count: V) -> V {
    let n = count[0].min(31);
    map1::<i32, _>(a, |x| x >> n)
}

/// PSLLDQ: by bytes.
#[inline(always)]
pub fn pslldq(a: V, count: V) -> V {
    if count[0] < 16 { narrow(wide(a) << (8 * count[0])) } else { [0; 2] }
}

/// PSRLDQ: by bytes.
#[inline(always)]
pub fn psrldq(a: V, count: V) -> V {
    if count[0] < 16 { narrow(wide(a) >> (8 * count[0])) } else { [0; 2] }
}

/// PMOVMSKB.
#[inline(always)]
pub fn pmovmskb(a: V) -> u32 {
    // Each multiplication gathers the eight top bits of a word in its top byte.
    let gather = |x: u64| ((x >> 7 & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u32;
    gather(a[0]) | gather(a[1]) << 8
}

/// MOVMSKPS.
#[inline(always)]
pub fn movmskps(a: V) -> u32 {
    ((a[0] >> 31 & 1) | (a[0] >> 63) << 1 | (a[1] >> 31 & 1) << 2 | (a[1] >> 63) << 3) as u32
}

/// MOVMSKPD.
#[inline(always)]
pub fn movmskpd(a: V) -> u32 {
    (a[0] >> 63 | (a[1] >> 63) << 1) as u32
}

// ---- widening --------------------------------------------------------------------------------------------------

/// PMOVSX and PMOVZX.
macro_rules! widen {
    ($($name:ident: $from:ty, $n:literal => $to:ty;)*) => {$(
        #[doc = concat!(stringify!($name), ".")]
        #[inline(always)]
        pub fn $name(b: V) -> V {
            let b = split::<$from, $n>(b);
            build(|i| b[i] as $to)
        }
    )*};
}

widen! {
    pmovsxbw: i8, 16 => i16;
    pmovsxbd: i8, 16 => i32;
    pmovsxbq: i8, 16 => i64;
    pmovsxwd: i16, 8 => i32;
    pmovsxwq: i16, 8 => i64;
    pmovsxdq: i32, 4 => i64;
    pmovzxbw: u8, 16 => u16;
    pmovzxbd: u8, 16 => u32;
    pmovzxbq: u8, 16 => u64;
    pmovzxwd: u16, 8 => u32;
    pmovzxwq: u16, 8 => u64;
    pmovzxdq: u32, 4 => u64;
}

/// PALIGNR: bytes `imm`.. of `a:b`.
#[inline(always)]
pub fn palignr(a: V, b: V, imm: u8) -> V {
    let (a, b, n) = (wide(a), wide(b), 8 * imm as u32);
    narrow(match imm {
        0 => b,
        1..=15 => b >> n | a << (128 - n),
        16..=31 => a >> (n - 128),
        _ => 0,
    })
}

/// PALIGNR on MMX registers.
#[inline(always)]
pub fn palignr_mm(a: u64, b: u64, imm: u8) -> u64 {
    if imm < 16 { ((b as u128 | (a as u128) << 64) >> (8 * imm as u32)) as u64 } else { 0 }
}

/// PSHUFB.
#[inline(always)]
pub fn pshufb(a: V, control: V) -> V {
    let (a, c) = (split::<u8, 16>(a), split::<u8, 16>(control));
    join::<u8, 16>(c.map(|c| if c & 0x80 != 0 { 0 } else { a[c as usize & 15] }))
}
