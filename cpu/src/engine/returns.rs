// SPDX-License-Identifier: Apache-2.0
//! Where returns lead: a ring of the last calls in flat code ([`Processor::flat_code`]), as processors have one.
//!
//! A near call that returns into its own page notes the address and the block there, if its own block has learned it
//! (in `near[1]`, an exit that calls don't have). A near return takes the newest note away. If the address is right and
//! fetches are translated as they were at the call ([`fetch_key`]), that block is next, without a look-up; else
//! the note is worth nothing. What software does to the stack between changes no result, only the time it takes.

use super::block::{Block, nowhere};
use super::processor::Processor;
use super::tlb::PAGE_SHIFT;

const DEPTH: usize = 16;
/// Neither canonical nor even: no return goes there.
const NO_ADDRESS: u64 = 1 << 63 | 1;

/// What is noted of a call.
pub struct Return<P> {
    /// Where it returns to.
    pc: u64,
    /// [`fetch_key`] at the call.
    key: u64,
    /// The block there, or one that never agrees with memory.
    pub block: *const Block<P>,
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

    /// After a return of which address and key were right ([`take_return`]): the next time its call notes `next`, a
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

/// Two equal keys: the same linear address is fetched from the same host address.
#[inline(always)]
fn fetch_key<P: Processor>(cpu: &P) -> u64 {
    cpu.engine().tlb.key() ^ cpu.privilege()
}

/// Notes a call of the running block, which ends with it, to return to `next`.
#[inline(always)]
pub fn note_call<P: Processor>(cpu: &mut P, next: u64) {
    let same_page = (next ^ cpu.block_pc()) >> PAGE_SHIFT == 0;
    let key = fetch_key(cpu);
    let engine = cpu.engine_mut();
    // SAFETY: `block` is the running block.
    let block = unsafe { (*engine.block).near[1] };
    let note = Return { pc: if same_page { next } else { NO_ADDRESS }, key, block, from: engine.block };
    let top = (engine.returns.top + 1) % DEPTH;
    engine.returns.top = top;
    engine.returns.ring[top] = note;
}

/// Takes the newest note away; whether a return to `target` is the one it is about. Then fetching there cannot fault,
/// and the exit is [`LINK_RETURN`](super::op::LINK_RETURN).
#[inline(always)]
pub fn take_return<P: Processor>(cpu: &mut P, target: u64) -> bool {
    let returns = &mut cpu.engine_mut().returns;
    let top = returns.top;
    returns.top = top.wrapping_sub(1) % DEPTH;
    let note = &returns.ring[top % DEPTH];
    let (pc, key) = (note.pc, note.key);
    pc == target && key == fetch_key(cpu)
}
