// SPDX-License-Identifier: Apache-2.0
//! The run loop while a processor counts events. The one that doesn't ([`super::run::run`]) knows nothing of it.
//!
//! Handlers don't count. What has retired is known behind each run of ops; of which instructions these were, the
//! architecture finds out from the block's bytes. So the number of instructions alone costs next to nothing, and what
//! depends on the instructions costs the chaining of blocks. A counter overflows behind the very instruction that made
//! it: as the overflow comes near, blocks are run one by one, and then instructions.

use core::mem::take;

use super::block::{Block, COUNTED};
use super::fetch::{lookup, next_block};
use super::op::{LINK_NONE, Stop};
use super::processor::{Exited, Processor};
use super::run::{attend, enter, step};

/// How far a processor runs before it is asked to count.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pace {
    /// Until about so many instructions have retired in all; `far`: through any exit of a block, else as long as the next
    /// one is linked within the page, which nothing is that changes the privilege.
    Chained {
        /// Instructions; not more than [`super::block::CHAIN`] from now.
        limit: u64,
        /// Whether that is so for all exits.
        far: bool,
    },
    /// One block, if [`Counting::admits`] it.
    Block,
    /// One instruction.
    Single,
}

/// A processor that can count events.
pub trait Counting: Processor {
    /// How far to run now; notes the state that what runs then is to be counted by.
    fn pace(&mut self) -> Pace;
    /// Whether no counter overflows inside of the block, which is about to run.
    fn admits(&mut self, block: *const Block<Self>) -> bool;
    /// Counts what has happened since the last time.
    fn account(&mut self);
    /// Leaves the guest if an overflow is to be told of.
    fn overflowed(&mut self) -> Result<(), Exited>;
}

/// [`super::run::run`], counting.
pub fn run_counted<P: Counting>(cpu: &mut P) {
    let mut prev: *mut Block<P> = core::ptr::null_mut();
    let mut alone = false;
    loop {
        if cpu.overflowed().is_err() {
            return;
        }
        if cpu.engine().needs_attention() {
            let done = attend(cpu);
            cpu.account();
            if done.is_err() || cpu.overflowed().is_err() {
                return;
            }
            prev = core::ptr::null_mut();
            alone |= cpu.engine().single;
        }
        let pace = cpu.pace();
        let stop = match if take(&mut alone) { Pace::Single } else { pace } {
            Pace::Single => {
                prev = core::ptr::null_mut();
                let done = step(cpu);
                cpu.account();
                if done.is_err() {
                    return;
                }
                continue;
            }
            Pace::Block => match lookup(cpu, COUNTED) {
                Ok(b) if cpu.admits(b) => enter(cpu, b, 0, 0),
                Ok(_) => {
                    alone = true;
                    continue;
                }
                Err(stop) => not_found(cpu, stop),
            },
            Pace::Chained { limit, far } => match next_block(cpu, prev) {
                Ok(b) => enter(cpu, b, limit, if far { limit } else { 0 }),
                Err(stop) => not_found(cpu, stop),
            },
        };
        cpu.account();
        prev = core::ptr::null_mut();
        match stop {
            Stop::EndBlock => {
                if cpu.engine().link != LINK_NONE && pace != Pace::Block {
                    prev = cpu.engine().block;
                }
            }
            Stop::SelfModify => alone = true,
            other => {
                let done = cpu.stopped(other);
                cpu.account();
                if done.is_err() {
                    return;
                }
            }
        }
    }
}

/// There is no block to run.
fn not_found<P: Processor>(cpu: &mut P, stop: Stop) -> Stop {
    cpu.engine_mut().stop_op = core::ptr::null();
    stop
}
