// SPDX-License-Identifier: Apache-2.0
//! Single accesses to guest memory through host pointers.
//!
//! x86 guests expect loads to be acquire and stores release; on x86 hosts plain moves are that. A naturally aligned
//! access is atomic. Guest memory is shared with other threads by design, so nothing here makes Rust references to it.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::int::Int;

/// Loads a value, aligned or not.
///
/// # Safety
/// `p..p+size` must be mapped and readable.
#[inline(always)]
pub unsafe fn host_load<T: Int>(p: *const T) -> T {
    if cfg!(target_arch = "x86_64") {
        // SAFETY: given; x86 does unaligned loads in one instruction.
        return unsafe { p.read_unaligned() };
    }
    // SAFETY: given; aligned in the atomic arms.
    unsafe {
        if p as usize % T::BYTES == 0 {
            T::from_u64(match T::BYTES {
                1 => AtomicU8::from_ptr(p as *mut u8).load(Ordering::Acquire) as u64,
                2 => AtomicU16::from_ptr(p as *mut u16).load(Ordering::Acquire) as u64,
                4 => AtomicU32::from_ptr(p as *mut u32).load(Ordering::Acquire) as u64,
                _ => AtomicU64::from_ptr(p as *mut u64).load(Ordering::Acquire),
            })
        } else {
            p.read_unaligned()
        }
    }
}

/// Stores a value, aligned or not.
///
/// # Safety
/// `p..p+size` must be mapped and writable.
#[inline(always)]
pub unsafe fn host_store<T: Int>(p: *mut T, v: T) {
    if cfg!(target_arch = "x86_64") {
        // SAFETY: given.
        unsafe { p.write_unaligned(v) };
        return;
    }
    // SAFETY: given; aligned in the atomic arms.
    unsafe {
        if p as usize % T::BYTES == 0 {
            let v = v.to_u64();
            match T::BYTES {
                1 => AtomicU8::from_ptr(p as *mut u8).store(v as u8, Ordering::Release),
                2 => AtomicU16::from_ptr(p as *mut u16).store(v as u16, Ordering::Release),
                4 => AtomicU32::from_ptr(p as *mut u32).store(v as u32, Ordering::Release),
                _ => AtomicU64::from_ptr(p as *mut u64).store(v, Ordering::Release),
            }
        } else {
            p.write_unaligned(v);
        }
    }
}

/// Compare and exchange, atomic towards every other access on x86 hosts; elsewhere towards aligned ones only when
/// itself aligned (the caller holds the machine's split lock for the others). Returns the value found.
///
/// # Safety
/// `p..p+size` must be mapped and writable.
#[inline(always)]
pub unsafe fn host_cas<T: Int>(p: *mut T, old: T, new: T) -> T {
    // SAFETY: given; aligned in the atomic arms, one assembly instruction otherwise.
    unsafe {
        if p as usize % T::BYTES == 0 {
            let (o, n) = (old.to_u64(), new.to_u64());
            macro_rules! cas {
                ($a:ty, $t:ty) => {
                    match <$a>::from_ptr(p as *mut $t).compare_exchange(
                        o as $t,
                        n as $t,
                        Ordering::SeqCst,
                        Ordering::SeqCst,
                    ) {
                        Ok(v) | Err(v) => v as u64,
                    }
                };
            }
            return T::from_u64(match T::BYTES {
                1 => cas!(AtomicU8, u8),
                2 => cas!(AtomicU16, u16),
                4 => cas!(AtomicU32, u32),
                _ => cas!(AtomicU64, u64),
            });
        }
        unaligned_cas(p, old, new)
    }
}

#[cfg(target_arch = "x86_64")]
#[cold]
unsafe fn unaligned_cas<T: Int>(p: *mut T, old: T, new: T) -> T {
    use core::arch::asm;
    let mut found = old.to_u64();
    let n = new.to_u64();
    // SAFETY: given; LOCK CMPXCHG has no alignment requirement.
    unsafe {
        match T::BYTES {
            2 => asm!("lock cmpxchg word ptr [{p}], {n:x}", p = in(reg) p, n = in(reg) n, inout("rax") found),
            4 => {
                asm!("lock cmpxchg dword ptr [{p}], {n:e}", p = in(reg) p, n = in(reg) n, inout("rax") found)
            }
            _ => asm!("lock cmpxchg qword ptr [{p}], {n}", p = in(reg) p, n = in(reg) n, inout("rax") found),
        }
    }
    T::from_u64(found)
}

#[cfg(not(target_arch = "x86_64"))]
#[cold]
unsafe fn unaligned_cas<T: Int>(p: *mut T, old: T, new: T) -> T {
    // SAFETY: given.
    unsafe {
        let found = p.read_unaligned();
        if found == old {
            p.write_unaligned(new);
        }
        found
    }
}
