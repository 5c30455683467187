// SPDX-License-Identifier: Apache-2.0
//! Sleeping on a word of memory (futex(2)): waking needs no lock, so a signal handler may do it.

use std::io;
use std::sync::atomic::AtomicU32;

use libc::{FUTEX_BITSET_MATCH_ANY, FUTEX_PRIVATE_FLAG, FUTEX_WAIT_BITSET, FUTEX_WAKE};

/// A time that doesn't come: without one the kernel would go on waiting behind a handler with SA_RESTART.
const NEVER: u64 = i64::MAX as u64;

/// Sleeps while `word` holds `value`, until a wake-up or until the physical clock reads `deadline` ns. It may come back
/// for no reason. Err: ETIMEDOUT, EINTR for a signal that was handled, EAGAIN for another value.
pub fn wait(word: &AtomicU32, value: u32, deadline: Option<u64>) -> io::Result<()> {
    let end = deadline.unwrap_or(NEVER).min(NEVER);
    let until = libc::timespec {
        tv_sec: (end / 1_000_000_000) as libc::time_t,
        tv_nsec: (end % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: `word` and `until` live during the call, which writes neither. The bit-set form takes the time when to
    // end, on CLOCK_MONOTONIC.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG,
            value,
            &raw const until,
            core::ptr::null::<u32>(),
            FUTEX_BITSET_MATCH_ANY,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Wakes everybody who sleeps on `word`. Async-signal-safe.
pub fn wake(word: &AtomicU32) {
    // SAFETY: the kernel only looks the address up; it cannot fail for memory of this process.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), FUTEX_WAKE | FUTEX_PRIVATE_FLAG, i32::MAX) };
}
