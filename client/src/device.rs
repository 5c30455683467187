// SPDX-License-Identifier: Apache-2.0
//! `/dev/kvm` as a client sees it by its path: a character device that may be read and written.

use core::ffi::{CStr, c_char, c_uint};
use core::mem::zeroed;

/// Its numbers: `MISC_MAJOR`, `KVM_MINOR`.
pub const MAJOR: c_uint = 10;
pub const MINOR: c_uint = 232;
/// Its type and permissions, and a block of it.
pub const MODE: libc::mode_t = libc::S_IFCHR | 0o666;
pub const BLOCK: u32 = 4096;

/// Whether a path is the device's. Touches nothing but the path.
///
/// # Safety
/// `path` is null or a string.
pub unsafe fn is_device(path: *const c_char) -> bool {
    // SAFETY: as said.
    !path.is_null() && unsafe { CStr::from_ptr(path) } == c"/dev/kvm"
}

/// What `stat()` says of it.
///
/// # Safety
/// `stat` may be written.
pub unsafe fn describe(stat: *mut libc::stat) {
    // SAFETY: all of the fields may be zero.
    unsafe {
        *stat = zeroed();
        (*stat).st_mode = MODE;
        (*stat).st_nlink = 1;
        (*stat).st_rdev = libc::makedev(MAJOR, MINOR);
        (*stat).st_blksize = BLOCK.into();
    }
}
