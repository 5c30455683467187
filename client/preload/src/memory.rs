// SPDX-License-Identifier: Apache-2.0
//! Mappings: of the KVM's files, and of memory that guests have.

use core::cell::Cell;
use core::ffi::{c_int, c_void};

use softkvm_client::python::core;
use softkvm_client::{KIND_NONE, KIND_VCPU, takes_memory};

use crate::descriptors::kind;
use crate::real;
use crate::real::{errno, set_errno};

fn mapped(
    address: *mut c_void,
    size: usize,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    if address != libc::MAP_FAILED
        && fd >= 0
        && kind(fd) != KIND_NONE
        && let Some(core) = core()
    {
        let shared = flags & libc::MAP_TYPE != libc::MAP_PRIVATE;
        let result = (core.mapped)(fd, address as usize, size, offset as usize, protection, shared);
        if result < 0 {
            // SAFETY: it has just come, and nobody knows of it.
            unsafe { libc::munmap(address, size) };
            set_errno(-result);
            return libc::MAP_FAILED;
        }
    }
    address
}

thread_local!(static WITHIN: Cell<bool> = const { Cell::new(false) });

/// Calls the C library's function. It may be another library's, behind ours, that makes the system call by its number, as
/// allocators do: that one is the kernel's.
fn within<R>(function: impl FnOnce() -> R) -> R {
    let before = WITHIN.replace(true);
    let result = function();
    WITHIN.set(before);
    result
}

/// Whether the thread is in the C library's function for one of ours.
pub fn is_within() -> bool {
    WITHIN.get()
}

/// `MAP_FIXED_NOREPLACE` without `MAP_FIXED`.
const MAP_NOREPLACE: c_int = libc::MAP_FIXED_NOREPLACE & !libc::MAP_FIXED;

/// Memory is about to go, or to change: guests that have it must not by then (the kernel's MMU notifiers). Most memory is
/// no guest's, which is found out without the interpreter: it may be that the thread has its lock. Tells whether it is.
fn going(address: *mut c_void, size: usize) -> bool {
    match core() {
        Some(core) if (core.concerns)(address as usize, size) => {
            (core.unmapping)(address as usize, size);
            true
        }
        _ => false,
    }
}

/// [`within`] for a call by which memory goes, or changes: a guest that runs may have looked at it again between the two.
fn replacing<R>(memory: &[(*mut c_void, usize)], function: impl FnOnce() -> R) -> R {
    let concerns = memory.iter().fold(false, |any, &(address, size)| going(address, size) | any);
    let result = within(function);
    if concerns {
        let kept = errno();
        memory.iter().for_each(|&(address, size)| {
            going(address, size);
        });
        set_errno(kept);
    }
    result
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn munmap(address: *mut c_void, size: usize) -> c_int {
    replacing(&[(address, size)], || real!(munmap(address: *mut c_void, size: usize) -> c_int))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mremap(
    address: *mut c_void,
    size: usize,
    new_size: usize,
    flags: c_int,
    new: *mut c_void,
) -> *mut c_void {
    let fixed = flags & libc::MREMAP_FIXED != 0;
    let memory = [(address, size), (new, if fixed { new_size } else { 0 })];
    replacing(&memory[..1 + usize::from(fixed)], || {
        real!(mremap(
            address: *mut c_void, size: usize, new_size: usize, flags: c_int, new: *mut c_void
        ) -> *mut c_void)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mprotect(address: *mut c_void, size: usize, protection: c_int) -> c_int {
    replacing(
        &[(address, size)],
        || real!(mprotect(address: *mut c_void, size: usize, protection: c_int) -> c_int),
    )
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(address: *mut c_void, size: usize, advice: c_int) -> c_int {
    replacing(
        &[(address, size)][..usize::from(takes_memory(advice))],
        || real!(madvise(address: *mut c_void, size: usize, advice: c_int) -> c_int),
    )
}

macro_rules! maps {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name(
            address: *mut c_void,
            size: usize,
            protection: c_int,
            flags: c_int,
            fd: c_int,
            offset: i64,
        ) -> *mut c_void {
            let kind = if fd >= 0 && flags & libc::MAP_ANONYMOUS == 0 { kind(fd) } else { KIND_NONE };
            if !matches!(kind, KIND_NONE | KIND_VCPU) && size != 0 && offset % 4096 == 0 {
                // What is mapped there stays.
                set_errno(libc::ENODEV);
                return libc::MAP_FAILED;
            }
            let replaces = flags & libc::MAP_FIXED != 0 && flags & MAP_NOREPLACE != MAP_NOREPLACE;
            let result = replacing(&[(address, size)][..usize::from(replaces)], || real!($name(
                address: *mut c_void, size: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64
            ) -> *mut c_void));
            mapped(result, size, protection, flags, fd, offset)
        }
    )*};
}

maps! { mmap mmap64 }
