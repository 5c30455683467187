// SPDX-License-Identifier: Apache-2.0
//! The processors of a machine, as others find and signal them.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};

use super::shared::{Shared, signal};

/// The shared part of each processor, as a snapshot: who waits for processors must not keep them from anything.
#[derive(Default)]
pub(super) struct Processors(Mutex<Arc<Vec<Arc<Shared>>>>);

impl Processors {
    /// They, and nobody is added or removed meanwhile.
    pub(super) fn lock(&self) -> MutexGuard<'_, Arc<Vec<Arc<Shared>>>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// They as they are now.
    pub(super) fn now(&self) -> Arc<Vec<Arc<Shared>>> {
        self.lock().clone()
    }

    /// Adds one.
    pub(super) fn add(&self, shared: Arc<Shared>) {
        let mut all = self.lock();
        *all = Arc::new(all.iter().cloned().chain([shared]).collect());
    }

    /// Removes one.
    pub(super) fn remove(&self, shared: &Arc<Shared>) {
        let mut all = self.lock();
        *all = Arc::new(all.iter().filter(|s| !Arc::ptr_eq(s, shared)).cloned().collect());
    }

    /// Sets pending bits of each but `me`.
    pub(super) fn signal(&self, me: Option<&Arc<Shared>>, bits: u32) {
        signal(&self.lock(), me, bits);
    }

    /// The one with a number.
    pub(super) fn find(&self, index: u32) -> Option<Arc<Shared>> {
        let all = self.lock();
        // They are numbered as they come, mostly.
        let guess = all.get(index as usize).filter(|s| s.index() == index);
        guess.or_else(|| all.iter().find(|s| s.index() == index)).cloned()
    }

    /// Has each that sleeps in an access to memory leave its guest.
    pub(super) fn rouse(&self) {
        self.now().iter().for_each(|processor| processor.rouse());
    }

    /// Whether each that is running, but `me`, has caught up with `generation`.
    pub(super) fn caught_up(&self, generation: u64, me: Option<&Arc<Shared>>) -> bool {
        self.lock().iter().all(|s| {
            me.is_some_and(|m| Arc::ptr_eq(m, s))
                || !s.running.load(Ordering::SeqCst)
                || s.synced.load(Ordering::SeqCst) >= generation
        })
    }
}
