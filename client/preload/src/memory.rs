// SPDX-License-Identifier: Apache-2.0
//! Mappings: of the KVM's files, and of memory that guests have.

use core::ffi::{c_int, c_void};

use crate::descriptors::is_marked;
use crate::python::core;
use crate::real;

fn mapped(address: *mut c_void, size: usize, protection: c_int, fd: c_int, offset: i64) -> *mut c_void {
    if address != libc::MAP_FAILED
        && fd >= 0
        && is_marked(fd)
        && let Some(core) = core()
    {
        (core.mapped)(fd, address as usize, size, offset as usize, protection);
    }
    address
}

macro_rules! maps {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
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
            mapped(result, size, protection, fd, offset)
        }
    )*};
}

maps! { mmap mmap64 }
