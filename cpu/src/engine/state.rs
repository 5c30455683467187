// SPDX-License-Identifier: Apache-2.0
//! The engine's part of a logical processor.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::architecture::{Access, Architecture, Operands};
use super::block::{Block, BlockCache};
use super::op::{LINK_NONE, Op};
use super::returns::Returns;
use super::tlb::{Entry, Tlb, index};
use crate::int::Int;
use crate::mem::lost::{load_for, load128_for, store_for, store128_for};
use crate::mem::{Machine, RegionTable, Shared};

/// What running ops takes, beside the architecture's own registers.
///
/// The first cache line is what memory handlers and the chain need; the TLB's context and key come behind it.
#[repr(C, align(64))]
pub struct Engine<P: Architecture> {
    /// The TLB's entries for data accesses as they are made now.
    pub(crate) bank: *const Entry,
    /// Local reasons to look closer before the next block ([`super::processor::Processor::attend`]); 0: none.
    pub(crate) attention: u32,
    /// Which exit of its last block a run took that stopped with [`super::op::Stop::EndBlock`]: 0, 1, [`LINK_NONE`] or
    /// [`LINK_RETURN`](super::op::LINK_RETURN).
    pub(crate) link: u8,
    /// The processor runs one instruction at a time.
    pub(crate) single: bool,
    /// The running block, to notice writes into itself and to chain from it.
    pub(crate) block: *mut Block<P>,
    /// The op that runs now, if [`Engine::executing`]; or at which the last run stopped.
    pub(crate) stop_op: *const Op<P>,
    /// The ops of [`Engine::block`] run: what stops half-way stops at [`Engine::stop_op`].
    pub(super) executing: bool,
    /// Retired instructions.
    pub(crate) instructions: u64,
    /// The run loop gets a look before the next block when so many instructions have retired.
    pub(crate) chain_limit: u64,
    /// The same for blocks that are not linked within the page: what changes the privilege leads to such.
    pub(crate) far_limit: u64,
    /// Blocks whose stamp is another one are checked against memory before they run.
    pub(crate) stamp: u64,
    /// Shared with other threads.
    pub(crate) shared: Arc<Shared>,
    /// Software TLB.
    pub(crate) tlb: Tlb<P>,
    /// The last calls.
    pub(crate) returns: Returns<P>,
    /// Decoded code.
    pub(crate) blocks: BlockCache<P>,
    /// The machine the processor is in.
    pub(crate) machine: Arc<Machine>,
    /// Snapshot of the machine's regions.
    pub(crate) regions: Arc<RegionTable>,
    /// Index of the region that the last look-up found; of a nested table, the last look-up of one.
    pub(crate) region_guess: usize,
    table_guess: usize,
}

// SAFETY: the pointers lead to what the engine itself owns, which moves with it: `bank` into the TLB's box; `block`,
// `stop_op`, the links of blocks and the notes of returns into the arena of `blocks` (or to a constant). The pages that
// blocks point to belong to `regions`, which is shared and made for it.
unsafe impl<P: Architecture> Send for Engine<P> {}

impl<P: Architecture> Engine<P> {
    /// That of a new processor, attached to its machine.
    pub fn new(machine: Arc<Machine>) -> Self {
        let shared = Arc::new(Shared::default());
        machine.attach(shared.clone());
        let tlb = Tlb::default();
        Engine {
            bank: tlb.bank(0),
            attention: 0,
            link: LINK_NONE,
            single: false,
            block: core::ptr::null_mut(),
            stop_op: core::ptr::null(),
            executing: false,
            instructions: 0,
            chain_limit: 0,
            far_limit: 0,
            stamp: 0,
            shared,
            returns: Returns::default(),
            tlb,
            blocks: BlockCache::default(),
            regions: machine.regions(),
            machine,
            region_guess: 0,
            table_guess: 0,
        }
    }

    /// Retired instructions.
    pub fn instructions(&self) -> u64 {
        self.instructions
    }

    /// The same, while another thread may run the processor: some recent value.
    ///
    /// # Safety
    /// `engine` must be alive.
    pub unsafe fn instructions_of(engine: *const Self) -> u64 {
        // SAFETY: given; an aligned word.
        unsafe { (&raw const (*engine).instructions).read_volatile() }
    }

    /// The part that other threads touch.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Forgets every translation.
    pub fn flush_tlb(&mut self) {
        self.tlb.flush_all();
    }

    /// Forgets what other threads have asked for ([`crate::mem::flush`]).
    #[cold]
    pub(super) fn flush_asked(&mut self) {
        let (shared, tlb) = (&self.shared, &mut self.tlb);
        shared.flush(|what| {
            if what.all {
                tlb.flush_all();
                return;
            }
            if !what.physical.is_empty() {
                tlb.flush_physical(&what.physical);
            }
            for guest in &what.guests {
                tlb.flush_guest(*guest);
            }
            for (guest, pages) in &what.linear {
                tlb.flush_linear(*guest, pages);
            }
        });
    }

    /// What has been counted since the processor was made, by name.
    pub fn statistics(&self) -> [(&'static str, u64); 10] {
        [
            ("instructions", self.instructions),
            ("decoded_blocks", self.blocks.decoded_blocks),
            ("decoded_instructions", self.blocks.decoded_instructions),
            ("block_checks", self.blocks.checks),
            ("block_flushes", self.blocks.flushes),
            ("block_bytes", self.blocks.bytes() as u64),
            ("code_writes", self.blocks.invalidations),
            ("tlb_fills", self.tlb.fills),
            ("tlb_flushes", self.tlb.flushes),
            ("tlb_range_flushes", self.tlb.range_flushes),
        ]
    }

    /// Whether any physical event or local reason calls for attention before the next block.
    #[inline(always)]
    pub fn needs_attention(&self) -> bool {
        (self.shared.pending.load(Ordering::Relaxed) | self.attention) != 0
    }

    /// Whether `size` bytes at a host address lie in one region.
    pub(crate) fn in_memory(&mut self, host: usize, size: usize) -> bool {
        self.regions.contains_near(host, size, &mut self.region_guess)
    }

    /// Whether a nested table's entry at a host address lies in memory.
    pub(crate) fn table_in_memory(&mut self, host: usize) -> bool {
        self.regions.contains_near(host, 8, &mut self.table_guess)
    }

    /// Makes data accesses go by a bank of the TLB.
    #[inline(always)]
    pub fn set_bank(&mut self, bank: usize) {
        self.bank = self.tlb.bank(bank);
    }

    /// What to add to a linear address for the host's, if an access to `bytes` bytes there needs nothing but a
    /// translation in the TLB; None: take the slow path.
    #[inline(always)]
    pub(crate) fn addend(&self, linear: u64, bytes: usize, access: Access) -> Option<u64> {
        // SAFETY: `bank` points to the first entry of a whole bank (see `set_bank`), `index` stays inside.
        let e = unsafe { &*self.bank.add(index(linear)) };
        let tag = if access == Access::Write { e.write } else { e.read };
        // A filled entry maps its whole page to registered memory; the tag is that of the last byte's page, the entry
        // that of the first's: they agree only if both bytes are in it.
        (tag == self.tlb.tag(linear.wrapping_add(bytes as u64 - 1))).then_some(e.addend)
    }

    /// Host address of a data access that needs nothing but a translation in the TLB; None: take the slow path. For
    /// complete functions of ops, as memory that is lost finds [`Engine::stop_op`] noted.
    #[inline(always)]
    pub fn hit<T: Int>(&self, linear: u64, access: Access) -> Option<*mut T> {
        debug_assert!(!self.executing || !self.stop_op.is_null(), "an access of an op that is not known");
        self.addend(linear, T::BYTES, access).map(|addend| addend.wrapping_add(linear) as *mut T)
    }

    /// A load for the op by a fast half; None if it needs more than a translation in the TLB.
    #[inline(always)]
    pub fn load<T: Int>(&self, op: &Op<P>, linear: u64) -> Option<T> {
        let addend = self.addend(linear, T::BYTES, Access::Read)?;
        // SAFETY: memory that the TLB maps is registered, and its loss is expected.
        Some(unsafe { load_for(op, addend, linear) })
    }

    /// A store, as [`Engine::load`].
    #[inline(always)]
    pub fn store<T: Int>(&mut self, op: &Op<P>, linear: u64, v: T) -> Option<()> {
        let addend = self.addend(linear, T::BYTES, Access::Write)?;
        // SAFETY: as above, and writable.
        unsafe { store_for(op, addend, linear, v) };
        Some(())
    }

    /// A load of 16 bytes, as [`Engine::load`].
    #[inline(always)]
    pub fn load128(&self, op: &Op<P>, linear: u64) -> Option<[u64; 2]> {
        let addend = self.addend(linear, 16, Access::Read)?;
        // SAFETY: as above.
        Some(unsafe { load128_for(op, addend, linear) })
    }

    /// A store of 16 bytes, as [`Engine::load`].
    #[inline(always)]
    pub fn store128(&mut self, op: &Op<P>, linear: u64, v: [u64; 2]) -> Option<()> {
        let addend = self.addend(linear, 16, Access::Write)?;
        // SAFETY: as above.
        unsafe { store128_for(op, addend, linear, v) };
        Some(())
    }

    /// The block that runs, or has run last; null when there is none.
    pub fn running_block(&self) -> *const Block<P> {
        self.block
    }

    /// Changes when blocks go: until then their addresses are theirs.
    pub fn block_generation(&self) -> u64 {
        self.blocks.flushes
    }

    /// Instructions that have retired before `op`, which runs.
    #[inline]
    pub fn instructions_before(&self, op: &Op<P>) -> u64 {
        // SAFETY: `block` is the running block.
        let first = unsafe { Block::first(self.block) };
        let bytes = core::ptr::from_ref(op).addr().wrapping_sub(first.addr());
        self.instructions + (bytes / size_of::<Op<P>>()) as u64
    }

    /// The op at which the last run stopped, if it stopped at one.
    pub fn stopped_op(&self) -> Option<&Op<P>> {
        // SAFETY: set by the run that just stopped; its block is alive.
        unsafe { self.stop_op.as_ref() }
    }

    /// The instruction's bytes there.
    pub fn stopped_bytes(&self) -> Option<&[u8]> {
        let op = self.stopped_op()?;
        if self.block.is_null() {
            return None;
        }
        // SAFETY: the block at which the run stopped is alive.
        let code = unsafe { Block::code(self.block) };
        let start = op.next().checked_sub(op.length() as u16)? as usize;
        code.get(start..op.next() as usize)
    }

    /// Forgets all decoded code; no block may be running.
    #[cold]
    pub fn drop_blocks(&mut self) {
        self.blocks.clear();
        self.block = core::ptr::null_mut();
        self.returns = Returns::default();
    }
}

impl<P: Architecture> Drop for Engine<P> {
    fn drop(&mut self) {
        self.machine.detach(&self.shared);
    }
}
