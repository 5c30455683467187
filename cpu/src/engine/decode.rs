// SPDX-License-Identifier: Apache-2.0
//! Decoding a block: its bytes out of memory, its ops by the architecture's decoder.

use super::architecture::Operands;
use super::block::{Block, COUNTED, SINGLE, nowhere};
use super::draft::{Draft, MAX_OPS};
use super::op::{Op, Res, Stop};
use super::processor::{Code, Decoder, Processor};
use super::thread::handler;
use super::tlb::PAGE_MASK;
use crate::mem::{PAGE_SIZE, PageInfo, host_read};

/// Bytes that are read at a time to be decoded: most blocks are shorter.
const STRIDE: usize = 128;
/// Bytes of the longest instruction of any architecture.
const LONGEST: usize = 16;
/// Most bytes of a block.
const WINDOW: usize = MAX_OPS * LONGEST;

/// The op behind the last instruction of a block that does not end in a branch: goes on with the next one.
fn fall_through<P: Processor>(cpu: &mut P, op: &Op<P>) -> Res {
    cpu.set_pc(cpu.block_pc().wrapping_add(op.next() as u64));
    Err(Stop::Exit1)
}

/// Host address of the instruction bytes at `linear`.
#[inline(always)]
pub(super) fn fetch_host<P: Processor>(cpu: &mut P, linear: u64) -> Result<usize, Stop> {
    match cpu.engine().tlb.fetch(cpu.fetch_bank(), linear) {
        Some(host) => Ok(host),
        None => cpu.translate_fetch(linear),
    }
}

/// Host address of the page behind that of `linear`.
pub(super) fn second_page<P: Processor>(cpu: &mut P, linear: u64) -> Result<usize, Stop> {
    let next = cpu.wrap((linear & PAGE_MASK).wrapping_add(PAGE_SIZE as u64));
    Ok(fetch_host(cpu, next)? & PAGE_MASK as usize)
}

/// Decodes the block at `host`.
#[cold]
pub(super) fn decode<P: Processor>(
    cpu: &mut P,
    code: Code,
    host: usize,
    mode: u8,
) -> Result<*mut Block<P>, Stop> {
    const { assert!(P::MAX_INSTRUCTION <= LONGEST) };
    if cpu.engine().blocks.full() {
        cpu.engine_mut().drop_blocks();
    }
    let in_page = (PAGE_SIZE - host % PAGE_SIZE).min(code.left.min(PAGE_SIZE as u64) as usize);
    let limit = in_page.min(WINDOW);
    let mut bytes = [0u8; WINDOW + LONGEST];
    let mut available = 0;
    let mut host2 = 0;
    let mut draft = Draft::<P>::new(if mode & SINGLE != 0 { 1 } else { MAX_OPS }, limit);
    let mut decoder = P::Decoder::new(mode & !(SINGLE | COUNTED), mode & COUNTED != 0);
    loop {
        if available < limit {
            // A store between this and the first `check` is noticed there: it compares after having marked the chunks.
            let more = STRIDE.min(limit - available);
            // SAFETY: `host` was translated; `limit` bytes remain in its page.
            unsafe { host_read((host + available) as *const u8, &mut bytes[available..available + more]) };
            available += more;
        }
        if !decoder.decode(&bytes[..available], &mut draft) {
            break;
        }
        if available < limit {
            continue;
        }
        // The instruction goes on behind the page (or the code's limit): it gets a block of its own.
        if draft.count() > 0 {
            break;
        }
        let need = P::MAX_INSTRUCTION.min(code.left.min(64) as usize);
        if available != in_page || need <= in_page {
            return Err(cpu.code_limit());
        }
        host2 = second_page(cpu, code.linear)?;
        // SAFETY: the start of a translated page; an instruction is far shorter.
        unsafe { host_read(host2 as *const u8, &mut bytes[in_page..need]) };
        available = need;
    }
    let at = draft.at();
    let count = draft.count();
    let len = at.min(in_page);
    let tail = at - len;
    if tail == 0 {
        host2 = 0;
    }
    let ops = draft.finish(Op::new(handler(fall_through), P::Operands::end(at as u16)));
    let engine = cpu.engine_mut();
    engine.blocks.decoded_instructions += count as u64;
    engine.blocks.decoded_blocks += 1;
    let page = |h: usize| engine.regions.page(h).map_or(core::ptr::null(), |p| p as *const PageInfo);
    let pages = [page(host), if host2 != 0 { page(host2) } else { core::ptr::null() }];
    let b = engine.blocks.allocate(size_of::<Block<P>>() + size_of_val(ops) + at) as *mut Block<P>;
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
        core::ptr::copy_nonoverlapping(ops.as_ptr(), first, ops.len());
        core::ptr::copy_nonoverlapping(bytes.as_ptr(), first.add(ops.len()).cast(), at);
    }
    // If another processor has written meanwhile, this one has fetched the bytes from before and may run them: once,
    // as a block without the stamp is compared again when it is entered next. To try until both agree would take as
    // long as the other processor likes.
    engine.check(b);
    engine.blocks.insert(b);
    Ok(b)
}
