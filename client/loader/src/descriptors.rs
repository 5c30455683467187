// SPDX-License-Identifier: Apache-2.0
//! Descriptors: the KVM's own, which are not there for the program, and files of its that may have been closed.

use core::ffi::c_int;
use core::mem::MaybeUninit;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use softkvm_client::{MARK_CLIENTS, MARK_OURS, python};

use crate::calls::Outcome;
use crate::donor::{self, Request};
use crate::raw::raw;

const MOST: usize = 1 << 16;

/// Which are the KVM's own.
static OURS: [AtomicBool; MOST] = [const { AtomicBool::new(false) }; MOST];
/// What file system those of the program's are of, that are the KVM's: memfds'.
static FILE_SYSTEM: AtomicU64 = AtomicU64::new(0);

fn file_system(fd: c_int) -> Option<u64> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    if raw!(libc::SYS_fstat, fd, stat.as_mut_ptr()) != 0 {
        return None;
    }
    // SAFETY: filled in.
    Some(unsafe { stat.assume_init() }.st_dev)
}

/// The KVM has made a descriptor, or has closed one.
pub extern "C-unwind" fn mark(fd: c_int, kind: u8) {
    if kind == MARK_CLIENTS
        && let Some(device) = file_system(fd)
    {
        FILE_SYSTEM.store(device, Ordering::SeqCst);
    }
    if let Some(own) = usize::try_from(fd).ok().and_then(|fd| OURS.get(fd)) {
        own.store(kind == MARK_OURS, Ordering::SeqCst);
    }
}

fn is_hidden(fd: usize) -> bool {
    OURS.get(fd as c_int as usize).is_some_and(|own| own.load(Ordering::SeqCst))
}

/// Whether a descriptor may be of one of the KVM's files: it is at least a memfd.
pub fn may_be_ours(fd: usize) -> bool {
    let device = FILE_SYSTEM.load(Ordering::SeqCst);
    device != 0 && file_system(fd as c_int) == Some(device)
}

fn collect_now(_: &Request) -> isize {
    if let Some(core) = python::core() {
        (core.collect)();
    }
    0
}

fn collect() {
    if !donor::is_child() {
        donor::request(collect_now, [0; 3], u64::MAX);
    }
}

pub fn close(fd: usize) -> Outcome {
    if is_hidden(fd) {
        return Outcome::Result(-(libc::EBADF as isize));
    }
    if !may_be_ours(fd) {
        return Outcome::Again;
    }
    let result = raw!(libc::SYS_close, fd);
    collect();
    Outcome::Result(result)
}

/// dup2() and dup3(); EBUSY, which there is for a descriptor that is just being made, if one of the KVM's is in the way.
pub fn replace(number: i64, [from, to, flags, ..]: [usize; 6]) -> Outcome {
    if is_hidden(to) {
        return Outcome::Result(-(libc::EBUSY as isize));
    }
    if from == to || !may_be_ours(to) {
        return Outcome::Again;
    }
    // SAFETY: as it was made.
    let result = unsafe { crate::raw::syscall(number, [from, to, flags, 0, 0, 0]) };
    collect();
    Outcome::Result(result)
}

/// Closes a range but for the KVM's own.
pub fn close_range(first: usize, last: usize, flags: usize) -> Outcome {
    const CLOSE_RANGE_CLOEXEC: usize = 4;
    let (first, last) = (first as u32 as usize, last as u32 as usize);
    let close = |first: usize, last: usize| match first <= last {
        true => raw!(libc::SYS_close_range, first, last, flags),
        false => 0,
    };
    if first > last {
        return Outcome::Again;
    }
    let mut from = first;
    for fd in first..last.saturating_add(1).min(MOST) {
        if is_hidden(fd) {
            let result = if fd > from { close(from, fd - 1) } else { 0 };
            if result != 0 {
                return Outcome::Result(result);
            }
            from = fd + 1;
        }
    }
    let result = close(from, last);
    if flags & CLOSE_RANGE_CLOEXEC == 0 {
        collect();
    }
    Outcome::Result(result)
}

fn refresh(request: &Request) -> isize {
    python::core().map_or(0, |core| (core.refresh)(request.arguments[0] as c_int) as isize)
}

/// read() and pread() of what may be statistics.
pub fn read(fd: usize) -> Outcome {
    if donor::is_child() || !may_be_ours(fd) {
        return Outcome::Again;
    }
    match donor::request(refresh, [fd, 0, 0], u64::MAX) {
        error @ ..0 => Outcome::Result(error),
        _ => Outcome::Again,
    }
}
