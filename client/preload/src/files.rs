// SPDX-License-Identifier: Apache-2.0
//! `/dev/kvm` by its path: it can be opened, and it is a character device that may be read and written.

use core::ffi::{c_char, c_int, c_uint};
use core::mem::zeroed;
use std::ffi::CStr;

use crate::load;
use crate::real;
use crate::real::set_errno;

const DEVICE: &CStr = c"/dev/kvm";
/// Its numbers: `MISC_MAJOR`, `KVM_MINOR`.
const MAJOR: c_uint = 10;
const MINOR: c_uint = 232;

fn is_device(path: *const c_char) -> bool {
    // SAFETY: null, or a string of the caller's.
    !path.is_null() && unsafe { CStr::from_ptr(path) } == DEVICE
}

fn open_device(flags: c_int) -> c_int {
    let fd = load().map_or(-libc::ENOENT, |core| (core.open)(flags));
    if fd < 0 {
        set_errno(-fd);
        return -1;
    }
    fd
}

macro_rules! opens {
    ($($name:ident($($before:ident: $type:ty),*) ;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name($($before: $type,)* path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
            if is_device(path) {
                return open_device(flags);
            }
            real!($name($($before: $type,)* path: *const c_char, flags: c_int, mode: c_uint) -> c_int)
        }
    )*};
}

opens! {
    open();
    open64();
    openat(directory: c_int);
    openat64(directory: c_int);
    __open_2();
    __open64_2();
    __openat_2(directory: c_int);
    __openat64_2(directory: c_int);
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn access(path: *const c_char, mode: c_int) -> c_int {
    if is_device(path) {
        return permission(mode);
    }
    real!(access(path: *const c_char, mode: c_int) -> c_int)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn euidaccess(path: *const c_char, mode: c_int) -> c_int {
    if is_device(path) {
        return permission(mode);
    }
    real!(euidaccess(path: *const c_char, mode: c_int) -> c_int)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn faccessat(
    directory: c_int,
    path: *const c_char,
    mode: c_int,
    flags: c_int,
) -> c_int {
    if is_device(path) {
        return permission(mode);
    }
    real!(faccessat(directory: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int)
}

fn permission(mode: c_int) -> c_int {
    if mode & libc::X_OK == 0 {
        return 0;
    }
    set_errno(libc::EACCES);
    -1
}

fn describe(stat: *mut libc::stat) -> c_int {
    // SAFETY: the caller's structure, all of whose fields may be zero.
    unsafe {
        *stat = zeroed();
        (*stat).st_mode = libc::S_IFCHR | 0o666;
        (*stat).st_nlink = 1;
        (*stat).st_rdev = libc::makedev(MAJOR, MINOR);
        (*stat).st_blksize = 4096;
    }
    0
}

macro_rules! stats {
    ($($name:ident($($before:ident: $type:ty),* ; $($after:ident: $last:ty),*) ;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name(
            $($before: $type,)* path: *const c_char, stat: *mut libc::stat $(, $after: $last)*
        ) -> c_int {
            if is_device(path) {
                return describe(stat);
            }
            real!($name($($before: $type,)* path: *const c_char, stat: *mut libc::stat $(, $after: $last)*) -> c_int)
        }
    )*};
}

stats! {
    stat(;);
    stat64(;);
    lstat(;);
    lstat64(;);
    fstatat(directory: c_int; flags: c_int);
    fstatat64(directory: c_int; flags: c_int);
    __xstat(version: c_int;);
    __xstat64(version: c_int;);
    __lxstat(version: c_int;);
    __lxstat64(version: c_int;);
    __fxstatat(version: c_int, directory: c_int; flags: c_int);
    __fxstatat64(version: c_int, directory: c_int; flags: c_int);
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn statx(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    statx: *mut libc::statx,
) -> c_int {
    if is_device(path) {
        // SAFETY: the caller's structure, all of whose fields may be zero.
        unsafe {
            *statx = zeroed();
            (*statx).stx_mask = libc::STATX_TYPE | libc::STATX_MODE | libc::STATX_NLINK;
            (*statx).stx_mode = (libc::S_IFCHR | 0o666) as u16;
            (*statx).stx_nlink = 1;
            (*statx).stx_blksize = 4096;
            (*statx).stx_rdev_major = MAJOR;
            (*statx).stx_rdev_minor = MINOR;
        }
        return 0;
    }
    real!(statx(directory: c_int, path: *const c_char, flags: c_int, mask: c_uint, statx: *mut libc::statx) -> c_int)
}
