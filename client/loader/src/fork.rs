// SPDX-License-Identifier: Apache-2.0
//! Children that the program forks: our C library and the interpreter are in them, too.
//!
//! They have to know of the fork: locks are held over it, and the child's other threads, our own among them, are not
//! there. So it is the C library's `fork()` that is called, on a donor's thread pointer, and what the program has asked
//! for besides is done by hand. What `fork()` cannot do (name spaces, a stack of the child's own, other signals at the
//! end) the kernel does: such a child has no KVM.

use core::ffi::c_int;

use crate::calls::Call;
use crate::donor::{self, Request};
use crate::raw::{gettid, raw};

const KNOWN: usize = 0xFF
    | (libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::CLONE_PARENT_SETTID | libc::CLONE_PIDFD)
        as usize;

fn by_library(_: &Request) -> isize {
    // SAFETY: the thread is one of the C library's, to it; no handler runs.
    let child = unsafe { libc::fork() };
    if child == 0 {
        donor::after_fork();
    }
    if child < 0 {
        // SAFETY: the donor's.
        return -(unsafe { *libc::__errno_location() } as isize);
    }
    child as isize
}

/// Puts a number where the program wants it.
fn put(at: usize, number: c_int) {
    if at != 0 {
        // SAFETY: the program's.
        unsafe { (at as *mut c_int).write_unaligned(number) };
    }
}

/// fork(), or clone() without common memory; returns the child's number, 0 in it.
pub fn fork(call: &mut Call) -> isize {
    let [flags, stack, parent, child, ..] =
        if call.number == libc::SYS_fork { [libc::SIGCHLD as usize, 0, 0, 0, 0, 0] } else { call.arguments };
    let mask = *call.mask();
    let is_plain =
        flags & !KNOWN == 0 && flags & 0xFF == libc::SIGCHLD as usize && stack == 0 && !donor::is_child();
    let result = if is_plain {
        donor::request(by_library, [0; 3], mask)
    } else {
        // Its stack is given to it afterwards: this function's frame has to be there now.
        let mut arguments = call.arguments;
        if call.number == libc::SYS_clone {
            arguments[1] = 0;
        }
        // SAFETY: a copy of the process.
        unsafe { crate::raw::syscall(call.number, arguments) }
    };
    if result == 0 {
        if stack != 0 {
            call.context.uc_mcontext.gregs[libc::REG_RSP as usize] = stack as i64;
        }
        if is_plain && flags & libc::CLONE_CHILD_SETTID as usize != 0 {
            put(child, gettid() as c_int);
        }
        if is_plain && flags & libc::CLONE_CHILD_CLEARTID as usize != 0 {
            raw!(libc::SYS_set_tid_address, child);
        }
    } else if result > 0 && is_plain {
        if flags & libc::CLONE_PARENT_SETTID as usize != 0 {
            put(parent, result as c_int);
        }
        if flags & libc::CLONE_PIDFD as usize != 0 {
            put(parent, raw!(libc::SYS_pidfd_open, result, 0) as c_int);
        }
    }
    result
}
