// SPDX-License-Identifier: Apache-2.0
//! 128-bit vectors as lanes of integers, written so that the compiler vectorizes them.
//!
//! Everything works on [`V`], one 128-bit lane; an operation on a wider register is the same function on each lane.

/// 128 bits, low word first: what an XMM register holds.
pub type V = [u64; 2];

/// An element type of which `N` fill a [`V`].
pub trait Lane<const N: usize>: Copy + Default {
    /// The elements, lowest first.
    fn split(v: V) -> [Self; N];
    /// The vector of these elements.
    fn join(a: [Self; N]) -> V;
}

macro_rules! lane {
    ($($t:ty, $n:literal;)*) => {$(
        // For u64 it is a transmute to the same type.
        #[allow(clippy::useless_transmute)]
        impl Lane<$n> for $t {
            #[inline(always)]
            fn split(v: V) -> [$t; $n] {
                // SAFETY: same size, any bits are valid in both; hosts are little endian (checked in lib.rs).
                unsafe { core::mem::transmute::<V, [$t; $n]>(v) }
            }
            #[inline(always)]
            fn join(a: [$t; $n]) -> V {
                // SAFETY: as in `split`.
                unsafe { core::mem::transmute::<[$t; $n], V>(a) }
            }
        }
    )*};
}
lane! { u8, 16; i8, 16; u16, 8; i16, 8; u32, 4; i32, 4; u64, 2; i64, 2; }

/// The elements of `v`.
#[inline(always)]
pub fn split<T: Lane<N>, const N: usize>(v: V) -> [T; N] {
    T::split(v)
}

/// The vector of `a`.
#[inline(always)]
pub fn join<T: Lane<N>, const N: usize>(a: [T; N]) -> V {
    T::join(a)
}

/// The vector whose element `i` is `f(i)`.
#[inline(always)]
pub fn build<T: Lane<N>, const N: usize>(mut f: impl FnMut(usize) -> T) -> V {
    let mut r = [T::default(); N];
    for (i, r) in r.iter_mut().enumerate() {
        *r = f(i);
    }
    T::join(r)
}

/// Applies `f` to every element.
#[inline(always)]
pub fn map1<T: Lane<N>, const N: usize>(a: V, f: impl Fn(T) -> T) -> V {
    let a = T::split(a);
    build(|i| f(a[i]))
}

/// Applies `f` to every pair of elements.
#[inline(always)]
pub fn map2<T: Lane<N>, const N: usize>(a: V, b: V, f: impl Fn(T, T) -> T) -> V {
    let (a, b) = (T::split(a), T::split(b));
    build(|i| f(a[i], b[i]))
}

/// `v` with its lowest 32-bit element replaced.
#[inline(always)]
pub fn with_low32(v: V, x: u32) -> V {
    [v[0] & !0xffff_ffff | x as u64, v[1]]
}

/// `v` with its lowest 64-bit element replaced.
#[inline(always)]
pub fn with_low64(v: V, x: u64) -> V {
    [x, v[1]]
}

/// The vector as one number.
#[inline(always)]
pub fn wide(v: V) -> u128 {
    v[0] as u128 | (v[1] as u128) << 64
}

/// The vector of one number.
#[inline(always)]
pub fn narrow(v: u128) -> V {
    [v as u64, (v >> 64) as u64]
}
