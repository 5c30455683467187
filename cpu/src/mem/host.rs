// SPDX-License-Identifier: Apache-2.0
//! Accesses to guest memory through host pointers.
//!
//! Guest memory is shared by design: with other processors' threads, with KVM's, with its owner. Nothing here makes Rust
//! references to it, and no access is one that the compiler may do twice, or leave out because it has seen the value
//! before: they are volatile, atomic, or opaque to it.
//!
//! x86 guests expect loads to be acquire and stores release; on x86 hosts plain moves are that. A naturally aligned
//! access is atomic.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::int::Int;

/// Whether any move is what the guest's would be: x86 has one instruction for each, aligned or not.
const ANY_MOVE: bool = cfg!(all(target_arch = "x86_64", not(miri)));

/// A value that may be anywhere: volatile accesses of others have to be aligned.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// Loads a value, aligned or not.
///
/// # Safety
/// `p..p+size` must be mapped and readable.
#[inline(always)]
pub unsafe fn host_load<T: Int>(p: *const T) -> T {
    if ANY_MOVE || p as usize % T::BYTES != 0 {
        // SAFETY: given.
        return unsafe { p.cast::<Unaligned<T>>().read_volatile().0 };
    }
    // SAFETY: given, and aligned.
    unsafe {
        T::from_u64(match T::BYTES {
            1 => AtomicU8::from_ptr(p as *mut u8).load(Ordering::Acquire) as u64,
            2 => AtomicU16::from_ptr(p as *mut u16).load(Ordering::Acquire) as u64,
            4 => AtomicU32::from_ptr(p as *mut u32).load(Ordering::Acquire) as u64,
            _ => AtomicU64::from_ptr(p as *mut u64).load(Ordering::Acquire),
        })
    }
}

/// Stores a value, aligned or not.
///
/// # Safety
/// `p..p+size` must be mapped and writable.
#[inline(always)]
pub unsafe fn host_store<T: Int>(p: *mut T, v: T) {
    // SAFETY: given.
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    unsafe {
        // A volatile store of an `Unaligned` takes a way round by the stack.
        use core::arch::asm;
        let v = v.to_u64();
        match T::BYTES {
            1 => {
                asm!("mov byte ptr [{p}], {v:l}", p = in(reg) p, v = in(reg) v, options(nostack, preserves_flags))
            }
            2 => {
                asm!("mov word ptr [{p}], {v:x}", p = in(reg) p, v = in(reg) v, options(nostack, preserves_flags))
            }
            4 => {
                asm!("mov dword ptr [{p}], {v:e}", p = in(reg) p, v = in(reg) v, options(nostack, preserves_flags))
            }
            _ => {
                asm!("mov qword ptr [{p}], {v}", p = in(reg) p, v = in(reg) v, options(nostack, preserves_flags))
            }
        }
    }
    // SAFETY: given; aligned in the atomic arms.
    #[cfg(any(not(target_arch = "x86_64"), miri))]
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
            p.cast::<Unaligned<T>>().write_volatile(Unaligned(v));
        }
    }
}

/// Loads 16 bytes, in one piece where the host can.
///
/// # Safety
/// `p..p+16` must be mapped and readable.
#[inline(always)]
pub unsafe fn host_load128(p: *const u64) -> [u64; 2] {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: given; any bits are a value of both types.
    unsafe {
        let v: core::arch::x86_64::__m128i;
        core::arch::asm!("movdqu {v}, [{p}]", p = in(reg) p, v = out(xmm_reg) v,
            options(nostack, preserves_flags, readonly));
        core::mem::transmute(v)
    }
    #[cfg(any(not(target_arch = "x86_64"), miri))]
    // SAFETY: given.
    unsafe {
        [host_load(p), host_load(p.add(1))]
    }
}

/// Stores 16 bytes, in one piece where the host can.
///
/// # Safety
/// `p..p+16` must be mapped and writable.
#[inline(always)]
pub unsafe fn host_store128(p: *mut u64, v: [u64; 2]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: given; any bits are a value of both types.
    unsafe {
        let v: core::arch::x86_64::__m128i = core::mem::transmute(v);
        core::arch::asm!("movdqu [{p}], {v}", p = in(reg) p, v = in(xmm_reg) v, options(nostack, preserves_flags));
    }
    #[cfg(any(not(target_arch = "x86_64"), miri))]
    // SAFETY: given.
    unsafe {
        host_store(p, v[0]);
        host_store(p.add(1), v[1]);
    }
}

/// Copies guest memory out. Bytes that others write at the same time are old or new ones; once copied they stay.
///
/// # Safety
/// `from` must be mapped and readable for as many bytes as `to` has.
#[inline]
pub unsafe fn host_read(from: *const u8, to: &mut [u8]) {
    // SAFETY: given; `to` is not guest memory, to which there are no references.
    unsafe { core::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), to.len()) };
    // The compiler does not know any more where the bytes came from, so it won't look there again for one.
    core::hint::black_box(to.as_mut_ptr());
}

/// Copies bytes into guest memory.
///
/// # Safety
/// `to` must be mapped and writable for as many bytes as there are.
#[inline]
pub unsafe fn host_write(bytes: &[u8], to: *mut u8) {
    // SAFETY: given; `bytes` are not guest memory.
    unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    core::hint::black_box(to);
}

/// Whether guest memory holds these bytes. While others write there either answer may come.
///
/// # Safety
/// `p` must be mapped and readable for as many bytes as there are.
#[inline]
pub unsafe fn host_equal(bytes: &[u8], p: *const u8) -> bool {
    // SAFETY: given.
    unsafe { libc::memcmp(bytes.as_ptr().cast(), p.cast(), bytes.len()) == 0 }
}

/// Moves guest memory within it; the ranges may overlap.
///
/// # Safety
/// Both must be mapped, `to` writable.
#[inline]
pub unsafe fn host_move(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: given.
    unsafe { core::ptr::copy(from, to, bytes) };
    core::hint::black_box(to);
}

/// Fills guest memory with a byte.
///
/// # Safety
/// `to` must be mapped and writable.
#[inline]
pub unsafe fn host_fill(to: *mut u8, byte: u8, bytes: usize) {
    // SAFETY: given.
    unsafe { core::ptr::write_bytes(to, byte, bytes) };
    core::hint::black_box(to);
}

/// Writes a byte of guest memory as it is, so that it is known to be there for writing.
///
/// # Safety
/// `p` must be mapped and writable, or its loss be expected.
#[inline]
pub unsafe fn host_touch(p: *mut u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: given. The compiler's own atomic OR with 0 would only read.
    unsafe {
        core::arch::asm!("lock or byte ptr [{p}], 0", p = in(reg) p, options(nostack));
    }
    #[cfg(any(not(target_arch = "x86_64"), miri))]
    // SAFETY: given.
    unsafe {
        let v = host_load(p);
        host_cas(p, v, v);
    }
}

/// How often something is tried that other processors may spoil, before it is done while they stand
/// ([`super::Bus::lock`]).
pub const PATIENCE: u32 = 1000;

/// Bytes that an x86 host's locked instruction has to itself without stopping the others.
const LINE: usize = 64;

/// Whether [`host_cas`] at `p` is atomic, and cheap: on x86 hosts within a cache line, elsewhere where aligned.
#[inline(always)]
pub fn is_atomic<T: Int>(p: *const T) -> bool {
    if ANY_MOVE { p as usize % LINE + T::BYTES <= LINE } else { p as usize % T::BYTES == 0 }
}

/// Compare and exchange, atomic towards every other access if [`is_atomic`]. Returns the value found.
///
/// # Safety
/// `p..p+size` must be mapped and writable, and [`is_atomic`].
#[inline(always)]
pub unsafe fn host_cas<T: Int>(p: *mut T, old: T, new: T) -> T {
    // SAFETY: given; aligned in the atomic arms, one assembly instruction otherwise.
    unsafe {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if p as usize % T::BYTES != 0 {
            return unaligned_cas(p, old, new);
        }
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
        T::from_u64(match T::BYTES {
            1 => cas!(AtomicU8, u8),
            2 => cas!(AtomicU16, u16),
            4 => cas!(AtomicU32, u32),
            _ => cas!(AtomicU64, u64),
        })
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
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
