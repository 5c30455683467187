// SPDX-License-Identifier: Apache-2.0
//! The cache of decoded blocks, keyed by the host address of their first byte.
//!
//! **Staying true to memory.** Every block keeps a copy of its bytes and a stamp. A block whose stamp is not the
//! processor's is compared with memory before it runs. The processor takes a new stamp when something may have changed
//! code: a store that hit a chunk holding code (its own, or another processor's, which signals), and each VMRUN (the
//! host may have written in between). So that stores are noticed, the chunks of a block are marked in the page's
//! [`PageInfo`] *before* its bytes are read; pages with marks are written through the slow path. Another processor may
//! still hold a fast translation from before the mark: until it has caught up with the machine's generation, the block
//! is compared on every entry.

use super::architecture::Architecture;
use super::op::Op;
use crate::mem::PageInfo;

/// Blocks run one after the other without coming back to the run loop until so many instructions have retired.
pub const CHAIN: u64 = if cfg!(debug_assertions) { 512 } else { 2048 };
/// In a block's mode: it holds one instruction only, for running one at a time.
pub const SINGLE: u8 = 0x80;
/// In a block's mode: what it holds can be counted from outside ([`super::count`]).
pub const COUNTED: u8 = 0x40;

/// The head of a decoded run of instructions. Its ops and then its bytes lie behind it.
///
/// A block starts at a cache line. What going from block to block needs comes last, so that it shares the next line with
/// the first op: code of a large footprint is bound by such misses.
#[repr(C)]
pub struct Block<P> {
    /// Host address of the first byte; 0 once the block is dead.
    pub(super) host: usize,
    /// Blocks that followed through exit 0 and 1.
    pub(super) links: [*mut Block<P>; 2],
    /// Host address of the second page, 0 when there is none.
    pub(super) host2: usize,
    /// The machine's generation at which the pages were marked as code.
    pub(super) generation: u64,
    /// The pages' marks.
    pub(super) pages: [*const PageInfo; 2],
    /// Instructions in the block.
    pub(super) count: u16,
    /// Bytes in the first page.
    pub(super) len: u16,
    /// Bytes in the second page (the last instruction crosses).
    pub(super) tail: u16,
    /// What decoding depended on, with [`SINGLE`] and [`COUNTED`].
    pub(super) mode: u8,
    /// Every running processor knows that the pages hold code.
    pub(super) settled: bool,
    /// Equal to [`crate::x86::state::Cpu::stamp`] when known to agree with memory.
    pub(super) stamp: u64,
    /// The links whose block starts in the same page, so that its translation is this block's; else a block that never
    /// agrees with memory.
    pub(super) near: [*const Block<P>; 2],
    /// `count`, where it is at hand.
    pub(super) retired: u64,
}

const LINE: usize = 64;
const _: () = assert!(size_of::<Block<()>>() == LINE + LINE / 2);

impl<P: Architecture> Block<P> {
    /// The first op; the last one always stops.
    ///
    /// # Safety
    /// `block` must point into the arena.
    #[inline(always)]
    pub unsafe fn first(block: *const Self) -> *const Op<P> {
        const { assert!(size_of::<Op<P>>() == LINE / 2) };
        // SAFETY: the ops follow the head in the same allocation.
        unsafe { block.add(1).cast() }
    }

    /// What decoding depended on: the processor's mode.
    ///
    /// # Safety
    /// `block` must point to a live block of the arena.
    pub unsafe fn mode(block: *const Self) -> u8 {
        // SAFETY: given.
        unsafe { (*block).mode & !(SINGLE | COUNTED) }
    }

    /// Instructions in it.
    ///
    /// # Safety
    /// `block` must point to a live block of the arena.
    pub unsafe fn count(block: *const Self) -> usize {
        // SAFETY: given.
        unsafe { (*block).count as usize }
    }

    /// The block's bytes as they were decoded.
    ///
    /// # Safety
    /// `block` must point to a live block of the arena.
    pub unsafe fn code<'a>(block: *const Self) -> &'a [u8] {
        // SAFETY: `count` ops, the one behind the last and the bytes follow the head in the same allocation.
        unsafe {
            let ops = Self::first(block);
            let bytes = ops.add((*block).count as usize + 1).cast();
            core::slice::from_raw_parts(bytes, (*block).len as usize + (*block).tail as usize)
        }
    }
}

impl<P> Block<P> {
    /// Whether `size` bytes at a host address touch the block.
    pub fn overlaps(&self, host: usize, size: usize) -> bool {
        let hit = |base: usize, len: usize| host < base + len && base < host + size;
        hit(self.host, self.len as usize) || (self.tail != 0 && hit(self.host2, self.tail as usize))
    }

    /// Has the processor fetch the `n`-th cache line of the block; line 1 is what entering it needs. Any address will
    /// do.
    #[inline(always)]
    pub fn prefetch(block: *const Self, n: usize) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint that never faults.
        unsafe {
            use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(block.wrapping_byte_add(n * LINE).cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (block, n);
    }
}

/// See [`Block::near`].
struct Nowhere(Block<()>);
// SAFETY: never written; its pointers are null and never followed.
unsafe impl Sync for Nowhere {}
static NOWHERE: Nowhere = Nowhere(Block {
    host: 0,
    links: [core::ptr::null_mut(); 2],
    host2: 0,
    generation: 0,
    pages: [core::ptr::null(); 2],
    count: 0,
    len: 0,
    tail: 0,
    mode: 0,
    settled: false,
    stamp: u64::MAX,
    near: [core::ptr::null(); 2],
    retired: 0,
});

/// A block that never agrees with memory.
pub fn nowhere<P>() -> *const Block<P> {
    // Nothing in a head but pointers depends on whose it is.
    (&raw const NOWHERE.0).cast()
}

#[derive(Clone)]
#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "only its address is used")] [u8; LINE]);

const CHUNK_BYTES: usize = 256 << 10;
/// All blocks are dropped when they take more than this.
const LIMIT_BYTES: usize = 128 << 20;
const FRONT_BITS: usize = 14;
/// log2 of the entries of an empty table.
const TABLE_BITS: usize = 12;

type Slot<P> = (usize, *mut Block<P>);
const fn empty<P>() -> Slot<P> {
    (0, core::ptr::null_mut())
}

/// All blocks of one processor.
pub struct BlockCache<P> {
    /// Chunks that never grow. Vectors, of which a pointer is to be had without a reference to all of the chunk.
    arena: Vec<Vec<Line>>,
    used: usize,
    /// Open addressing; a null pointer ends a search, a key of 0 is a dead block's.
    table: Vec<Slot<P>>,
    /// Entries that don't end a search: live blocks' and dead ones'.
    count: usize,
    /// Direct-mapped front of the table for targets of indirect branches; blocks that lie in one page only.
    front: Box<[Slot<P>]>,
    /// Blocks decoded so far, for statistics.
    pub(super) decoded_blocks: u64,
    /// Instructions decoded so far.
    pub(super) decoded_instructions: u64,
    /// Stores that hit decoded code.
    pub(super) invalidations: u64,
    /// Comparisons with memory.
    pub(super) checks: u64,
    /// Whole flushes.
    pub(super) flushes: u64,
}

impl<P> Default for BlockCache<P> {
    fn default() -> Self {
        BlockCache {
            arena: Vec::new(),
            used: CHUNK_BYTES,
            table: vec![empty(); 1 << TABLE_BITS],
            count: 0,
            front: vec![empty(); 1 << FRONT_BITS].into_boxed_slice(),
            decoded_blocks: 0,
            decoded_instructions: 0,
            invalidations: 0,
            checks: 0,
            flushes: 0,
        }
    }
}

/// What a block is found by: its host address, with the mode in the bits that addresses leave free. Never 0.
#[inline(always)]
fn key(host: usize, mode: u8) -> usize {
    host ^ (mode as usize) << (usize::BITS - 8)
}

fn hash(key: usize) -> usize {
    ((key as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) as usize
}

impl<P> BlockCache<P> {
    /// Drops everything. No block may be running or linked to afterwards.
    pub fn clear(&mut self) {
        self.arena.truncate(1);
        self.used = if self.arena.is_empty() { CHUNK_BYTES } else { 0 };
        self.table.clear();
        self.table.resize(1 << TABLE_BITS, empty());
        self.front.fill(empty());
        self.count = 0;
        self.flushes += 1;
    }

    /// Bytes held by decoded code.
    pub fn bytes(&self) -> usize {
        self.arena.len() * CHUNK_BYTES + self.table.len() * size_of::<Slot<P>>()
    }

    /// Whether there is no room for more.
    pub fn full(&self) -> bool {
        self.arena.len() * CHUNK_BYTES > LIMIT_BYTES
    }

    /// `size` bytes, aligned to a cache line, alive until [`BlockCache::clear`].
    pub fn allocate(&mut self, size: usize) -> *mut u8 {
        let size = size.next_multiple_of(LINE);
        debug_assert!(size <= CHUNK_BYTES);
        if self.used + size > CHUNK_BYTES {
            self.arena.push(vec![Line([0; LINE]); CHUNK_BYTES / LINE]);
            self.used = 0;
        }
        let chunk = self.arena.len() - 1;
        let p = self.arena[chunk].as_mut_ptr().cast::<u8>();
        // SAFETY: used + size <= CHUNK_BYTES.
        let p = unsafe { p.add(self.used) };
        self.used += size;
        p
    }

    #[inline(always)]
    fn front_slot(host: usize) -> usize {
        (host ^ (host >> 10)) & ((1 << FRONT_BITS) - 1)
    }

    /// The block for a key if the front has it, else null.
    #[inline(always)]
    pub fn find_front(&self, host: usize, mode: u8) -> *mut Block<P> {
        let (k, block) = self.front[Self::front_slot(host)];
        if k == key(host, mode) { block } else { core::ptr::null_mut() }
    }

    /// The block for a key, or null. `front`: by way of the front, which remembers it.
    #[inline(always)]
    pub fn find(&mut self, host: usize, mode: u8, front: bool) -> *mut Block<P> {
        if !front {
            return self.search(host, mode);
        }
        let b = self.find_front(host, mode);
        if !b.is_null() {
            return b;
        }
        let b = self.search(host, mode);
        if !b.is_null() {
            self.bring_forward(b);
        }
        b
    }

    fn search(&self, host: usize, mode: u8) -> *mut Block<P> {
        let mask = self.table.len() - 1;
        let key = key(host, mode);
        let mut at = hash(key) & mask;
        loop {
            let (k, b) = self.table[at];
            if k == key || b.is_null() {
                return b;
            }
            at = (at + 1) & mask;
        }
    }

    /// Has the front find the block.
    pub(super) fn bring_forward(&mut self, block: *mut Block<P>) {
        // SAFETY: a live block of the arena.
        let b = unsafe { &*block };
        if b.host2 == 0 {
            self.front[Self::front_slot(b.host)] = (key(b.host, b.mode), block);
        }
    }

    /// Lets nothing find the block any more, and no link to it hold.
    pub(super) fn kill(&mut self, block: *mut Block<P>) {
        // SAFETY: a block of the arena; a dead block's stamp never equals the processor's.
        let b = unsafe { &mut *block };
        self.front[Self::front_slot(b.host)] = empty();
        let mask = self.table.len() - 1;
        let mut at = hash(key(b.host, b.mode)) & mask;
        while !self.table[at].1.is_null() {
            if self.table[at].1 == block {
                self.table[at].0 = 0;
            }
            at = (at + 1) & mask;
        }
        b.host = 0;
        b.stamp = u64::MAX;
    }

    /// Lets the block be found.
    pub(super) fn insert(&mut self, block: *mut Block<P>) {
        if (self.count + 1) * 2 > self.table.len() {
            let live = self.table.iter().filter(|(key, _)| *key != 0).count();
            let len = if live * 4 > self.table.len() { self.table.len() * 2 } else { self.table.len() };
            let old = core::mem::replace(&mut self.table, vec![empty(); len]);
            self.count = 0;
            for (key, b) in old {
                // Dead blocks are left behind.
                if key != 0 {
                    self.place(key, b);
                }
            }
        }
        // SAFETY: a block of the arena.
        let key = unsafe { key((*block).host, (*block).mode) };
        self.place(key, block);
    }

    /// Dead blocks' places are used again: code that is rewritten all the time must not make the table grow, nor the
    /// searches in it.
    fn place(&mut self, key: usize, block: *mut Block<P>) {
        let mask = self.table.len() - 1;
        let mut at = hash(key) & mask;
        while !self.table[at].1.is_null() && self.table[at].0 != 0 {
            at = (at + 1) & mask;
        }
        self.count += self.table[at].1.is_null() as usize;
        self.table[at] = (key, block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(cache: &mut BlockCache<()>, host: usize) -> *mut Block<()> {
        let b = cache.allocate(size_of::<Block<()>>()).cast::<Block<()>>();
        // SAFETY: fresh memory of the right size; NOWHERE's pointers are null or NOWHERE's.
        unsafe {
            b.copy_from_nonoverlapping(&raw const NOWHERE.0, 1);
            (*b).host = host;
            (*b).mode = 8;
        }
        b
    }

    #[test]
    fn code_that_is_rewritten_for_ever_takes_no_more_of_the_table() {
        let mut cache = BlockCache::<()>::default();
        for round in 0..1 << 15 {
            let host = 0x1000 + (round % 1000) * 16;
            let b = block(&mut cache, host);
            cache.insert(b);
            assert_eq!(cache.search(host, 8), b);
            cache.kill(b);
            assert!(cache.search(host, 8).is_null());
        }
        assert_eq!(cache.table.len(), 1 << TABLE_BITS);
        assert!(cache.count <= 1000, "{} entries have to be searched", cache.count);
    }

    #[test]
    fn blocks_are_found_however_many_there_are() {
        let mut cache = BlockCache::<()>::default();
        let blocks: Vec<_> = (0..1 << 14).map(|n| block(&mut cache, 0x10_0000 + n * 3)).collect();
        blocks.iter().for_each(|b| cache.insert(*b));
        blocks.iter().step_by(2).for_each(|b| cache.kill(*b));
        for (n, b) in blocks.iter().enumerate() {
            let found = cache.search(0x10_0000 + n * 3, 8);
            assert_eq!(found, if n % 2 == 0 { core::ptr::null_mut() } else { *b });
        }
    }
}
