// SPDX-License-Identifier: Apache-2.0
//! Forks of the client: they wait while KVM is being loaded, which in the child nobody would bring to its end.

use core::cell::Cell;
use core::ffi::c_int;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::python::{core, loading};
use crate::{FORK_BEFORE, FORK_CHILD, FORK_PARENT};

/// A lock that is taken once, or a few times, in a process, and that a child takes away from a thread which it has not.
pub struct Turn {
    /// `pthread_self` of the thread that has it, 0: none.
    owner: AtomicUsize,
    /// Who has it may wait for a thread that forks.
    passable: AtomicBool,
}

/// The thread has its turn, until this is dropped.
pub struct Taken(&'static Turn);

fn this_thread() -> usize {
    // SAFETY: always works.
    unsafe { libc::pthread_self() as usize }
}

impl Turn {
    pub const fn new() -> Turn {
        Turn { owner: AtomicUsize::new(0), passable: AtomicBool::new(false) }
    }

    /// Takes it as soon as `done` no more says that this is not to be waited for; None: it said so.
    fn take_unless(&'static self, done: impl Fn(usize) -> bool) -> Option<Taken> {
        loop {
            match self.owner.compare_exchange(0, this_thread(), Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Some(Taken(self)),
                Err(owner) if done(owner) => return None,
                // SAFETY: waits a millisecond; what is waited for takes hundreds.
                Err(_) => unsafe { libc::usleep(1000) },
            };
        }
    }

    /// Takes it, or waits for it; None: this thread has it.
    pub fn take(&'static self) -> Option<Taken> {
        self.take_unless(|owner| owner == this_thread())
    }

    /// Forks do not wait from now on: the thread that forks may have a lock which the owner waits for.
    pub fn let_forks_pass(&self) {
        self.passable.store(true, Ordering::SeqCst);
    }
}

impl Default for Turn {
    fn default() -> Turn {
        Turn::new()
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.owner.store(0, Ordering::SeqCst);
    }
}

thread_local!(static FORKING: Cell<Option<Taken>> = const { Cell::new(None) });

fn tell(stage: c_int) {
    if let Some(core) = core() {
        (core.forking)(stage);
    }
}

extern "C" fn before() {
    let turn = loading();
    FORKING.set(turn.take_unless(|owner| owner == this_thread() || turn.passable.load(Ordering::SeqCst)));
    // Behind the turn, as loading takes the interpreter's lock while it has that.
    tell(FORK_BEFORE);
}

extern "C" fn parent() {
    tell(FORK_PARENT);
    FORKING.take();
}

extern "C" fn child() {
    tell(FORK_CHILD);
    if FORKING.take().is_none() && loading().owner.load(Ordering::SeqCst) != this_thread() {
        loading().owner.store(0, Ordering::SeqCst);
    }
}

/// Has the client's forks known; to be called before there are other threads.
pub fn follow() {
    // SAFETY: functions that live as long as the process.
    unsafe { libc::pthread_atfork(Some(before), Some(parent), Some(child)) };
}
