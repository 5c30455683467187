// SPDX-License-Identifier: Apache-2.0
//! Accesses that name what they are for: an address that is in some register of the host meanwhile, whichever the
//! compiler has it in. A table beside the code tells which; so it costs nothing until memory is lost.
//!
//! The memory is at `base + offset`, wrapping, which the host's instruction adds up.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(miri))))]
use super::super::host::{host_load, host_load128, host_store, host_store128};
use crate::int::Int;

/// One instruction of the host with an entry in the table that [`super::host::named`] reads.
#[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
macro_rules! named {
    ($instruction:literal, $of:expr, $base:expr, $offset:expr, $($operands:tt)*) => {
        core::arch::asm!(
            concat!("2: ", $instruction),
            ".pushsection softcpu_accesses, \"aR\", @progbits",
            ".balign 8",
            ".long 2b - .",
            ".ascii \"{of}\"",
            ".balign 8, 0",
            ".popsection",
            of = in(reg) $of,
            base = in(reg) $base,
            offset = in(reg) $offset,
            $($operands)*
        )
    };
}

/// Loads a value, as [`super::super::host_load`] does.
///
/// # Safety
/// The memory must be mapped and readable, or its loss be expected.
#[inline(always)]
pub unsafe fn load_for<T: Int, O>(of: *const O, base: u64, offset: u64) -> T {
    #[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
    // SAFETY: given. What is loaded is what T has, zero-extended.
    unsafe {
        macro_rules! load {
            ($instruction:literal) => {{
                let v: u64;
                named!($instruction, of, base, offset, v = lateout(reg) v,
                    options(nostack, preserves_flags, readonly));
                core::hint::assert_unchecked(v <= u64::MAX >> (64 - T::BITS));
                v
            }};
        }
        T::from_u64(match T::BYTES {
            1 => load!("movzx {v:e}, byte ptr [{base} + {offset}]"),
            2 => load!("movzx {v:e}, word ptr [{base} + {offset}]"),
            4 => load!("mov {v:e}, dword ptr [{base} + {offset}]"),
            _ => load!("mov {v}, qword ptr [{base} + {offset}]"),
        })
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(miri))))]
    // SAFETY: given.
    unsafe {
        let _ = of;
        host_load(base.wrapping_add(offset) as *const T)
    }
}

/// Stores a value, as [`super::super::host_store`] does.
///
/// # Safety
/// The memory must be mapped and writable, or its loss be expected.
#[inline(always)]
pub unsafe fn store_for<T: Int, O>(of: *const O, base: u64, offset: u64, v: T) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
    // SAFETY: given.
    unsafe {
        macro_rules! store {
            ($instruction:literal) => {
                named!($instruction, of, base, offset, v = in(reg) v.to_u64(), options(nostack, preserves_flags))
            };
        }
        match T::BYTES {
            1 => store!("mov byte ptr [{base} + {offset}], {v:l}"),
            2 => store!("mov word ptr [{base} + {offset}], {v:x}"),
            4 => store!("mov dword ptr [{base} + {offset}], {v:e}"),
            _ => store!("mov qword ptr [{base} + {offset}], {v}"),
        }
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(miri))))]
    // SAFETY: given.
    unsafe {
        let _ = of;
        host_store(base.wrapping_add(offset) as *mut T, v);
    }
}

/// Loads 16 bytes, as [`super::super::host_load128`] does.
///
/// # Safety
/// The memory must be mapped and readable, or its loss be expected.
#[inline(always)]
pub unsafe fn load128_for<O>(of: *const O, base: u64, offset: u64) -> [u64; 2] {
    #[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
    // SAFETY: given; any bits are a value of both types.
    unsafe {
        let v: core::arch::x86_64::__m128i;
        named!("movdqu {v}, [{base} + {offset}]", of, base, offset, v = out(xmm_reg) v,
            options(nostack, preserves_flags, readonly));
        core::mem::transmute(v)
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(miri))))]
    // SAFETY: given.
    unsafe {
        let _ = of;
        host_load128(base.wrapping_add(offset) as *const u64)
    }
}

/// Stores 16 bytes, as [`super::super::host_store128`] does.
///
/// # Safety
/// The memory must be mapped and writable, or its loss be expected.
#[inline(always)]
pub unsafe fn store128_for<O>(of: *const O, base: u64, offset: u64, v: [u64; 2]) {
    #[cfg(all(target_arch = "x86_64", target_os = "linux", not(miri)))]
    // SAFETY: given; any bits are a value of both types.
    unsafe {
        let v: core::arch::x86_64::__m128i = core::mem::transmute(v);
        named!("movdqu [{base} + {offset}], {v}", of, base, offset, v = in(xmm_reg) v,
            options(nostack, preserves_flags));
    }
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux", not(miri))))]
    // SAFETY: given.
    unsafe {
        let _ = of;
        host_store128(base.wrapping_add(offset) as *mut u64, v);
    }
}
