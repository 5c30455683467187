// SPDX-License-Identifier: Apache-2.0
//! Counters as they are programmed, and what is kept to count by.

use super::event::{Event, OpEvents};

/// Performance counters of a processor.
pub const COUNTERS: usize = 16;

/// Bits of PERF_CTL (APM vol. 2, 13.2.1).
pub mod select {
    #![allow(missing_docs)]
    pub const USR: u64 = 1 << 16;
    pub const OS: u64 = 1 << 17;
    pub const EDGE: u64 = 1 << 18;
    pub const INT: u64 = 1 << 20;
    pub const EN: u64 = 1 << 22;
    pub const INV: u64 = 1 << 23;
    pub const CNT_MASK_SHIFT: u32 = 24;
    pub const GUEST_ONLY: u64 = 1 << 40;
    pub const HOST_ONLY: u64 = 1 << 41;
}

/// Bits of a count.
pub const WIDTH: u32 = 48;
/// The greatest count.
pub(super) const MASK: u64 = (1 << WIDTH) - 1;
/// A counter that counts.
#[derive(Clone, Copy, Default)]
pub(super) struct Counter {
    pub(super) index: usize,
    pub(super) event: Event,
    pub(super) usr: bool,
    pub(super) os: bool,
    pub(super) interrupt: bool,
    pub(super) edge: bool,
    pub(super) invert: bool,
    pub(super) threshold: u64,
    /// Whether the condition held in the last cycle, for `edge`.
    pub(super) high: bool,
}

impl Counter {
    /// Of what is in a PERF_CTL; None if it counts nothing here.
    fn new(index: usize, ctl: u64) -> Option<Counter> {
        let number = (ctl & 0xff | ctl >> 24 & 0xf00) as u16;
        let elsewhere = ctl & (select::HOST_ONLY | select::GUEST_ONLY) == select::HOST_ONLY;
        if ctl & select::EN == 0 || elsewhere {
            return None;
        }
        Some(Counter {
            index,
            event: Event::new(number, (ctl >> 8) as u8),
            usr: ctl & select::USR != 0,
            os: ctl & select::OS != 0,
            interrupt: ctl & select::INT != 0,
            edge: ctl & select::EDGE != 0,
            invert: ctl & select::INV != 0,
            threshold: ctl >> select::CNT_MASK_SHIFT & 0xff,
            high: false,
        })
    }

    pub(super) fn at(&self, cpl: u8) -> bool {
        if cpl == 3 { self.usr } else { self.os }
    }

    /// Whether it adds up: what it counts is the sum over instructions.
    pub(super) fn adds_up(&self) -> bool {
        self.threshold == 0 && !self.edge
    }

    /// What a cycle in which `events` have happened adds (APM vol. 2, 13.2.1: CntMask, Inv, Edge).
    pub(super) fn cycle(&mut self, events: u64) -> u64 {
        if self.adds_up() {
            return events;
        }
        let enough =
            if self.threshold == 0 { events != 0 } else { (events >= self.threshold) != self.invert };
        let was = core::mem::replace(&mut self.high, enough);
        (enough && !(self.edge && was)) as u64
    }
}

/// What is known of a block.
pub(super) struct Known {
    pub(super) block: usize,
    pub(super) ops: Box<[OpEvents]>,
    /// Of each counter that counts and adds up, what all of it makes but taken branches.
    pub(super) totals: [u32; COUNTERS],
    /// [`Pmu::programs`] at which they were found.
    pub(super) program: u64,
}

/// What the processor counts now.
#[derive(Default)]
pub struct Pmu {
    pub(super) enable: u64,
    pub(super) select: [u64; COUNTERS],
    pub(super) counters: Vec<Counter>,
    /// Changes with the counters.
    pub(super) programs: u64,
    /// Something depends on which instructions there are.
    pub(super) by_op: bool,
    /// Something depends on the privilege level.
    pub(super) by_privilege: bool,
    /// Counters whose overflows are told of.
    pub(super) interrupting: u64,
    /// What has been counted: instructions and delivered events.
    pub(super) instructions: u64,
    pub(super) deliveries: u64,
    /// As what runs now began.
    pub(super) cpl: u8,
    pub(super) rcx: u64,
    pub(super) cache: Vec<Option<Known>>,
    pub(super) generation: u64,
}

impl Pmu {
    pub(super) fn program(&mut self, enable: u64, select: &[u64; COUNTERS]) {
        self.enable = enable;
        self.select = *select;
        let one = |n: usize| if enable >> n & 1 != 0 { Counter::new(n, select[n]) } else { None };
        self.counters = (0..COUNTERS).filter_map(one).collect();
        self.programs += 1;
        self.by_op = self.counters.iter().any(|c| !c.event.is_simple() || !c.adds_up());
        self.by_privilege = self.counters.iter().any(|c| c.usr != c.os);
        self.interrupting = self.counters.iter().filter(|c| c.interrupt).map(|c| 1 << c.index).sum();
    }
}
