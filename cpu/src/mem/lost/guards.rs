// SPDX-License-Identifier: Apache-2.0
//! The guards that each thread is inside of, for the handler to find.

use std::ffi::c_void;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::super::forks::forks;

/// An access found no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Lost {
    /// Where.
    pub address: usize,
    /// What the access was for, if it named that ([`load_for`]), else 0.
    pub of: usize,
    /// It may come yet: somebody has the thread leave that waits for it ([`super::rouse`]).
    pub awaited: bool,
}

/// One [`super::guarded`] under way, on the stack of its thread.
#[repr(C)]
pub(super) struct Guard {
    /// Where the stack was, with the registers to put back on it: see the assembly.
    pub(super) stack: usize,
    /// What has ended it.
    pub(super) lost: Lost,
    /// Points to the `&dyn Fn(usize) -> bool`.
    pub(super) covers: *const c_void,
    /// It may be left while its memory may come yet.
    pub(super) rousable: bool,
    /// The one around it.
    pub(super) outer: *mut Guard,
    /// [`forks`] when it began: of the parent's guards a child has only those of the thread that forked.
    pub(super) forks: u64,
}

/// The guards of one thread. Never freed, as signal handlers look at all of them; used again for other threads.
pub(super) struct Guards {
    /// pthread_self(), 0 when free.
    thread: AtomicUsize,
    pub(super) innermost: AtomicPtr<Guard>,
    next: *const Guards,
}

// SAFETY: `next` never changes and leads to another one that lives for ever; the rest is atomic.
unsafe impl Sync for Guards {}

static ALL: AtomicPtr<Guards> = AtomicPtr::new(null_mut());

pub(super) fn all() -> impl Iterator<Item = &'static Guards> {
    // SAFETY: null or a `Guards` that lives for ever.
    let at = |p: *const Guards| unsafe { p.as_ref() };
    std::iter::successors(at(ALL.load(Ordering::Acquire)), move |g| at(g.next))
}

fn this_thread() -> usize {
    // SAFETY: always succeeds; async-signal-safe in all C libraries (it reads a register).
    unsafe { libc::pthread_self() as usize }
}

pub(super) struct Mine(pub(super) &'static Guards);

thread_local!(pub(super) static MINE: Mine = Mine(Guards::take()));

impl Guards {
    /// Those of the calling thread from now on.
    fn take() -> &'static Guards {
        let me = this_thread();
        let free =
            |g: &&Guards| g.thread.compare_exchange(0, me, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if let Some(guards) = all().find(free) {
            return guards;
        }
        let guards = Box::into_raw(Box::new(Guards {
            thread: AtomicUsize::new(me),
            innermost: AtomicPtr::new(null_mut()),
            next: null(),
        }));
        let mut first = ALL.load(Ordering::Acquire);
        loop {
            // SAFETY: nobody else knows it yet.
            unsafe { (*guards).next = first };
            match ALL.compare_exchange_weak(first, guards, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: leaked, so it lives for ever.
                Ok(_) => return unsafe { &*guards },
                Err(now) => first = now,
            }
        }
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        self.0.thread.store(0, Ordering::Release);
    }
}

/// The innermost guard of this thread that expects the address to be lost, or null. Async-signal-safe.
pub(super) fn expecting(address: usize) -> *mut Guard {
    let me = this_thread();
    for guards in all().filter(|g| g.thread.load(Ordering::Relaxed) == me) {
        let mut guard = guards.innermost.load(Ordering::Acquire);
        // SAFETY: guards of this thread, in this process: they are on its stack, below what runs now.
        while let Some(g) = unsafe { guard.as_ref() } {
            if g.forks != forks() {
                break;
            }
            // SAFETY: points to the reference that `guarded` has, which allows it to be called now.
            if unsafe { (*g.covers.cast::<&dyn Fn(usize) -> bool>())(address) } {
                return guard;
            }
            guard = g.outer;
        }
    }
    null_mut()
}
