// SPDX-License-Identifier: Apache-2.0
//! Flushes of other processors' TLBs by ranges of addresses: what INVLPGB and TLBSYNC are on AMD's processors (APM
//! vol. 3) and TLBI on Arm's. Nobody leaves a guest for one.
//!
//! What is to be flushed is noted for each processor, which does it between two instructions, or before the first one of
//! its next run. So whoever asked waits only for those that are within a guest.

use std::sync::Arc;
use std::sync::atomic::Ordering;

pub use super::flush_queue::{Flushes, MAX_RANGES, Pages};
use super::shared::{Patience, Shared, pending};

/// How often a processor is looked at before the host's processor is given away.
const SPINS: u32 = 200;
/// How often that is done before a processor that waits inside of an instruction is kicked out of the guest.
const YIELDS: u32 = 50;

impl Shared {
    /// Notes what is to be forgotten; the number of the request, for [`Shared::has_flushed`].
    fn ask_flush(&self, what: &Flushes) -> u64 {
        let ticket = self.flushes.add(what);
        self.set_pending(pending::FLUSH);
        ticket
    }

    /// Whether no instruction goes by what was to be forgotten: it is, or will be before the next one.
    fn has_flushed(&self, ticket: u64) -> bool {
        !self.running.load(Ordering::SeqCst) || self.flushes.has_done(ticket)
    }

    /// Whether there is something to forget.
    #[inline(always)]
    pub(crate) fn wants_flush(&self) -> bool {
        self.pending.load(Ordering::SeqCst) & pending::FLUSH != 0
    }

    /// On the processor's thread: calls `f` with what there is to forget; when it returns, that is done.
    pub(crate) fn flush(&self, f: impl FnOnce(&Flushes)) {
        self.pending.fetch_and(!pending::FLUSH, Ordering::SeqCst);
        self.flushes.work_off(f);
    }
}

/// Processors that have been asked to forget something, and may yet go by it.
pub struct Asked<'a> {
    left: Vec<(&'a Arc<Shared>, u64)>,
    waited: usize,
}

/// Asks `processors` to forget translations. Not on a thread that runs one of them at the moment.
pub fn ask<'a>(processors: &'a [Arc<Shared>], what: &Flushes) -> Asked<'a> {
    let mut left: Vec<_> = processors.iter().map(|p| (p, p.ask_flush(what))).collect();
    left.retain(|(processor, ticket)| !processor.has_flushed(*ticket));
    Asked { waited: left.len(), left }
}

impl Asked<'_> {
    /// How many were within a guest when they were asked.
    pub fn waited(&self) -> usize {
        self.waited
    }

    /// Looks for a moment; true if none executes an instruction by what it was to forget any more, nor will.
    pub fn done(&mut self) -> bool {
        for _ in 0..SPINS {
            self.left.retain(|(processor, ticket)| !processor.has_flushed(*ticket));
            if self.left.is_empty() {
                return true;
            }
            core::hint::spin_loop();
        }
        false
    }

    /// Waits until that is so.
    pub fn wait(mut self) {
        let (mut looks, mut patience) = (0, Patience::default());
        while !self.done() {
            looks += 1;
            if patience.pause() {
                self.left.iter().for_each(|(processor, _)| processor.rouse());
            }
            if looks % YIELDS == 0 {
                for (processor, _) in self.left.iter().filter(|(processor, _)| processor.waits()) {
                    processor.kick();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    const PAGE: Pages = 5..6;

    #[test]
    fn too_many_ranges_are_a_flush_of_everything() {
        let shared = Shared::new();
        let half: Vec<_> = (0..MAX_RANGES as u64 / 2).map(|n| 4 * n..4 * n + 1).collect();
        for _ in 0..2 {
            shared.ask_flush(&Flushes::physical(&half));
        }
        shared.flush(|what| assert!(!what.all && what.physical == half, "the same ones, joined"));
        shared.flush(|what| assert_eq!(what, &Flushes::default(), "once"));
        for _ in 0..3 {
            shared.ask_flush(&Flushes::linear(1, Some(&half)));
        }
        shared.flush(|what| assert_eq!(what, &Flushes::everything()));
    }

    #[test]
    fn ranges_that_meet_are_one() {
        let shared = Shared::new();
        for pages in [7..9, 1..3, 3..4, 0..2, 20..21] {
            shared.ask_flush(&Flushes::physical(std::slice::from_ref(&pages)));
        }
        shared.flush(|what| assert_eq!(what.physical, [0..4, 7..9, 20..21]));
    }

    #[test]
    fn a_processor_outside_of_a_guest_is_not_waited_for_and_one_inside_is() {
        let me = Arc::new(Shared::new());
        let all = [me.clone()];
        assert_eq!(ask(&all, &Flushes::everything()).waited(), 0);
        me.start();
        assert!(me.wants_flush(), "its next run begins with it");
        me.flush(|_| {});
        let flushed = AtomicBool::new(false);
        std::thread::scope(|s| {
            s.spawn(|| {
                while !me.wants_flush() {
                    std::thread::yield_now();
                }
                me.flush(|what| assert_eq!(what.physical, std::slice::from_ref(&PAGE)));
                flushed.store(true, Ordering::SeqCst);
            });
            let asked = ask(&all, &Flushes::physical(std::slice::from_ref(&PAGE)));
            assert_eq!(asked.waited(), 1);
            asked.wait();
        });
        assert!(flushed.load(Ordering::SeqCst));
    }
}
