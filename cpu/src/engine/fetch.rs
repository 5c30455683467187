// SPDX-License-Identifier: Apache-2.0
//! From the program counter to the next block: look-up, links.

use super::block::{Block, nowhere};
use super::decode::{decode, fetch_host, second_page};
use super::op::{LINK_NONE, LINK_RETURN, Stop};
use super::processor::{Code, Processor};
use super::tlb::PAGE_SHIFT;

/// The block at the program counter, decoded if need be and known to agree with memory. `prev` is the block that ran
/// before, if its exit [`super::state::Engine::link`] always leads there.
#[inline(always)]
pub(super) fn next_block<P: Processor>(cpu: &mut P, prev: *mut Block<P>) -> Result<*mut Block<P>, Stop> {
    let flushes = cpu.engine().blocks.flushes;
    let b = lookup(cpu, 0)?;
    // SAFETY: live.
    if !prev.is_null()
        && flushes == cpu.engine().blocks.flushes
        && unsafe { (*b).host2 } == 0
        && cpu.flat_code()
    {
        let link = cpu.engine().link;
        if link == LINK_RETURN {
            cpu.engine_mut().returns.learn(b);
            return Ok(b);
        }
        // SAFETY: both live.
        unsafe {
            let exit = (link & 1) as usize;
            (*prev).links[exit] = b;
            let from = cpu.block_pc();
            let same =
                (from ^ cpu.pc()) >> PAGE_SHIFT == 0 && (*prev).host >> PAGE_SHIFT == (*b).host >> PAGE_SHIFT;
            (*prev).near[exit] = if same { b } else { nowhere() };
        }
    }
    Ok(b)
}

/// Looks up (or decodes) the block at the program counter, of a `kind`: [`super::block::SINGLE`],
/// [`super::block::COUNTED`] or 0.
#[inline]
pub(super) fn lookup<P: Processor>(cpu: &mut P, kind: u8) -> Result<*mut Block<P>, Stop> {
    let code = cpu.code()?;
    let host = fetch_host(cpu, code.linear)?;
    let mode = cpu.mode() | kind;
    let engine = cpu.engine_mut();
    let indirect = engine.link >= LINK_NONE;
    let b = engine.blocks.find(host, mode, indirect);
    if b.is_null() {
        let b = decode(cpu, code, host, mode)?;
        if indirect {
            cpu.engine_mut().blocks.bring_forward(b);
        }
        return Ok(b);
    }
    // SAFETY: a live block.
    let block = unsafe { &*b };
    if block.host2 != 0 && second_page(cpu, code.linear)? != block.host2 {
        return replace(cpu, b, code, host, mode);
    }
    if block.len as u64 + block.tail as u64 > code.left {
        return replace(cpu, b, code, host, mode);
    }
    let engine = cpu.engine_mut();
    if block.stamp != engine.stamp && !engine.check(b) {
        return replace(cpu, b, code, host, mode);
    }
    Ok(b)
}

#[cold]
fn replace<P: Processor>(
    cpu: &mut P,
    b: *mut Block<P>,
    code: Code,
    host: usize,
    mode: u8,
) -> Result<*mut Block<P>, Stop> {
    cpu.engine_mut().blocks.kill(b);
    decode(cpu, code, host, mode)
}
