// SPDX-License-Identifier: Apache-2.0
//! The C library's functions, behind ours of the same names.

use core::ffi::{CStr, c_long, c_void};
use core::sync::atomic::{AtomicPtr, Ordering};

/// The next function of a name, or null.
pub fn next(name: &CStr) -> *mut c_void {
    // SAFETY: looks a name up.
    unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) }
}

/// A function that is looked up when it is called first.
pub struct Real(pub AtomicPtr<c_void>);

impl Real {
    pub const fn new() -> Real {
        Real(AtomicPtr::new(core::ptr::null_mut()))
    }

    pub fn get(&self, name: &CStr) -> *mut c_void {
        let known = self.0.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        let found = next(name);
        if found.is_null() {
            // Nobody can have called it then: its own symbol would not have been bound.
            std::process::abort();
        }
        self.0.store(found, Ordering::Relaxed);
        found
    }
}

/// Calls the C library's function: `real!(close(fd: c_int) -> c_int)`.
#[macro_export]
macro_rules! real {
    ($name:ident($($value:ident: $type:ty),* $(,)?) -> $result:ty) => {{
        static REAL: $crate::real::Real = $crate::real::Real::new();
        let name = match core::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
            Ok(name) => name,
            Err(_) => unreachable!(),
        };
        let function = REAL.get(name);
        // SAFETY: the function of this name and type, with the arguments that ours has got.
        #[allow(unused_unsafe)]
        unsafe { core::mem::transmute::<*mut core::ffi::c_void, extern "C-unwind" fn($($type),*) -> $result>(function)($($value),*) }
    }};
}

pub fn errno() -> i32 {
    // SAFETY: errno of this thread.
    unsafe { *libc::__errno_location() }
}

pub fn set_errno(error: i32) {
    // SAFETY: errno of this thread.
    unsafe { *libc::__errno_location() = error };
}

/// Does a system call, and leaves errno as it is.
pub fn call(number: c_long, [a, b, c, d, e, f]: [usize; 6]) -> isize {
    let kept = errno();
    let result = real!(syscall(
        number: c_long, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize
    ) -> c_long);
    let result = if result == -1 { -errno() as isize } else { result as isize };
    set_errno(kept);
    result
}
