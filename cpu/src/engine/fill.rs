// SPDX-License-Identifier: Apache-2.0
//! Filling the TLB: what a page needs the slow path for, and when that is over.

use std::sync::atomic::Ordering;

use super::architecture::{Access, Architecture};
use super::state::Engine;
use super::tlb::{INVALID, PAGE_MASK, SLOW};

/// What a walk has found of one page.
#[derive(Clone, Copy)]
pub struct Mapping {
    /// Host address of the page, which is in registered memory.
    pub host: u64,
    /// Its guest-physical address.
    pub physical: u64,
    /// Reads are allowed.
    pub read: bool,
    /// Writes are allowed, and need no mark in the tables.
    pub write: bool,
    /// Fetches are allowed.
    pub exec: bool,
    /// log2 of the size of the guest's page.
    pub size: u8,
}

impl<P: Architecture> Engine<P> {
    /// Host address of an access that came the slow way, if its translation is known. `watched`: data accesses are
    /// watched, so the page stays on the slow path.
    #[inline]
    pub fn translated(&mut self, bank: usize, linear: u64, access: Access, watched: bool) -> Option<usize> {
        let want = self.tlb.tag(linear);
        let e = self.tlb.entry(bank, linear);
        let tag = match access {
            Access::Read => e.read,
            Access::Write => e.write,
            Access::Fetch => e.exec,
        };
        if tag & !SLOW != want || tag == INVALID {
            return None;
        }
        if tag & SLOW != 0 && !watched {
            self.try_fast_again(bank, linear, want);
        }
        Some(self.tlb.entry(bank, linear).addend.wrapping_add(linear) as usize)
    }

    /// Takes the slow-path mark off an entry whose reason is gone (the page's code was written, breakpoints are off).
    fn try_fast_again(&mut self, bank: usize, linear: u64, want: u64) {
        let e = *self.tlb.entry(bank, linear);
        let page = e.addend.wrapping_add(linear & PAGE_MASK) as usize;
        let code = self.regions.page(page).is_none_or(|p| p.code.load(Ordering::SeqCst) != 0);
        let entry = self.tlb.entry_mut(bank, linear);
        if entry.read & !SLOW == want {
            entry.read = want;
        }
        if entry.write & !SLOW == want && !code {
            entry.write = want;
        }
    }

    /// Enters what a walk has found for the page of `linear`; the host address of `linear`.
    #[inline]
    pub fn fill(&mut self, bank: usize, linear: u64, mapping: Mapping, watched: bool) -> usize {
        let want = self.tlb.tag(linear);
        let addend = mapping.host.wrapping_sub(linear & PAGE_MASK);
        let code = mapping.write
            && self
                .regions
                .page_near(mapping.host as usize, &mut self.region_guess)
                .is_some_and(|p| p.code.load(Ordering::SeqCst) != 0);
        let known = self.tlb.physical(bank, linear);
        let entry = self.tlb.entry_mut(bank, linear);
        let same = entry.addend == addend
            && known == mapping.physical
            && [entry.read, entry.write, entry.exec].iter().all(|t| *t == INVALID || *t & !SLOW == want);
        if !same {
            entry.read = INVALID;
            entry.write = INVALID;
            entry.exec = INVALID;
            entry.addend = addend;
        }
        if mapping.read {
            entry.read = want;
        }
        if mapping.write {
            entry.write = if code { want | SLOW } else { want };
        }
        if mapping.exec {
            entry.exec = want;
        }
        if watched {
            // Watched pages keep missing the fast path; which bytes are watched is asked on each access.
            entry.read |= SLOW;
            entry.write |= SLOW;
        }
        self.tlb.note(bank, linear, mapping.size, mapping.physical);
        (mapping.host | (linear & !PAGE_MASK)) as usize
    }
}
