// SPDX-License-Identifier: Apache-2.0
//! Tables that start as zeros and may stay so for the most part: the host gives memory to what is written only.
//!
//! The allocator's zeroed memory is not that: it gives what others have had before, and clears it.

use std::alloc::{Layout, handle_alloc_error};
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::ptr::{null_mut, slice_from_raw_parts_mut};

/// A slice of fixed length in a mapping of its own. It is a box for the compiler, which knows most of those.
pub struct Zeroed<T: Copy>(ManuallyDrop<Box<[T]>>);

impl<T: Copy> Zeroed<T> {
    /// # Safety
    ///
    /// All zeros must be a value of `T`.
    pub unsafe fn new(length: usize) -> Self {
        let layout = Layout::array::<T>(length).expect("the size of a table fits an isize");
        assert!(layout.size() > 0 && layout.align() <= 4096);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, which replaces nothing.
        let p = unsafe { libc::mmap(null_mut(), layout.size(), protection, flags, -1, 0) };
        if p == libc::MAP_FAILED {
            handle_alloc_error(layout);
        }
        // One entry written should not become 2 MiB.
        #[cfg(target_os = "linux")]
        // SAFETY: advice about the mapping just made.
        unsafe {
            libc::madvise(p, layout.size(), libc::MADV_NOHUGEPAGE)
        };
        // SAFETY: its own, aligned to a page, and its zeros are values of T; never freed as a box.
        Zeroed(ManuallyDrop::new(unsafe { Box::from_raw(slice_from_raw_parts_mut(p.cast::<T>(), length)) }))
    }
}

impl<T: Copy> Deref for Zeroed<T> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Copy> DerefMut for Zeroed<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T: Copy> Drop for Zeroed<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; T has no drop of its own.
        unsafe { libc::munmap(self.0.as_mut_ptr().cast(), size_of_val(&**self)) };
    }
}

#[cfg(test)]
mod tests {
    use super::Zeroed;

    #[test]
    fn what_was_not_written_is_zero_and_takes_no_memory() {
        const LENGTH: usize = 1 << 20;
        // SAFETY: zeros are a u64.
        let mut table = unsafe { Zeroed::<u64>::new(LENGTH) };
        table[LENGTH / 2] = 7;
        let mut resident = vec![0u8; LENGTH * 8 / 4096];
        // SAFETY: a byte for each page of the table.
        let result = unsafe { libc::mincore(table.as_mut_ptr().cast(), LENGTH * 8, resident.as_mut_ptr()) };
        assert_eq!(result, 0);
        assert_eq!(resident.iter().filter(|page| **page & 1 != 0).count(), 1);
        assert_eq!(table.iter().sum::<u64>(), 7);
    }
}
