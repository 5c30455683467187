// SPDX-License-Identifier: Apache-2.0
//! RFLAGS, with the six arithmetic flags kept lazily.
//!
//! [`LazyFlags`] keeps the last result, sign-extended to 64 bits, and a word of carries from which CF, OF and AF
//! follow; flags are computed only when somebody looks. Layout of `aux`: bit 31 = CF (carry out of the operand's top
//! bit), bit 30 = carry into the top bit (OF = CF xor that), bit 3 = AF, bits 8..15 = bits to flip in the byte that PF
//! is the parity of, bit 0 = flips SF. The last two are only non-zero after a direct write of the flags.

pub use crate::int::Int;

/// RFLAGS bits (APM vol. 2, 3.1.6).
pub mod rf {
    #![allow(missing_docs)]
    pub const CF: u64 = 1 << 0;
    pub const FIXED1: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
    /// Every bit that software can see set.
    pub const DEFINED: u64 = ARITH | FIXED1 | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
}

/// The six arithmetic flags, not yet computed.
#[derive(Clone, Copy, Default, Debug)]
pub struct LazyFlags {
    /// The last result, sign-extended: ZF, SF and PF follow from it.
    pub res: i64,
    /// Carries; see the module's documentation.
    pub aux: u32,
}

const CARRY: u32 = 1 << 31;
const CARRY_IN: u32 = 1 << 30;
const ADJUST: u32 = 1 << 3;

/// Condenses a vector of carries (bit i = carry out of bit i) of an operand of size T into `aux` form.
#[inline(always)]
fn condense<T: Int>(carries: u64) -> u32 {
    let top = if T::BITS == 64 { (carries >> 32) as u32 } else { (carries << (32 - T::BITS)) as u32 };
    (top & (CARRY | CARRY_IN)) | (carries as u32 & ADJUST)
}

impl LazyFlags {
    /// After `res = a + b (+ carry)`.
    #[inline(always)]
    pub fn set_add<T: Int>(&mut self, a: T, b: T, res: T) {
        let (a, b, r) = (a.to_u64(), b.to_u64(), res.to_u64());
        self.res = res.to_i64();
        self.aux = condense::<T>((a & b) | ((a | b) & !r));
    }

    /// After `res = a - b (- borrow)`.
    #[inline(always)]
    pub fn set_sub<T: Int>(&mut self, a: T, b: T, res: T) {
        let (a, b, r) = (a.to_u64(), b.to_u64(), res.to_u64());
        self.res = res.to_i64();
        self.aux = condense::<T>((!a & b) | ((!a | b) & r));
    }

    /// After AND, OR, XOR, TEST: CF = OF = 0, AF (undefined) = 0.
    #[inline(always)]
    pub fn set_logic<T: Int>(&mut self, res: T) {
        self.res = res.to_i64();
        self.aux = 0;
    }

    /// ZF, SF, PF from `res`; CF, OF and AF as given.
    #[inline(always)]
    pub fn set_result<T: Int>(&mut self, res: T, cf: bool, of: bool, af: bool) {
        self.res = res.to_i64();
        self.aux = ((cf as u32) << 31) | (((cf ^ of) as u32) << 30) | ((af as u32) << 3);
    }

    /// After INC: as ADD of 1, but CF stays.
    #[inline(always)]
    pub fn set_inc<T: Int>(&mut self, a: T, res: T) {
        let cf = self.cf();
        self.set_add(a, T::from_u64(1), res);
        self.keep_cf(cf);
    }

    /// After DEC: as SUB of 1, but CF stays.
    #[inline(always)]
    pub fn set_dec<T: Int>(&mut self, a: T, res: T) {
        let cf = self.cf();
        self.set_sub(a, T::from_u64(1), res);
        self.keep_cf(cf);
    }

    /// Replaces CF, leaving the other five.
    #[inline(always)]
    pub fn set_cf(&mut self, cf: bool) {
        self.keep_cf(cf);
    }

    /// Replaces OF, leaving the other five.
    #[inline(always)]
    pub fn set_of(&mut self, of: bool) {
        self.aux ^= ((self.of() ^ of) as u32) << 30;
    }

    /// Replaces CF and OF, leaving the other four (rotates).
    #[inline(always)]
    pub fn set_cf_of(&mut self, cf: bool, of: bool) {
        self.aux = (self.aux & !(CARRY | CARRY_IN)) | ((cf as u32) << 31) | (((cf ^ of) as u32) << 30);
    }

    /// Replaces ZF, leaving the other five.
    #[inline(always)]
    pub fn set_zf(&mut self, zf: bool) {
        if zf != self.zf() {
            self.set_all(self.bits() ^ rf::ZF);
        }
    }

    #[inline(always)]
    fn keep_cf(&mut self, cf: bool) {
        // OF = bit31 ^ bit30 must stay: flip both when CF changes.
        let flip = ((self.aux >> 31) ^ cf as u32) * (CARRY | CARRY_IN);
        self.aux ^= flip;
    }

    /// Writes all six from an RFLAGS image.
    pub fn set_all(&mut self, rflags: u64) {
        let cf = rflags & rf::CF != 0;
        let of = rflags & rf::OF != 0;
        let zf = rflags & rf::ZF != 0;
        let sf = rflags & rf::SF != 0;
        let pf = rflags & rf::PF != 0;
        // res = 0 when ZF, else 1 (SF clear, odd parity); SF and PF are then flipped where they differ.
        self.res = if zf { 0 } else { 1 };
        let pf_now = zf;
        self.aux = ((cf as u32) << 31)
            | (((cf ^ of) as u32) << 30)
            | ((rflags & rf::AF != 0) as u32) << 3
            | ((pf != pf_now) as u32) << 8
            | sf as u32;
    }

    /// Carry flag.
    #[inline(always)]
    pub fn cf(&self) -> bool {
        self.aux & CARRY != 0
    }
    /// Zero flag.
    #[inline(always)]
    pub fn zf(&self) -> bool {
        self.res == 0
    }
    /// Sign flag.
    #[inline(always)]
    pub fn sf(&self) -> bool {
        (self.res < 0) ^ (self.aux & 1 != 0)
    }
    /// Overflow flag.
    #[inline(always)]
    pub fn of(&self) -> bool {
        (self.aux ^ (self.aux << 1)) & CARRY != 0
    }
    /// Parity flag: even number of ones in the low byte.
    #[inline(always)]
    pub fn pf(&self) -> bool {
        ((self.res as u8) ^ (self.aux >> 8) as u8).count_ones() & 1 == 0
    }
    /// Auxiliary carry flag.
    #[inline(always)]
    pub fn af(&self) -> bool {
        self.aux & ADJUST != 0
    }

    /// The six flags at their places in RFLAGS.
    pub fn bits(&self) -> u64 {
        (self.cf() as u64)
            | (self.pf() as u64) << 2
            | (self.af() as u64) << 4
            | (self.zf() as u64) << 6
            | (self.sf() as u64) << 7
            | (self.of() as u64) << 11
    }

    /// Condition code `cc` (0..15) as in Jcc, SETcc, CMOVcc.
    #[inline(always)]
    pub fn condition(&self, cc: u8) -> bool {
        let v = match cc >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() | self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() | (self.sf() != self.of()),
        };
        v ^ (cc & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_all_flags_reads_back_every_combination() {
        for n in 0..64u64 {
            let image = (n & 1) | (n & 2) << 1 | (n & 4) << 2 | (n & 8) << 3 | (n & 16) << 3 | (n & 32) << 6;
            let mut lf = LazyFlags::default();
            lf.set_all(image);
            assert_eq!(lf.bits(), image);
            for cf in [false, true] {
                let mut g = lf;
                g.set_cf(cf);
                assert_eq!(g.bits(), (image & !rf::CF) | cf as u64);
                let mut g = lf;
                g.set_of(cf);
                assert_eq!(g.bits(), (image & !rf::OF) | (cf as u64) << 11);
                let mut g = lf;
                g.set_zf(cf);
                assert_eq!(g.bits(), (image & !rf::ZF) | (cf as u64) << 6);
            }
        }
    }
}
