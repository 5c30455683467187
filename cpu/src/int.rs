// SPDX-License-Identifier: Apache-2.0
//! Integers of any width.

/// An unsigned integer operand of 1, 2, 4 or 8 bytes.
pub trait Int: Copy + Eq + Ord + core::fmt::Debug + Send + Sync + 'static {
    /// Size in bits.
    const BITS: u32;
    /// Size in bytes.
    const BYTES: usize;
    /// Zero-extends.
    fn to_u64(self) -> u64;
    /// Sign-extends.
    fn to_i64(self) -> i64;
    /// Truncates.
    fn from_u64(v: u64) -> Self;
}

macro_rules! int {
    ($t:ty, $s:ty) => {
        impl Int for $t {
            const BITS: u32 = <$t>::BITS;
            const BYTES: usize = size_of::<$t>();
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn to_i64(self) -> i64 {
                self as $s as i64
            }
            #[inline(always)]
            fn from_u64(v: u64) -> Self {
                v as $t
            }
        }
    };
}
int!(u8, i8);
int!(u16, i16);
int!(u32, i32);
int!(u64, i64);
