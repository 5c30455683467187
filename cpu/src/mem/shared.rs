// SPDX-License-Identifier: Apache-2.0
//! What of a processor other threads touch.

use std::sync::atomic::{AtomicU32, Ordering};

/// Bits of [`Shared::pending`].
pub mod pending {
    #![allow(missing_docs)]
    pub const KICK: u32 = 1;
    /// Other processors want this one to drop writable translations of pages that became code, or of removed regions.
    pub const TLB_SYNC: u32 = 4;
    /// Decoded code may have changed in memory: check it before running it again.
    pub const CODE_CHANGED: u32 = 8;
}

/// The part of a processor that other threads touch.
#[derive(Default)]
pub struct Shared {
    /// Physical events; see [`pending`].
    pub pending: AtomicU32,
    /// True inside VMRUN.
    pub running: std::sync::atomic::AtomicBool,
    /// The machine's TLB-sync generation this processor has caught up with.
    pub synced: std::sync::atomic::AtomicU64,
    /// True inside [`Shared::wait`].
    pub waiting: std::sync::atomic::AtomicBool,
    /// Woken by kicks.
    pub wake: (std::sync::Mutex<()>, std::sync::Condvar),
}

impl Shared {
    /// A physical interrupt: the processor leaves the guest with VMEXIT_INTR, now or at its next VMRUN.
    pub fn kick(&self) {
        self.pending.fetch_or(pending::KICK, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) {
            drop(self.wake.0.lock());
            self.wake.1.notify_all();
        }
    }

    /// Takes a pending kick back; whether there was one.
    pub fn clear_kick(&self) -> bool {
        self.pending.fetch_and(!pending::KICK, Ordering::SeqCst) & pending::KICK != 0
    }

    /// Whether a kick is pending.
    pub fn kicked(&self) -> bool {
        self.pending.load(Ordering::SeqCst) & pending::KICK != 0
    }

    /// Blocks until a kick is pending (it stays pending) or the time is over; whether one is.
    pub fn wait(&self, timeout: Option<std::time::Duration>) -> bool {
        if self.kicked() {
            return true;
        }
        let deadline = timeout.and_then(|t| std::time::Instant::now().checked_add(t));
        self.waiting.store(true, Ordering::SeqCst);
        let mut guard = self.wake.0.lock().unwrap_or_else(|e| e.into_inner());
        while !self.kicked() {
            guard = match deadline {
                None => self.wake.1.wait(guard).unwrap_or_else(|e| e.into_inner()),
                Some(d) => {
                    let left = d.saturating_duration_since(std::time::Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    self.wake.1.wait_timeout(guard, left).unwrap_or_else(|e| e.into_inner()).0
                }
            };
        }
        drop(guard);
        self.waiting.store(false, Ordering::SeqCst);
        self.kicked()
    }
}
