// SPDX-License-Identifier: Apache-2.0
//! Where code goes that may be anywhere: 4 GiB that nobody else uses, so that a call's address tells whose it is.
//!
//! The kernel and dynamic linkers have code at the upper end of the address space, and programs of fixed addresses at its
//! lower end. A program that is executed inherits the filter: its code is not here, but if it is one of ours.

use core::ops::Range;
use core::sync::atomic::{AtomicUsize, Ordering};

use crate::raw::raw;
use softkvm_client::kernel::PAGE;

pub const HERE: Range<usize> = 0xAE0_0000_0000..0xAE1_0000_0000;

/// Where files have been mapped from their beginning, as many as are remembered: libraries.
static FILES: [AtomicUsize; 1024] = [const { AtomicUsize::new(0) }; 1024];
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Where libraries may be: what has been unmapped since is among them.
pub fn libraries() -> impl Iterator<Item = usize> {
    let count = COUNT.load(Ordering::SeqCst).min(FILES.len());
    FILES[..count].iter().map(|file| file.load(Ordering::SeqCst)).filter(|at| *at != 0)
}

fn remember(at: usize) {
    if libraries().all(|known| known != at)
        && let Some(file) = FILES.get(COUNT.fetch_add(1, Ordering::SeqCst))
    {
        file.store(at, Ordering::SeqCst);
    }
}

static NEXT: AtomicUsize = AtomicUsize::new(HERE.start);

/// Maps something here; the address, or −errno. Where there is no room left, it goes where the kernel likes it.
pub fn map(size: usize, protection: i32, flags: i32, fd: i32, offset: usize) -> isize {
    let pages = size.next_multiple_of(PAGE);
    // What has been unmapped is used again when the end has been reached.
    for _ in 0..2 {
        let mut at = NEXT.load(Ordering::SeqCst);
        while at + pages <= HERE.end && pages != 0 {
            let flags = flags | libc::MAP_FIXED_NOREPLACE;
            let result = raw!(libc::SYS_mmap, at, size, protection, flags, fd, offset);
            if result != -(libc::EEXIST as isize) {
                if result >= 0 {
                    NEXT.store(at + pages, Ordering::SeqCst);
                    if fd >= 0 && offset == 0 {
                        remember(at);
                    }
                }
                return result;
            }
            at += pages;
        }
        NEXT.store(HERE.start, Ordering::SeqCst);
    }
    raw!(libc::SYS_mmap, 0, size, protection, flags, fd, offset)
}
