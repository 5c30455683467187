// SPDX-License-Identifier: Apache-2.0
//! Descriptors: requests on them, and those that may be the KVM's.
//!
//! Which file a descriptor is of, the KVM knows by its inode. What is kept here is only whether to ask: a descriptor that
//! was marked and is closed may have been the last one. One that came by ways not seen here (over a socket) is found by
//! the next look at all files.

use core::ffi::{c_int, c_uint, c_ulong};
use core::sync::atomic::{AtomicU8, Ordering};

use softkvm_client::python::core;
use softkvm_client::{KIND_NONE, MARK_CLIENTS, MARK_OURS, NOT_OURS};

use crate::real;
use crate::real::set_errno;

const MOST: usize = 1 << 16;

static MARKED: [AtomicU8; MOST] = [const { AtomicU8::new(0) }; MOST];

fn of(fd: c_int) -> Option<&'static AtomicU8> {
    MARKED.get(usize::try_from(fd).ok()?)
}

/// The KVM has made a descriptor.
pub extern "C-unwind" fn mark(fd: c_int, kind: u8) {
    if let Some(marked) = of(fd) {
        marked.store(kind, Ordering::Relaxed);
    }
}

/// Whether a descriptor is the KVM's own, which is not there for the client.
fn is_hidden(fd: c_int) -> bool {
    let own = core().is_some() && of(fd).is_some_and(|marked| marked.load(Ordering::Relaxed) == MARK_OURS);
    own && core().is_some_and(|core| !(core.in_request)())
}

pub fn is_marked(fd: c_int) -> bool {
    core().is_some() && of(fd).is_some_and(|marked| marked.load(Ordering::Relaxed) == MARK_CLIENTS)
}

/// What a descriptor is to the client; [`KIND_NONE`] for one that is none of the KVM's, and in a request.
pub fn kind(fd: c_int) -> c_int {
    match core() {
        Some(core) if is_marked(fd) && !(core.in_request)() => (core.kind)(fd),
        _ => KIND_NONE,
    }
}

/// Takes the mark away; whether it was there.
fn unmark(fd: c_int) -> bool {
    core().is_some() && of(fd).is_some_and(|marked| marked.swap(0, Ordering::Relaxed) == MARK_CLIENTS)
}

fn collect() {
    if let Some(core) = core() {
        (core.collect)();
    }
}

/// Marks a copy of a marked descriptor.
fn copied(from: c_int, to: c_int) -> c_int {
    if to >= 0 && is_marked(from) {
        mark(to, MARK_CLIENTS);
    }
    to
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn ioctl(fd: c_int, request: c_ulong, argument: c_ulong) -> c_int {
    if request & 0xFF00 == 0xAE00
        && let Some(core) = core()
        && let result = (core.ioctl)(fd, request as c_uint, argument)
        && result != NOT_OURS
    {
        if result < 0 {
            set_errno(-result as c_int);
            return -1;
        }
        return result as c_int;
    }
    real!(ioctl(fd: c_int, request: c_ulong, argument: c_ulong) -> c_int)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn close(fd: c_int) -> c_int {
    if is_hidden(fd) {
        set_errno(libc::EBADF);
        return -1;
    }
    let ours = unmark(fd);
    let result = real!(close(fd: c_int) -> c_int);
    if ours {
        collect();
    }
    result
}

/// Closes a range but for the KVM's own.
fn close_all(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    const CLOSE_RANGE_CLOEXEC: c_int = 4;
    let close = |first: c_uint, last: c_uint| {
        if first > last {
            return 0;
        }
        real!(close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int)
    };
    if core().is_none() || first > last {
        return real!(close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int);
    }
    let (mut from, mut closed) = (first, false);
    for fd in first..last.saturating_add(1).min(MOST as c_uint) {
        if is_hidden(fd as c_int) {
            let result = if fd > from { close(from, fd - 1) } else { 0 };
            if result != 0 {
                return result;
            }
            from = fd + 1;
        } else if flags & CLOSE_RANGE_CLOEXEC == 0 {
            closed |= unmark(fd as c_int);
        }
    }
    let result = close(from, last);
    if closed {
        collect();
    }
    result
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    close_all(first, last, flags)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn closefrom(first: c_int) {
    if core().is_none() || close_all(first.max(0) as c_uint, c_uint::MAX, 0) != 0 {
        real!(closefrom(first: c_int) -> ());
    }
}

/// Whether a descriptor can be replaced; EBUSY, which there is for one that is just being made, if not.
fn can_replace(fd: c_int) -> bool {
    let can = !is_hidden(fd);
    if !can {
        set_errno(libc::EBUSY);
    }
    can
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dup(fd: c_int) -> c_int {
    copied(fd, real!(dup(fd: c_int) -> c_int))
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dup2(fd: c_int, to: c_int) -> c_int {
    if !can_replace(to) {
        return -1;
    }
    let closes = fd != to && unmark(to);
    let result = copied(fd, real!(dup2(fd: c_int, to: c_int) -> c_int));
    if closes {
        collect();
    }
    result
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
    if !can_replace(to) {
        return -1;
    }
    let closes = fd != to && unmark(to);
    let result = copied(fd, real!(dup3(fd: c_int, to: c_int, flags: c_int) -> c_int));
    if closes {
        collect();
    }
    result
}

fn is_copy(command: c_int) -> bool {
    matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn fcntl(fd: c_int, command: c_int, argument: c_ulong) -> c_int {
    let result = real!(fcntl(fd: c_int, command: c_int, argument: c_ulong) -> c_int);
    if is_copy(command) { copied(fd, result) } else { result }
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn fcntl64(fd: c_int, command: c_int, argument: c_ulong) -> c_int {
    let result = real!(fcntl64(fd: c_int, command: c_int, argument: c_ulong) -> c_int);
    if is_copy(command) { copied(fd, result) } else { result }
}
