// SPDX-License-Identifier: Apache-2.0
//! The physical clock. The time-stamp counter ticks once per nanosecond of it (1 GHz, invariant).

/// CLOCK_MONOTONIC in nanoseconds: what `time.monotonic_ns()` gives in Python.
#[inline]
pub fn clock_ns() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid clock and a valid pointer; cannot fail on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}
