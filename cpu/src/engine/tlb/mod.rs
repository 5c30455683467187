// SPDX-License-Identifier: Apache-2.0
//! The software TLB: direct-mapped, four banks, tagged by context.
//!
//! A bank holds what one kind of access may do (a privilege, with what else decides); which is the architecture's. The
//! last one stays empty, for accesses of which each needs the slow path. A tag is the linear page | context number (11
//! bits). Bit 11 set makes the fast path miss on purpose: the page needs the slow path on every such access (it holds
//! decoded code, or a data breakpoint is armed on it). A context stands for one address space of one guest
//! ([`Architecture::Space`]); flushing it gives the space a new number.

mod directory;
mod entry;
mod physical;
mod sizes;

use std::collections::HashMap;

use super::architecture::{Architecture, Space};
use super::zeroed::Zeroed;
use crate::mem::flush::Pages;
use directory::Directories;
use entry::{CONTEXT_BITS, CONTEXTS, EMPTY, FIRST_CONTEXT, TLB_SIZE};
use sizes::Sizes;

/// So many pages are looked for one by one, more in the whole TLB.
const FEW_PAGES: u64 = 32;

pub use directory::Directory;
pub use entry::{BANKS, Entry, INVALID, PAGE_MASK, PAGE_SHIFT, SLOW, TLB_BITS, index};
use physical::contains;
pub use physical::{Frame, Frames, LARGE_SHIFT};

/// The TLB of one processor.
#[repr(C)]
pub struct Tlb<P: Architecture> {
    /// Context number in force, in tag position.
    context: u64,
    /// Epoch and context in one word of which bits 1:0 are clear.
    key: u64,
    entries: Zeroed<Entry>,
    /// The guest-physical page behind each entry.
    physical: Zeroed<u64>,
    sizes: Sizes,
    contexts: HashMap<P::Space, u64>,
    current: Option<P::Space>,
    next: u64,
    frames: Frames,
    directories: Directories<P>,
    /// Advances when anything is flushed.
    epoch: u64,
    /// Fills, for statistics.
    pub(crate) fills: u64,
    /// Whole flushes, for statistics.
    pub(crate) flushes: u64,
    /// Flushes of ranges of pages, for statistics.
    pub(crate) range_flushes: u64,
}

impl<P: Architecture> Default for Tlb<P> {
    fn default() -> Self {
        Tlb {
            // SAFETY: EMPTY is all zeros.
            entries: unsafe { Zeroed::new(TLB_SIZE * (BANKS + 1)) },
            // SAFETY: numbers.
            physical: unsafe { Zeroed::new(TLB_SIZE * (BANKS + 1)) },
            sizes: Sizes::default(),
            context: FIRST_CONTEXT,
            contexts: HashMap::new(),
            current: None,
            next: FIRST_CONTEXT,
            frames: Frames::default(),
            directories: Directories::default(),
            epoch: 1,
            key: 0,
            fills: 0,
            flushes: 0,
            range_flushes: 0,
        }
    }
}

impl<P: Architecture> Tlb<P> {
    // ---- entries -----------------------------------------------------------------------------------------------

    /// The entry that would hold `linear` in `bank`.
    #[inline(always)]
    pub fn entry(&self, bank: usize, linear: u64) -> &Entry {
        debug_assert!(bank <= BANKS);
        // SAFETY: bank <= 3 (every caller's is a constant or one that `bank` has taken) and index < TLB_SIZE.
        unsafe { self.entries.get_unchecked((bank << TLB_BITS) + index(linear)) }
    }

    /// The first entry of `bank`, valid as long as the TLB.
    pub fn bank(&self, bank: usize) -> *const Entry {
        self.entries[bank << TLB_BITS..].as_ptr()
    }

    /// As [`Tlb::entry`], for filling. The last bank must stay empty.
    #[inline]
    pub fn entry_mut(&mut self, bank: usize, linear: u64) -> &mut Entry {
        &mut self.entries[(bank << TLB_BITS) + index(linear)]
    }

    /// What a tag must be for an access whose last byte is at `last`.
    #[inline(always)]
    pub fn tag(&self, last: u64) -> u64 {
        (last & PAGE_MASK) | self.context
    }

    /// Host address of an instruction, if its page is in the TLB.
    #[inline(always)]
    pub fn fetch(&self, bank: usize, linear: u64) -> Option<usize> {
        let e = self.entry(bank, linear);
        (e.exec == self.tag(linear)).then(|| e.addend.wrapping_add(linear) as usize)
    }

    /// Notes the size (log2) of the guest's page behind the entry of `linear` in `bank`, and the guest-physical address.
    pub fn note(&mut self, bank: usize, linear: u64, size: u8, physical: u64) {
        self.sizes.note(bank, linear, size);
        self.physical[(bank << TLB_BITS) + index(linear)] = physical;
    }

    /// The guest-physical address that was noted last.
    #[inline]
    pub fn physical(&self, bank: usize, linear: u64) -> u64 {
        self.physical[(bank << TLB_BITS) + index(linear)]
    }

    /// As long as it is the same, so are translations. Bits 1:0 are clear.
    #[inline(always)]
    pub fn key(&self) -> u64 {
        self.key
    }

    // ---- what walks are spared ---------------------------------------------------------------------------------

    /// The nested translations that are known.
    #[inline]
    pub fn frames(&self) -> &Frames {
        &self.frames
    }

    /// The same, to add one.
    #[inline]
    pub fn frames_mut(&mut self) -> &mut Frames {
        &mut self.frames
    }

    /// Where the last-level table for `linear` lies, if that is remembered.
    #[inline]
    pub fn directory(&self, linear: u64) -> Option<Directory<P::Rights>> {
        self.directories.find(linear, self.context, self.epoch)
    }

    /// Remembers where the last-level table for `linear` lies; the entries above it have their accessed bits set.
    pub fn set_directory(&mut self, linear: u64, directory: Directory<P::Rights>) {
        self.directories.remember(linear, self.context, self.epoch, directory);
    }

    // ---- address spaces ----------------------------------------------------------------------------------------

    /// Makes `space` the one that accesses belong to.
    pub fn switch(&mut self, space: P::Space) {
        if self.current == Some(space) {
            return;
        }
        self.current = Some(space);
        self.context = match self.contexts.get(&space) {
            Some(c) => *c,
            None => self.new_context(),
        };
        self.renew_key();
    }

    fn new_context(&mut self) -> u64 {
        self.advance();
        if self.next >= CONTEXTS {
            self.clear_entries();
            self.contexts.clear();
            self.next = FIRST_CONTEXT;
        }
        let c = self.next;
        self.next += 1;
        if let Some(space) = self.current {
            self.contexts.insert(space, c);
        }
        c
    }

    // ---- flushes -----------------------------------------------------------------------------------------------

    /// Something is flushed.
    fn advance(&mut self) {
        self.epoch += 1;
        self.renew_key();
    }

    fn renew_key(&mut self) {
        self.key = self.epoch << (CONTEXT_BITS + 2) | self.context << 2;
    }

    /// Empties every bank.
    fn clear_entries(&mut self) {
        // Only what was filled: the rest need not become memory of the host's.
        for e in self.entries.iter_mut().filter(|e| e.read | e.write | e.exec != INVALID) {
            *e = EMPTY;
        }
        self.sizes.clear();
    }

    /// Forgets everything of every context.
    pub fn flush_all(&mut self) {
        self.clear_entries();
        self.flush_frames();
        self.contexts.clear();
        self.next = FIRST_CONTEXT;
        self.flushes += 1;
        self.context = self.new_context();
        self.renew_key();
    }

    /// Forgets nested translations only (they are all of one nested root).
    pub fn flush_frames(&mut self) {
        self.advance();
        self.frames.clear();
    }

    /// Forgets the translations of the space in force (global ones too: a TLB may).
    pub fn flush_current(&mut self) {
        self.context = self.new_context();
        self.renew_key();
        self.flushes += 1;
    }

    /// Forgets the translations of one space.
    pub fn flush_space(&mut self, space: P::Space) {
        if self.current == Some(space) {
            self.flush_current();
        } else {
            self.contexts.remove(&space);
            self.advance();
        }
    }

    /// Forgets the translations of every space of a guest.
    pub fn flush_guest(&mut self, guest: u32) {
        self.contexts.retain(|space, _| space.guest() != guest);
        if self.current.is_some_and(|space| space.guest() == guest) {
            self.flush_current();
        } else {
            self.advance();
        }
    }

    /// Forgets the page of `linear`, in every context, whatever its size.
    pub fn flush_page(&mut self, linear: u64) {
        self.advance();
        self.forget_page(linear, |_| true);
    }

    /// Forgets some pages of linear addresses in every space of a guest, whatever their size.
    pub fn flush_linear(&mut self, guest: u32, pages: &Pages) {
        self.advance();
        self.range_flushes += 1;
        let mut of_guest = [0u64; CONTEXTS as usize / 64];
        for (_, context) in self.contexts.iter().filter(|(space, _)| space.guest() == guest) {
            of_guest[*context as usize / 64] |= 1 << (context % 64);
        }
        let meant = |tag: u64| {
            let context = tag & (CONTEXTS - 1);
            of_guest[context as usize / 64] >> (context % 64) & 1 != 0
        };
        if pages.end.saturating_sub(pages.start) <= FEW_PAGES {
            for page in pages.clone() {
                self.forget_page(page << PAGE_SHIFT, meant);
            }
            return;
        }
        for (at, e) in self.entries.iter_mut().enumerate() {
            let tag = e.tag();
            if tag == INVALID || !meant(tag) {
                continue;
            }
            let size = self.sizes.range(at, 1)[0];
            let first = tag >> PAGE_SHIFT >> size << size;
            if first < pages.end && pages.start < first + (1 << size) {
                *e = EMPTY;
            }
        }
    }

    /// Forgets what is known of some guest-physical pages, and what was made of them. `ranges` are sorted, and don't meet.
    pub fn flush_physical(&mut self, ranges: &[Pages]) {
        self.advance();
        self.range_flushes += 1;
        self.frames.forget(ranges);
        let (Some(first), Some(last)) = (ranges.first(), ranges.last()) else { return };
        let (start, length) = (first.start, last.end - first.start);
        for (physical, e) in self.physical.iter().zip(self.entries.iter_mut()) {
            let page = physical >> PAGE_SHIFT;
            if page.wrapping_sub(start) < length && contains(ranges, page) && e.tag() != INVALID {
                *e = EMPTY;
            }
        }
    }

    /// Forgets the page of `linear` in the contexts of tags that are `meant`.
    fn forget_page(&mut self, linear: u64, meant: impl Fn(u64) -> bool) {
        for bank in 0..BANKS {
            let e = self.entry_mut(bank, linear);
            if meant(e.tag()) {
                *e = EMPTY;
            }
        }
        let Some((first, count)) = self.sizes.around(linear) else { return };
        for bank in 0..BANKS {
            let at = (bank << TLB_BITS) + first;
            let sizes = self.sizes.range(at, count);
            // Eight sizes at a time: most are the base page's.
            for (sizes, entries) in sizes.chunks_exact_mut(8).zip(self.entries[at..].chunks_exact_mut(8)) {
                if sizes == [0; 8] {
                    continue;
                }
                for (size, e) in sizes.iter_mut().zip(entries) {
                    let tag = e.tag();
                    if *size > 0
                        && (tag == INVALID
                            || ((tag ^ linear) >> (PAGE_SHIFT as u8 + *size) == 0 && meant(tag)))
                    {
                        *e = EMPTY;
                        *size = 0;
                    }
                }
            }
        }
    }

    /// Takes writes of the host page at `host` off the fast path (it holds code now).
    pub fn protect_host_page(&mut self, host: u64) {
        for e in self.entries.iter_mut() {
            if e.write != INVALID && (e.write & PAGE_MASK).wrapping_add(e.addend) == host {
                e.write |= SLOW;
            }
        }
    }

    /// Forgets every writable translation.
    pub fn protect_all(&mut self) {
        for e in self.entries.iter_mut().filter(|e| e.write != INVALID) {
            e.write = INVALID;
        }
    }
}
