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

use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction};
use std::sync::atomic::Ordering;

use super::access::Access;
use super::op::{MAX_OPS, Op, Res, Stop, handler};
use super::paging::fetch_bank;
use super::state::{Cpu, LINK_NONE, sreg};
use super::translate::{Context, translate};
use crate::mem::{PageInfo, chunk_mask};

/// Longest instruction (APM vol. 3, 1.1).
pub const MAX_INSTRUCTION: usize = 15;
/// Most bytes of a block.
const WINDOW: usize = MAX_OPS * MAX_INSTRUCTION;
/// Most blocks that run one after the other without coming back to the run loop.
pub const CHAIN: u32 = if cfg!(debug_assertions) { 32 } else { 256 };
/// In a block's mode: it holds one instruction only, for running one at a time.
pub const SINGLE: u8 = 0x80;

/// A decoded run of instructions.
pub struct Block {
    /// Equal to [`Cpu::stamp`] when known to agree with memory.
    pub stamp: u64,
    /// Host address of the first byte; 0 once the block is dead.
    pub host: usize,
    /// The ops; the last one always stops.
    pub first: *const Op,
    /// Blocks that followed through exit 0 and 1.
    pub links: [*mut Block; 2],
    /// The same where the next block starts in the same page, so that its translation is this block's; else a block
    /// that never agrees with memory.
    pub near: [*const Block; 2],
    /// Instructions in the block.
    pub count: u64,
    /// Code size (2, 4, 8), with [`SINGLE`].
    pub mode: u8,
    /// Every running processor knows that the pages hold code.
    settled: bool,
    /// Bytes in the first page.
    pub len: u16,
    /// Bytes in the second page (the last instruction crosses).
    pub tail: u16,
    /// Host address of the second page, 0 when there is none.
    pub host2: usize,
    generation: u64,
    pages: [*const PageInfo; 2],
    bytes: *const u8,
}

impl Block {
    /// Whether `size` bytes at a host address touch the block.
    pub fn overlaps(&self, host: usize, size: usize) -> bool {
        let hit = |base: usize, len: usize| host < base + len && base < host + size;
        hit(self.host, self.len as usize) || (self.tail != 0 && hit(self.host2, self.tail as usize))
    }

    /// The block's bytes as they were decoded.
    pub fn code(&self) -> &[u8] {
        // SAFETY: `bytes` was allocated in the arena with exactly this length and lives as long as the block.
        unsafe { core::slice::from_raw_parts(self.bytes, self.len as usize + self.tail as usize) }
    }
}

/// See [`Block::near`].
struct Nowhere(Block);
// SAFETY: never written; its pointers are null and never followed.
unsafe impl Sync for Nowhere {}
static NOWHERE: Nowhere = Nowhere(Block {
    stamp: u64::MAX,
    host: 0,
    first: core::ptr::null(),
    links: [core::ptr::null_mut(); 2],
    near: [core::ptr::null(); 2],
    count: 0,
    mode: 0,
    settled: false,
    len: 0,
    tail: 0,
    host2: 0,
    generation: 0,
    pages: [core::ptr::null(); 2],
    bytes: core::ptr::null(),
});

const CHUNK_BYTES: usize = 256 << 10;
/// All blocks are dropped when they take more than this.
const LIMIT_BYTES: usize = 40 << 20;
const FRONT_BITS: usize = 12;

/// All blocks of one processor.
pub struct BlockCache {
    arena: Vec<Box<[u64]>>,
    used: usize,
    table: Vec<*mut Block>,
    count: usize,
    /// Direct-mapped front of the table.
    front: Box<[*mut Block]>,
    /// Blocks decoded so far, for statistics.
    pub decoded_blocks: u64,
    /// Instructions decoded so far.
    pub decoded_instructions: u64,
    /// Stores that hit decoded code.
    pub invalidations: u64,
    /// Comparisons with memory.
    pub checks: u64,
    /// Whole flushes.
    pub flushes: u64,
}

impl Default for BlockCache {
    fn default() -> Self {
        BlockCache {
            arena: Vec::new(),
            used: CHUNK_BYTES,
            table: vec![core::ptr::null_mut(); 1 << 12],
            count: 0,
            front: vec![core::ptr::null_mut(); 1 << FRONT_BITS].into_boxed_slice(),
            decoded_blocks: 0,
            decoded_instructions: 0,
            invalidations: 0,
            checks: 0,
            flushes: 0,
        }
    }
}

fn hash(host: usize, mode: u8) -> usize {
    let h = (host as u64 ^ ((mode as u64) << 56)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (h >> 20) as usize
}

impl BlockCache {
    /// Drops everything. No block may be running or linked to afterwards.
    pub fn clear(&mut self) {
        self.arena.truncate(1);
        self.used = if self.arena.is_empty() { CHUNK_BYTES } else { 0 };
        self.table.clear();
        self.table.resize(1 << 12, core::ptr::null_mut());
        self.front.fill(core::ptr::null_mut());
        self.count = 0;
        self.flushes += 1;
    }

    /// Bytes held by decoded code.
    pub fn bytes(&self) -> usize {
        self.arena.len() * CHUNK_BYTES + self.table.len() * 8
    }

    fn full(&self) -> bool {
        self.arena.len() * CHUNK_BYTES > LIMIT_BYTES
    }

    /// `size` bytes, 8-byte aligned, alive until [`BlockCache::clear`].
    fn allocate(&mut self, size: usize) -> *mut u8 {
        let size = (size + 7) & !7;
        debug_assert!(size <= CHUNK_BYTES);
        if self.used + size > CHUNK_BYTES {
            self.arena.push(vec![0u64; CHUNK_BYTES / 8].into_boxed_slice());
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

    /// The block for a key.
    #[inline(always)]
    fn find(&mut self, host: usize, mode: u8) -> *mut Block {
        let slot = Self::front_slot(host);
        let b = self.front[slot];
        // SAFETY: pointers in the front are null or live blocks of the arena.
        if !b.is_null() && unsafe { (*b).host == host && (*b).mode == mode } {
            return b;
        }
        self.find_slow(host, mode)
    }

    fn find_slow(&mut self, host: usize, mode: u8) -> *mut Block {
        let mask = self.table.len() - 1;
        let mut at = hash(host, mode) & mask;
        loop {
            let b = self.table[at];
            if b.is_null() {
                return b;
            }
            // SAFETY: as above.
            if unsafe { (*b).host == host && (*b).mode == mode } {
                self.front[Self::front_slot(host)] = b;
                return b;
            }
            at = (at + 1) & mask;
        }
    }

    fn insert(&mut self, block: *mut Block) {
        if (self.count + 1) * 2 > self.table.len() {
            let old = core::mem::take(&mut self.table);
            self.table = vec![core::ptr::null_mut(); old.len() * 2];
            self.count = 0;
            for b in old {
                // SAFETY: as above. Dead blocks (host 0) are left behind.
                if !b.is_null() && unsafe { (*b).host } != 0 {
                    self.place(b);
                }
            }
        }
        self.place(block);
        // SAFETY: as above.
        self.front[Self::front_slot(unsafe { (*block).host })] = block;
    }

    fn place(&mut self, block: *mut Block) {
        let mask = self.table.len() - 1;
        // SAFETY: as above.
        let mut at = unsafe { hash((*block).host, (*block).mode) } & mask;
        while !self.table[at].is_null() {
            at = (at + 1) & mask;
        }
        self.table[at] = block;
        self.count += 1;
    }
}

/// The op behind the last instruction of a block that does not end in a branch: goes on with the next one.
fn fall_through(cpu: &mut Cpu, op: &Op) -> Res {
    let next = cpu.next_ip(op);
    Err(cpu.jump(cpu.mask_ip(next), 1))
}

/// #GP(0) for an instruction longer than 15 bytes.
fn too_long(cpu: &mut Cpu, _: &Op) -> Res {
    Err(cpu.gp(0))
}

impl Cpu {
    /// At a block's end: the first op of the next block if the exit taken is linked within the page and nothing calls
    /// for attention, else null.
    #[inline(always)]
    pub(super) fn chain(&mut self) -> *const Op {
        if self.link == LINK_NONE {
            return core::ptr::null();
        }
        // SAFETY: `block` is the running block; `near` points to a block of the arena or to NOWHERE. The exits 0 and 1
        // are taken by a block's last instruction (or the op behind it), so all of the block has retired.
        unsafe {
            let block = &*self.block;
            let next = block.near[(self.link & 1) as usize];
            if (*next).stamp != self.stamp || self.needs_attention() || self.chain_left == 0 {
                return core::ptr::null();
            }
            self.chain_left -= 1;
            self.link = LINK_NONE;
            self.instructions += block.count;
            self.rb.gpr[17] = self.rip;
            self.block = next.cast_mut();
            (*next).first
        }
    }

    /// Linear address of the instruction at RIP, with the limit check of legacy modes; also how many bytes the limit
    /// leaves.
    #[inline(always)]
    fn code_linear(&mut self) -> Result<(u64, u64), Stop> {
        if self.code_size == 8 {
            return Ok((self.rip, u64::MAX));
        }
        let cs = &self.seg[sreg::CS];
        let left = (cs.limit as u64).wrapping_add(1).wrapping_sub(self.rip);
        if self.rip > cs.limit as u64 {
            return Err(self.gp(0));
        }
        Ok(((cs.base as u32).wrapping_add(self.rip as u32) as u64, left))
    }

    /// Host address of the instruction bytes at `linear`.
    #[inline(always)]
    fn fetch_host(&mut self, linear: u64) -> Result<usize, Stop> {
        let bank = fetch_bank(self.cpl);
        let e = self.tlb.entry(bank, linear);
        if e.exec == self.tlb.tag(linear) {
            Ok(e.addend.wrapping_add(linear) as usize)
        } else {
            self.translate(bank, sreg::CS as u8, linear, 1, Access::Fetch)
        }
    }

    /// The block at RIP, decoded if need be and known to agree with memory. `prev` is the block that ran before, if
    /// its exit `self.link` always leads to this RIP.
    #[inline(always)]
    pub(super) fn next_block(&mut self, prev: *mut Block) -> Result<*mut Block, Stop> {
        let exit = (self.link & 1) as usize;
        if !prev.is_null() {
            // SAFETY: prev is the block that just ran.
            let p = unsafe { &*prev };
            let b = p.links[exit];
            // SAFETY: links are null or point to blocks of the arena (dead ones have an old stamp).
            if !b.is_null() && unsafe { (*b).stamp } == self.stamp {
                if core::ptr::eq(p.near[exit], b) {
                    return Ok(b);
                }
                if self.code_size == 8 {
                    let linear = self.rip;
                    let e = self.tlb.entry(fetch_bank(self.cpl), linear);
                    // SAFETY: as above.
                    if e.exec == self.tlb.tag(linear)
                        && e.addend.wrapping_add(linear) as usize == unsafe { (*b).host }
                    {
                        return Ok(b);
                    }
                }
            }
        }
        let flushes = self.blocks.flushes;
        let b = self.lookup(false)?;
        // A block that crosses into a second page is reached by look-up only: both translations must hold.
        // SAFETY: as above.
        if !prev.is_null()
            && flushes == self.blocks.flushes
            && unsafe { (*b).host2 } == 0
            && self.code_size == 8
        {
            // SAFETY: both live.
            unsafe {
                (*prev).links[exit] = b;
                let from = self.rb.gpr[17];
                let same = (from ^ self.rip) >> 12 == 0 && (*prev).host >> 12 == (*b).host >> 12;
                (*prev).near[exit] = if same { b } else { &raw const NOWHERE.0 };
            }
        }
        Ok(b)
    }

    /// Looks up (or decodes) the block at RIP.
    #[inline]
    pub(super) fn lookup(&mut self, single: bool) -> Result<*mut Block, Stop> {
        let (linear, left) = self.code_linear()?;
        let host = self.fetch_host(linear)?;
        let mode = self.code_size | if single { SINGLE } else { 0 };
        let b = self.blocks.find(host, mode);
        if b.is_null() {
            return self.decode(linear, left, host, mode);
        }
        // SAFETY: a live block.
        let block = unsafe { &*b };
        if block.host2 != 0 {
            let second = self.fetch_host((linear & !0xfff).wrapping_add(4096))?;
            if second & !0xfff != block.host2 {
                return self.replace(b, linear, left, host, mode);
            }
        }
        if block.len as u64 + block.tail as u64 > left {
            return self.replace(b, linear, left, host, mode);
        }
        if block.stamp != self.stamp && !self.check(b) {
            return self.replace(b, linear, left, host, mode);
        }
        Ok(b)
    }

    #[cold]
    fn replace(
        &mut self,
        b: *mut Block,
        linear: u64,
        left: u64,
        host: usize,
        mode: u8,
    ) -> Result<*mut Block, Stop> {
        // SAFETY: live; a dead block's stamp never equals the processor's.
        unsafe {
            (*b).host = 0;
            (*b).stamp = u64::MAX;
        }
        let slot = BlockCache::front_slot(host);
        self.blocks.front[slot] = core::ptr::null_mut();
        self.decode(linear, left, host, mode)
    }

    /// Marks the block's chunks as code; true when every running processor is known to respect the marks.
    fn arm(&mut self, b: &mut Block) -> bool {
        let offset = b.host & 0xfff;
        let parts = [(b.pages[0], b.host, offset, b.len as usize), (b.pages[1], b.host2, 0, b.tail as usize)];
        for (page, host, offset, len) in parts {
            if page.is_null() {
                continue;
            }
            // SAFETY: pages point into regions of `self.regions`; blocks are dropped when that snapshot changes.
            let page = unsafe { &*page };
            let mask = chunk_mask(offset, len);
            let old = page.code.load(Ordering::SeqCst);
            if old & mask != mask {
                page.code.fetch_or(mask, Ordering::SeqCst);
                if old == 0 {
                    self.tlb.protect_host_page((host & !0xfff) as u64);
                    b.generation = self.machine.advance(Some(&self.shared));
                } else {
                    b.generation = self.machine.generation();
                }
                b.settled = false;
            }
        }
        if !b.settled {
            b.settled = self.machine.caught_up(b.generation, Some(&self.shared));
        }
        b.settled
    }

    /// Compares a block with memory; gives it the processor's stamp if it agrees and will be told of changes.
    fn check(&mut self, b: *mut Block) -> bool {
        self.blocks.checks += 1;
        // SAFETY: a live block, not otherwise borrowed.
        let block = unsafe { &mut *b };
        let settled = self.arm(block);
        let code = block.code();
        let (first, second) = code.split_at(block.len as usize);
        // SAFETY: the block's pages are registered memory (translated just now or by the link's check).
        let same = unsafe {
            equal(first, block.host as *const u8)
                && (block.tail == 0 || equal(second, block.host2 as *const u8))
        };
        if same && settled {
            block.stamp = self.stamp;
        }
        same
    }

    /// Decodes the block at `host`.
    #[cold]
    fn decode(&mut self, linear: u64, left: u64, host: usize, mode: u8) -> Result<*mut Block, Stop> {
        if self.blocks.full() {
            self.blocks.clear();
            self.block = core::ptr::null_mut();
        }
        let in_page = (4096 - (host & 0xfff)).min(left.min(4096) as usize);
        let mut bytes = [0u8; WINDOW + 16];
        let mut available = in_page.min(WINDOW);
        // A store between this and `check` below is noticed there: it compares after having marked the chunks.
        // SAFETY: `host` was translated; in_page bytes remain in its page.
        unsafe { core::ptr::copy_nonoverlapping(host as *const u8, bytes.as_mut_ptr(), available) };
        let mut host2 = 0usize;
        let max_ops = if mode & SINGLE != 0 { 1 } else { MAX_OPS };
        let code_size = mode & !SINGLE;
        let mut ops: [core::mem::MaybeUninit<Op>; MAX_OPS + 1] =
            [core::mem::MaybeUninit::uninit(); MAX_OPS + 1];
        let mut n = 0;
        let mut at = 0usize;
        let mut i = Instruction::default();
        while n < max_ops && at < available {
            let window = (at + MAX_INSTRUCTION).min(available);
            let mut d =
                Decoder::with_ip(code_size as u32 * 8, &bytes[at..window], at as u64, DecoderOptions::AMD);
            d.decode_out(&mut i);
            let mut op;
            let ended;
            if i.is_invalid() && d.last_error() == DecoderError::NoMoreBytes {
                if window - at < MAX_INSTRUCTION {
                    // The instruction goes on behind the page (or the segment limit).
                    if n > 0 {
                        break;
                    }
                    let need = MAX_INSTRUCTION.min(left.min(64) as usize);
                    if available == in_page && need > in_page {
                        let next = (linear & !0xfff).wrapping_add(4096);
                        let next = if self.long_mode() { next } else { next as u32 as u64 };
                        let second = self.fetch_host(next)?;
                        host2 = second & !0xfff;
                        let more = need - in_page;
                        // SAFETY: `second` is the start of a translated page; more < 15.
                        unsafe {
                            core::ptr::copy_nonoverlapping(
                                second as *const u8,
                                bytes.as_mut_ptr().add(in_page),
                                more,
                            );
                        }
                        available += more;
                        continue;
                    }
                    if left < MAX_INSTRUCTION as u64 {
                        return Err(self.gp(0));
                    }
                }
                op = translate(&i, &Context { code_size, offset: at as u16 });
                op.f = handler(too_long);
                op.len = 1;
                op.next = at as u16 + 1;
                ended = true;
                at += 1;
            } else {
                let crosses = at + i.len() > in_page;
                if crosses && n > 0 {
                    break;
                }
                op = translate(&i, &Context { code_size, offset: at as u16 });
                at += i.len();
                ended = i.is_invalid() || i.flow_control() != FlowControl::Next;
            }
            ops[n].write(op);
            n += 1;
            if ended {
                break;
            }
        }
        self.blocks.decoded_instructions += n as u64;
        self.blocks.decoded_blocks += 1;
        let count = n;
        let mut end = translate(&Instruction::default(), &Context { code_size, offset: at as u16 });
        end.f = handler(fall_through);
        end.len = 0;
        end.next = at as u16;
        ops[n].write(end);
        n += 1;
        let len = at.min(in_page);
        let tail = at - len;
        if tail == 0 {
            host2 = 0;
        }
        let regions = self.regions.clone();
        let page = |h: usize| regions.page(h).map_or(core::ptr::null(), |p| p as *const PageInfo);
        let pages = [page(host), if host2 != 0 { page(host2) } else { core::ptr::null() }];
        let code = self.blocks.allocate(at);
        let first = self.blocks.allocate(n * size_of::<Op>()) as *mut Op;
        let b = self.blocks.allocate(size_of::<Block>()) as *mut Block;
        // SAFETY: fresh arena memory of the right sizes and alignment (8).
        unsafe {
            core::ptr::copy_nonoverlapping(bytes.as_ptr(), code, at);
            core::ptr::copy_nonoverlapping(ops.as_ptr().cast::<Op>(), first, n);
            b.write(Block {
                stamp: u64::MAX,
                host,
                first,
                links: [core::ptr::null_mut(); 2],
                near: [&raw const NOWHERE.0; 2],
                count: count as u64,
                mode,
                settled: false,
                len: len as u16,
                tail: tail as u16,
                host2,
                generation: 0,
                pages,
                bytes: code,
            });
        }
        if self.check(b) {
            self.blocks.insert(b);
            return Ok(b);
        }
        // Another processor wrote between reading and arming; the next look-up sees the new bytes.
        self.decode(linear, left, host, mode)
    }
}

/// Compares bytes with memory that others may write.
///
/// # Safety
/// `p` must be readable for `bytes.len()` bytes.
#[inline]
unsafe fn equal(bytes: &[u8], p: *const u8) -> bool {
    // SAFETY: given. Racing writes at worst give a wrong answer that the next stamp corrects.
    unsafe { libc::memcmp(bytes.as_ptr().cast(), p.cast(), bytes.len()) == 0 }
}

impl Cpu {
    /// The instruction bytes at which the last run stopped, for decode assists and traces.
    pub fn stopped_bytes(&self) -> Option<&[u8]> {
        if self.stop_op.is_null() || self.block.is_null() {
            return None;
        }
        // SAFETY: set by the run that just stopped; the block is alive.
        let (op, block) = unsafe { (&*self.stop_op, &*self.block) };
        let start = op.next.checked_sub(op.len as u16)? as usize;
        block.code().get(start..op.next as usize)
    }
}
