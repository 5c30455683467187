// SPDX-License-Identifier: Apache-2.0
//! Decoded code stays true to memory: marks on pages that hold code, stores that hit them, comparison of blocks.

use std::sync::atomic::Ordering;

use super::architecture::Architecture;
use super::block::Block;
use super::op::{Res, Stop};
use super::state::Engine;
use crate::mem::{PAGE_SIZE, PageInfo, chunk_mask, host_equal, pending};

impl<P: Architecture> Engine<P> {
    /// Before a write of `size` bytes at a host address: [`Stop::SelfModify`] if it hits the running block.
    #[inline]
    pub fn before_code_write(&self, host: usize, size: usize) -> Res {
        if self.single || self.block.is_null() {
            return Ok(());
        }
        // SAFETY: `block` is the running block, alive until the run loop changes it.
        let b = unsafe { &*self.block };
        if b.overlaps(host, size) { Err(Stop::SelfModify) } else { Ok(()) }
    }

    /// After a write through the slow path: tells every processor if it hit decoded code.
    #[inline]
    pub fn after_code_write(&mut self, host: usize, size: usize) {
        let Some(page) = self.regions.page_near(host, &mut self.region_guess) else { return };
        let mask = chunk_mask(host % PAGE_SIZE, size);
        if page.code.load(Ordering::SeqCst) & mask != 0 {
            page.code.fetch_and(!mask, Ordering::SeqCst);
            self.code_written();
        }
    }

    #[cold]
    fn code_written(&mut self) {
        self.distrust_blocks();
        self.blocks.invalidations += 1;
        self.machine.signal(Some(&self.shared), pending::CODE_CHANGED);
    }

    /// Has every block compared with memory before it runs again.
    #[inline(always)]
    pub fn distrust_blocks(&mut self) {
        self.stamp = self.stamp.wrapping_add(1);
    }

    /// Catches up with the machine: no translation from before may be used for writes or for removed regions.
    pub(super) fn catch_up(&mut self) {
        self.shared.pending.fetch_and(!pending::TLB_SYNC, Ordering::SeqCst);
        let generation = self.machine.generation();
        let regions = self.machine.regions();
        let extended = regions.extends(&self.regions);
        self.regions = regions;
        if extended {
            self.tlb.protect_all();
        } else {
            self.tlb.flush_all();
            self.drop_blocks();
        }
        self.shared.synced.store(generation, Ordering::SeqCst);
    }

    /// Marks chunks of the page with the host address `host` in it; returns the generation that knows of them.
    fn mark(&mut self, page: &PageInfo, host: usize, mask: u64) -> u64 {
        let (generation, first) = self.machine.mark_code(page, mask, &self.shared);
        // This processor, too, may write the page by a translation from before the first mark.
        if self.shared.synced.load(Ordering::SeqCst) < generation {
            self.tlb.protect_host_page((host - host % PAGE_SIZE) as u64);
        }
        if first {
            // Its own mark is no reason to catch up, if there was none before.
            let _ = self.shared.synced.compare_exchange(
                generation - 1,
                generation,
                Ordering::SeqCst,
                Ordering::SeqCst,
            );
        }
        generation
    }

    /// Has the next store to the chunk of memory at `host` change this processor's stamp, or be pending
    /// ([`pending::CODE_CHANGED`]), as if code lay there. Counts from when the generation that it returns is
    /// [settled](Engine::settled). None if no region has the chunk.
    pub fn watch(&mut self, host: usize) -> Option<u64> {
        let regions = self.regions.clone();
        let page = regions.page(host)?;
        Some(self.mark(page, host, chunk_mask(host % PAGE_SIZE, 1)))
    }

    /// Whether all other processors that run know the marks of `generation`.
    pub fn settled(&self, generation: u64) -> bool {
        self.machine.caught_up(generation, Some(&self.shared))
    }

    /// Marks the block's chunks as code; true when every running processor is known to respect the marks.
    fn arm(&mut self, b: &mut Block<P>) -> bool {
        let fresh = b.generation == 0;
        let offset = b.host % PAGE_SIZE;
        let parts = [(b.pages[0], b.host, offset, b.len as usize), (b.pages[1], b.host2, 0, b.tail as usize)];
        for (page, host, offset, len) in parts {
            if page.is_null() {
                continue;
            }
            // SAFETY: pages point into regions of `self.regions`; blocks are dropped when one is taken away.
            let page = unsafe { &*page };
            let mask = chunk_mask(offset, len);
            if fresh || page.code.load(Ordering::SeqCst) & mask != mask {
                b.generation = self.mark(page, host, mask);
                b.settled = false;
            }
        }
        if !b.settled {
            b.settled = self.machine.caught_up(b.generation, Some(&self.shared));
        }
        b.settled
    }

    /// Compares a block with memory; gives it the processor's stamp if it agrees and will be told of changes.
    pub(super) fn check(&mut self, b: *mut Block<P>) -> bool {
        self.blocks.checks += 1;
        // SAFETY: a live block, not otherwise borrowed.
        let settled = self.arm(unsafe { &mut *b });
        // SAFETY: as above.
        let (block, code) = unsafe { (&*b, Block::code(b)) };
        let (first, second) = code.split_at(block.len as usize);
        // SAFETY: the block's pages are registered memory (translated just now or by the link's check). An answer that a
        // racing write makes wrong is corrected by the next stamp.
        let same = unsafe {
            host_equal(first, block.host as *const u8)
                && (block.tail == 0 || host_equal(second, block.host2 as *const u8))
        };
        if same && settled {
            // SAFETY: as above.
            unsafe { (*b).stamp = self.stamp };
        }
        same
    }
}
