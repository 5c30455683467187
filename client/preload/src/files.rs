// SPDX-License-Identifier: Apache-2.0
//! `/dev/kvm` by its path, and what is told of the KVM's files: a character device that may be read and written, and
//! anonymous files.

use core::ffi::{c_char, c_int, c_uint};
use core::mem::zeroed;
use std::ffi::CStr;

use softkvm_client::device::{self, BLOCK, DEVICE};
use softkvm_client::{KIND_DEVICE, KIND_GUEST_MEMFD, KIND_NONE};

use crate::descriptors::kind;
use crate::load;
use crate::real;
use crate::real::{call, set_errno};

/// Whether a path, relative to a directory, is the device's.
pub fn is_device(directory: c_int, path: *const c_char) -> bool {
    device::is_device(directory, path, call)
}

pub fn open_device(flags: c_int) -> c_int {
    let fd = load().map_or(-libc::ENOENT, |core| (core.open)(flags));
    if fd < 0 {
        set_errno(-fd);
        return -1;
    }
    fd
}

macro_rules! opens {
    ($($name:ident($($before:ident: $type:ty),*) $directory:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name($($before: $type,)* path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
            if is_device($directory, path) {
                return open_device(flags);
            }
            real!($name($($before: $type,)* path: *const c_char, flags: c_int, mode: c_uint) -> c_int)
        }
    )*};
}

opens! {
    open() libc::AT_FDCWD;
    open64() libc::AT_FDCWD;
    openat(directory: c_int) directory;
    openat64(directory: c_int) directory;
    __open_2() libc::AT_FDCWD;
    __open64_2() libc::AT_FDCWD;
    __openat_2(directory: c_int) directory;
    __openat64_2(directory: c_int) directory;
}

const CREATES: c_int = libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC;

macro_rules! creates {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name(path: *const c_char, mode: c_uint) -> c_int {
            if is_device(libc::AT_FDCWD, path) {
                return open_device(CREATES);
            }
            real!($name(path: *const c_char, mode: c_uint) -> c_int)
        }
    )*};
}

creates! { creat creat64 }

/// The flags of open() that a mode of fopen() stands for.
fn flags_of(mode: &[u8]) -> Option<c_int> {
    let both = mode.contains(&b'+');
    let access = |one| if both { libc::O_RDWR } else { one };
    let mut flags = match mode.first()? {
        b'r' => access(libc::O_RDONLY),
        b'w' => access(libc::O_WRONLY) | libc::O_CREAT | libc::O_TRUNC,
        b'a' => access(libc::O_WRONLY) | libc::O_CREAT | libc::O_APPEND,
        _ => return None,
    };
    if mode.contains(&b'e') {
        flags |= libc::O_CLOEXEC;
    }
    if mode.contains(&b'x') {
        flags |= libc::O_EXCL;
    }
    Some(flags)
}

macro_rules! streams {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name(path: *const c_char, mode: *const c_char) -> *mut libc::FILE {
            if is_device(libc::AT_FDCWD, path)
                // SAFETY: a string of the caller's.
                && let Some(flags) = flags_of(unsafe { CStr::from_ptr(mode) }.to_bytes())
            {
                let fd = open_device(flags);
                // SAFETY: the same string, and a descriptor of this access.
                return if fd < 0 { core::ptr::null_mut() } else { unsafe { libc::fdopen(fd, mode) } };
            }
            real!($name(path: *const c_char, mode: *const c_char) -> *mut libc::FILE)
        }
    )*};
}

streams! { fopen fopen64 }

// ---- permissions -----------------------------------------------------------------------------------------------------

macro_rules! permissions {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name(path: *const c_char, mode: c_int) -> c_int {
            if is_device(libc::AT_FDCWD, path) {
                return permission(mode);
            }
            real!($name(path: *const c_char, mode: c_int) -> c_int)
        }
    )*};
}

permissions! { access euidaccess eaccess }

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn faccessat(
    directory: c_int,
    path: *const c_char,
    mode: c_int,
    flags: c_int,
) -> c_int {
    if flags as usize & !device::ACCESS_FLAGS == 0 && is_device(directory, path) {
        return permission(mode);
    }
    real!(faccessat(directory: c_int, path: *const c_char, mode: c_int, flags: c_int) -> c_int)
}

fn permission(mode: c_int) -> c_int {
    let error = device::permission(mode);
    if error == 0 {
        return 0;
    }
    set_errno(error);
    -1
}

// ---- where it leads --------------------------------------------------------------------------------------------------

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn readlink(path: *const c_char, room: *mut c_char, size: usize) -> isize {
    if is_device(libc::AT_FDCWD, path) {
        set_errno(libc::EINVAL); // it is no link
        return -1;
    }
    real!(readlink(path: *const c_char, room: *mut c_char, size: usize) -> isize)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn realpath(path: *const c_char, room: *mut c_char) -> *mut c_char {
    if !is_device(libc::AT_FDCWD, path) {
        return real!(realpath(path: *const c_char, room: *mut c_char) -> *mut c_char);
    }
    // SAFETY: the caller's room, of PATH_MAX bytes, or memory that is the caller's to free.
    unsafe {
        if room.is_null() { libc::strdup(DEVICE.as_ptr()) } else { libc::strcpy(room, DEVICE.as_ptr()) }
    }
}

// ---- descriptions ----------------------------------------------------------------------------------------------------

/// Whether a call with a path and a descriptor is about the descriptor.
fn is_own(path: *const c_char, flags: c_int) -> bool {
    flags & libc::AT_EMPTY_PATH != 0
        && (path.is_null() || device::path(path, call).is_some_and(<[u8]>::is_empty))
}

/// Type and permissions of a file of guest memory.
const GUEST_MEMFD_MODE: libc::mode_t = libc::S_IFREG | 0o600;

/// Describes a file of the KVM's. One that is anonymous is of no type.
fn describe(kind: c_int, stat: *mut libc::stat) {
    // SAFETY: the caller's structure, which the C library has filled in; all of its fields may be zero.
    unsafe {
        if kind == KIND_GUEST_MEMFD {
            (*stat).st_mode = GUEST_MEMFD_MODE;
            return;
        }
        if kind == KIND_DEVICE {
            return device::describe(stat);
        }
        let (device, inode) = ((*stat).st_dev, (*stat).st_ino);
        *stat = zeroed();
        (*stat).st_dev = device;
        (*stat).st_ino = inode;
        (*stat).st_mode = 0o600;
        (*stat).st_nlink = 1;
        (*stat).st_blksize = BLOCK.into();
    }
}

fn describe_x(kind: c_int, statx: *mut libc::statx) {
    // SAFETY: as above.
    unsafe {
        if kind == KIND_GUEST_MEMFD {
            (*statx).stx_mode = GUEST_MEMFD_MODE as u16;
            return;
        }
        let before = *statx;
        device::describe_x(statx);
        if kind != KIND_DEVICE {
            (*statx).stx_dev_major = before.stx_dev_major;
            (*statx).stx_dev_minor = before.stx_dev_minor;
            (*statx).stx_ino = before.stx_ino;
            (*statx).stx_mode = 0o600;
            (*statx).stx_rdev_major = 0;
            (*statx).stx_rdev_minor = 0;
        }
    }
}

macro_rules! stats {
    ($($name:ident($($before:ident: $type:ty),* ; $($after:ident: $last:ty),*) $directory:expr, $flags:expr;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name(
            $($before: $type,)* path: *const c_char, stat: *mut libc::stat $(, $after: $last)*
        ) -> c_int {
            let (path, kind) = whose($directory, path, $flags);
            let result = real!($name(
                $($before: $type,)* path: *const c_char, stat: *mut libc::stat $(, $after: $last)*
            ) -> c_int);
            if kind != KIND_NONE && result == 0 {
                describe(kind, stat);
            }
            result
        }
    )*};
}

/// What the C library is to be asked in the place of a path, and the kind of the KVM's files that it is about. Something
/// is asked in any case: whether the structure can be written, the kernel knows.
fn whose(directory: c_int, path: *const c_char, flags: c_int) -> (*const c_char, c_int) {
    if is_device(directory, path) {
        (c"/".as_ptr(), KIND_DEVICE)
    } else if is_own(path, flags) {
        (path, kind(directory))
    } else {
        (path, KIND_NONE)
    }
}

stats! {
    stat(;) libc::AT_FDCWD, 0;
    stat64(;) libc::AT_FDCWD, 0;
    lstat(;) libc::AT_FDCWD, 0;
    lstat64(;) libc::AT_FDCWD, 0;
    fstatat(directory: c_int; flags: c_int) directory, flags;
    fstatat64(directory: c_int; flags: c_int) directory, flags;
    __xstat(version: c_int;) libc::AT_FDCWD, 0;
    __xstat64(version: c_int;) libc::AT_FDCWD, 0;
    __lxstat(version: c_int;) libc::AT_FDCWD, 0;
    __lxstat64(version: c_int;) libc::AT_FDCWD, 0;
    __fxstatat(version: c_int, directory: c_int; flags: c_int) directory, flags;
    __fxstatat64(version: c_int, directory: c_int; flags: c_int) directory, flags;
}

macro_rules! fstats {
    ($($name:ident($($before:ident: $type:ty),*);)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name($($before: $type,)* fd: c_int, stat: *mut libc::stat) -> c_int {
            let result = real!($name($($before: $type,)* fd: c_int, stat: *mut libc::stat) -> c_int);
            let kind = if result == 0 { kind(fd) } else { KIND_NONE };
            if kind != KIND_NONE {
                describe(kind, stat);
            }
            result
        }
    )*};
}

fstats! {
    fstat();
    fstat64();
    __fxstat(version: c_int);
    __fxstat64(version: c_int);
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn statx(
    directory: c_int,
    path: *const c_char,
    flags: c_int,
    mask: c_uint,
    statx: *mut libc::statx,
) -> c_int {
    let (path, kind) = whose(directory, path, flags);
    let result = real!(statx(
        directory: c_int, path: *const c_char, flags: c_int, mask: c_uint, statx: *mut libc::statx
    ) -> c_int);
    if kind != KIND_NONE && result == 0 {
        describe_x(kind, statx);
    }
    result
}
