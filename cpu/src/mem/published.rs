// SPDX-License-Identifier: Apache-2.0
//! The table of regions, for those who may not wait: signal handlers, and code that may hold any lock.

use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::region::RegionTable;

/// A table as of now, to be looked at without a lock. A table that has been replaced stays until nobody looks.
#[derive(Default)]
pub(super) struct Published {
    now: AtomicPtr<RegionTable>,
    /// How many are looking.
    readers: AtomicUsize,
    /// What they may be looking at: the table of now, and older ones.
    kept: Mutex<Vec<Arc<RegionTable>>>,
}

impl Published {
    /// Lets `table` be the one that is looked at. The caller serialises calls.
    pub(super) fn publish(&self, table: &Arc<RegionTable>) {
        let mut kept = self.kept.lock().unwrap_or_else(|e| e.into_inner());
        kept.push(table.clone());
        self.now.store(Arc::as_ptr(table).cast_mut(), Ordering::SeqCst);
        // Whoever begins to look from here on finds the new one.
        if self.readers.load(Ordering::SeqCst) == 0 {
            let older = kept.len() - 1;
            kept.drain(..older);
        }
    }

    /// Looks at the table; None if there has never been one. Async-signal-safe if `look` is.
    pub(super) fn look<R>(&self, look: impl FnOnce(&RegionTable) -> R) -> Option<R> {
        self.readers.fetch_add(1, Ordering::SeqCst);
        // SAFETY: what was published is kept while there are readers.
        let result = unsafe { self.now.load(Ordering::SeqCst).as_ref() }.map(look);
        self.readers.fetch_sub(1, Ordering::SeqCst);
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::super::region::{Owner, Region};
    use super::*;

    #[test]
    fn who_looks_sees_a_whole_table_while_others_come() {
        let published = Published::default();
        assert_eq!(published.look(|_| ()), None);
        let region = |base| Region::new(base, 0x1000, Owner::User).unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let look = || {
                while !done.load(Ordering::SeqCst) {
                    // There is one region in each, here or there.
                    let seen = published.look(|t| [0x1000, 0x3000].map(|base| t.meets_user(base, 0x1000)));
                    assert!(seen.is_none_or(|[a, b]| a != b));
                }
            };
            scope.spawn(look);
            scope.spawn(look);
            for n in 0..1000 {
                let table = RegionTable::default().with(region(0x1000 + n % 2 * 0x2000)).unwrap();
                published.publish(&Arc::new(table));
            }
            done.store(true, Ordering::SeqCst);
        });
        published.publish(&Arc::default());
        assert_eq!(published.kept.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_look_within_a_look_keeps_the_table() {
        let published = Published::default();
        published.publish(&Arc::new(
            RegionTable::default().with(Region::new(0x1000, 0x1000, Owner::User).unwrap()).unwrap(),
        ));
        published.look(|table| {
            published.publish(&Arc::default());
            assert!(
                table.meets_user(0x1fff, 2) && !table.meets_user(0x2000, 1) && !table.meets_user(0x1800, 0)
            );
            assert_eq!(published.look(|new| new.meets_user(0, usize::MAX)), Some(false));
        });
    }
}
