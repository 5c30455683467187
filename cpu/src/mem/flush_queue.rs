// SPDX-License-Identifier: Apache-2.0
//! What a processor is to forget of its translations, noted until it does ([`super::flush`]).

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Ranges that a processor notes before it forgets everything instead.
pub const MAX_RANGES: usize = 512;

/// Numbers of pages of the base size (4 KiB).
pub type Pages = Range<u64>;

/// What a processor is to forget.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct Flushes {
    /// Everything.
    pub all: bool,
    /// Translations of these guest-physical pages, of any guest's, and what was made of them.
    pub physical: Vec<Pages>,
    /// All translations of linear addresses of these guests (ASIDs, VMIDs).
    pub guests: Vec<u32>,
    /// Those of these guests' linear pages, in any address space.
    pub linear: Vec<(u32, Pages)>,
}

impl Flushes {
    /// All that is known.
    pub fn everything() -> Flushes {
        Flushes { all: true, ..Flushes::default() }
    }

    /// Guest-physical pages.
    pub fn physical(pages: &[Pages]) -> Flushes {
        Flushes { physical: pages.to_vec(), ..Flushes::default() }
    }

    /// Linear pages of a guest; None: all of them.
    pub fn linear(guest: u32, pages: Option<&[Pages]>) -> Flushes {
        match pages {
            Some(pages) => {
                let linear = pages.iter().map(|p| (guest, p.clone())).collect();
                Flushes { linear, ..Flushes::default() }
            }
            None => Flushes { guests: vec![guest], ..Flushes::default() },
        }
    }

    fn add(&mut self, other: &Flushes) {
        if self.all || other.all {
            *self = Flushes::everything();
            return;
        }
        self.physical.extend_from_slice(&other.physical);
        self.linear.extend_from_slice(&other.linear);
        self.guests.extend_from_slice(&other.guests);
        if self.physical.len() + self.linear.len() + self.guests.len() > MAX_RANGES {
            *self = Flushes::everything();
        }
    }

    /// Sorts the guest-physical ranges and joins those that meet.
    fn join(&mut self) {
        self.physical.sort_unstable_by_key(|p| p.start);
        self.physical.dedup_by(|next, last| {
            let meets = next.start <= last.end;
            if meets {
                last.end = last.end.max(next.end);
            }
            meets
        });
    }
}

/// What a processor has yet to forget.
#[derive(Default)]
pub(super) struct FlushQueue {
    waiting: Mutex<Flushes>,
    /// How often something was asked for, and how much of that is done.
    asked: AtomicU64,
    done: AtomicU64,
}

impl FlushQueue {
    pub(super) const fn new() -> FlushQueue {
        let nothing = Flushes { all: false, physical: Vec::new(), guests: Vec::new(), linear: Vec::new() };
        FlushQueue { waiting: Mutex::new(nothing), asked: AtomicU64::new(0), done: AtomicU64::new(0) }
    }

    /// Held for a moment, in which nobody touches memory that could be lost.
    fn lock(&self) -> MutexGuard<'_, Flushes> {
        self.waiting.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Notes what is to be forgotten; the number of the request.
    pub(super) fn add(&self, what: &Flushes) -> u64 {
        let mut waiting = self.lock();
        waiting.add(what);
        self.asked.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Whether a request has been worked off.
    pub(super) fn has_done(&self, ticket: u64) -> bool {
        self.done.load(Ordering::SeqCst) >= ticket
    }

    /// Calls `f` with all that there is to forget; when it returns, that is done.
    pub(super) fn work_off(&self, f: impl FnOnce(&Flushes)) {
        let (mut flushes, ticket) = {
            let mut waiting = self.lock();
            (std::mem::take(&mut *waiting), self.asked.load(Ordering::SeqCst))
        };
        flushes.join();
        f(&flushes);
        self.done.store(ticket, Ordering::SeqCst);
    }
}
