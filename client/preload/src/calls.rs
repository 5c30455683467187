// SPDX-License-Identifier: Apache-2.0
//! System calls that the client makes by number, and its filters of them.

use core::ffi::{c_int, c_long, c_uint, c_ulong, c_void};

use softkvm_client::python::core;
use softkvm_client::seccomp;

use crate::real::set_errno;
use crate::{cpuid, descriptors, files, memory, real};

/// Does a call about filters; None: it is for the kernel. A process that has nothing to do with KVM, as a program that
/// the client starts, filters its calls as it likes.
fn filter(number: c_long, arguments: [c_ulong; 3]) -> Option<c_long> {
    if core().is_none() && !cpuid::is_client() {
        return None;
    }
    Some(match seccomp::answer(number, arguments.map(|a| a as usize))? {
        error @ ..0 => {
            set_errno(-error as c_int);
            -1
        }
        result => result as c_long,
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn prctl(
    option: c_int,
    a: c_ulong,
    b: c_ulong,
    c: c_ulong,
    d: c_ulong,
) -> c_int {
    if option == libc::PR_SET_SECCOMP
        && let Some(result) = filter(libc::SYS_prctl, [option as c_ulong, a, b])
    {
        return result as c_int;
    }
    real!(prctl(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int)
}

/// The last argument is on the stack, where there is always something.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn syscall(
    number: c_long,
    a: c_ulong,
    b: c_ulong,
    c: c_ulong,
    d: c_ulong,
    e: c_ulong,
    f: c_ulong,
) -> c_long {
    // SAFETY: the functions of these calls, with the caller's arguments.
    unsafe {
        match number {
            libc::SYS_ioctl => descriptors::ioctl(a as c_int, b, c).into(),
            libc::SYS_open => files::open(a as _, b as c_int, c as c_uint).into(),
            libc::SYS_openat => files::openat(a as c_int, b as _, c as c_int, d as c_uint).into(),
            libc::SYS_close => descriptors::close(a as c_int).into(),
            libc::SYS_close_range => descriptors::close_range(a as c_uint, b as c_uint, c as c_int).into(),
            libc::SYS_dup => descriptors::dup(a as c_int).into(),
            libc::SYS_dup2 => descriptors::dup2(a as c_int, b as c_int).into(),
            libc::SYS_dup3 => descriptors::dup3(a as c_int, b as c_int, c as c_int).into(),
            libc::SYS_mmap => {
                memory::mmap(a as *mut c_void, b as usize, c as c_int, d as c_int, e as c_int, f as i64)
                    as c_long
            }
            libc::SYS_munmap => memory::munmap(a as *mut c_void, b as usize).into(),
            _ => filter(number, [a, b, c]).unwrap_or_else(|| {
                real!(syscall(
                    number: c_long, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong, e: c_ulong, f: c_ulong
                ) -> c_long)
            }),
        }
    }
}
