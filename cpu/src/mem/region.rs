// SPDX-License-Identifier: Apache-2.0
//! Registered host memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a base page.
pub const PAGE_SIZE: usize = 4096;

/// Why a region was refused.
#[derive(Debug, PartialEq, Eq)]
pub enum RegionError {
    /// Address or size is not a multiple of the page size, or zero, or wraps around.
    Unaligned,
    /// It overlaps a region that is there.
    Overlap,
    /// No region starts at this address.
    Missing,
}

/// What is known of one page.
#[derive(Default)]
pub struct PageInfo {
    /// Bit i: the 64 bytes at i * 64 hold decoded code of some processor.
    pub code: AtomicU64,
}

/// A range of host memory.
pub struct Region {
    /// First address.
    pub base: usize,
    /// Bytes.
    pub size: usize,
    pages: Box<[PageInfo]>,
}

impl Region {
    /// Checks alignment and makes the page table of a region.
    pub fn new(base: usize, size: usize) -> Result<Region, RegionError> {
        if base == 0
            || base % PAGE_SIZE != 0
            || size == 0
            || size % PAGE_SIZE != 0
            || base.checked_add(size).is_none_or(|end| end > 1 << 52)
        {
            return Err(RegionError::Unaligned);
        }
        let pages = (0..size / PAGE_SIZE).map(|_| PageInfo::default()).collect();
        Ok(Region { base, size, pages })
    }
}

/// An immutable snapshot of all regions, sorted by address.
#[derive(Default)]
pub struct RegionTable {
    regions: Vec<Arc<Region>>,
    /// First address and size of each, close together for the search.
    bounds: Vec<(usize, usize)>,
}

/// Bits of the chunks that `size` bytes at page offset `offset` touch (`size` ends within the page).
pub fn chunk_mask(offset: usize, size: usize) -> u64 {
    let first = offset / 64;
    let last = (offset + size.max(1) - 1).min(PAGE_SIZE - 1) / 64;
    (u64::MAX >> (63 - (last - first))) << first
}

impl RegionTable {
    fn of(regions: Vec<Arc<Region>>) -> RegionTable {
        let bounds = regions.iter().map(|r| (r.base, r.size)).collect();
        RegionTable { regions, bounds }
    }

    /// Index of the region that holds `address`.
    #[inline]
    fn index(&self, address: usize) -> Option<usize> {
        let at = self.bounds.partition_point(|b| b.0 <= address).checked_sub(1)?;
        let (base, size) = self.bounds[at];
        (address - base < size).then_some(at)
    }

    /// This table and one region more.
    pub fn with(&self, region: Region) -> Result<RegionTable, RegionError> {
        let at = self.regions.partition_point(|r| r.base < region.base);
        let after_previous = at == 0 || {
            let p = &self.regions[at - 1];
            p.base + p.size <= region.base
        };
        let before_next = at == self.regions.len() || region.base + region.size <= self.regions[at].base;
        if !(after_previous && before_next) {
            return Err(RegionError::Overlap);
        }
        let mut regions = self.regions.clone();
        regions.insert(at, Arc::new(region));
        Ok(RegionTable::of(regions))
    }

    /// This table less the region that starts at `base`.
    pub fn without(&self, base: usize) -> Result<RegionTable, RegionError> {
        let mut regions = self.regions.clone();
        let at = regions.iter().position(|r| r.base == base).ok_or(RegionError::Missing)?;
        regions.remove(at);
        Ok(RegionTable::of(regions))
    }

    /// The region that holds `address`.
    #[inline]
    pub fn find(&self, address: usize) -> Option<&Region> {
        self.index(address).map(|at| &*self.regions[at])
    }

    /// The page that holds `address`.
    #[inline]
    pub fn page(&self, address: usize) -> Option<&PageInfo> {
        let region = self.find(address)?;
        region.pages.get((address - region.base) / PAGE_SIZE)
    }

    /// [`RegionTable::page`] with a guess which region holds it, which the answer corrects.
    #[inline]
    pub fn page_near(&self, address: usize, guess: &mut usize) -> Option<&PageInfo> {
        if self.bounds.get(*guess).is_none_or(|&(base, size)| address.wrapping_sub(base) >= size) {
            *guess = self.index(address)?;
        }
        let region = &self.regions[*guess];
        region.pages.get((address - region.base) / PAGE_SIZE)
    }

    /// Whether `size` bytes at `address` lie in one region.
    pub fn contains(&self, address: usize, size: usize) -> bool {
        self.index(address).is_some_and(|at| {
            let (base, whole) = self.bounds[at];
            size <= whole - (address - base)
        })
    }

    /// Forgets that the chunks touched by `size` bytes at `address` hold code; returns whether any did.
    pub fn take_code(&self, address: usize, size: usize) -> bool {
        let mut any = false;
        let end = address.saturating_add(size);
        let mut at = address;
        while at < end {
            let stop = end.min((at & !(PAGE_SIZE - 1)) + PAGE_SIZE);
            if let Some(page) = self.page(at) {
                let mask = chunk_mask(at % PAGE_SIZE, stop - at);
                if page.code.load(Ordering::SeqCst) & mask != 0 {
                    page.code.fetch_and(!mask, Ordering::SeqCst);
                    any = true;
                }
            }
            at = stop;
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_do_not_overlap_and_are_found_by_address() {
        let t = RegionTable::default();
        let t = t.with(Region::new(0x10000, 0x2000).unwrap()).unwrap();
        let t = t.with(Region::new(0x20000, 0x1000).unwrap()).unwrap();
        assert_eq!(t.with(Region::new(0x11000, 0x1000).unwrap()).err(), Some(RegionError::Overlap));
        assert_eq!(t.with(Region::new(0xf000, 0x2000).unwrap()).err(), Some(RegionError::Overlap));
        assert!(t.contains(0x10000, 0x2000) && !t.contains(0x10001, 0x2000));
        assert!(t.find(0x12000).is_none() && t.find(0x20fff).is_some());
        let t = t.without(0x10000).unwrap();
        assert!(t.find(0x10000).is_none());
    }

    #[test]
    fn chunk_masks_cover_what_they_touch() {
        assert_eq!(chunk_mask(0, 4096), u64::MAX);
        assert_eq!(chunk_mask(63, 2), 3);
        assert_eq!(chunk_mask(4095, 1), 1 << 63);
    }
}
