// SPDX-License-Identifier: Apache-2.0
//! The client's threads in Python: how one gets in, what it must not do there, and forks.

use std::cell::Cell;
use std::ffi::c_int;

use pyo3::ffi;
use pyo3::prelude::*;

use super::files;
use crate::request;

unsafe extern "C" {
    fn pthread_setcancelstate(state: c_int, old: *mut c_int) -> c_int;
}
const PTHREAD_CANCEL_DISABLE: c_int = 1;

/// The interpreter's state of a thread: made at its first request and kept until its end.
struct State(Cell<bool>);

impl Drop for State {
    fn drop(&mut self) {
        // SAFETY: asks; a thread of Python's own has given its state up already.
        if self.0.get() && unsafe { !ffi::PyGILState_GetThisThreadState().is_null() } {
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

/// Does a request: not cancelled half-way, handlers of signals behind it, when the interpreter's lock is free again. A
/// handler may jump out, or end the thread.
pub fn request<R>(function: impl FnOnce(Python<'_>) -> R) -> R {
    // SAFETY: errno of this thread, and its own state of cancellation.
    let errno = unsafe { libc::__errno_location() };
    let before = unsafe { *errno };
    let mut cancel = 0;
    unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &mut cancel) };
    let runner = request::own();
    let outermost = !runner.held() && runner.try_lock();
    if outermost {
        runner.begin();
    }
    keep();
    let result = attached(function);
    unsafe { pthread_setcancelstate(cancel, core::ptr::null_mut()) };
    unsafe { *errno = before };
    if outermost {
        runner.end();
        files::collect_postponed();
    }
    result
}

// ---- forks ---------------------------------------------------------------------------------------------------------

thread_local!(static FORKING: Cell<bool> = const { Cell::new(false) });

/// Whether it is Python that forks, which does the same for itself: in a request, or on a thread of its own.
fn in_python() -> bool {
    // SAFETY: asks.
    let known = unsafe { !ffi::PyGILState_GetThisThreadState().is_null() };
    request::own().held() || known && !STATE.try_with(|state| state.0.get()).unwrap_or(true)
}

extern "C" fn before() {
    if in_python() {
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

extern "C" fn parent() {
    if FORKING.replace(false) {
        // SAFETY: as in `before`.
        unsafe {
            PyOS_AfterFork_Parent();
            ffi::PyGILState_Release(ffi::PyGILState_STATE::PyGILState_UNLOCKED);
        }
    }
}

extern "C" fn child() {
    if FORKING.replace(false) {
        // SAFETY: as in `before`.
        unsafe {
            PyOS_AfterFork_Child();
            ffi::PyGILState_Release(ffi::PyGILState_STATE::PyGILState_UNLOCKED);
        }
    }
}

unsafe extern "C" {
    fn PyOS_BeforeFork();
    fn PyOS_AfterFork_Parent();
    fn PyOS_AfterFork_Child();
}

/// A child that the client forks has an interpreter of its own: the parent's files are EIO there, new ones work.
pub fn follow_forks() {
    // SAFETY: the handlers do what Python's own fork does.
    unsafe { libc::pthread_atfork(Some(before), Some(parent), Some(child)) };
}
