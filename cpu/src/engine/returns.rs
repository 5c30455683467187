// SPDX-License-Identifier: Apache-2.0
//! Where returns lead: a ring of the last calls in 64-bit code, as processors have one.
//!
//! A near call that returns into its own page notes the address and the block there, if its own block has learned it
//! (in `near[1]`, an exit that calls don't have). A near return takes the newest note away. If the address is right and
//! fetches are translated as they were at the call ([`Cpu::fetch_key`]), that block is next, without a look-up; else
//! the note is worth nothing. What software does to the stack between changes no result, only the time it takes.

use super::block::{Block, nowhere};
use crate::x86::state::Cpu;

const DEPTH: usize = 16;
/// Not canonical, so that no return goes there.
const NO_ADDRESS: u64 = 1 << 63;

/// What is noted of a call.
#[derive(Clone, Copy)]
pub struct Return {
    /// Where it returns to.
    rip: u64,
    /// [`Cpu::fetch_key`] at the call.
    key: u64,
    /// The block there, or one that never agrees with memory.
    pub block: *const Block,
    /// The call's block.
    from: *mut Block,
}

/// The ring.
pub struct Returns {
    ring: [Return; DEPTH],
    top: usize,
}

impl Default for Returns {
    fn default() -> Self {
        let none = Return { rip: NO_ADDRESS, key: 0, block: nowhere(), from: core::ptr::null_mut() };
        Returns { ring: [none; DEPTH], top: 0 }
    }
}

impl Returns {
    /// The note that was taken away last.
    #[inline(always)]
    pub fn last(&self) -> &Return {
        &self.ring[(self.top + 1) % DEPTH]
    }

    /// After a return of which address and key were right ([`Cpu::take_return`]): the next time its call notes `next`, a
    /// block in one page.
    pub(crate) fn learn(&mut self, next: *const Block) {
        let from = self.last().from;
        // SAFETY: a note with an address names a block of the arena; blocks live as long as the ring.
        unsafe {
            if (*from).host >> 12 == (*next).host >> 12 {
                (*from).near[1] = next;
            }
        }
    }
}

impl Cpu {
    /// Two equal keys: the same linear address is fetched from the same host address.
    #[inline(always)]
    fn fetch_key(&self) -> u64 {
        self.tlb.key ^ self.cpl as u64
    }

    /// Notes a call of the running block, which ends with it, to return to `next`.
    #[inline(always)]
    pub(crate) fn note_call(&mut self, next: u64) {
        let same_page = (next ^ self.rb.gpr[17]) >> 12 == 0;
        // SAFETY: `block` is the running block.
        let block = unsafe { (*self.block).near[1] };
        let note = Return {
            rip: if same_page { next } else { NO_ADDRESS },
            key: self.fetch_key(),
            block,
            from: self.block,
        };
        let top = (self.returns.top + 1) % DEPTH;
        self.returns.top = top;
        self.returns.ring[top] = note;
    }

    /// Takes the newest note away; whether a return to `target` is the one it is about. Then the target is canonical,
    /// and the exit is [`LINK_RETURN`].
    ///
    /// [`LINK_RETURN`]: crate::x86::state::LINK_RETURN
    #[inline(always)]
    pub(crate) fn take_return(&mut self, target: u64) -> bool {
        let top = self.returns.top;
        self.returns.top = top.wrapping_sub(1) % DEPTH;
        let note = &self.returns.ring[top % DEPTH];
        note.rip == target && note.key == self.fetch_key()
    }
}
