// SPDX-License-Identifier: Apache-2.0
//! Holes of the process's address space that users have named as memory, for later.
//!
//! What the process maps there is the guest's. It would be anything: the host gives the next free place to whoever asks,
//! the allocator, a thread's stack, a library. So a hole is filled with mappings that have no access and no memory:
//! nobody gets the place who does not name it (MAP_FIXED, which replaces them). They are recognized by their file.

use std::ffi::CStr;
use std::fs::read_to_string;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::c_void;

const NAME: &CStr = c"softkvm-hole";
/// What the path in /proc/self/maps begins with.
const PATH: &str = "/memfd:softkvm-hole";

/// The process's mappings in a range: start, end, and whether it is one of these.
fn mappings(start: usize, end: usize) -> Vec<(usize, usize, bool)> {
    let maps = read_to_string("/proc/self/maps").unwrap_or_default();
    let parse = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let (from, to) = fields.next()?.split_once('-')?;
        let (from, to) = (usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?);
        let ours = fields.nth(4).is_some_and(|path| path == PATH);
        (from < end && start < to).then_some((from.max(start), to.min(end), ours))
    };
    maps.lines().filter_map(parse).collect()
}

/// Fills the holes of a range, as far as the host lets it: where it does not, others don't get anything either. False if
/// there are none.
pub(super) fn fill(base: usize, size: usize) -> bool {
    // SAFETY: looks whether all is mapped, and does nothing else on Linux.
    let any = || unsafe { libc::msync(base as *mut c_void, size, libc::MS_ASYNC) } != 0;
    // Meanwhile others may map something there, and unmap it.
    (0..ATTEMPTS).take_while(|_| any() && fill_those_seen(base, base + size)).count() > 0
}

const ATTEMPTS: usize = 4;

fn fill_those_seen(base: usize, end: usize) -> bool {
    // SAFETY: a new file.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return false;
    }
    // SAFETY: nobody else has it.
    let file = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut at = base;
    for (start, stop, _) in mappings(base, end).into_iter().chain([(end, end, false)]) {
        if at < start {
            let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
            // SAFETY: replaces nothing.
            unsafe {
                let p =
                    libc::mmap(at as *mut c_void, start - at, libc::PROT_NONE, flags, file.as_raw_fd(), 0);
                // Kernels before 4.17 take the address for a wish.
                if p != libc::MAP_FAILED && p as usize != at {
                    libc::munmap(p, start - at);
                }
            }
        }
        at = at.max(stop);
    }
    true
}

/// Makes holes of a range free again, but for those that are still named: `named` gives the first such range, start and
/// end, that meets one given by its start and size. Who maps something there at the same time, in another thread, may
/// lose it.
pub(super) fn free(base: usize, size: usize, named: impl Fn(usize, usize) -> Option<(usize, usize)>) {
    for (start, end, _) in mappings(base, base + size).into_iter().filter(|m| m.2) {
        let mut at = start;
        while at < end {
            let (stop, next) = match named(at, end - at) {
                Some((from, to)) => (from.clamp(at, end), to.min(end)),
                None => (end, end),
            };
            if at < stop {
                // SAFETY: a mapping of these, of which nobody has anything.
                unsafe { libc::munmap(at as *mut c_void, stop - at) };
            }
            at = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Machine, PAGE_SIZE};
    use super::*;

    /// Where the host puts nothing by itself, while other tests run.
    const FAR: usize = 0x2000_0000_0000;

    /// Something that the process maps, near there if it can be.
    fn map(near: usize, pages: usize, flags: i32) -> usize {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | flags;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping; with MAP_FIXED in the place of what is this test's.
        let p = unsafe { libc::mmap(near as *mut c_void, pages * PAGE_SIZE, protection, flags, -1, 0) };
        assert_ne!(p, libc::MAP_FAILED);
        p as usize
    }

    fn unmap(at: usize, pages: usize) {
        // SAFETY: this test's mapping.
        assert_eq!(unsafe { libc::munmap(at as *mut c_void, pages * PAGE_SIZE) }, 0);
    }

    /// Start and end in pages, and whether they are a filled hole.
    fn seen(base: usize, pages: usize) -> Vec<(usize, usize, bool)> {
        let all = mappings(base, base + pages * PAGE_SIZE).into_iter();
        all.map(|(a, b, ours)| ((a - base) / PAGE_SIZE, (b - base) / PAGE_SIZE, ours)).collect()
    }

    #[test]
    fn nobody_gets_a_hole_who_does_not_name_it_until_no_region_does() {
        const PAGES: usize = 16;
        let (one, other) = (Machine::new(), Machine::new());
        // Two pages are there.
        let base = map(FAR, PAGES, 0);
        let page = |n: usize| base + n * PAGE_SIZE;
        unmap(base, 4);
        unmap(page(6), PAGES - 6);
        // SAFETY: no processor runs.
        unsafe {
            one.add_region(base, 10 * PAGE_SIZE).unwrap();
            other.add_region(page(8), 8 * PAGE_SIZE).unwrap();
        }
        let filled =
            |all: &[(usize, usize, bool)]| -> usize { all.iter().filter(|m| m.2).map(|m| m.1 - m.0).sum() };
        let all = seen(base, PAGES);
        assert!(all.contains(&(4, 6, false)), "{all:?}");
        assert_eq!(filled(&all), PAGES - 2, "{all:?}");
        // The host gives other places.
        let others: Vec<usize> = (0..100).map(|_| map(base, 2, 0)).collect();
        assert!(
            others.iter().all(|at| at.wrapping_sub(base) >= PAGES * PAGE_SIZE && base.wrapping_sub(*at) != 0)
        );
        others.into_iter().for_each(|at| unmap(at, 2));
        // Who names it gets it, and keeps it.
        assert_eq!(map(page(12), 1, libc::MAP_FIXED), page(12));
        one.remove_region(base).unwrap();
        assert_eq!(filled(&seen(page(8), 8)), 7);
        other.remove_region(page(8)).unwrap();
        let all = seen(base, PAGES);
        assert_eq!(filled(&all), 0, "{all:?}");
        assert!(all.iter().any(|m| m.0 <= 12 && 12 < m.1));
        unmap(page(12), 1);
        unmap(page(4), 2);
    }

    #[test]
    fn what_a_machine_knows_of_a_region_does_not_lie_in_its_holes() {
        const PAGES: usize = 1 << 18;
        // Where the host puts the next mapping; another test may be there first.
        let all_filled = |_| {
            let base = map(0, PAGES, 0);
            unmap(base, PAGES);
            let machine = Machine::new();
            // SAFETY: no processor runs.
            unsafe {
                machine.add_region(base, PAGES * PAGE_SIZE).is_ok() && seen(base, PAGES) == [(0, PAGES, true)]
            }
        };
        assert!((0..100).any(all_filled));
    }

    #[test]
    fn a_machine_that_goes_leaves_no_hole_filled() {
        // Unless another test looks through all machines at that moment.
        let gone = |n: usize| {
            let base = map(FAR + (n << 30), 4, 0);
            unmap(base, 4);
            let machine = Machine::new();
            // SAFETY: no processor runs.
            unsafe { machine.add_region(base, 4 * PAGE_SIZE).unwrap() };
            assert_eq!(seen(base, 4).iter().filter(|m| m.2).count(), 1);
            drop(machine);
            seen(base, 4).iter().all(|m| !m.2)
        };
        assert!((1..1000).any(gone));
    }
}
