// SPDX-License-Identifier: Apache-2.0
//! `/dev/kvm` as a client sees it by its path: a character device that may be read and written.

use core::ffi::{CStr, c_char, c_int, c_uint};
use core::mem::{MaybeUninit, zeroed};

use crate::kernel::{Call, PAGE, is_readable};

pub const DEVICE: &CStr = c"/dev/kvm";

/// Its numbers: `MISC_MAJOR`, `KVM_MINOR`.
pub const MAJOR: c_uint = 10;
pub const MINOR: c_uint = 232;
/// Its type and permissions, and a block of it.
pub const MODE: libc::mode_t = libc::S_IFCHR | 0o666;
pub const BLOCK: u32 = 4096;

/// The bytes of a path; None if it cannot be read, or is longer than paths are.
pub fn path<'a>(path: *const c_char, call: Call) -> Option<&'a [u8]> {
    let start = path as usize;
    let mut end = start;
    while end - start < libc::PATH_MAX as usize {
        if (end == start || end & (PAGE - 1) == 0) && !is_readable(call, end) {
            return None;
        }
        // SAFETY: its page can be read, and from the path's beginning to here.
        unsafe {
            if *(end as *const u8) == 0 {
                return Some(core::slice::from_raw_parts(path.cast(), end - start));
            }
        }
        end += 1;
    }
    None
}

/// Which directory a path is, seen from another.
fn identity(directory: c_int, path: &CStr, call: Call) -> Option<(u64, u64)> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    let arguments = [directory as usize, path.as_ptr() as usize, stat.as_mut_ptr() as usize, 0, 0, 0];
    // SAFETY: filled in on success.
    (call(libc::SYS_newfstatat, arguments) == 0)
        .then(|| unsafe { (stat.assume_init_ref().st_dev, stat.assume_init_ref().st_ino) })
}

/// Whether a path, relative to a directory, is the device's: by these words, or as `kvm` in the directory `/dev`.
pub fn is_device(directory: c_int, at: *const c_char, call: Call) -> bool {
    let Some(bytes) = path(at, call) else { return false };
    if bytes == DEVICE.to_bytes() {
        return true;
    }
    // On the stack of who calls, of which little may be left.
    let mut room = [0; 256];
    match bytes.strip_suffix(b"kvm") {
        Some(b"") => room[0] = b'.',
        Some(before @ [.., b'/']) if before.len() < room.len() => {
            room[..before.len()].copy_from_slice(before)
        }
        _ => return false,
    }
    let Ok(before) = CStr::from_bytes_until_nul(&room) else { return false };
    let found = identity(directory, before, call);
    found.is_some() && found == identity(libc::AT_FDCWD, c"/dev", call)
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

/// What `statx()` says of it, of what was asked for.
///
/// # Safety
/// `statx` may be written, and the kernel has.
pub unsafe fn describe_x(statx: *mut libc::statx) {
    // SAFETY: all of the fields may be zero.
    unsafe {
        let mask = (*statx).stx_mask & libc::STATX_BASIC_STATS;
        *statx = zeroed();
        (*statx).stx_mask = mask;
        (*statx).stx_mode = MODE as u16;
        (*statx).stx_nlink = 1;
        (*statx).stx_rdev_major = MAJOR;
        (*statx).stx_rdev_minor = MINOR;
        (*statx).stx_blksize = BLOCK;
    }
}

/// Flags of `faccessat2()`: AT_EACCESS, AT_SYMLINK_NOFOLLOW, AT_EMPTY_PATH.
pub const ACCESS_FLAGS: usize = (libc::AT_EACCESS | libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH) as usize;

/// What `access()` says of it: 0, or errno.
pub fn permission(mode: c_int) -> c_int {
    match mode {
        _ if mode & !(libc::R_OK | libc::W_OK | libc::X_OK) != 0 => libc::EINVAL,
        _ if mode & libc::X_OK != 0 => libc::EACCES,
        _ => 0,
    }
}
