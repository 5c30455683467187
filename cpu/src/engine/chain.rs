// SPDX-License-Identifier: Apache-2.0
//! From a block's end to the next block without the run loop; calls and their returns.

use super::architecture::Operands;
use super::block::Block;
use super::op::{LINK_NONE, LINK_RETURN, Op};
use super::processor::Processor;
use super::state::Engine;
use super::tlb::PAGE_SHIFT;

/// Last cache line of a block that is asked for when it is entered: the lines before and it hold its first five ops.
const AHEAD: usize = 3;

/// At a block's end: the first op of the next block if the exit taken (0, 1 or [`LINK_RETURN`]) is linked within the
/// page or predicted, and nothing calls for attention; else null.
#[inline(always)]
pub(super) fn chain<P: Processor>(cpu: &mut P, link: u8) -> *const Op<P> {
    let engine = cpu.engine_mut();
    // SAFETY: `block` is the running block; `near` points to a block of the arena or to NOWHERE, predicted returns
    // too. These exits are taken by a block's last instruction (or the op behind it): all of the block has retired.
    unsafe {
        let block = &*engine.block;
        let next =
            if link == LINK_RETURN { engine.returns.last().block } else { block.near[(link & 1) as usize] };
        if (*next).stamp != engine.stamp
            || engine.needs_attention()
            || engine.instructions >= engine.chain_limit
        {
            return core::ptr::null();
        }
        engine.instructions += block.retired;
        pass_to(cpu, next)
    }
}

/// Makes `next` the running block; its first op.
///
/// # Safety
/// `next` must be a live block that agrees with memory, and its code what is at the program counter.
#[inline(always)]
unsafe fn pass_to<P: Processor>(cpu: &mut P, next: *const Block<P>) -> *const Op<P> {
    cpu.begin_block();
    cpu.engine_mut().block = next.cast_mut();
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

/// [`chain`] to another page, through an indirect branch, or to a block that must be compared with memory first, in flat
/// code. The translation must be in the TLB and the block linked or in the front of the cache.
#[inline(always)]
pub(super) fn chain_far<P: Processor>(cpu: &mut P, op: *const Op<P>) -> *const Op<P> {
    let engine = cpu.engine();
    if engine.needs_attention() || engine.instructions >= engine.far_limit || !cpu.flat_code() {
        return core::ptr::null();
    }
    let linear = cpu.pc();
    let Some(host) = engine.tlb.fetch(cpu.fetch_bank(), linear) else { return core::ptr::null() };
    let mode = cpu.mode();
    let engine = cpu.engine_mut();
    // SAFETY: `block` is the running block and `op` belongs to it; links and the front hold null or blocks of the
    // arena (dead ones have an old stamp and host 0), none of which crosses into a second page.
    unsafe {
        let block = engine.block;
        let next = if engine.link >= LINK_NONE {
            engine.blocks.find_front(host, mode)
        } else {
            let next = (*block).links[(engine.link & 1) as usize];
            if !next.is_null() && (*next).host == host { next } else { core::ptr::null_mut() }
        };
        if next.is_null() {
            return core::ptr::null();
        }
        let retired = retired(block, op);
        if (*next).stamp != engine.stamp && !check_between(engine, next, retired) {
            return core::ptr::null();
        }
        if engine.link == LINK_RETURN {
            engine.returns.learn(next);
        }
        engine.instructions += retired;
        pass_to(cpu, next)
    }
}

/// Compares a block with memory, which may be lost, when `retired` instructions of the running one have retired, and it
/// is over.
#[inline]
fn check_between<P: Processor>(engine: &mut Engine<P>, next: *mut Block<P>, retired: u64) -> bool {
    engine.instructions += retired;
    engine.executing = false;
    let same = engine.check(next);
    engine.executing = true;
    engine.instructions -= retired;
    same
}

/// Instructions of the block that have retired when `op` has.
///
/// # Safety
/// `op` must belong to the block.
#[inline(always)]
pub(super) unsafe fn retired<P: Processor>(block: *const Block<P>, op: *const Op<P>) -> u64 {
    // SAFETY: given.
    unsafe { op.offset_from(Block::first(block)) as u64 + ((*op).length() != 0) as u64 }
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
    unsafe { engine.returns.note(same_page.then_some(next), key, engine.block) }
}

/// Takes the newest note away; whether a return to `target` is the one it is about. Then fetching there cannot fault,
/// and the exit is [`LINK_RETURN`].
#[inline(always)]
pub fn take_return<P: Processor>(cpu: &mut P, target: u64) -> bool {
    let (pc, key) = cpu.engine_mut().returns.take();
    pc == target && key == fetch_key(cpu)
}
