// SPDX-License-Identifier: Apache-2.0
//! Caches of nested translations: from guest-physical pages to host memory.

use super::entry::{PAGE_MASK, PAGE_SHIFT};
use crate::mem::flush::Pages;

/// log2 of the bytes that one large entry covers.
pub const LARGE_SHIFT: u32 = 21;
const LARGE_MASK: u64 = (1 << LARGE_SHIFT) - 1;
const BITS: usize = 10;
const LARGE_BITS: usize = 8;

/// A nested translation.
#[derive(Clone, Copy)]
pub struct Frame {
    /// Host address of the page.
    pub host: u64,
    /// Writes are allowed, and need no mark in the tables.
    pub write: bool,
    /// Fetches are allowed.
    pub exec: bool,
    /// The 2 MiB around it are mapped by one entry, to registered memory.
    pub large: bool,
}

/// A guest-physical page or piece | 1 when writable | 2 when executable | [`PRESENT`]; and its host address.
type Slot = (u64, u64);
const PRESENT: u64 = 4;
/// All zeros: memory of the host's only once it is filled.
const EMPTY: Slot = (0, 0);

/// Both caches, of one nested root.
pub struct Frames {
    pages: Box<[Slot]>,
    /// 2 MiB pieces of large nested leaves.
    pieces: Box<[Slot]>,
}

impl Default for Frames {
    fn default() -> Self {
        Frames {
            pages: vec![EMPTY; 1 << BITS].into_boxed_slice(),
            pieces: vec![EMPTY; 1 << LARGE_BITS].into_boxed_slice(),
        }
    }
}

fn page_slot(gpa: u64) -> usize {
    (gpa >> PAGE_SHIFT) as usize & ((1 << BITS) - 1)
}

fn piece_slot(gpa: u64) -> usize {
    (gpa >> LARGE_SHIFT) as usize & ((1 << LARGE_BITS) - 1)
}

/// Whether one of `ranges`, sorted and apart, meets the pages from `start` to before `end`.
fn meets(ranges: &[Pages], start: u64, end: u64) -> bool {
    let behind = ranges.partition_point(|pages| pages.end <= start);
    ranges.get(behind).is_some_and(|pages| pages.start < end)
}

/// Whether `page` is in one of them.
pub(super) fn contains(ranges: &[Pages], page: u64) -> bool {
    meets(ranges, page, page + 1)
}

impl Frames {
    /// The translation of the page of `gpa`, if it is known to allow the access.
    #[inline]
    pub fn find(&self, gpa: u64, write: bool, fetch: bool) -> Option<Frame> {
        let allowed = |slot: u64| (!write || slot & 1 != 0) && (!fetch || slot & 2 != 0);
        let frame = |slot: u64, host: u64, large: bool| Frame {
            host,
            write: slot & 1 != 0,
            exec: slot & 2 != 0,
            large,
        };
        let (slot, host) = self.pieces[piece_slot(gpa)];
        if slot & PAGE_MASK == gpa & !LARGE_MASK && slot & PRESENT != 0 && allowed(slot) {
            return Some(frame(slot, host | (gpa & LARGE_MASK & PAGE_MASK), true));
        }
        let (slot, host) = self.pages[page_slot(gpa)];
        let found = slot & PAGE_MASK == gpa & PAGE_MASK && slot & PRESENT != 0 && allowed(slot);
        found.then(|| frame(slot, host, false))
    }

    /// Remembers the translation of the page of `gpa`, or of the piece around it.
    pub fn remember(&mut self, gpa: u64, frame: Frame) {
        let rights = frame.write as u64 | (frame.exec as u64) << 1 | PRESENT;
        if frame.large {
            self.pieces[piece_slot(gpa)] = (gpa & !LARGE_MASK | rights, frame.host & !LARGE_MASK);
        } else {
            self.pages[page_slot(gpa)] = (gpa & PAGE_MASK | rights, frame.host);
        }
    }

    /// Forgets the translations of some pages, and of the large pieces that they are in.
    pub(super) fn forget(&mut self, ranges: &[Pages]) {
        for slot in &mut *self.pages {
            if slot.0 & PRESENT != 0 && contains(ranges, slot.0 >> PAGE_SHIFT) {
                *slot = EMPTY;
            }
        }
        for slot in &mut *self.pieces {
            let first = slot.0 >> LARGE_SHIFT << (LARGE_SHIFT - PAGE_SHIFT);
            if slot.0 & PRESENT != 0 && meets(ranges, first, first + (1 << (LARGE_SHIFT - PAGE_SHIFT))) {
                *slot = EMPTY;
            }
        }
    }

    pub(super) fn clear(&mut self) {
        self.pages.fill(EMPTY);
        self.pieces.fill(EMPTY);
    }
}
