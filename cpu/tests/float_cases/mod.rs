// SPDX-License-Identifier: Apache-2.0
//! Operands for the floating-point tests: random bits, drawn to the edges of the formats.

#![allow(dead_code, reason = "each test file uses its part")]

use softcpu::float::F80;

/// xorshift64*: small, seedable, the same everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.bits() >> 32) % n
    }

    /// A fraction of `width` bits: random, sparse, or all ones or zeros but for an end.
    fn fraction(&mut self, width: u32) -> u64 {
        let mask = u64::MAX >> (64 - width);
        let v = match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => self.below(4),
            3 => u64::MAX - self.below(4),
            4 => 1 << self.below(width.into()),
            5 => self.bits() & self.bits() & self.bits() & self.bits(),
            6 => self.bits() << self.below(width.into()),
            _ => self.bits(),
        };
        v & mask
    }

    /// A biased exponent of a format with bias `bias`.
    fn exponent(&mut self, bias: u64) -> u64 {
        let top = 2 * bias + 1;
        match self.below(10) {
            0 => 0,
            1 => top,
            2 => 1 + self.below(4),
            3 => top - 1 - self.below(4),
            4 => self.bits() % (top + 1),
            5 => bias + self.below(70),
            6 => bias - self.below(70),
            _ => bias + 4 - self.below(8),
        }
    }

    pub fn f80(&mut self) -> F80 {
        let sign = (self.bits() >> 63) as u16;
        let e = self.exponent(16383);
        let fraction = self.fraction(63);
        // Mostly proper encodings; one in eight has the other integer bit.
        let integer = u64::from(e != 0) ^ u64::from(self.below(8) == 0);
        F80 { mant: integer << 63 | fraction, se: sign << 15 | e as u16 }
    }

    pub fn f64(&mut self) -> u64 {
        self.bits() >> 63 << 63 | self.exponent(1023) << 52 | self.fraction(52)
    }

    pub fn f32(&mut self) -> u32 {
        ((self.bits() >> 63) as u32) << 31 | (self.exponent(127) as u32) << 23 | self.fraction(23) as u32
    }
}

/// Unbiased exponent of a number, low for zeros and denormals.
fn exponent(v: F80) -> i32 {
    i32::from(v.se & 0x7fff) - 16383
}

/// Where Intel's processors differ from AMD's, whose answers softcpu gives: instructions, operands (ST0 and ST1), what
/// they do instead. Neither maker's manual says anything about it.
type Peculiarity = (&'static [&'static str], fn(F80, F80) -> bool, &'static str);
const INTEL: &[Peculiarity] = &[
    (
        &["fscale"],
        |a, b| exponent(a) == -16383 && b.abs() == F80::ZERO,
        "a denormal scaled by nothing raises no underflow exception",
    ),
    (
        &["fsin", "fcos", "fsincos"],
        |a, _| exponent(a) < -60,
        "a tiny angle is its own sine, and its cosine is one, in all rounding modes",
    ),
    (
        &["fpatan"],
        |a, b| exponent(b) - exponent(a) < -60,
        "a tiny quotient is its own arc tangent in all rounding modes",
    ),
];

/// Whether Intel's processors are known to answer something else.
pub fn intel_differs(name: &str, a: F80, b: F80) -> bool {
    let name = name.split(' ').next().unwrap_or(name);
    INTEL.iter().any(|(names, operands, _)| names.contains(&name) && operands(a, b))
}

/// One test case.
pub struct Operands {
    pub a: F80,
    pub b: F80,
    double: (u64, u64),
    single: (u32, u32),
}

impl Operands {
    pub fn double(&self) -> (u64, u64) {
        self.double
    }

    pub fn single(&self) -> (u32, u32) {
        self.single
    }

    /// A memory image: a double or single here, random bits behind.
    pub fn memory(&self) -> [u8; 16] {
        let low = if self.double.1 & 1 == 0 {
            self.double.0
        } else {
            u64::from(self.single.0) | u64::from(self.single.1) << 32
        };
        (u128::from(low) | u128::from(self.b.mant) << 64).to_le_bytes()
    }
}

/// The cases for a seed: as many as `SOFTCPU_FLOAT_CASES` says.
pub fn cases(seed: u64) -> impl Iterator<Item = Operands> {
    let count = std::env::var("SOFTCPU_FLOAT_CASES").ok().and_then(|v| v.parse().ok()).unwrap_or(3000);
    let mut random = Random::new(seed + 1);
    (0..count).map(move |_| {
        let r = &mut random;
        let (a, mut b) = (r.f80(), r.f80());
        let (da, mut db) = (r.f64(), r.f64());
        let (sa, mut sb) = (r.f32(), r.f32());
        match r.below(8) {
            // Close neighbours cancel; equal significands tie.
            0 => {
                b = F80 { mant: a.mant ^ r.below(4), se: a.se ^ (r.below(2) as u16) << 15 };
                db = da ^ r.below(4) ^ r.below(2) << 63;
                sb = sa ^ r.below(4) as u32 ^ (r.below(2) as u32) << 31;
            }
            // Exponents whose sum or difference is at the end of the range.
            1 => {
                let near = |e: u64, top: u64, d: u64| top.wrapping_add(d).wrapping_sub(e) & top;
                let (d, e) = (r.below(9).wrapping_sub(4), u64::from(a.se & 0x7fff));
                let half = if r.below(2) == 0 { 0x3fff } else { 0xbffe };
                let e80 = u64::wrapping_add(half, d).wrapping_sub(e) & 0x7fff;
                b.se = b.se & 0x8000 | e80 as u16;
                b.mant |= 1 << 63;
                db = db & !(0x7ff << 52) | near(da >> 52 & 0x7ff, 0x3ff, d) << 52;
                sb = sb & !(0xff << 23) | (near((sa >> 23 & 0xff).into(), 0x7f, d) as u32) << 23;
            }
            _ => {}
        }
        Operands { a, b, double: (da, db), single: (sa, sb) }
    })
}
