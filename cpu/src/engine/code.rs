// SPDX-License-Identifier: Apache-2.0
//! Stores that hit decoded code.

use std::sync::atomic::Ordering;

use crate::engine::op::{Res, Stop};
use crate::mem::pending;
use crate::x86::state::Cpu;

impl Cpu {
    /// Before a write of `size` bytes at a host address: [`Stop::SelfModify`] if it hits the running block.
    #[inline]
    pub fn before_code_write(&mut self, host: usize, size: usize) -> Res {
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
        let mask = crate::mem::chunk_mask(host & 0xfff, size);
        if page.code.load(Ordering::SeqCst) & mask != 0 {
            page.code.fetch_and(!mask, Ordering::SeqCst);
            self.code_written();
        }
    }

    #[cold]
    fn code_written(&mut self) {
        self.stamp = self.stamp.wrapping_add(1);
        self.blocks.invalidations += 1;
        self.machine.signal(Some(&self.shared), pending::CODE_CHANGED);
    }
}
