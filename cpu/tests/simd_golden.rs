// SPDX-License-Identifier: Apache-2.0
//! SIMD instructions against recorded results of a real processor and published test vectors (any host), and the
//! conditions under which they may run at all.
#![cfg(target_os = "linux")]

mod simd_cases;

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use simd_cases::{AT, Random, Soft, State, golden_cases, map_memory, state};
use softcpu::x86::simd::vector::{V, join, split};
use softcpu::x86::simd::{aes, crypto, integer, sha};

/// The tests share the memory at [`AT`], so they take turns.
fn soft() -> (MutexGuard<'static, bool>, Soft) {
    static MAPPED: Mutex<bool> = Mutex::new(false);
    let mut guard = MAPPED.lock().unwrap_or_else(|e| e.into_inner());
    if !*guard {
        map_memory();
        *guard = true;
    }
    // SAFETY: mapped, and nobody unmaps it.
    (guard, unsafe { Soft::new(AT) })
}

#[test]
fn results_are_those_of_a_real_processor() {
    let (_guard, mut soft) = soft();
    let golden: HashMap<&str, u64> = include_str!("simd_golden.txt")
        .lines()
        .filter_map(|l| l.split_once(' '))
        .map(|(name, digest)| (name, u64::from_str_radix(digest, 16).unwrap()))
        .collect();
    let cases = golden_cases();
    assert_eq!(cases.len(), golden.len());
    for (n, (name, bytes, states)) in cases.into_iter().enumerate() {
        // Half of them without the host's own instructions.
        softcpu::x86::simd::native::set_portable(n & 1 != 0);
        soft.code(&bytes);
        let digest = states.iter().fold(0u64, |d, s| {
            let mut after = soft.run(s);
            after.mxcsr &= 0xffff;
            d.rotate_left(7) ^ after.digest()
        });
        assert_eq!(digest, golden[name.as_str()], "{name}");
    }
}

const MOVAPS: &[u8] = &[0x0f, 0x28, 0xc1];
const MOVAPS_M: &[u8] = &[0x0f, 0x28, 0x07];
const MOVUPS_M: &[u8] = &[0x0f, 0x10, 0x07];
const PADDB_MM: &[u8] = &[0x0f, 0xfc, 0xc1];
const MOVQ2DQ: &[u8] = &[0xf3, 0x0f, 0xd6, 0xc1];
const CVTPI2PS_M: &[u8] = &[0x0f, 0x2a, 0x07];
const DIVSS: &[u8] = &[0xf3, 0x0f, 0x5e, 0xc1];
const COMISS: &[u8] = &[0x0f, 0x2f, 0xc1];
const CVTSS2SI: &[u8] = &[0xf3, 0x0f, 0x2d, 0xc1];

const CR0: u64 = 0x8000_0033;
const EM: u64 = 4;
const TS: u64 = 8;
const CR4: u64 = 0x6a0;
const OSFXSR: u64 = 0x200;
const OSXMMEXCPT: u64 = 0x400;

fn plain() -> State {
    let mut s = state(&mut Random(5), AT as u64, false);
    s.mxcsr = 0x1f80;
    s
}

#[test]
fn unavailable_instructions_raise_ud_before_nm_before_mf() {
    let (_guard, mut soft) = soft();
    let pending = 0x80;
    type Row = (&'static [u8], u64, u64, u16, Option<u8>); // code, CR0, CR4, status word, vector
    let rows: &[Row] = &[
        (MOVAPS, CR0, CR4, pending, None),
        (MOVAPS, CR0 | EM, CR4, 0, Some(6)),
        (MOVAPS, CR0 | TS, CR4, 0, Some(7)),
        (MOVAPS, CR0 | EM | TS, CR4, 0, Some(6)),
        (MOVAPS, CR0, CR4 & !OSFXSR, 0, Some(6)),
        (MOVAPS, CR0 | TS, CR4 & !OSFXSR, 0, Some(6)),
        (PADDB_MM, CR0, CR4 & !OSFXSR, 0, None),
        (PADDB_MM, CR0 | EM, CR4, pending, Some(6)),
        (PADDB_MM, CR0 | TS, CR4, pending, Some(7)),
        (PADDB_MM, CR0, CR4, pending, Some(16)),
        (MOVQ2DQ, CR0, CR4 & !OSFXSR, 0, Some(6)),
        (MOVQ2DQ, CR0, CR4, pending, Some(16)),
        (CVTPI2PS_M, CR0, CR4, pending, None),
    ];
    for &(code, cr0, cr4, fsw, expected) in rows {
        soft.code(code);
        soft.control(cr0, cr4);
        let before = State { fsw, ..plain() };
        let after = soft.run(&before);
        assert_eq!(after.fault, expected, "{code:02x?} CR0 {cr0:#x} CR4 {cr4:#x} FSW {fsw:#x}");
        if expected.is_some() {
            assert_eq!((after.xmm, after.mm, after.fsw), (before.xmm, before.mm, before.fsw));
        }
    }
}

#[test]
fn aligned_moves_raise_gp_on_misaligned_memory() {
    let (_guard, mut soft) = soft();
    let mut before = plain();
    before.gpr[7] = AT as u64 + 8;
    soft.code(MOVAPS_M);
    assert_eq!(soft.run(&before).fault, Some(13));
    soft.code(MOVUPS_M);
    let after = soft.run(&before);
    assert_eq!((after.fault, after.xmm[0]), (None, [before.memory[1], before.memory[2]]));
}

#[test]
fn unmasked_simd_exceptions_change_nothing_but_mxcsr() {
    let (_guard, mut soft) = soft();
    // 1 / 0, compare with a signaling NaN, convert one: all masks but those of the exceptions that count.
    for (code, operand, flags) in [(DIVSS, 0, 4), (COMISS, 0x7fa0_0000, 1), (CVTSS2SI, 0x7fa0_0000, 1)] {
        soft.code(code);
        for (cr4, vector) in [(CR4, 19), (CR4 & !OSXMMEXCPT, 6)] {
            soft.control(CR0, cr4);
            let mut before = plain();
            before.rflags &= simd_cases::FLAGS;
            before.xmm[0][0] = 0x3f80_0000;
            before.xmm[1][0] = operand;
            before.mxcsr = 0x1f80 & !(flags << 7);
            let expected = State { mxcsr: before.mxcsr | flags, fault: Some(vector), ..before };
            assert_eq!(soft.run(&before), expected, "{code:02x?}");
        }
    }
}

fn bytes(text: &str) -> V {
    let b: Vec<u8> =
        (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect();
    join::<u8, 16>(b.try_into().unwrap())
}

/// AES-128 key expansion with AESKEYGENASSIST.
fn round_keys(key: V) -> Vec<V> {
    let mut keys = vec![key];
    for rcon in [1, 2, 4, 8, 16, 32, 64, 128, 27, 54] {
        let last = keys[keys.len() - 1];
        let t = split::<u32, 4>(aes::aeskeygenassist(last, rcon))[3];
        let mut k = split::<u32, 4>(last);
        k[0] ^= t;
        for i in 1..4 {
            k[i] ^= k[i - 1];
        }
        keys.push(join(k));
    }
    keys
}

#[test]
fn aes_gives_the_example_of_fips_197() {
    let keys = round_keys(bytes("2b7e151628aed2a6abf7158809cf4f3c"));
    assert_eq!(keys[10], bytes("d014f9a8c9ee2589e13f0cc8b6630ca6"));
    let plain = bytes("3243f6a8885a308d313198a2e0370734");
    let cipher = bytes("3925841d02dc09fbdc118597196a0b32");
    let mut s = integer::pxor(plain, keys[0]);
    for k in &keys[1..10] {
        s = aes::aesenc(s, *k);
    }
    assert_eq!(aes::aesenclast(s, keys[10]), cipher);
    let mut s = integer::pxor(cipher, keys[10]);
    for k in keys[1..10].iter().rev() {
        s = aes::aesdec(s, aes::aesimc(*k));
    }
    assert_eq!(aes::aesdeclast(s, keys[0]), plain);
}

/// The padded block of "abc", as big-endian words.
fn abc() -> [u32; 16] {
    let mut w = [0; 16];
    w[0] = 0x6162_6380;
    w[15] = 24;
    w
}

#[test]
fn sha1_of_abc_is_that_of_fips_180() {
    // The instructions want the first word at the top.
    let mut w: Vec<V> = abc().chunks(4).map(|c| join([c[3], c[2], c[1], c[0]])).collect();
    for i in 4..20 {
        let t = integer::pxor(sha::sha1msg1(w[i - 4], w[i - 3]), w[i - 2]);
        w.push(sha::sha1msg2(t, w[i - 1]));
    }
    let start: V = join([0x1032_5476u32, 0x98ba_dcfe, 0xefcd_ab89, 0x6745_2301]);
    let mut abcd = start;
    // E of the first group is added as it is, later ones come from the A before the last four rounds.
    let mut e = integer::paddd(join([0u32, 0, 0, 0xc3d2_e1f0]), w[0]);
    for i in 0..20 {
        let next = sha::sha1rnds4(abcd, e, (i / 5) as u8);
        if i < 19 {
            e = sha::sha1nexte(abcd, w[i + 1]);
        } else {
            e = sha::sha1nexte(abcd, join([0u32, 0, 0, 0xc3d2_e1f0]));
        }
        abcd = next;
    }
    let r = split::<u32, 4>(integer::paddd(abcd, start));
    let digest = [r[3], r[2], r[1], r[0], split::<u32, 4>(e)[3]];
    assert_eq!(digest, [0xa999_3e36, 0x4706_816a, 0xba3e_2571, 0x7850_c26c, 0x9cd0_d89d]);
}

/// First 32 bits of the fractional parts of the cube roots of the first 64 primes, from integer arithmetic.
fn sha256_constants() -> Vec<u32> {
    let primes = (2u128..).filter(|n| (2..*n).all(|d| n % d != 0)).take(64);
    // floor(cbrt(p) * 2^32) = floor(cbrt(p * 2^96))
    primes
        .map(|p| {
            let (mut low, mut high) = (0u128, 1 << 36);
            while high - low > 1 {
                let middle = (low + high) / 2;
                if middle * middle * middle <= p << 96 { low = middle } else { high = middle }
            }
            low as u32
        })
        .collect()
}

#[test]
fn sha256_of_abc_is_that_of_fips_180() {
    let k = sha256_constants();
    let mut w: Vec<V> = abc().chunks(4).map(|c| join([c[0], c[1], c[2], c[3]])).collect();
    for i in 4..16 {
        let t = sha::sha256msg1(w[i - 4], w[i - 3]);
        let t = integer::paddd(t, integer::palignr(w[i - 1], w[i - 2], 4));
        w.push(sha::sha256msg2(t, w[i - 1]));
    }
    let h = [
        0x6a09_e667u32,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ];
    let (mut abef, mut cdgh): (V, V) = (join([h[5], h[4], h[1], h[0]]), join([h[7], h[6], h[3], h[2]]));
    for i in 0..16 {
        let wk = integer::paddd(w[i], join([k[4 * i], k[4 * i + 1], k[4 * i + 2], k[4 * i + 3]]));
        cdgh = sha::sha256rnds2(cdgh, abef, wk);
        abef = sha::sha256rnds2(abef, cdgh, [wk[1], 0]);
    }
    let (x, y) = (split::<u32, 4>(abef), split::<u32, 4>(cdgh));
    let out = [x[3], x[2], y[3], y[2], x[1], x[0], y[1], y[0]];
    let digest: Vec<u32> = out.iter().zip(h).map(|(a, b)| a.wrapping_add(b)).collect();
    assert_eq!(
        digest,
        [
            0xba78_16bf,
            0x8f01_cfea,
            0x4141_40de,
            0x5dae_2223,
            0xb003_61a3,
            0x9617_7a9c,
            0xb410_ff61,
            0xf200_15ad
        ]
    );
}

#[test]
fn pclmulqdq_gives_the_published_products() {
    let number = |x: u128| softcpu::x86::simd::vector::narrow(x);
    let a = number(0x7b5b54657374566563746f725d53475d);
    let b = number(0x48692853686179295b477565726f6e5d);
    for (imm, product) in [
        (0x00, 0x1d4d84c85c3440c0929633d5d36f0451),
        (0x10, 0x1bd17c8d556ab5a17fa540ac2a281315),
        (0x01, 0x1a2bf6db3a30862fbabf262df4b7d5c9),
        (0x11, 0x1d1e1f2c592e7c45d66ee03e410fd4ed),
    ] {
        assert_eq!(aes::pclmulqdq(a, b, imm), number(product), "{imm:#x}");
    }
}

#[test]
fn crc32_of_the_digits_is_the_check_value_of_crc_32c() {
    let crc = b"123456789".iter().fold(!0, |c, &b| crypto::crc32(c, b as u64, 1));
    assert_eq!(!crc, 0xe306_9283);
}

/// The portable forms of what `native` runs on the host, against the host.
#[test]
#[cfg(target_arch = "x86_64")]
fn portable_functions_agree_with_the_host() {
    use core::arch::x86_64::*;
    if !(is_x86_feature_detected!("aes")
        && is_x86_feature_detected!("pclmulqdq")
        && is_x86_feature_detected!("ssse3"))
    {
        return;
    }
    let mut r = Random(99);
    for _ in 0..10_000 {
        let (a, b): (V, V) = ([r.next(), r.next()], [r.next(), r.next()]);
        // SAFETY: same sizes; the features were just found.
        unsafe {
            let m = |v: V| core::mem::transmute::<V, __m128i>(v);
            let v = |m: __m128i| core::mem::transmute::<__m128i, V>(m);
            assert_eq!(aes::aesenc(a, b), v(_mm_aesenc_si128(m(a), m(b))));
            assert_eq!(aes::aesenclast(a, b), v(_mm_aesenclast_si128(m(a), m(b))));
            assert_eq!(aes::aesdec(a, b), v(_mm_aesdec_si128(m(a), m(b))));
            assert_eq!(aes::aesdeclast(a, b), v(_mm_aesdeclast_si128(m(a), m(b))));
            assert_eq!(aes::aesimc(a), v(_mm_aesimc_si128(m(a))));
            assert_eq!(aes::pclmulqdq(a, b, 0x10), v(_mm_clmulepi64_si128::<0x10>(m(a), m(b))));
            assert_eq!(integer::pshufb(a, b), v(_mm_shuffle_epi8(m(a), m(b))));
        }
    }
}
