// SPDX-License-Identifier: Apache-2.0
//! The client's threads in Python: how one gets in, what it must not do there, and forks.

use std::cell::Cell;
use std::ffi::c_int;
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use pyo3::ffi;
use pyo3::prelude::*;
use softkvm_client::sanitizers::Unseen;
use softkvm_client::{FORK_BEFORE, FORK_CHILD, FORK_PARENT};

use super::{files, guests};
use crate::signals::Runner;
use crate::{request, signals};

unsafe extern "C-unwind" {
    /// Ends the thread at once where that was asked for meanwhile.
    fn pthread_setcancelstate(state: c_int, old: *mut c_int) -> c_int;
    fn pthread_setcanceltype(kind: c_int, old: *mut c_int) -> c_int;
}
const PTHREAD_CANCEL_DISABLE: c_int = 1;
const PTHREAD_CANCEL_DEFERRED: c_int = 0;

/// Whether a thread was cancelled that may have been in a request.
static CANCELLED: AtomicBool = AtomicBool::new(false);

/// A thread was cancelled whose cancellation may be asynchronous: the run that it is in ends.
pub extern "C-unwind" fn cancelled(thread: usize) {
    CANCELLED.store(true, Ordering::SeqCst);
    signals::end_run_of(thread);
}

/// The interpreter's state of a thread: made at its first request and kept until its end.
struct State(Cell<bool>);

impl Drop for State {
    fn drop(&mut self) {
        // SAFETY: asks; a thread of Python's own has given its state up already.
        if self.0.get() && is_there() && unsafe { !ffi::PyGILState_GetThisThreadState().is_null() } {
            // SAFETY: the second one gives back what `keep` has taken; this thread is not in Python.
            unsafe {
                ffi::PyGILState_Ensure();
                ffi::PyGILState_Release(ffi::PyGILState_STATE::PyGILState_LOCKED);
                ffi::PyGILState_Release(ffi::PyGILState_STATE::PyGILState_UNLOCKED);
            }
        }
    }
}

thread_local!(static STATE: State = const { State(Cell::new(false)) });

/// Lets the thread keep its state when it leaves Python: to make one costs more than a request.
fn keep() {
    let _ = STATE.try_with(|state| {
        if !state.0.replace(true) {
            // SAFETY: the interpreter is there for as long as the process; the lock is given back.
            unsafe {
                ffi::PyGILState_Ensure();
                ffi::PyEval_SaveThread();
            }
        }
    });
}

/// Calls a function with the interpreter's lock. It may be that a request of this thread has it, or had it and has given
/// it up for the call that has led here.
fn attached<R>(function: impl FnOnce(Python<'_>) -> R) -> R {
    struct Attached(ffi::PyGILState_STATE);
    impl Drop for Attached {
        fn drop(&mut self) {
            // SAFETY: of the call below.
            unsafe { ffi::PyGILState_Release(self.0) };
        }
    }
    // SAFETY: the interpreter is there for as long as the process.
    let _attached = Attached(unsafe { ffi::PyGILState_Ensure() });
    // SAFETY: the thread has the lock.
    function(unsafe { Python::assume_attached() })
}

/// The calling thread's own runner, made with all signals blocked when this is its first request.
fn runner() -> &'static Runner {
    if STATE.try_with(|state| state.0.get()).unwrap_or(true) {
        return request::own();
    }
    // SAFETY: valid sets.
    unsafe {
        let (mut all, mut mask): (libc::sigset_t, libc::sigset_t) = (zeroed(), zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut mask);
        let runner = request::own();
        libc::pthread_sigmask(libc::SIG_SETMASK, &mask, null_mut());
        runner
    }
}

/// Lets the thread be cancelled as before; now, if that is due.
fn set_cancel_state(state: c_int) {
    // SAFETY: the thread's own state.
    unsafe {
        if !CANCELLED.load(Ordering::Relaxed) {
            pthread_setcancelstate(state, null_mut());
            return;
        }
        // With the result of a thread that was cancelled it only ends by a change of the kind.
        let mut kind = 0;
        pthread_setcanceltype(PTHREAD_CANCEL_DEFERRED, &mut kind);
        pthread_setcancelstate(state, null_mut());
        pthread_setcanceltype(kind, null_mut());
    }
}

/// Calls a function that is to the client as a system call is: it is not cancelled half-way, no handler of a signal runs
/// before its end, when nothing is held any more, and errno stays. A handler may jump out then, or end the thread.
pub fn uninterrupted<R>(function: impl FnOnce() -> R) -> R {
    let runner = runner();
    let outermost = runner.enter();
    // SAFETY: errno of this thread, and its own state of cancellation.
    let errno = unsafe { libc::__errno_location() };
    let before = unsafe { *errno };
    let mut cancel = 0;
    unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &mut cancel) };
    let unseen = Unseen::new();
    let result = function();
    drop(unseen);
    unsafe { *errno = before };
    if outermost {
        runner.leave(|| set_cancel_state(cancel));
        files::collect_postponed();
    } else {
        set_cancel_state(cancel);
    }
    result
}

/// Whether there is an interpreter.
fn is_there() -> bool {
    // SAFETY: asks.
    unsafe { ffi::Py_IsInitialized() != 0 }
}

/// Calls a function of a request's with the interpreter's lock; None: there is no interpreter any more. That is so at the
/// end of a client that is a Python program: it is the client's own.
pub fn request<R>(function: impl FnOnce(Python<'_>) -> R) -> Option<R> {
    if !is_there() {
        return None;
    }
    keep();
    Some(attached(function))
}

// ---- forks ---------------------------------------------------------------------------------------------------------

thread_local! {
    static FORKING: Cell<bool> = const { Cell::new(false) };
    static HELD: Cell<Option<files::Held>> = const { Cell::new(None) };
}

static CLIENT_IS_PYTHON: AtomicBool = AtomicBool::new(false);

pub extern "C-unwind" fn client_is_python() {
    CLIENT_IS_PYTHON.store(true, Ordering::SeqCst);
}

/// Whether the thread may have the interpreter's lock outside of what is done here.
pub fn may_hold_lock() -> bool {
    CLIENT_IS_PYTHON.load(Ordering::SeqCst) || in_python()
}

/// Whether it is Python that has called: in a request, or on a thread of its own.
fn in_python() -> bool {
    // SAFETY: asks.
    let known = unsafe { !ffi::PyGILState_GetThisThreadState().is_null() };
    request::own().held() || known && !STATE.try_with(|state| state.0.get()).unwrap_or(true)
}

/// The process that has this memory; a child of vfork() is another.
static PROCESS: AtomicI32 = AtomicI32::new(0);

pub fn note_process() {
    // SAFETY: asks.
    PROCESS.store(unsafe { libc::getpid() }, Ordering::SeqCst);
}

pub fn is_own_process() -> bool {
    // SAFETY: asks.
    PROCESS.load(Ordering::SeqCst) == unsafe { libc::getpid() }
}

fn before() {
    // A fork of Python's own does all of this itself, and holds the interpreter's lock.
    // SAFETY: asks.
    if !is_there() || in_python() || unsafe { PyGILState_Check() } != 0 {
        return;
    }
    keep();
    FORKING.set(true);
    // SAFETY: the lock is held until `parent` or `child`.
    unsafe {
        ffi::PyGILState_Ensure();
        PyOS_BeforeFork();
    }
}

fn parent() {
    if FORKING.replace(false) {
        // SAFETY: as in `before`.
        unsafe {
            PyOS_AfterFork_Parent();
            ffi::PyGILState_Release(ffi::PyGILState_STATE::PyGILState_UNLOCKED);
        }
    }
}

fn child() {
    note_process();
    if FORKING.replace(false) {
        // SAFETY: as in `before`.
        unsafe {
            PyOS_AfterFork_Child();
            ffi::PyGILState_Release(ffi::PyGILState_STATE::PyGILState_UNLOCKED);
        }
    }
}

unsafe extern "C" {
    fn PyGILState_Check() -> c_int;
    fn PyOS_BeforeFork();
    fn PyOS_AfterFork_Parent();
    fn PyOS_AfterFork_Child();
}

/// A child that the client forks has an interpreter of its own: the parent's files are EIO there, new ones work.
pub extern "C-unwind" fn forking(stage: c_int) {
    let _unseen = Unseen::new();
    match stage {
        FORK_BEFORE => {
            before();
            HELD.set(Some(files::hold()));
        }
        FORK_PARENT => {
            HELD.take();
            parent();
        }
        FORK_CHILD => {
            HELD.take();
            guests::after_fork();
            child();
        }
        _ => {}
    }
}
