// SPDX-License-Identifier: Apache-2.0
//! Mappings: the program's heap, its libraries, the KVM's files, and memory that guests have.

use core::ffi::c_int;
use core::sync::atomic::{AtomicUsize, Ordering};

use softkvm_client::python;

use crate::calls::Outcome;
use crate::donor::{self, Request};
use crate::raw::raw;
use crate::{descriptors, place};

/// Room for the program's heap, `brk()`'s.
const HEAP: usize = 64 << 30;

/// Where it begins, and its end. Ours is the C library's.
static HEAP_START: AtomicUsize = AtomicUsize::new(0);
static HEAP_END: AtomicUsize = AtomicUsize::new(0);

/// brk(): the program's own.
pub fn brk(wanted: usize) -> isize {
    let mut start = HEAP_START.load(Ordering::SeqCst);
    if start == 0 {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let at = raw!(libc::SYS_mmap, 0, HEAP, libc::PROT_READ | libc::PROT_WRITE, flags, usize::MAX, 0);
        if at < 0 {
            return at;
        }
        start = at as usize;
        HEAP_END.store(start, Ordering::SeqCst);
        HEAP_START.store(start, Ordering::SeqCst);
    }
    if (start..=start + HEAP).contains(&wanted) {
        let before = HEAP_END.swap(wanted, Ordering::SeqCst);
        if wanted < before {
            let from = wanted.next_multiple_of(4096);
            going(from, before.next_multiple_of(4096) - from);
            raw!(libc::SYS_madvise, from, before.next_multiple_of(4096) - from, libc::MADV_DONTNEED);
        }
    }
    HEAP_END.load(Ordering::SeqCst) as isize
}

fn unmap(request: &Request) -> isize {
    let [address, size, _] = request.arguments;
    if let Some(core) = python::core() {
        (core.unmapping)(address, size);
    }
    0
}

/// Memory is about to go, or to change: guests that have it must not by then (the kernel's MMU notifiers).
fn going(address: usize, size: usize) {
    if let Some(core) = python::core()
        && !donor::is_child()
        && (core.concerns)(address, size)
    {
        donor::request(unmap, [address, size, 0], u64::MAX);
    }
}

pub fn munmap(address: usize, size: usize) -> Outcome {
    going(address, size);
    Outcome::Again
}

pub fn mprotect(address: usize, size: usize) -> Outcome {
    going(address, size);
    Outcome::Again
}

pub fn madvise(address: usize, size: usize, advice: usize) -> Outcome {
    if matches!(advice as c_int, libc::MADV_DONTNEED | libc::MADV_REMOVE | libc::MADV_FREE) {
        going(address, size);
    }
    Outcome::Again
}

pub fn mremap([address, size, new_size, flags, new, _]: [usize; 6]) -> Outcome {
    going(address, size);
    if flags & libc::MREMAP_FIXED as usize != 0 {
        going(new, new_size);
    }
    Outcome::Again
}

fn mapped(request: &Request) -> isize {
    // SAFETY: of `mmap`, which waits.
    let [address, size, protection, flags, fd, offset] =
        unsafe { *(request.arguments[0] as *const [usize; 6]) };
    let shared = flags as c_int & libc::MAP_TYPE != libc::MAP_PRIVATE;
    python::core().map_or(0, |core| {
        (core.mapped)(fd as c_int, address, size, offset, protection as c_int, shared) as isize
    })
}

/// Has code that may go anywhere, or will have: the linker reserves a library's addresses by its first mapping.
fn is_library(address: usize, protection: usize, flags: usize, fd: usize) -> bool {
    let is_file = fd as c_int >= 0 && flags as c_int & libc::MAP_ANONYMOUS == 0;
    let is_private = flags as c_int & libc::MAP_TYPE == libc::MAP_PRIVATE;
    address == 0 && is_file && is_private && protection as c_int & libc::PROT_WRITE == 0
}

pub fn mmap(arguments: [usize; 6]) -> Outcome {
    let [address, size, protection, flags, fd, offset] = arguments;
    /// `MAP_FIXED_NOREPLACE` without `MAP_FIXED`.
    const NOREPLACE: usize = (libc::MAP_FIXED_NOREPLACE & !libc::MAP_FIXED) as usize;
    if flags & libc::MAP_FIXED as usize != 0 && flags & NOREPLACE == 0 {
        going(address, size);
    }
    let is_anonymous = flags & libc::MAP_ANONYMOUS as usize != 0;
    if !is_anonymous && !donor::is_child() && python::core().is_some() && descriptors::may_be_ours(fd) {
        let at = raw!(libc::SYS_mmap, address, size, protection, flags, fd, offset);
        if at < 0 {
            return Outcome::Result(at);
        }
        let made = [at as usize, size, protection, flags, fd, offset];
        let result = donor::request(mapped, [&raw const made as usize, 0, 0], u64::MAX);
        if result < 0 {
            raw!(libc::SYS_munmap, at, size);
            return Outcome::Result(result);
        }
        return Outcome::Result(at);
    }
    if is_library(address, protection, flags, fd) {
        return Outcome::Result(place::map(size, protection as i32, flags as i32, fd as i32, offset));
    }
    Outcome::Again
}
