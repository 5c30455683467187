// SPDX-License-Identifier: Apache-2.0
//! What the client's side asks the kernel, by way of system calls that touch nothing of a C library's.

use core::ffi::c_long;

/// Does a system call; errno, negated, if it fails.
pub type Call = fn(number: c_long, arguments: [usize; 6]) -> isize;

pub const PAGE: usize = 4096;

/// Whether a page of the client's can be read: who copies from what a client names has to know before. A futex's word is
/// read to be compared, and with no time to wait that is all.
pub fn is_readable(call: Call, address: usize) -> bool {
    const WAIT: usize = (libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG) as usize;
    const UNLIKELY: usize = 0x8DB6_A51E;
    let no_time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let result = call(libc::SYS_futex, [address & !3, WAIT, UNLIKELY, (&raw const no_time) as usize, 0, 0]);
    result != -(libc::EFAULT as isize)
}

/// Whether all pages of a range can be read.
pub fn are_readable(call: Call, address: usize, size: usize) -> bool {
    let Some(last) = address.checked_add(size.saturating_sub(1)) else { return false };
    (address / PAGE..=last / PAGE).all(|page| is_readable(call, (page * PAGE).max(address)))
}
