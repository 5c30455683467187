// SPDX-License-Identifier: Apache-2.0
//! Filters of system calls that a client puts on itself (seccomp(2)).
//!
//! They list what the client needs of a kernel whose KVM is the kernel's. With KVM in its process the same threads also
//! do what the interpreter needs, and a filter would end the process there. So a client has success, and no filter; what
//! it asks about filters, and what is wrong with its request, the kernel answers.

use core::ffi::c_long;

const SET_MODE_STRICT: usize = 0;
const SET_MODE_FILTER: usize = 1;

const NEW_LISTENER: usize = 1 << 3;
/// All flags of `SECCOMP_SET_MODE_FILTER`: TSYNC, LOG, SPEC_ALLOW, NEW_LISTENER, TSYNC_ESRCH, WAIT_KILLABLE_RECV.
const FLAGS: usize = 0x3F;

/// What a client gets for a system call with these first arguments: 0, −errno, or None, which is the kernel's answer.
pub fn answer(number: c_long, [operation, flags, arguments]: [usize; 3]) -> Option<isize> {
    let (operation, flags) = match number {
        libc::SYS_seccomp => (operation, flags),
        libc::SYS_prctl if operation as i32 == libc::PR_SET_SECCOMP => match flags as u32 {
            libc::SECCOMP_MODE_STRICT => return Some(0),
            libc::SECCOMP_MODE_FILTER => (SET_MODE_FILTER, 0),
            _ => return None,
        },
        _ => return None,
    };
    match operation {
        SET_MODE_STRICT if flags == 0 && arguments == 0 => Some(0),
        // Nobody is told of calls: as by a kernel that has no such filters.
        SET_MODE_FILTER if flags & NEW_LISTENER != 0 => Some(-(libc::EINVAL as isize)),
        SET_MODE_FILTER if flags & !FLAGS == 0 && arguments != 0 => Some(0),
        _ => None,
    }
}
