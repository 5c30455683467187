// SPDX-License-Identifier: Apache-2.0
//! The environment of a floating-point operation: controls in, exception flags out.

/// Invalid operation (MXCSR and x87 status word bit 0).
pub const IE: u8 = 1 << 0;
/// Denormal operand.
pub const DE: u8 = 1 << 1;
/// Division of a finite number by zero.
pub const ZE: u8 = 1 << 2;
/// Overflow.
pub const OE: u8 = 1 << 3;
/// Underflow.
pub const UE: u8 = 1 << 4;
/// Inexact result (precision).
pub const PE: u8 = 1 << 5;
/// All six exceptions.
pub const ALL: u8 = 0x3f;
/// The exceptions that are found before the computation; unmasked, they prevent it (APM vol. 1, 4.10.2 and 6.8.4).
pub const PRE: u8 = IE | DE | ZE;

/// Rounding control, in the encoding of MXCSR.RC and FCW.RC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Rounding {
    /// To nearest, ties to even.
    NearestEven = 0,
    /// Toward minus infinity.
    Down = 1,
    /// Toward plus infinity.
    Up = 2,
    /// Toward zero.
    Zero = 3,
}

impl Rounding {
    /// The rounding mode of the two low bits of `rc`.
    #[inline]
    pub const fn from_bits(rc: u32) -> Self {
        match rc & 3 {
            0 => Rounding::NearestEven,
            1 => Rounding::Down,
            2 => Rounding::Up,
            _ => Rounding::Zero,
        }
    }
}

/// Precision control of the x87 (FCW.PC): width of the significand of add, subtract, multiply, divide and square root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 24 bits.
    Single,
    /// 53 bits.
    Double,
    /// 64 bits (also the reserved encoding).
    Extended,
}

impl Precision {
    /// Significand width in bits, integer bit included.
    #[inline]
    pub(super) const fn bits(self) -> u32 {
        match self {
            Precision::Single => 24,
            Precision::Double => 53,
            Precision::Extended => 64,
        }
    }
}

/// Controls and results of one or several floating-point operations.
///
/// `flags` accumulates. Operations only ever set bits in it, so that a caller who doesn't care which operation raised
/// what may start from the sticky flags of MXCSR; the fast paths use that (see [`Env::sse`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Env {
    /// Rounding mode.
    pub rounding: Rounding,
    /// Precision control; used by the F80 operations only.
    pub precision: Precision,
    /// Masked exceptions (bits as in `flags`).
    pub masks: u8,
    /// Denormal operands are zeros (MXCSR.DAZ); f32 and f64 only.
    pub daz: bool,
    /// Tiny results are zeros while underflow is masked (MXCSR.FTZ); f32 and f64 only.
    pub ftz: bool,
    /// Exceptions raised.
    pub flags: u8,
    /// x87 condition C1: the last rounding increased the magnitude.
    pub c1: bool,
}

impl Env {
    /// Reset state: everything masked, round to nearest, full precision, no flags.
    pub const DEFAULT: Env = Env {
        rounding: Rounding::NearestEven,
        precision: Precision::Extended,
        masks: ALL,
        daz: false,
        ftz: false,
        flags: 0,
        c1: false,
    };

    /// The environment of an SSE instruction under `mxcsr`.
    ///
    /// While everything is masked the sticky flags are taken over (nobody needs to know which instruction raised
    /// them, and a sticky PE opens the fast paths); otherwise the flags start clear, because a new unmasked exception
    /// must be told from an old one.
    #[inline]
    pub const fn sse(mxcsr: u32) -> Env {
        let masks = (mxcsr >> 7) as u8 & ALL;
        Env {
            rounding: Rounding::from_bits(mxcsr >> 13),
            precision: Precision::Extended,
            masks,
            daz: mxcsr & (1 << 6) != 0,
            ftz: mxcsr & (1 << 15) != 0,
            flags: if masks == ALL { mxcsr as u8 & ALL } else { 0 },
            c1: false,
        }
    }

    /// The environment of an x87 instruction under control word `fcw`; the flags start clear.
    #[inline]
    pub const fn x87(fcw: u16) -> Env {
        Env {
            rounding: Rounding::from_bits((fcw >> 10) as u32),
            precision: match (fcw >> 8) & 3 {
                0 => Precision::Single,
                2 => Precision::Double,
                _ => Precision::Extended,
            },
            masks: fcw as u8 & ALL,
            daz: false,
            ftz: false,
            flags: 0,
            c1: false,
        }
    }

    /// Ends an SSE instruction that began with [`Env::sse`]: adds its flags to `mxcsr`; true if #XM must be raised
    /// (the destination is then left alone). An unmasked pre-computation exception hides the post-computation flags
    /// of all elements (APM vol. 1, 4.10.3).
    #[inline]
    #[must_use]
    pub fn commit_sse(&self, mxcsr: &mut u32) -> bool {
        let unmasked = self.flags & !self.masks;
        let visible = if unmasked & PRE != 0 { self.flags & PRE } else { self.flags };
        *mxcsr |= u32::from(visible);
        unmasked != 0
    }

    /// Whether an exception raised so far is not masked.
    #[inline]
    pub const fn unmasked(&self) -> bool {
        self.flags & !self.masks != 0
    }

    /// Whether host arithmetic in round-to-nearest gives everything that is wanted, if operands and result are normal.
    #[inline]
    pub(super) fn host_rounding(&self) -> bool {
        matches!(self.rounding, Rounding::NearestEven)
    }

    #[inline]
    pub(super) fn raise(&mut self, flags: u8) {
        self.flags |= flags;
    }
}
