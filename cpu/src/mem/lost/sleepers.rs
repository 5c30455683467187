// SPDX-License-Identifier: Apache-2.0
//! Threads that sleep within a guard, at a page that somebody has yet to provide: the owner of a userfaultfd.
//!
//! A kernel's vCPU waits for such a page in get_user_pages(), and a signal ends that. Here the access is an instruction of
//! the host's, which the kernel has the thread repeat behind the signal's handler. So the handler looks what it is: an
//! access to memory that the guard covers and that is not mapped ends the guard, as if it were lost. Nothing has happened
//! yet that it would be a part of, and a page that it has found before does not go: it can be done once more.
//!
//! A thread is called by a SIGBUS with a value that nobody else sends, or by any signal whose handler asks for it
//! ([`leave_awaited`]).

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;

use super::guards::{Lost, expecting};
use super::host::{self, go_on_leaving};
use super::instruction;

pub(super) const SIGNAL: c_int = libc::SIGBUS;
const PAGE: usize = 4096;

/// Its address is the value.
static CALL: u8 = 0;

/// What the kernel passes with a signal of rt_sigqueueinfo(2).
#[repr(C)]
struct Info {
    signal: c_int,
    errno: c_int,
    code: c_int,
    pid: libc::pid_t,
    uid: libc::uid_t,
    value: usize,
    _rest: [u64; 12],
}

const _: () = assert!(size_of::<Info>() == size_of::<libc::siginfo_t>());

/// Sends a thread of this process the signal. Async-signal-safe, but for `errno`.
pub(super) fn call(thread: c_int) {
    // SAFETY: zeros are a siginfo; a process may send itself any.
    unsafe {
        let mut info: Info = MaybeUninit::zeroed().assume_init();
        info.signal = SIGNAL;
        info.code = libc::SI_QUEUE;
        info.value = &raw const CALL as usize;
        libc::syscall(libc::SYS_rt_tgsigqueueinfo, libc::getpid(), thread, SIGNAL, &raw const info);
    }
}

/// Whether a signal is [`call`]'s.
pub(super) fn is_call(info: *const libc::siginfo_t) -> bool {
    // SAFETY: the kernel's; with this code it has a value.
    unsafe {
        (*info).si_code == libc::SI_QUEUE
            && std::ptr::eq((*info).si_value().sival_ptr.cast_const().cast(), &raw const CALL)
    }
}

/// In the handler of a signal: has its thread leave the guard if it was interrupted at an access to memory that is not
/// there yet; whether it does. Async-signal-safe.
///
/// # Safety
/// `context` is the handler's.
pub unsafe fn leave_awaited(context: *mut c_void) -> bool {
    // SAFETY: errno of this thread, which a handler has to leave alone.
    let errno = unsafe { libc::__errno_location() };
    let before = unsafe { *errno };
    // SAFETY: given.
    let left = unsafe { instruction::accessed(context) }.into_iter().any(|(address, size)| {
        (size != 0) && [address, address.wrapping_add(size - 1)].into_iter().any(|byte| leave(byte, context))
    });
    // SAFETY: as above.
    unsafe { *errno = before };
    left
}

fn leave(address: usize, context: *mut c_void) -> bool {
    let guard = expecting(address);
    // SAFETY: null, or a guard of this thread; the context is what the thread goes on with.
    unsafe {
        if guard.is_null() || !(*guard).rousable || is_mapped(address) {
            return false;
        }
        (*guard).lost = Lost { address, of: host::named(context), awaited: true };
        go_on_leaving(context, guard.cast());
    }
    true
}

/// Whether a byte's page is mapped: touching it waits for nobody. System calls without the C library's functions, as one
/// of those may be ours.
fn is_mapped(address: usize) -> bool {
    const ENTRY: usize = 8;
    const PRESENT: u64 = 1 << 63;
    let path = c"/proc/self/pagemap".as_ptr();
    let mut entry = 0u64;
    // SAFETY: system calls with valid pointers.
    unsafe {
        let flags = libc::O_RDONLY | libc::O_CLOEXEC;
        let fd = libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, flags, 0);
        if fd < 0 {
            // No /proc, or no descriptor left. A page that is in its file only counts as mapped then.
            let mut resident = 0u8;
            let page = address & !(PAGE - 1);
            let known = libc::syscall(libc::SYS_mincore, page, PAGE, &raw mut resident) == 0;
            return known && resident & 1 != 0;
        }
        let read = libc::syscall(libc::SYS_pread64, fd, &raw mut entry, ENTRY, address / PAGE * ENTRY);
        libc::syscall(libc::SYS_close, fd);
        read == ENTRY as libc::c_long && entry & PRESENT != 0
    }
}
