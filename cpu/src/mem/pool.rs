// SPDX-License-Identifier: Apache-2.0
//! A machine's own pages: page tables, control blocks, permission maps.
//!
//! They are given out from chunks, each one region, so that a new page table changes nothing that processors look at.
//! A chunk lies where no machine's user has its memory: a user may name addresses where nothing is mapped yet, and what
//! the host put there would be its guest's to write.

use std::collections::{BTreeMap, BTreeSet};

use super::region::{PAGE_SIZE, RegionError};

/// Pages of a chunk, unless more are wanted in a row.
const CHUNK_PAGES: usize = 512;

/// Places that are tried for a chunk.
const ATTEMPTS: usize = 4096;

/// Zeroed memory of the host.
pub(super) struct Mapping {
    base: usize,
    size: usize,
}

impl Mapping {
    pub(super) fn base(&self) -> usize {
        self.base
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Maps `size` bytes, at `near` if that is free.
    fn new(near: usize, size: usize) -> Option<Mapping> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, which replaces nothing.
        let p = unsafe { libc::mmap(near as *mut libc::c_void, size, protection, flags, -1, 0) };
        if p == libc::MAP_FAILED {
            return None;
        }
        // The few pages of a small guest need not be 2 MiB.
        #[cfg(all(target_os = "linux", not(miri)))]
        // SAFETY: advice about the mapping just made.
        unsafe {
            libc::madvise(p, size, libc::MADV_NOHUGEPAGE)
        };
        Some(Mapping { base: p as usize, size })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; whoever drops it has made sure that nobody reaches it.
        unsafe { libc::munmap(self.base as *mut libc::c_void, self.size) };
    }
}

/// Maps `size` bytes apart from everything that `taken` tells of: the first range, start and end, that meets one given
/// by its start and size.
pub(super) fn map(
    size: usize,
    taken: impl Fn(usize, usize) -> Option<(usize, usize)>,
) -> Result<Mapping, RegionError> {
    let mut near = Vec::new();
    let mut seen = Vec::new();
    // What lies wrong stays until the end, so that the host can't give the same place again.
    let mut rejected = Vec::new();
    for _ in 0..ATTEMPTS {
        let mapping = Mapping::new(near.pop().unwrap_or(0), size).ok_or(RegionError::NoMemory)?;
        let Some((start, end)) = taken(mapping.base, size) else { return Ok(mapping) };
        // Not there: above, below. Where the host has something already it gives another place, perhaps inside the next
        // range; each is looked at once.
        if !seen.contains(&start) {
            seen.push(start);
            near.push(end);
            near.extend(start.checked_sub(size));
        }
        rejected.push(mapping);
    }
    Err(RegionError::NoMemory)
}

/// A mapping and which of its pages are given out.
struct Chunk {
    memory: Mapping,
    /// A bit for each page: given out; has been given out before.
    used: Vec<u64>,
    stale: Vec<u64>,
    /// Pages that are not given out.
    free: usize,
    /// No free page lies in a word before this.
    first: usize,
}

impl Chunk {
    fn pages(&self) -> usize {
        self.memory.size / PAGE_SIZE
    }

    fn is_used(&self, page: usize) -> bool {
        self.used[page / 64] >> (page % 64) & 1 != 0
    }

    /// The first of `count` free pages in a row.
    fn find(&self, count: usize) -> Option<usize> {
        let mut run = 0;
        let mut page = self.first * 64;
        while page < self.pages() {
            if page % 64 == 0 && self.used[page / 64] == u64::MAX {
                run = 0;
                page += 64;
                continue;
            }
            run = if self.is_used(page) { 0 } else { run + 1 };
            page += 1;
            if run == count {
                return Some(page - count);
            }
        }
        None
    }

    fn take(&mut self, count: usize) -> Option<usize> {
        if self.free < count {
            return None;
        }
        let page = self.find(count)?;
        for n in page..page + count {
            let bit = 1 << (n % 64);
            self.used[n / 64] |= bit;
            if self.stale[n / 64] & bit != 0 {
                // SAFETY: the page is in the mapping, and nobody's.
                unsafe { ((self.memory.base + n * PAGE_SIZE) as *mut u8).write_bytes(0, PAGE_SIZE) };
            }
            self.stale[n / 64] |= bit;
        }
        self.free -= count;
        while self.used.get(self.first) == Some(&u64::MAX) {
            self.first += 1;
        }
        Some(self.memory.base + page * PAGE_SIZE)
    }

    fn give(&mut self, page: usize, count: usize) {
        for n in page..page + count {
            assert!(self.is_used(n), "page {n} of a chunk is given back twice");
            self.used[n / 64] &= !(1 << (n % 64));
        }
        self.free += count;
        self.first = self.first.min(page / 64);
    }
}

/// The pages.
///
/// A guest decides how many tables there are and in which order they go, so neither to take a page nor to give one back
/// may look at all chunks.
#[derive(Default)]
pub(super) struct Pool {
    /// By address.
    chunks: BTreeMap<usize, Chunk>,
    /// The addresses of those that have a free page.
    open: BTreeSet<usize>,
    /// Free pages of all chunks.
    free: usize,
    /// Chunks that have been asked for pages, for statistics.
    #[cfg(test)]
    looks: usize,
}

impl Pool {
    /// Bytes of a chunk that has room for `count` pages.
    pub(super) fn chunk_size(count: usize) -> Option<usize> {
        count.max(CHUNK_PAGES).checked_mul(PAGE_SIZE).filter(|size| count > 0 && *size < 1 << 47)
    }

    /// `count` zeroed pages in a row, if a chunk has them.
    pub(super) fn take(&mut self, count: usize) -> Option<usize> {
        for at in &self.open {
            #[cfg(test)]
            {
                self.looks += 1;
            }
            let chunk = self.chunks.get_mut(at)?;
            if let Some(address) = chunk.take(count) {
                self.free -= count;
                if chunk.free == 0 {
                    self.open.remove(&chunk.memory.base);
                }
                return Some(address);
            }
        }
        None
    }

    /// Adds a chunk.
    pub(super) fn add(&mut self, memory: Mapping) {
        let pages = memory.size / PAGE_SIZE;
        let words = pages.div_ceil(64);
        let mut used = vec![0; words];
        if pages % 64 != 0 {
            used[words - 1] = u64::MAX << (pages % 64);
        }
        let base = memory.base;
        self.chunks.insert(base, Chunk { memory, used, stale: vec![0; words], free: pages, first: 0 });
        self.open.insert(base);
        self.free += pages;
    }

    /// Takes pages back. A chunk that is not used any more is returned, unless the others have little room.
    pub(super) fn give(&mut self, address: usize, count: usize) -> Option<Mapping> {
        let (&base, chunk) = self.chunks.range_mut(..=address).next_back()?;
        if address - base >= chunk.memory.size {
            return None;
        }
        chunk.give((address - base) / PAGE_SIZE, count);
        self.open.insert(base);
        self.free += count;
        let room = self.free - chunk.free;
        if chunk.free < chunk.pages() || room < CHUNK_PAGES / 4 {
            return None;
        }
        self.free = room;
        self.open.remove(&base);
        self.chunks.remove(&base).map(|chunk| chunk.memory)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Machine;
    use super::*;

    fn word(address: usize) -> *mut u64 {
        address as *mut u64
    }

    #[test]
    fn pages_are_zeroed_apart_and_usable() {
        let machine = Machine::new();
        let mut seen = std::collections::HashSet::new();
        let mut pages = Vec::new();
        for round in 0..3000 {
            let count = 1 + round % 3;
            let address = machine.alloc_pages(count).unwrap();
            for page in 0..count {
                let at = address + page * PAGE_SIZE;
                assert!(seen.insert(at), "{at:#x} was given out twice");
                // SAFETY: the machine's page.
                unsafe {
                    assert_eq!(word(at).read(), 0);
                    word(at).write(1);
                }
            }
            assert!(machine.regions().contains(address, count * PAGE_SIZE));
            pages.push((address, count));
            if round % 2 == 0 {
                let (address, count) = pages.swap_remove(round / 2 % pages.len());
                (0..count).for_each(|n| assert!(seen.remove(&(address + n * PAGE_SIZE))));
                machine.free_pages(address, count);
            }
        }
    }

    #[test]
    fn a_page_more_or_less_is_the_same_table_of_regions() {
        let machine = Machine::new();
        let first = machine.alloc_pages(1).unwrap();
        let before = machine.regions();
        let more: Vec<usize> = (0..100).map(|_| machine.alloc_pages(1).unwrap()).collect();
        more.iter().for_each(|p| machine.free_pages(*p, 1));
        assert!(std::sync::Arc::ptr_eq(&before, &machine.regions()));
        machine.free_pages(first, 1);
    }

    #[test]
    fn chunks_that_are_not_used_go_back_to_the_host() {
        let machine = Machine::new();
        let pages: Vec<usize> = (0..CHUNK_PAGES * 4).map(|_| machine.alloc_pages(1).unwrap()).collect();
        let count = || machine.pool().chunks.len();
        assert_eq!(count(), 4);
        pages.iter().for_each(|p| machine.free_pages(*p, 1));
        assert_eq!(count(), 1);
        let big = machine.alloc_pages(CHUNK_PAGES * 3).unwrap();
        machine.free_pages(big, CHUNK_PAGES * 3);
        assert_eq!(count(), 1);
        assert_eq!(machine.alloc_pages(usize::MAX / PAGE_SIZE), Err(RegionError::NoMemory));
        assert_eq!(machine.alloc_pages(0), Err(RegionError::NoMemory));
    }

    #[test]
    fn a_page_comes_and_goes_without_a_look_at_all_chunks() {
        const PAGES: usize = CHUNK_PAGES * 20;
        let machine = Machine::new();
        let mut pages: Vec<usize> = (0..PAGES).map(|_| machine.alloc_pages(1).unwrap()).collect();
        assert!(machine.pool().looks <= PAGES + 20, "{} looks", machine.pool().looks);
        assert!(machine.pool().open.is_empty());
        // Any order: a multiplier prime to the count visits each once.
        for n in 0..PAGES {
            let page = n * 7919 % PAGES;
            machine.free_pages(pages[page], 1);
            if n % 3 == 0 {
                pages[page] = machine.alloc_pages(1).unwrap();
            } else {
                pages[page] = 0;
            }
            let pool = machine.pool();
            if n % 500 == 0 {
                assert_eq!(pool.free, pool.chunks.values().map(|c| c.free).sum::<usize>());
                assert!(pool.chunks.iter().all(|(at, c)| pool.open.contains(at) == (c.free > 0)));
            }
        }
        assert!(machine.pool().looks <= 2 * PAGES, "{} looks", machine.pool().looks);
        pages.retain(|page| *page != 0);
        pages.iter().for_each(|page| machine.free_pages(*page, 1));
        let pool = machine.pool();
        assert_eq!((pool.chunks.len(), pool.open.len(), pool.free), (1, 1, CHUNK_PAGES));
    }

    #[test]
    fn a_hole_that_a_user_has_named_is_left_whatever_lies_around_it() {
        // Above and below there is something else, so the host gives one place of the hole after the other.
        let places = std::cell::RefCell::new(Vec::new());
        let mapping = map(PAGE_SIZE, |base, _| {
            let mut places = places.borrow_mut();
            assert!(!places.contains(&base), "{base:#x} again");
            places.push(base);
            (places.len() <= 20).then_some((1 << 46, 1 << 47))
        });
        assert_eq!(mapping.ok().map(|m| m.base), places.borrow().last().copied());
    }

    #[test]
    fn pages_lie_outside_of_what_a_user_has_named_mapped_or_not() {
        let (machine, other) = (Machine::new(), Machine::new());
        // Where the host would put the next mapping, and much around it. (Another test's machine may be there first.)
        let (base, size) = loop {
            let hole = Mapping::new(0, 1 << 30).unwrap();
            let (base, size) = (hole.base, hole.size);
            drop(hole);
            // SAFETY: no processor runs.
            if unsafe { machine.add_region(base, size).is_ok() } {
                break (base, size);
            }
        };
        for m in [&machine, &other] {
            let pages: Vec<usize> = (0..CHUNK_PAGES + 1).map(|_| m.alloc_pages(1).unwrap()).collect();
            assert!(pages.iter().all(|p| p.wrapping_sub(base) >= size));
            // Nor can a user name them.
            // SAFETY: refused.
            unsafe {
                assert_eq!(machine.add_region(pages[7], PAGE_SIZE), Err(RegionError::Overlap));
                assert_eq!(other.add_region(pages[7], PAGE_SIZE), Err(RegionError::Overlap));
            }
        }
    }
}
