// SPDX-License-Identifier: Apache-2.0
//! The run loop: from one block to the next until the guest is left, with events taken at instruction boundaries only.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::architecture::Operands;
use super::block::{Block, CHAIN, SINGLE};
use super::chain::retired;
use super::fetch::{lookup, next_block};
use super::op::{LINK_NONE, Stop};
use super::processor::{Exited, Processor};
use crate::mem::lost::{self, Lost};
use crate::mem::{Shared, pending};

/// Calls `f` with the processor in the guest: it has caught up with its machine, and until `f` returns the machine waits
/// for it before memory goes away.
pub fn in_guest<P: Processor, R>(cpu: &mut P, f: impl FnOnce(&mut P) -> R) -> R {
    let shared = Arc::as_ptr(&cpu.engine().shared);
    // SAFETY: the processor keeps its own for as long as it is there, and it is borrowed until this returns.
    let shared = unsafe { &*shared };
    shared.start();
    let _running = Running(shared);
    let engine = cpu.engine_mut();
    engine.machine.bus().enter(shared);
    if shared.synced.load(Ordering::SeqCst) != engine.machine.generation() {
        engine.catch_up();
    }
    if shared.wants_flush() {
        engine.flush_asked();
    }
    f(cpu)
}

/// Clears `running` however the run ends.
struct Running<'a>(&'a Shared);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Before a guest's first instruction: nothing of the run before counts, and the host may have written code.
pub fn begin<P: Processor>(cpu: &mut P) {
    let engine = cpu.engine_mut();
    engine.distrust_blocks();
    engine.single = false;
    engine.stop_op = core::ptr::null();
    engine.block = core::ptr::null_mut();
}

/// Calls `f`, which runs guest code or accesses guest memory, on the processor. If memory is lost meanwhile
/// ([`crate::mem::lost`]), all stays as it is between two instructions, or before the one that found out, which is at the
/// program counter then; so it is if the processor was roused while it waited for memory. An event that was being
/// delivered has not arrived.
pub fn guarded<P: Processor>(cpu: &mut P, f: impl FnOnce(&mut P)) -> Result<(), Lost> {
    cpu.engine_mut().executing = false;
    let regions = &raw const cpu.engine().regions;
    // SAFETY: the engine has its regions at any time; only `catch_up` changes them, which touches no guest memory.
    let covers = |address: usize| unsafe { (*regions).find(address).is_some() };
    // SAFETY: no function of the processor has something to drop while it touches guest memory.
    let done = unsafe { lost::guarded_rousable(&covers, || f(cpu)) };
    if let Err(lost) = done
        && cpu.engine().executing
    {
        let engine = cpu.engine_mut();
        engine.executing = false;
        if lost.of != 0 {
            // The op of a fast half.
            engine.stop_op = lost.of as *const _;
        }
        not_retired(cpu);
    }
    done
}

/// The op at which the run stopped has not retired: those before it have, and the next instruction is its own.
#[inline(always)]
fn not_retired<P: Processor>(cpu: &mut P) {
    let engine = cpu.engine_mut();
    // SAFETY: the op at which the run stopped belongs to the block that ran last.
    let (index, op) =
        unsafe { (engine.stop_op.offset_from(Block::first(engine.block)) as u64, &*engine.stop_op) };
    let at = op.next() as u64 - op.length() as u64;
    engine.instructions += index;
    cpu.set_pc(cpu.block_pc().wrapping_add(at));
}

/// Runs until the guest is left; why is in the processor.
pub fn run<P: Processor>(cpu: &mut P) {
    let mut prev: *mut Block<P> = core::ptr::null_mut();
    loop {
        if cpu.engine().needs_attention() {
            if attend(cpu).is_err() {
                return;
            }
            prev = core::ptr::null_mut();
            if cpu.engine().single {
                if step(cpu).is_err() {
                    return;
                }
                continue;
            }
        }
        let stop = match next_block(cpu, prev) {
            Ok(b) => {
                let limit = cpu.engine().instructions + CHAIN;
                enter(cpu, b, limit, limit)
            }
            Err(stop) => {
                cpu.engine_mut().stop_op = core::ptr::null();
                stop
            }
        };
        prev = core::ptr::null_mut();
        match stop {
            Stop::EndBlock => {
                if cpu.engine().link != LINK_NONE {
                    prev = cpu.engine().block;
                }
            }
            Stop::SelfModify => {
                if step(cpu).is_err() {
                    return;
                }
            }
            other => {
                if cpu.stopped(other).is_err() {
                    return;
                }
            }
        }
    }
}

/// Runs a block and those chained to it to a stop; counts what retired and leaves the program counter at the instruction
/// to go on with. No further block is chained once `limit` instructions have retired in all, or `far` if it is not linked
/// within the page.
#[inline(always)]
pub(super) fn enter<P: Processor>(cpu: &mut P, b: *mut Block<P>, limit: u64, far: u64) -> Stop {
    cpu.begin_block();
    let engine = cpu.engine_mut();
    engine.block = b;
    engine.chain_limit = limit;
    engine.far_limit = far;
    // SAFETY: `b` is a live block; its ops end with one that stops.
    let stop = unsafe {
        let first = Block::first(b);
        engine.stop_op = first;
        engine.executing = true;
        ((*first).f)(cpu, first)
    };
    cpu.engine_mut().executing = false;
    match stop {
        Stop::EndBlock | Stop::Exit0 | Stop::Exit1 | Stop::Return | Stop::Trap | Stop::ExitAfter => {
            let engine = cpu.engine_mut();
            // SAFETY: the op at which the run stopped belongs to the block that ran last.
            engine.instructions += unsafe { retired(engine.block, engine.stop_op) };
        }
        Stop::Fault | Stop::Exit | Stop::Restart | Stop::SelfModify | Stop::Slow => not_retired(cpu),
    }
    stop
}

/// Looks at everything that may come between two instructions.
#[cold]
#[inline(never)]
pub(super) fn attend<P: Processor>(cpu: &mut P) -> Result<(), Exited> {
    let engine = cpu.engine_mut();
    engine.single = false;
    let p = engine.shared.pending.load(Ordering::SeqCst);
    if p & pending::TLB_SYNC != 0 {
        engine.catch_up();
    }
    if p & pending::BUS != 0 {
        engine.machine.bus().give_way(&engine.shared);
    }
    if p & pending::FLUSH != 0 {
        engine.flush_asked();
    }
    if p & pending::CODE_CHANGED != 0 {
        engine.shared.pending.fetch_and(!pending::CODE_CHANGED, Ordering::SeqCst);
        engine.distrust_blocks();
    }
    cpu.attend(p)
}

/// Runs one instruction by itself.
#[cold]
#[inline(never)]
pub(super) fn step<P: Processor>(cpu: &mut P) -> Result<(), Exited> {
    cpu.engine_mut().single = true;
    let done = cpu.step();
    cpu.engine_mut().single = false;
    done
}

/// For [`Processor::step`]: runs the instruction at the program counter, to its stop.
pub fn run_one<P: Processor>(cpu: &mut P) -> Stop {
    match lookup(cpu, SINGLE) {
        Ok(b) => enter(cpu, b, 0, 0),
        Err(stop) => {
            cpu.engine_mut().stop_op = core::ptr::null();
            stop
        }
    }
}
