// SPDX-License-Identifier: Apache-2.0
//! Performance counters (APM vol. 2, 13.2): of the host, counting while it runs a guest.
//!
//! There are sixteen, of which CPUID tells of six, as AMD's processors have. Their registers are in the register block. `pmc_select` is laid out as PERF_CTL, `pmc_count` as PERF_CTR, of 48 bits,
//! and `pmc_enable` and `pmc_status` as PerfMonV2's PerfCntrGlobalCtl and -Status. Software programs them while no guest
//! runs; counts are up to date then. What a guest is shown of it, if anything, is its hypervisor's affair: RDMSR and RDPMC
//! do not come here.
//!
//! A counter that overflows sets its bit of `pmc_status`. If its PERF_CTL.Int is set, that is an NMI to the host: with NMIs
//! intercepted the guest is left at once, and cannot be entered before the bit is cleared. That is behind the very
//! instruction that made the counter overflow (if that is a repeated string instruction, behind all of it).
//!
//! An instruction counts for the privilege level at which it began, the delivery of an event for that of its handler.

use super::state::{Cpu, attention, reg};
use super::system::exitcode;
use crate::engine::block::{Block, CHAIN};
use crate::engine::count::{Counting, Pace};
use crate::engine::draft::MAX_OPS;
use crate::engine::processor::Exited;

pub mod counters;
pub mod event;

pub use counters::select;
use counters::{Counter, Known, MASK, Pmu};
use event::{OpEvents, is};

/// Blocks begin at cache lines.
const BLOCK_ALIGN: usize = 64;
/// Entries of the cache of what blocks have.
const CACHE: usize = 4096;
/// The most that a run of chained blocks retires beyond its limit: the block at whose end it is looked at, and the next.
const OVERSHOOT: u64 = 2 * MAX_OPS as u64;

/// What `block` has, out of the cache or found out. It is one of those that there are since `generation`.
fn known(pmu: &mut Pmu, generation: u64, block: *const Block<Cpu>) -> usize {
    if pmu.cache.is_empty() || pmu.generation != generation {
        pmu.cache.clear();
        pmu.cache.resize_with(CACHE, || None);
        pmu.generation = generation;
    }
    let slot = block.addr() / BLOCK_ALIGN % CACHE;
    let found = pmu.cache[slot].take().filter(|k| k.block == block.addr());
    let mut found = found.unwrap_or_else(|| {
        // SAFETY: blocks of a generation live as long as it lasts.
        let ops = unsafe { event::of_code(Block::code(block), Block::mode(block), Block::count(block)) };
        Known { block: block.addr(), ops, totals: [0; counters::COUNTERS], program: 0 }
    });
    if found.program != pmu.programs {
        for (total, counter) in found.totals.iter_mut().zip(&pmu.counters) {
            let sum = found.ops.iter().map(|op| counter.event.of(op, 1, true, false)).sum::<u64>();
            *total = sum as u32;
        }
        found.program = pmu.programs;
    }
    pmu.cache[slot] = Some(found);
    slot
}

impl Cpu {
    /// Before a guest is entered while counters are enabled.
    #[cold]
    pub(super) fn start_counting(&mut self) {
        let pmu = &mut *self.pmu;
        if pmu.enable != self.rb.pmc_enable || pmu.select != self.rb.pmc_select {
            pmu.program(self.rb.pmc_enable, &self.rb.pmc_select);
        }
        pmu.instructions = self.engine.instructions();
        pmu.deliveries = self.sys.deliveries;
        for count in &mut self.rb.pmc_count {
            *count &= MASK;
        }
        // Nothing has run yet.
        pmu.rcx = self.rb.gpr[reg::RCX];
    }

    fn add(&mut self, index: usize, events: u64) {
        let sum = self.rb.pmc_count[index] + events;
        self.rb.pmc_count[index] = sum & MASK;
        if sum > MASK {
            self.rb.pmc_status |= 1 << index;
        }
    }

    /// Counts the first `retired` ops of the block that has run.
    fn account_ops(&mut self, retired: usize) {
        let rcx = self.rb.gpr[reg::RCX];
        if retired == 0 && rcx == self.pmu.rcx {
            return;
        }
        let block = self.engine.running_block();
        if block.is_null() {
            return;
        }
        let slot = known(&mut self.pmu, self.engine.block_generation(), block);
        let Some(block) = self.pmu.cache[slot].take() else { return };
        let ops = &block.ops;
        let whole = retired == ops.len() && ops.first().is_none_or(|op| op.repeats == 0);
        // Exit 1 of a block that a branch ends is the one behind it.
        let taken = retired == ops.len()
            && ops.last().is_some_and(|op| op.is & is::BRANCH != 0)
            && self.engine.link != 1;
        for n in 0..self.pmu.counters.len() {
            let mut counter = self.pmu.counters[n];
            if !counter.at(self.pmu.cpl) {
                continue;
            }
            let sum = if whole && counter.adds_up() {
                block.totals[n] as u64 + (counter.event.taken && taken) as u64
            } else {
                self.sum_ops(&mut counter, ops, retired, taken)
            };
            self.pmu.counters[n].high = counter.high;
            self.add(counter.index, sum);
        }
        self.pmu.cache[slot] = Some(block);
        // The rest of an instruction that is repeated comes later.
        self.pmu.rcx = rcx;
    }

    fn sum_ops(&self, counter: &mut Counter, ops: &[OpEvents], retired: usize, taken: bool) -> u64 {
        if let [op] = ops
            && op.repeats != 0
        {
            let mask = u64::MAX >> (64 - 8 * op.repeats as u32);
            let times = self.pmu.rcx.wrapping_sub(self.rb.gpr[reg::RCX]) & mask;
            return counter.cycle(counter.event.of(op, times, retired != 0, false));
        }
        let last = ops.len() - 1;
        let ops = ops[..retired.min(ops.len())].iter().enumerate();
        ops.map(|(n, op)| counter.cycle(counter.event.of(op, 1, true, taken && n == last))).sum()
    }
}

impl Counting for Cpu {
    fn pace(&mut self) -> Pace {
        let pmu = &mut *self.pmu;
        pmu.cpl = self.cpl;
        pmu.rcx = self.rb.gpr[reg::RCX];
        if pmu.by_op {
            return Pace::Block;
        }
        let counting = pmu.counters.iter().filter(|c| c.interrupt && c.event.instructions && c.at(self.cpl));
        let left = counting.map(|c| MASK - self.rb.pmc_count[c.index]).min().unwrap_or(MASK);
        let now = self.engine.instructions();
        if left > OVERSHOOT {
            Pace::Chained { limit: now + CHAIN.min(left - OVERSHOOT), far: !pmu.by_privilege }
        } else if left > MAX_OPS as u64 {
            Pace::Chained { limit: 0, far: false }
        } else {
            Pace::Single
        }
    }

    fn admits(&mut self, block: *const Block<Cpu>) -> bool {
        let slot = known(&mut self.pmu, self.engine.block_generation(), block);
        let Some(known) = &self.pmu.cache[slot] else { return false };
        let mut counters = self.pmu.counters.iter().zip(known.totals);
        counters.all(|(c, total)| {
            let most = if c.adds_up() { total as u64 + 1 } else { MAX_OPS as u64 };
            !c.interrupt || !c.at(self.cpl) || MASK - self.rb.pmc_count[c.index] >= most
        })
    }

    fn account(&mut self) {
        let now = self.engine.instructions();
        let retired = now - core::mem::replace(&mut self.pmu.instructions, now);
        if self.pmu.by_op {
            self.account_ops(retired as usize);
        } else if retired != 0 {
            for n in 0..self.pmu.counters.len() {
                let c = &self.pmu.counters[n];
                if c.event.instructions && c.at(self.pmu.cpl) {
                    self.add(c.index, retired);
                }
            }
        }
        let deliveries = self.sys.deliveries;
        let delivered = deliveries.wrapping_sub(core::mem::replace(&mut self.pmu.deliveries, deliveries));
        if delivered != 0 {
            for n in 0..self.pmu.counters.len() {
                let mut c = self.pmu.counters[n];
                if c.event.deliveries && c.at(self.cpl) {
                    let events = c.cycle(delivered);
                    self.pmu.counters[n].high = c.high;
                    self.add(c.index, events);
                }
            }
        }
    }

    fn overflowed(&mut self) -> Result<(), Exited> {
        if self.rb.pmc_status & self.pmu.interrupting != 0 && self.intercepted(exitcode::NMI) {
            // What the last instruction has written to its APIC takes effect before the guest is left.
            if self.engine.attention & attention::APIC != 0 {
                self.avic_take_writes()?;
            }
            return self.leave(exitcode::NMI);
        }
        Ok(())
    }
}
