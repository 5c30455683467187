// SPDX-License-Identifier: Apache-2.0
//! Reading, writing and positions: of the KVM's files only those of KVM_GET_STATS_FD have contents, which are what counts
//! now. The others are in memory here, and no client is to find or change what is there.

use core::ffi::{c_int, c_long, c_void};

use softkvm_client::python::core;
use softkvm_client::{KIND_DEVICE, KIND_NONE, KIND_STATISTICS};

use crate::descriptors::kind;
use crate::real;
use crate::real::set_errno;

/// Whether the kernel is to transfer what it is asked for. What it says of a file that has nothing for it (fs/read_write.c):
/// ESPIPE for positions in an anonymous one, EBADF if it is not open for this, EINVAL.
fn transfers(fd: c_int, writes: bool, positioned: bool) -> bool {
    let kind = kind(fd);
    let error = match kind {
        KIND_NONE => return true,
        KIND_STATISTICS if writes => return true, // it is not open for this
        KIND_STATISTICS => match core() {
            Some(core) => -(core.refresh)(fd),
            None => 0,
        },
        _ if positioned && kind != KIND_DEVICE => libc::ESPIPE,
        _ => {
            let without = if writes { libc::O_RDONLY } else { libc::O_WRONLY };
            // SAFETY: asks.
            let access = unsafe { libc::fcntl(fd, libc::F_GETFL) } & libc::O_ACCMODE;
            if access == without { libc::EBADF } else { libc::EINVAL }
        }
    };
    if error > 0 {
        set_errno(error);
    }
    error <= 0
}

macro_rules! transfers {
    ($($name:ident($($value:ident: $type:ty),*) $writes:literal, $positioned:literal;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name(fd: c_int, $($value: $type),*) -> isize {
            if !transfers(fd, $writes, $positioned) {
                return -1;
            }
            real!($name(fd: c_int, $($value: $type),*) -> isize)
        }
    )*};
}

transfers! {
    read(buffer: *mut c_void, size: usize) false, false;
    write(buffer: *const c_void, size: usize) true, false;
    pread(buffer: *mut c_void, size: usize, at: i64) false, true;
    pread64(buffer: *mut c_void, size: usize, at: i64) false, true;
    pwrite(buffer: *const c_void, size: usize, at: i64) true, true;
    pwrite64(buffer: *const c_void, size: usize, at: i64) true, true;
    readv(parts: *const c_void, count: c_int) false, false;
    writev(parts: *const c_void, count: c_int) true, false;
    preadv(parts: *const c_void, count: c_int, at: i64) false, true;
    preadv64(parts: *const c_void, count: c_int, at: i64) false, true;
    pwritev(parts: *const c_void, count: c_int, at: i64) true, true;
    pwritev64(parts: *const c_void, count: c_int, at: i64) true, true;
    __read_chk(buffer: *mut c_void, size: usize, room: usize) false, false;
    __pread_chk(buffer: *mut c_void, size: usize, at: i64, room: usize) false, true;
    __pread64_chk(buffer: *mut c_void, size: usize, at: i64, room: usize) false, true;
}

macro_rules! positions {
    ($($name:ident)*) => {$(
        /// No file of the KVM's goes anywhere (`noop_llseek`).
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name(fd: c_int, offset: i64, whence: c_int) -> i64 {
            let (offset, whence) = match whence {
                libc::SEEK_SET..=libc::SEEK_HOLE if kind(fd) != KIND_NONE => (0, libc::SEEK_CUR),
                _ => (offset, whence),
            };
            real!($name(fd: c_int, offset: i64, whence: c_int) -> i64)
        }
    )*};
}

positions! { lseek lseek64 }

macro_rules! sizes {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name(fd: c_int, size: i64) -> c_int {
            if kind(fd) != KIND_NONE {
                set_errno(libc::EINVAL);
                return -1;
            }
            real!($name(fd: c_int, size: i64) -> c_int)
        }
    )*};
}

sizes! { ftruncate ftruncate64 }

/// [`preadv`] and the like by number: their position is in two halves, of which 64-bit kernels take the first.
pub fn by_number(number: c_long, fd: c_int) -> bool {
    match number {
        libc::SYS_read | libc::SYS_readv => transfers(fd, false, false),
        libc::SYS_write | libc::SYS_writev => transfers(fd, true, false),
        libc::SYS_pread64 | libc::SYS_preadv | libc::SYS_preadv2 => transfers(fd, false, true),
        libc::SYS_pwrite64 | libc::SYS_pwritev | libc::SYS_pwritev2 => transfers(fd, true, true),
        _ => true,
    }
}
