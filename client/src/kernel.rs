// SPDX-License-Identifier: Apache-2.0
//! What the client's side asks the kernel, by way of system calls that touch nothing of a C library's.

use core::ffi::c_long;

/// Does a system call; errno, negated, if it fails.
pub type Call = fn(number: c_long, arguments: [usize; 6]) -> isize;

pub const PAGE: usize = 4096;

/// Whether a page of the client's can be read: who copies from what a client names has to know before. There is no such
/// `how` of rt_sigprocmask(), and the kernel finds that after it has read the set.
pub fn is_readable(call: Call, address: usize) -> bool {
    let word = address & !7;
    let result = call(libc::SYS_rt_sigprocmask, [usize::MAX, word, 0, 8, 0, 0]);
    word != 0 && result != -(libc::EFAULT as isize) // null is no set
}

/// Whether all pages of a range can be read.
pub fn are_readable(call: Call, address: usize, size: usize) -> bool {
    let Some(last) = address.checked_add(size.saturating_sub(1)) else { return false };
    (address / PAGE..=last / PAGE).all(|page| is_readable(call, (page * PAGE).max(address)))
}
