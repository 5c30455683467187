// SPDX-License-Identifier: Apache-2.0
//! Registered host memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

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
    /// The host has no memory for it.
    NoMemory,
}

/// What is known of one page.
#[derive(Default)]
pub struct PageInfo {
    /// Bit i: the 64 bytes at i * 64 hold decoded code of some processor.
    pub code: AtomicU64,
}

/// Whose memory a region is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Owner {
    /// The machine's user's.
    User,
    /// The machine's own: its [`super::pool::Pool`]'s.
    Machine,
}

/// A range of host memory.
pub struct Region {
    base: usize,
    size: usize,
    owner: Owner,
    pages: Box<[PageInfo]>,
    /// It has, or had, holes that are filled ([`super::holes`]).
    pub(super) filled: AtomicBool,
}

impl Region {
    /// Checks a region's place.
    pub(super) fn check(base: usize, size: usize) -> Result<(), RegionError> {
        if base == 0
            || base % PAGE_SIZE != 0
            || size == 0
            || size % PAGE_SIZE != 0
            || base.checked_add(size).is_none_or(|end| end > 1 << 52)
        {
            return Err(RegionError::Unaligned);
        }
        Ok(())
    }

    /// Checks alignment and makes the page table of a region.
    pub(super) fn new(base: usize, size: usize, owner: Owner) -> Result<Region, RegionError> {
        Region::check(base, size)?;
        let pages = page_infos(size / PAGE_SIZE).ok_or(RegionError::NoMemory)?;
        Ok(Region { base, size, owner, pages, filled: AtomicBool::new(false) })
    }

    /// First address.
    pub fn base(&self) -> usize {
        self.base
    }

    /// The address behind the last.
    pub fn end(&self) -> usize {
        self.base + self.size
    }
}

/// What is known of `count` pages, as yet nothing; None without memory for that. A region may be of any size, most of
/// which no processor ever looks at: the allocator takes zeroed memory of such a size from the host, page by page as it
/// is touched.
fn page_infos(count: usize) -> Option<Box<[PageInfo]>> {
    use std::alloc::{Layout, alloc_zeroed};
    let layout = Layout::array::<PageInfo>(count).ok()?;
    // SAFETY: the layout has a size, as `count` is not 0. Zeros are what PageInfo's default is; the memory comes from
    // the global allocator with the layout that the box will give it back with.
    unsafe {
        let first = alloc_zeroed(layout).cast::<PageInfo>();
        (!first.is_null()).then(|| Box::from_raw(core::ptr::slice_from_raw_parts_mut(first, count)))
    }
}

/// The most regions of a [`Run`], a power of two.
const RUN: usize = if cfg!(miri) { 8 } else { 256 };

/// Neighbouring regions, sorted by address.
#[derive(Default)]
struct Run {
    regions: Vec<Arc<Region>>,
    /// First address and size of each, close together for the search.
    bounds: Vec<(usize, usize)>,
}

impl Run {
    fn new(regions: &[Arc<Region>]) -> Arc<Run> {
        let bounds = regions.iter().map(|r| (r.base, r.size)).collect();
        Arc::new(Run { regions: regions.to_vec(), bounds })
    }
}

/// An immutable snapshot of all regions, sorted by address. It shares all but one run with the one before: a change
/// costs about the square root of what there is.
#[derive(Default)]
pub struct RegionTable {
    runs: Vec<Arc<Run>>,
    /// The first address of each run.
    firsts: Vec<usize>,
    /// Counts the regions that have been taken away on the way to this table.
    removals: u64,
}

/// Bits of the chunks that `size` bytes at page offset `offset` touch (`size` ends within the page).
pub fn chunk_mask(offset: usize, size: usize) -> u64 {
    let first = offset / 64;
    let last = (offset + size.max(1) - 1).min(PAGE_SIZE - 1) / 64;
    (u64::MAX >> (63 - (last - first))) << first
}

impl RegionTable {
    /// This table with `regions` in the place of a run: none, one or two.
    fn replaced(&self, run: usize, regions: &[Arc<Region>], removals: u64) -> RegionTable {
        let (mut runs, mut firsts) = (self.runs.clone(), self.firsts.clone());
        let most = if regions.len() > RUN { RUN / 2 } else { RUN };
        let parts = || regions.chunks(most);
        let old = run..self.runs.len().min(run + 1);
        runs.splice(old.clone(), parts().map(Run::new));
        firsts.splice(old, parts().map(|part| part[0].base));
        RegionTable { runs, firsts, removals }
    }

    /// The number of the run that holds `address`, or would.
    #[inline]
    fn run(&self, address: usize) -> usize {
        self.firsts.partition_point(|&first| first <= address).saturating_sub(1)
    }

    /// The regions from the one that holds `base` on.
    fn from(&self, base: usize) -> impl Iterator<Item = &Region> {
        let runs = self.runs.get(self.run(base)..).unwrap_or_default();
        runs.iter().flat_map(|run| &run.regions).map(|r| &**r).skip_while(move |r| r.end() <= base)
    }

    /// Whether everything that the table `before`, an earlier one of the same machine, has is in this one.
    pub fn extends(&self, before: &RegionTable) -> bool {
        self.removals == before.removals
    }

    /// The first region that meets `size` bytes at `base`.
    pub fn meets(&self, base: usize, size: usize) -> Option<&Region> {
        self.from(base).next().filter(|r| r.base < base.saturating_add(size))
    }

    /// The machine's user's regions.
    pub(super) fn users(&self) -> impl Iterator<Item = &Region> {
        self.from(0).filter(|r| r.owner == Owner::User)
    }

    /// Whether one of the machine's user's regions meets `size` bytes at `base`.
    pub(super) fn meets_user(&self, base: usize, size: usize) -> bool {
        let end = base.saturating_add(size);
        size != 0 && self.from(base).take_while(|r| r.base < end).any(|r| r.owner == Owner::User)
    }

    /// The same among the machine's own.
    pub(super) fn meets_own(&self, base: usize, size: usize) -> bool {
        self.from(base).take_while(|r| r.base < base.saturating_add(size)).any(|r| r.owner == Owner::Machine)
    }

    /// Where the region is that holds `address`: its run's number times [`RUN`], and its own in there.
    #[inline]
    fn index(&self, address: usize) -> Option<usize> {
        let run = self.run(address);
        let bounds = &self.runs.get(run)?.bounds;
        let at = bounds.partition_point(|b| b.0 <= address).checked_sub(1)?;
        let (base, size) = bounds[at];
        (address - base < size).then_some(run * RUN + at)
    }

    #[inline]
    fn region(&self, index: usize) -> &Region {
        &self.runs[index / RUN].regions[index % RUN]
    }

    /// This table and one region more.
    pub(super) fn with(&self, region: Region) -> Result<RegionTable, RegionError> {
        if self.meets(region.base, region.size).is_some() {
            return Err(RegionError::Overlap);
        }
        let run = self.run(region.base);
        let mut regions = self.runs.get(run).map_or_else(Vec::new, |r| r.regions.clone());
        regions.insert(regions.partition_point(|r| r.base < region.base), Arc::new(region));
        Ok(self.replaced(run, &regions, self.removals))
    }

    /// This table less the region of `owner` that starts at `base`.
    pub(super) fn without(&self, base: usize, owner: Owner) -> Result<RegionTable, RegionError> {
        let index = self.index(base).ok_or(RegionError::Missing)?;
        let region = self.region(index);
        if region.base != base || region.owner != owner {
            return Err(RegionError::Missing);
        }
        let mut regions = self.runs[index / RUN].regions.clone();
        regions.remove(index % RUN);
        Ok(self.replaced(index / RUN, &regions, self.removals + 1))
    }

    /// The region that holds `address`.
    #[inline]
    pub fn find(&self, address: usize) -> Option<&Region> {
        self.index(address).map(|at| self.region(at))
    }

    /// The page that holds `address`.
    #[inline]
    pub fn page(&self, address: usize) -> Option<&PageInfo> {
        let region = self.find(address)?;
        region.pages.get((address - region.base) / PAGE_SIZE)
    }

    /// The base and size of the region that holds `address`, with a guess which it is, which the answer corrects.
    #[inline]
    fn bounds_near(&self, address: usize, guess: &mut usize) -> Option<(usize, usize)> {
        let guessed = self.runs.get(*guess / RUN).and_then(|run| run.bounds.get(*guess % RUN));
        match guessed {
            Some(&(base, size)) if address.wrapping_sub(base) < size => Some((base, size)),
            _ => {
                *guess = self.index(address)?;
                Some(self.runs[*guess / RUN].bounds[*guess % RUN])
            }
        }
    }

    /// [`RegionTable::page`] with a guess.
    #[inline]
    pub fn page_near(&self, address: usize, guess: &mut usize) -> Option<&PageInfo> {
        let (base, _) = self.bounds_near(address, guess)?;
        self.region(*guess).pages.get((address - base) / PAGE_SIZE)
    }

    /// Whether `size` bytes at `address` lie in one region.
    pub fn contains(&self, address: usize, size: usize) -> bool {
        self.find(address).is_some_and(|region| size <= region.size - (address - region.base))
    }

    /// [`RegionTable::contains`] with a guess.
    #[inline]
    pub fn contains_near(&self, address: usize, size: usize, guess: &mut usize) -> bool {
        self.bounds_near(address, guess).is_some_and(|(base, length)| size <= length - (address - base))
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

    fn region(base: usize, size: usize) -> Region {
        Region::new(base, size, Owner::User).unwrap()
    }

    #[test]
    fn regions_do_not_overlap_and_are_found_by_address() {
        let t = RegionTable::default();
        let t = t.with(region(0x10000, 0x2000)).unwrap();
        let t = t.with(region(0x20000, 0x1000)).unwrap();
        assert_eq!(t.with(region(0x11000, 0x1000)).err(), Some(RegionError::Overlap));
        assert_eq!(t.with(region(0xf000, 0x2000)).err(), Some(RegionError::Overlap));
        assert_eq!(t.with(region(0xf000, 0x20000)).err(), Some(RegionError::Overlap));
        assert!(t.with(region(0x12000, 0xe000)).is_ok());
        assert!(t.contains(0x10000, 0x2000) && !t.contains(0x10001, 0x2000));
        assert!(t.find(0x12000).is_none() && t.find(0x20fff).is_some());
        assert_eq!(t.without(0x10000, Owner::Machine).err(), Some(RegionError::Missing));
        let less = t.without(0x10000, Owner::User).unwrap();
        assert!(less.find(0x10000).is_none());
        assert!(!less.extends(&t) && less.with(region(0x50000, 0x1000)).unwrap().extends(&less));
    }

    #[test]
    fn many_regions_come_and_go_in_any_order() {
        const COUNT: usize = 5 * RUN;
        // A multiplier prime to the count visits every number once.
        let place = |n: usize| 0x10_0000 + (n * 771 % COUNT) * 0x3000;
        let mut t = RegionTable::default();
        for n in 0..COUNT {
            t = t.with(region(place(n), 0x2000)).unwrap();
            assert!(t.runs.iter().all(|r| (1..=RUN).contains(&r.regions.len())));
        }
        let bases: Vec<_> = t.from(0).map(|r| r.base).collect();
        assert!(bases.len() == COUNT && bases.is_sorted());
        let mut guess = 0;
        for n in 0..COUNT {
            let at = place(n);
            assert!(t.contains(at, 0x2000) && !t.contains(at + 0x2000, 1) && !t.contains(at, 0x2001));
            assert!(
                t.page_near(at + 0x1fff, &mut guess).is_some() && t.page_near(at - 1, &mut guess).is_none()
            );
            assert_eq!(t.meets(at - 0x1000, 0x1001).map(|r| r.base), Some(at));
            assert_eq!(t.with(region(at + 0x1000, 0x1000)).err(), Some(RegionError::Overlap));
            t = t.without(at, Owner::User).unwrap();
            assert!(t.find(at).is_none() && t.without(at, Owner::User).is_err());
        }
        assert!(t.runs.is_empty() && t.firsts.is_empty());
    }

    #[test]
    #[cfg_attr(miri, ignore = "it allocates what nobody has")]
    fn a_region_takes_memory_for_the_pages_that_are_looked_at() {
        let resident = || {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4
        };
        let before = resident();
        let huge = region(1 << 42, 1 << 40);
        assert_eq!(huge.pages[12345].code.load(Ordering::SeqCst), 0);
        assert!(resident() < before + (64 << 10), "KiB: {} -> {}", before, resident());
    }

    #[test]
    fn chunk_masks_cover_what_they_touch() {
        assert_eq!(chunk_mask(0, 4096), u64::MAX);
        assert_eq!(chunk_mask(63, 2), 3);
        assert_eq!(chunk_mask(4095, 1), 1 << 63);
    }
}
