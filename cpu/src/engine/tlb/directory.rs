// SPDX-License-Identifier: Apache-2.0
//! Where the last-level tables lie: a cache of the upper levels of the guest's tables (as x86's paging-structure
//! cache and arm64's walk cache).

use super::entry::CONTEXT_BITS;
use crate::engine::architecture::Architecture;

const SLOTS: usize = 256;

/// Where the last-level table for some linear addresses lies.
#[derive(Clone, Copy)]
pub struct Directory<R> {
    /// Host address of the table.
    pub host: u64,
    /// What the tables above it leave.
    pub rights: R,
}

struct Slot<R> {
    /// Linear address >> TABLE_SHIFT, over the context number.
    key: u64,
    /// Valid while this is the TLB's epoch.
    epoch: u64,
    directory: Directory<R>,
}

/// The cache. What it remembers from before the last flush of anything does not count.
pub(super) struct Directories<P: Architecture>(Box<[Slot<P::Rights>]>);

impl<P: Architecture> Default for Directories<P> {
    fn default() -> Self {
        let empty =
            || Slot { key: 0, epoch: 0, directory: Directory { host: 0, rights: P::Rights::default() } };
        Directories((0..SLOTS).map(|_| empty()).collect())
    }
}

impl<P: Architecture> Directories<P> {
    fn key(linear: u64, context: u64) -> u64 {
        (linear >> P::TABLE_SHIFT) << CONTEXT_BITS | context
    }

    fn slot(linear: u64) -> usize {
        (linear >> P::TABLE_SHIFT) as usize % SLOTS
    }

    #[inline]
    pub(super) fn find(&self, linear: u64, context: u64, epoch: u64) -> Option<Directory<P::Rights>> {
        let slot = &self.0[Self::slot(linear)];
        (slot.epoch == epoch && slot.key == Self::key(linear, context)).then_some(slot.directory)
    }

    pub(super) fn remember(
        &mut self,
        linear: u64,
        context: u64,
        epoch: u64,
        directory: Directory<P::Rights>,
    ) {
        self.0[Self::slot(linear)] = Slot { key: Self::key(linear, context), epoch, directory };
    }
}
