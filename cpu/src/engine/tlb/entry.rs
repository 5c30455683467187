// SPDX-License-Identifier: Apache-2.0
//! Entries of the TLB and the shape of its banks.

/// log2 of the entries in a bank.
pub const TLB_BITS: usize = 12;
pub(super) const TLB_SIZE: usize = 1 << TLB_BITS;
/// Banks that are ever filled.
pub const BANKS: usize = 3;
/// log2 of the bytes that an entry covers.
pub const PAGE_SHIFT: u32 = 12;
/// Mask of the page number.
pub const PAGE_MASK: u64 = !((1 << PAGE_SHIFT) - 1);
/// In a tag: take the slow path.
pub const SLOW: u64 = 1 << CONTEXT_BITS;
/// A tag that no access matches: contexts are counted from [`FIRST_CONTEXT`]. Zero, so that what a TLB never used takes
/// no memory of the host's.
pub const INVALID: u64 = 0;
pub(super) const CONTEXT_BITS: u32 = 11;
pub(super) const FIRST_CONTEXT: u64 = 1;
pub(super) const CONTEXTS: u64 = 1 << CONTEXT_BITS;

/// One translation, for reads, writes and instruction fetch.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Entry {
    /// Tag for reads.
    pub read: u64,
    /// Tag for writes.
    pub write: u64,
    /// Tag for fetches.
    pub exec: u64,
    /// Host address minus linear address.
    pub addend: u64,
}

impl Entry {
    /// A tag that is in the entry, but for [`SLOW`]; [`INVALID`]: there is none.
    #[inline]
    pub(super) fn tag(&self) -> u64 {
        let some = [self.read, self.exec, self.write].map(|tag| tag & !SLOW);
        some.into_iter().find(|tag| *tag != INVALID).unwrap_or(INVALID)
    }
}

pub(super) const EMPTY: Entry = Entry { read: INVALID, write: INVALID, exec: INVALID, addend: 0 };

/// Number of the entry in its bank that would hold `linear`.
#[inline(always)]
pub fn index(linear: u64) -> usize {
    (linear >> PAGE_SHIFT) as usize & (TLB_SIZE - 1)
}
