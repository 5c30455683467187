// SPDX-License-Identifier: Apache-2.0
//! Which process this is, of those that were forked one from the other.

use std::sync::atomic::{AtomicU64, Ordering};

/// How often this process, and those that it was forked from, have been forked into what it is now.
static FORKS: AtomicU64 = AtomicU64::new(0);

/// Tells that this is a child that has just been forked: its machines are those of its parent. Async-signal-safe.
pub fn forked() {
    FORKS.fetch_add(1, Ordering::SeqCst);
}

/// A number that is another one in a child. Async-signal-safe.
pub fn forks() -> u64 {
    FORKS.load(Ordering::SeqCst)
}
