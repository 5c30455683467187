// SPDX-License-Identifier: Apache-2.0
//! System calls that the client makes by number, and its filters of them.

use core::ffi::{c_char, c_int, c_long, c_uint, c_ulong, c_void};

use softkvm_client::kernel::are_readable;
use softkvm_client::python::core;
use softkvm_client::seccomp;

use crate::real::{call, set_errno};
use crate::{cpuid, descriptors, files, handlers, memory, real, transfers};

/// Does a call about filters; None: it is for the kernel. A process that has nothing to do with KVM, as a program that
/// the client starts, filters its calls as it likes.
fn filter(number: c_long, arguments: [c_ulong; 3]) -> Option<c_long> {
    if core().is_none() && !cpuid::is_client() {
        return None;
    }
    let arguments = arguments.map(|a| a as usize);
    Some(match seccomp::answer(number, arguments, call, || seccomp::may_filter(call))? {
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

/// What openat2() takes.
#[repr(C)]
#[derive(Clone, Copy)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

/// The flags of an openat2() of the device, None if it is not, or not simply, that.
fn opened_by_how(directory: c_int, path: *const c_char, how: *const OpenHow, size: usize) -> Option<c_int> {
    if size != size_of::<OpenHow>()
        || !files::is_device(directory, path)
        || !are_readable(call, how as usize, size)
    {
        return None;
    }
    // SAFETY: the caller's structure, whose beginning can be read.
    let how = unsafe { how.read_unaligned() };
    (how.resolve == 0).then(|| c_int::try_from(how.flags).ok()).flatten()
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
    const HERE: c_int = libc::AT_FDCWD;
    let (fd, path) = (a as c_int, a as *const c_char);
    let at = b as *const c_char;
    // SAFETY: the functions of these calls, with the caller's arguments.
    unsafe {
        match number {
            libc::SYS_ioctl => descriptors::ioctl(fd, b, c).into(),
            libc::SYS_open => files::open(path, b as c_int, c as c_uint).into(),
            libc::SYS_openat => files::openat(fd, at, c as c_int, d as c_uint).into(),
            libc::SYS_openat2 => match opened_by_how(fd, at, c as *const OpenHow, d as usize) {
                Some(flags) => files::open_device(flags).into(),
                None => kernel(number, [a, b, c, d, e, f]),
            },
            libc::SYS_creat => files::creat(path, b as c_uint).into(),
            libc::SYS_access => files::faccessat(HERE, path, b as c_int, 0).into(),
            libc::SYS_faccessat => files::faccessat(fd, at, c as c_int, 0).into(),
            libc::SYS_faccessat2 => files::faccessat(fd, at, c as c_int, d as c_int).into(),
            libc::SYS_stat => files::fstatat(HERE, path, b as *mut libc::stat, 0).into(),
            libc::SYS_lstat => {
                files::fstatat(HERE, path, b as *mut libc::stat, libc::AT_SYMLINK_NOFOLLOW).into()
            }
            libc::SYS_fstat => files::fstat(fd, b as *mut libc::stat).into(),
            libc::SYS_newfstatat => files::fstatat(fd, at, c as *mut libc::stat, d as c_int).into(),
            libc::SYS_statx => files::statx(fd, at, c as c_int, d as c_uint, e as *mut libc::statx).into(),
            libc::SYS_lseek => transfers::lseek(fd, b as i64, c as c_int),
            libc::SYS_close => descriptors::close(fd).into(),
            libc::SYS_close_range => descriptors::close_range(a as c_uint, b as c_uint, c as c_int).into(),
            libc::SYS_dup => descriptors::dup(fd).into(),
            libc::SYS_dup2 => descriptors::dup2(fd, b as c_int).into(),
            libc::SYS_dup3 => descriptors::dup3(fd, b as c_int, c as c_int).into(),
            libc::SYS_fcntl => descriptors::fcntl(fd, b as c_int, c).into(),
            libc::SYS_mmap | libc::SYS_munmap | libc::SYS_mprotect | libc::SYS_madvise | libc::SYS_mremap
                if memory::is_within() =>
            {
                kernel(number, [a, b, c, d, e, f])
            }
            libc::SYS_mmap => {
                memory::mmap(a as *mut c_void, b as usize, c as c_int, d as c_int, e as c_int, f as i64)
                    as c_long
            }
            libc::SYS_munmap => memory::munmap(a as *mut c_void, b as usize).into(),
            libc::SYS_mprotect => memory::mprotect(a as *mut c_void, b as usize, c as c_int).into(),
            libc::SYS_madvise => memory::madvise(a as *mut c_void, b as usize, c as c_int).into(),
            libc::SYS_mremap => {
                memory::mremap(a as *mut c_void, b as usize, c as usize, d as c_int, e as *mut c_void)
                    as c_long
            }
            libc::SYS_exit_group => {
                handlers::at_exit();
                let status = a as c_int;
                real!(_exit(status: c_int) -> !)
            }
            _ if !transfers::by_number(number, fd) => -1,
            _ => filter(number, [a, b, c]).unwrap_or_else(|| kernel(number, [a, b, c, d, e, f])),
        }
    }
}

fn kernel(number: c_long, [a, b, c, d, e, f]: [c_ulong; 6]) -> c_long {
    real!(syscall(
        number: c_long, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong, e: c_ulong, f: c_ulong
    ) -> c_long)
}
