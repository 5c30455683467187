// SPDX-License-Identifier: Apache-2.0
//! Filters of system calls that a client puts on itself (seccomp(2)).
//!
//! They list what the client needs of a kernel whose KVM is the kernel's. With KVM in its process the same threads also
//! do what the interpreter needs, and a filter would end the process there. So a client has success, and no filter; what
//! it asks about filters, and what is wrong with its request, the kernel answers.

use core::ffi::c_long;

use crate::bpf;
use crate::kernel::{Call, are_readable};

const SET_MODE_STRICT: usize = 0;
const SET_MODE_FILTER: usize = 1;

const NEW_LISTENER: usize = 1 << 3;
/// Flags of `SECCOMP_SET_MODE_FILTER` that go without `NEW_LISTENER`: TSYNC, LOG, SPEC_ALLOW, TSYNC_ESRCH.
const FLAGS: usize = 0x17;

/// What a client gets for a system call with these first arguments: 0, −errno, or None, which is the kernel's answer: it
/// is one for sure that is refused. `may_filter` tells whether the client may have filters (see [`may_filter`]).
pub fn answer(
    number: c_long,
    [operation, flags, arguments]: [usize; 3],
    call: Call,
    may_filter: impl FnOnce() -> bool,
) -> Option<isize> {
    let (operation, flags) = match number {
        libc::SYS_seccomp => (operation as u32 as usize, flags as u32 as usize),
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
        SET_MODE_FILTER if flags & !FLAGS == 0 => filter(arguments, call, may_filter),
        _ => None,
    }
}

/// As the kernel looks at `struct sock_fprog` (seccomp_prepare_filter).
fn filter(argument: usize, call: Call, may_filter: impl FnOnce() -> bool) -> Option<isize> {
    if !are_readable(call, argument, size_of::<libc::sock_fprog>()) {
        return None;
    }
    // SAFETY: it can be read; the structure is of numbers.
    let program = unsafe { (argument as *const libc::sock_fprog).read_unaligned() };
    let length = usize::from(program.len);
    if !(1..=bpf::MOST).contains(&length) {
        return None;
    }
    if !may_filter() {
        return Some(-(libc::EACCES as isize));
    }
    let size = length * size_of::<libc::sock_filter>();
    if !are_readable(call, program.filter as usize, size) {
        return None;
    }
    // SAFETY: as above.
    let instruction = |at: usize| unsafe { program.filter.add(at).read_unaligned() };
    bpf::is_filter(length, instruction, call).then_some(0)
}

/// Whether the kernel lets this thread have filters: with no_new_privs, or CAP_SYS_ADMIN.
pub fn may_filter(call: Call) -> bool {
    const VERSION_3: u32 = 0x2008_0522;
    const CAP_SYS_ADMIN: u32 = 21;
    if call(libc::SYS_prctl, [libc::PR_GET_NO_NEW_PRIVS as usize, 0, 0, 0, 0, 0]) == 1 {
        return true;
    }
    let header = [VERSION_3, 0];
    // Effective, permitted and inheritable ones, twice 32.
    let mut sets = [0u32; 6];
    let result = call(libc::SYS_capget, [header.as_ptr() as usize, sets.as_mut_ptr() as usize, 0, 0, 0, 0]);
    result == 0 && sets[0] >> CAP_SYS_ADMIN & 1 != 0
}
