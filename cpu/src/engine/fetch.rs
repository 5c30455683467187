// SPDX-License-Identifier: Apache-2.0
//! From RIP to the next block: links between blocks, look-up, comparison with memory, decoding.

use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction};
use std::sync::atomic::Ordering;

use super::block::{Block, MAX_INSTRUCTION, SINGLE, WINDOW, nowhere};
use super::op::{MAX_OPS, Op, Res, Stop, handler};
use super::returns::Returns;
use crate::mem::{PageInfo, chunk_mask};
use crate::x86::access::Access;
use crate::x86::int::fuse;
use crate::x86::paging::fetch_bank;
use crate::x86::state::{Cpu, LINK_NONE, LINK_RETURN, sreg};
use crate::x86::translate::{Context, translate};

/// Last cache line of a block that is asked for when it is entered: the lines before and it hold its first five ops.
const AHEAD: usize = 3;

/// Bytes that are read at a time to be decoded: most blocks are shorter.
const STRIDE: usize = 128;

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
    /// At a block's end: the first op of the next block if the exit taken (0, 1 or [`LINK_RETURN`]) is linked within the
    /// page or predicted, and nothing calls for attention; else null.
    #[inline(always)]
    pub(crate) fn chain(&mut self, link: u8) -> *const Op {
        // SAFETY: `block` is the running block; `near` points to a block of the arena or to NOWHERE, predicted returns
        // too. These exits are taken by a block's last instruction (or the op behind it): all of the block has retired.
        unsafe {
            let block = &*self.block;
            let next =
                if link == LINK_RETURN { self.returns.last().block } else { block.near[(link & 1) as usize] };
            if (*next).stamp != self.stamp || self.needs_attention() || self.instructions >= self.chain_limit
            {
                return core::ptr::null();
            }
            self.instructions += block.retired;
            self.pass_to(next)
        }
    }

    /// Makes `next` the running block; its first op.
    ///
    /// # Safety
    /// `next` must be a live block that agrees with memory, and its code what is at RIP.
    #[inline(always)]
    unsafe fn pass_to(&mut self, next: *const Block) -> *const Op {
        self.rb.gpr[17] = self.rip;
        self.block = next.cast_mut();
        // SAFETY: given.
        unsafe {
            for n in 2..=AHEAD {
                Block::prefetch(next, n);
            }
            Block::prefetch((*next).near[0], 1);
            Block::prefetch((*next).near[1], 1);
            Block::first(next)
        }
    }

    /// [`Cpu::chain`] to another page, through an indirect branch, or to a block that must be compared with memory
    /// first, in 64-bit code. The translation must be in the TLB and the block linked or in the front of the cache.
    #[inline(always)]
    pub(crate) fn chain_far(&mut self, op: *const Op) -> *const Op {
        if self.needs_attention() || self.instructions >= self.chain_limit || self.code_size != 8 {
            return core::ptr::null();
        }
        let linear = self.rip;
        let e = self.tlb.entry(fetch_bank(self.cpl), linear);
        if e.exec != self.tlb.tag(linear) {
            return core::ptr::null();
        }
        let host = e.addend.wrapping_add(linear) as usize;
        // SAFETY: `block` is the running block and `op` belongs to it; links and the front hold null or blocks of the
        // arena (dead ones have an old stamp and host 0), none of which crosses into a second page.
        unsafe {
            let block = self.block;
            let next = if self.link >= LINK_NONE {
                self.blocks.find_front(host, 8)
            } else {
                let next = (*block).links[(self.link & 1) as usize];
                if !next.is_null() && (*next).host == host { next } else { core::ptr::null_mut() }
            };
            if next.is_null() || ((*next).stamp != self.stamp && !self.check(next)) {
                return core::ptr::null();
            }
            if self.link == LINK_RETURN {
                self.returns.learn(next);
            }
            self.instructions += op.offset_from(Block::first(block)) as u64 + ((*op).len != 0) as u64;
            self.pass_to(next)
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
    pub(crate) fn next_block(&mut self, prev: *mut Block) -> Result<*mut Block, Stop> {
        let flushes = self.blocks.flushes;
        let b = self.lookup(false)?;
        // SAFETY: live.
        if !prev.is_null()
            && flushes == self.blocks.flushes
            && unsafe { (*b).host2 } == 0
            && self.code_size == 8
        {
            if self.link == LINK_RETURN {
                self.returns.learn(b);
                return Ok(b);
            }
            // SAFETY: both live.
            unsafe {
                let exit = (self.link & 1) as usize;
                (*prev).links[exit] = b;
                let from = self.rb.gpr[17];
                let same = (from ^ self.rip) >> 12 == 0 && (*prev).host >> 12 == (*b).host >> 12;
                (*prev).near[exit] = if same { b } else { nowhere() };
            }
        }
        Ok(b)
    }

    /// Looks up (or decodes) the block at RIP.
    #[inline]
    pub(crate) fn lookup(&mut self, single: bool) -> Result<*mut Block, Stop> {
        let (linear, left) = self.code_linear()?;
        let host = self.fetch_host(linear)?;
        let mode = self.code_size | if single { SINGLE } else { 0 };
        let indirect = self.link >= LINK_NONE;
        let b = self.blocks.find(host, mode, indirect);
        if b.is_null() {
            let b = self.decode(linear, left, host, mode)?;
            if indirect {
                self.blocks.bring_forward(b);
            }
            return Ok(b);
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

    /// Forgets all decoded code; no block may be running.
    #[cold]
    pub(crate) fn drop_blocks(&mut self) {
        self.blocks.clear();
        self.block = core::ptr::null_mut();
        self.returns = Returns::default();
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
        self.blocks.kill(b);
        self.decode(linear, left, host, mode)
    }

    /// Marks the block's chunks as code; true when every running processor is known to respect the marks.
    fn arm(&mut self, b: &mut Block) -> bool {
        let fresh = b.generation == 0;
        let offset = b.host & 0xfff;
        let parts = [(b.pages[0], b.host, offset, b.len as usize), (b.pages[1], b.host2, 0, b.tail as usize)];
        for (page, host, offset, len) in parts {
            if page.is_null() {
                continue;
            }
            // SAFETY: pages point into regions of `self.regions`; blocks are dropped when that snapshot changes.
            let page = unsafe { &*page };
            let mask = chunk_mask(offset, len);
            if fresh || page.code.load(Ordering::SeqCst) & mask != mask {
                let (generation, first) = self.machine.mark_code(page, mask, &self.shared);
                // This processor, too, may write the page by a translation from before the first mark.
                if self.shared.synced.load(Ordering::SeqCst) < generation {
                    self.tlb.protect_host_page((host & !0xfff) as u64);
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
                b.generation = generation;
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
        // SAFETY: as above.
        let code = unsafe { Block::code(b) };
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
            self.drop_blocks();
        }
        let in_page = (4096 - (host & 0xfff)).min(left.min(4096) as usize);
        let mut bytes = [0u8; WINDOW + 16];
        let limit = in_page.min(WINDOW);
        let mut available = 0;
        let mut host2 = 0usize;
        let max_ops = if mode & SINGLE != 0 { 1 } else { MAX_OPS };
        let code_size = mode & !SINGLE;
        let mut ops: [core::mem::MaybeUninit<Op>; MAX_OPS + 1] =
            [core::mem::MaybeUninit::uninit(); MAX_OPS + 1];
        let mut n = 0;
        let mut at = 0usize;
        let mut i = Instruction::default();
        let mut before = Instruction::default();
        let mut d = decoder(code_size, &[], 0);
        while n < max_ops && at < limit {
            if available < limit && available < at + MAX_INSTRUCTION {
                // A store between this and the first `check` is noticed there: it compares after having marked the chunks.
                let more = STRIDE.min(limit - available);
                // SAFETY: `host` was translated; `limit` bytes remain in its page.
                unsafe {
                    let from = (host + available) as *const u8;
                    core::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr().add(available), more);
                }
                available += more;
                d = decoder(code_size, &bytes[at..available], at);
            }
            d.decode_out(&mut i);
            let mut op;
            let ended;
            if i.is_invalid() && d.last_error() == DecoderError::NoMoreBytes {
                if available - at < MAX_INSTRUCTION {
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
                        d = decoder(code_size, &bytes[..available], 0);
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
                op = translate(&i, &Context { code_size, offset: at as u16 });
                at += i.len();
                ended = i.is_invalid() || i.flow_control() != FlowControl::Next;
            }
            if ended && n > 0 {
                // SAFETY: the op before has been written.
                let first = unsafe { ops[n - 1].assume_init_mut() };
                if let Some(f) = fuse::fuse(&before, first, &i) {
                    first.f = f;
                }
            }
            ops[n].write(op);
            n += 1;
            if ended {
                break;
            }
            core::mem::swap(&mut i, &mut before);
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
        let ops_bytes = n * size_of::<Op>();
        let b = self.blocks.allocate(size_of::<Block>() + ops_bytes + at) as *mut Block;
        // SAFETY: fresh arena memory of the right size and alignment: the head, the ops, the bytes.
        unsafe {
            b.write(Block {
                host,
                links: [core::ptr::null_mut(); 2],
                host2,
                generation: 0,
                pages,
                count: count as u16,
                len: len as u16,
                tail: tail as u16,
                mode,
                settled: false,
                stamp: u64::MAX,
                near: [nowhere(); 2],
                retired: count as u64,
            });
            let first = Block::first(b).cast_mut();
            core::ptr::copy_nonoverlapping(ops.as_ptr().cast::<Op>(), first, n);
            core::ptr::copy_nonoverlapping(bytes.as_ptr(), first.byte_add(ops_bytes).cast(), at);
        }
        // If another processor has written meanwhile, this one has fetched the bytes from before and may run them: once,
        // as a block without the stamp is compared again when it is entered next. To try until both agree would take as
        // long as the other processor likes.
        self.check(b);
        self.blocks.insert(b);
        Ok(b)
    }
}

/// A decoder of bytes that lie `at` bytes behind the block's start.
fn decoder(code_size: u8, bytes: &[u8], at: usize) -> Decoder<'_> {
    Decoder::with_ip(code_size as u32 * 8, bytes, at as u64, DecoderOptions::AMD)
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
        let (op, code) = unsafe { (&*self.stop_op, Block::code(self.block)) };
        let start = op.next.checked_sub(op.len as u16)? as usize;
        code.get(start..op.next as usize)
    }
}
