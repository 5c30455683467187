// SPDX-License-Identifier: Apache-2.0
//! Where returns lead: a ring of the last calls in flat code ([`super::processor::Processor::flat_code`]), as processors have one.
//!
//! A near call that returns into its own page notes the address and the block there, if its own block has learned it
//! (in `near[1]`, an exit that calls don't have). A near return takes the newest note away. If the address is right and
//! fetches are translated as they were at the call ([`super::chain::fetch_key`]), that block is next, without a look-up; else
//! the note is worth nothing. What software does to the stack between changes no result, only the time it takes.

use super::block::{Block, nowhere};
use super::tlb::PAGE_SHIFT;

const DEPTH: usize = 16;
/// Neither canonical nor even: no return goes there.
const NO_ADDRESS: u64 = 1 << 63 | 1;

/// What is noted of a call.
pub struct Return<P> {
    /// Where it returns to.
    pc: u64,
    /// [`super::chain::fetch_key`] at the call.
    key: u64,
    /// The block there, or one that never agrees with memory.
    pub(super) block: *const Block<P>,
    /// The call's block.
    from: *mut Block<P>,
}

/// The ring.
pub struct Returns<P> {
    ring: [Return<P>; DEPTH],
    top: usize,
}

impl<P> Default for Returns<P> {
    fn default() -> Self {
        let none = || Return { pc: NO_ADDRESS, key: 0, block: nowhere(), from: core::ptr::null_mut() };
        Returns { ring: core::array::from_fn(|_| none()), top: 0 }
    }
}

impl<P> Returns<P> {
    /// The note that was taken away last.
    #[inline(always)]
    pub fn last(&self) -> &Return<P> {
        &self.ring[(self.top + 1) % DEPTH]
    }

    /// Notes a call: where it returns to, if that is in its page, the key then, and its block.
    ///
    /// # Safety
    /// `from` must be a block of the arena.
    #[inline(always)]
    pub(super) unsafe fn note(&mut self, pc: Option<u64>, key: u64, from: *mut Block<P>) {
        // SAFETY: given.
        let block = unsafe { (*from).near[1] };
        self.top = (self.top + 1) % DEPTH;
        self.ring[self.top] = Return { pc: pc.unwrap_or(NO_ADDRESS), key, block, from };
    }

    /// Takes the newest note away: the address and the key.
    #[inline(always)]
    pub(super) fn take(&mut self) -> (u64, u64) {
        let note = &self.ring[self.top % DEPTH];
        self.top = self.top.wrapping_sub(1) % DEPTH;
        (note.pc, note.key)
    }

    /// After a return of which address and key were right ([`super::chain::take_return`]): the next time its call notes `next`, a
    /// block in one page.
    pub(super) fn learn(&mut self, next: *const Block<P>) {
        let from = self.last().from;
        // SAFETY: a note with an address names a block of the arena; blocks live as long as the ring.
        unsafe {
            if (*from).host >> PAGE_SHIFT == (*next).host >> PAGE_SHIFT {
                (*from).near[1] = next;
            }
        }
    }
}
