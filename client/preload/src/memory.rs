// SPDX-License-Identifier: Apache-2.0
//! Mappings: of the KVM's files, and of memory that guests have.

use core::ffi::{c_int, c_void};

use softkvm_client::python::core;

use crate::descriptors::is_marked;
use crate::real;
use crate::real::set_errno;

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
        && is_marked(fd)
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
            let result = real!($name(
                address: *mut c_void, size: usize, protection: c_int, flags: c_int, fd: c_int, offset: i64
            ) -> *mut c_void);
            mapped(result, size, protection, flags, fd, offset)
        }
    )*};
}

maps! { mmap mmap64 }
