// SPDX-License-Identifier: Apache-2.0
//! Whether a path is `/dev/kvm`'s, which need not be there.

use core::ffi::{CStr, c_char, c_int};
use core::mem::MaybeUninit;

use softkvm_client::kernel::{PAGE, is_readable};

use crate::real;
use crate::real::{call, errno, set_errno};

pub const DEVICE: &CStr = c"/dev/kvm";

/// The bytes of a path; None if it cannot be read, or is longer than paths are.
pub fn bytes_of<'a>(path: *const c_char) -> Option<&'a [u8]> {
    let start = path as usize;
    let mut end = start;
    if start < PAGE {
        return None;
    }
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
fn identity(directory: c_int, path: &CStr) -> Option<(u64, u64)> {
    let kept = errno();
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    let (path, room, flags) = (path.as_ptr(), stat.as_mut_ptr(), 0);
    let result = real!(fstatat(
        directory: c_int, path: *const c_char, room: *mut libc::stat, flags: c_int
    ) -> c_int);
    set_errno(kept);
    // SAFETY: filled in on success.
    (result == 0).then(|| unsafe { (stat.assume_init_ref().st_dev, stat.assume_init_ref().st_ino) })
}

/// Whether a path, relative to a directory, is the device's: by these words, or as `kvm` in the directory `/dev`.
pub fn is_device(directory: c_int, path: *const c_char) -> bool {
    let Some(bytes) = bytes_of(path) else { return false };
    if bytes == DEVICE.to_bytes() {
        return true;
    }
    let Some(before) = bytes.strip_suffix(b"kvm") else { return false };
    let mut room = [0; libc::PATH_MAX as usize + 1];
    match before {
        b"" => room[0] = b'.',
        [.., b'/'] => room[..before.len()].copy_from_slice(before),
        _ => return false,
    }
    let Ok(before) = CStr::from_bytes_until_nul(&room) else { return false };
    identity(directory, before).is_some_and(|found| identity(libc::AT_FDCWD, c"/dev") == Some(found))
}
