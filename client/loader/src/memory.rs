// SPDX-License-Identifier: Apache-2.0
//! Mappings: the program's heap, its libraries, the KVM's files, and memory that guests have.

use core::ffi::c_int;
use core::sync::atomic::{AtomicUsize, Ordering};

use softkvm_client::kernel::PAGE;
use softkvm_client::{KIND_NONE, KIND_VCPU, python, takes_memory};

use crate::calls::Outcome;
use crate::donor::{self, Request};
use crate::raw::{call, raw};
use crate::{descriptors, place};

/// Room for the program's heap, `brk()`'s: as much as there may be.
const HEAPS: [usize; 3] = [64 << 30, 4 << 30, 256 << 20];

/// Where it begins, and its end, and that of the room for it. Ours is the C library's.
static HEAP_START: AtomicUsize = AtomicUsize::new(0);
static HEAP_END: AtomicUsize = AtomicUsize::new(0);
static ROOM_END: AtomicUsize = AtomicUsize::new(0);

fn reserve_heap() -> usize {
    for room in HEAPS {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // Not to be accessed: mlockall() would fetch it.
        let at = raw!(libc::SYS_mmap, 0, room, libc::PROT_NONE, flags, usize::MAX, 0);
        if at >= 0 {
            ROOM_END.store(at as usize + room, Ordering::SeqCst);
            return at as usize;
        }
    }
    0
}

/// brk(): the program's own.
pub fn brk(wanted: usize) -> isize {
    let mut start = HEAP_START.load(Ordering::SeqCst);
    if start == 0 {
        start = reserve_heap();
        HEAP_END.store(start, Ordering::SeqCst);
        HEAP_START.store(start, Ordering::SeqCst);
    }
    let end = HEAP_END.load(Ordering::SeqCst);
    let (before, after) = (end.next_multiple_of(PAGE), wanted.next_multiple_of(PAGE));
    if start == 0 || !(start..=ROOM_END.load(Ordering::SeqCst)).contains(&wanted) {
        return end as isize;
    }
    if after > before {
        let accessible = libc::PROT_READ | libc::PROT_WRITE;
        if raw!(libc::SYS_mprotect, before, after - before, accessible) < 0 {
            return end as isize;
        }
    } else if after < before {
        going(after, before - after);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        raw!(libc::SYS_mmap, after, before - after, libc::PROT_NONE, flags, usize::MAX, 0);
    }
    HEAP_END.store(wanted, Ordering::SeqCst);
    wanted as isize
}

fn unmap(request: &Request) -> isize {
    let [address, size, _] = request.arguments;
    if let Some(core) = python::core() {
        (core.unmapping)(address, size);
    }
    0
}

/// Memory goes, or changes: guests that have it must not (the kernel's MMU notifiers). Whether any has.
fn going(address: usize, size: usize) -> bool {
    let concerns = python::core().is_some_and(|core| !donor::is_child() && (core.concerns)(address, size));
    if concerns {
        donor::request(unmap, [address, size, 0], u64::MAX);
    }
    concerns
}

/// Makes a call by which memory goes. Where it is a guest's it is told before and behind, as the kernel's notifiers tell of
/// a beginning and an end: meanwhile a guest may have come upon what was there once more.
fn changing(number: i64, arguments: [usize; 6], [address, size]: [usize; 2]) -> Outcome {
    if !going(address, size) {
        return Outcome::Again;
    }
    let result = call(number, arguments);
    going(address, size);
    Outcome::Result(result)
}

pub fn munmap(arguments: [usize; 6]) -> Outcome {
    changing(libc::SYS_munmap, arguments, [arguments[0], arguments[1]])
}

pub fn mprotect(arguments: [usize; 6]) -> Outcome {
    changing(libc::SYS_mprotect, arguments, [arguments[0], arguments[1]])
}

pub fn madvise(arguments: [usize; 6]) -> Outcome {
    let [address, size, advice, ..] = arguments;
    if !takes_memory(advice as c_int) {
        return Outcome::Again;
    }
    changing(libc::SYS_madvise, arguments, [address, size])
}

pub fn mremap(arguments: [usize; 6]) -> Outcome {
    let [address, size, new_size, flags, new, _] = arguments;
    let ranges =
        [[address, size], if flags & libc::MREMAP_FIXED as usize != 0 { [new, new_size] } else { [0, 0] }];
    let concerned = ranges.map(|[at, length]| length != 0 && going(at, length));
    if !concerned.contains(&true) {
        return Outcome::Again;
    }
    let result = call(libc::SYS_mremap, arguments);
    for [at, length] in ranges {
        going(at, length);
    }
    Outcome::Result(result)
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

fn kind(request: &Request) -> isize {
    python::core().map_or(KIND_NONE, |core| (core.kind)(request.arguments[0] as c_int)) as isize
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
    let is_anonymous = flags & libc::MAP_ANONYMOUS as usize != 0;
    let may_be_ours = !is_anonymous && !donor::is_child() && descriptors::may_be_ours(fd);
    let kind = if may_be_ours { donor::request(kind, [fd, 0, 0], u64::MAX) as c_int } else { KIND_NONE };
    if !matches!(kind, KIND_NONE | KIND_VCPU) && size != 0 && offset % PAGE == 0 {
        // What is mapped there stays.
        return Outcome::Result(-(libc::ENODEV as isize));
    }
    let replaces = flags & libc::MAP_FIXED as usize != 0 && flags & NOREPLACE == 0;
    if replaces && kind != KIND_VCPU {
        return changing(libc::SYS_mmap, arguments, [address, size]);
    }
    if kind == KIND_VCPU {
        if replaces {
            going(address, size);
        }
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
