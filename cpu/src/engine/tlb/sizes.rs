// SPDX-License-Identifier: Apache-2.0
//! How large the guest's pages behind the TLB's entries are: a flush of one address is a flush of its whole page.

use super::entry::{BANKS, PAGE_SHIFT, TLB_BITS, TLB_SIZE, index};

/// log2 of the bytes of linear addresses that are searched together for entries of a large page.
const WINDOW_SHIFT: u32 = 22;
const WINDOWS: usize = 4096;
/// Pages of more bytes may be in the 1 GiB around an address.
const GIANT_SHIFT: u32 = 30;

pub(super) struct Sizes {
    /// log2 of the page size behind each entry, less [`PAGE_SHIFT`]; 0 for empty ones.
    of: Box<[u8]>,
    /// Where entries of large pages may be, since the last whole flush: bit (linear >> 22) & 4095 for pages of up to
    /// 4 MiB.
    large: Box<[u64; WINDOWS / 64]>,
    /// Bit (linear >> 30) & 63: the same for larger ones.
    giant: u64,
}

/// Number of the window that `linear` lies in, modulo [`WINDOWS`].
fn window(linear: u64) -> usize {
    (linear >> WINDOW_SHIFT) as usize & (WINDOWS - 1)
}

impl Default for Sizes {
    fn default() -> Self {
        Sizes {
            of: vec![0; TLB_SIZE * (BANKS + 1)].into_boxed_slice(),
            large: Box::new([0; WINDOWS / 64]),
            giant: 0,
        }
    }
}

impl Sizes {
    pub(super) fn clear(&mut self) {
        self.of.iter_mut().filter(|size| **size != 0).for_each(|size| *size = 0);
        self.large.fill(0);
        self.giant = 0;
    }

    pub(super) fn note(&mut self, bank: usize, linear: u64, size: u8) {
        self.of[(bank << TLB_BITS) + index(linear)] = size - PAGE_SHIFT as u8;
        if size as u32 > WINDOW_SHIFT {
            self.giant |= 1 << (linear >> GIANT_SHIFT & 63);
        } else if size as u32 > PAGE_SHIFT {
            self.large[window(linear) / 64] |= 1 << (window(linear) % 64);
        }
    }

    /// The entries of every bank that may be of a large page around `linear`: the first one's number and how many. The
    /// entries of a large page are as far apart as their addresses, modulo the size of a bank.
    pub(super) fn around(&self, linear: u64) -> Option<(usize, usize)> {
        if self.giant >> (linear >> GIANT_SHIFT & 63) & 1 != 0 {
            Some((0, TLB_SIZE))
        } else if self.large[window(linear) / 64] >> (window(linear) % 64) & 1 != 0 {
            let count = TLB_SIZE.min(1 << (WINDOW_SHIFT - PAGE_SHIFT));
            Some((index(linear) & !(count - 1), count))
        } else {
            None
        }
    }

    /// The sizes behind some entries, less [`PAGE_SHIFT`], counted through all banks.
    pub(super) fn range(&mut self, first: usize, count: usize) -> &mut [u8] {
        &mut self.of[first..first + count]
    }
}
