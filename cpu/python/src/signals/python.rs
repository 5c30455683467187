// SPDX-License-Identifier: Apache-2.0
//! Python's handlers: what another thread has caught is handed to the request that the main thread is in.

use std::sync::atomic::{AtomicUsize, Ordering};

use libc::c_int;

use super::runner::{current_thread, runners};

/// The interpreter's handler, which only needs the signal's number, and its main thread's `pthread_self`; 0: not known.
pub(super) static PYTHON: AtomicUsize = AtomicUsize::new(0);
pub(super) static MAIN: AtomicUsize = AtomicUsize::new(0);
/// How many threads are in [`mark_for_python`].
pub(super) static MARKING: AtomicUsize = AtomicUsize::new(0);

/// Whether a handler is the interpreter's, and this is not the thread on which it calls Python's.
pub(super) fn is_for_main(handler: usize) -> bool {
    handler == PYTHON.load(Ordering::SeqCst) && current_thread() != MAIN.load(Ordering::SeqCst)
}

/// Lets the interpreter know of a signal, now or when its main thread's request ends.
pub(super) fn mark_for_python(signal: c_int) {
    MARKING.fetch_add(1, Ordering::SeqCst);
    if !hand_to_main(signal) {
        // SAFETY: CPython's handler, which takes the number alone.
        unsafe { core::mem::transmute::<usize, extern "C" fn(c_int)>(PYTHON.load(Ordering::SeqCst))(signal) };
    }
    MARKING.fetch_sub(1, Ordering::SeqCst);
}

/// Leaves a signal to the request that Python's main thread is in; false: it is in none.
fn hand_to_main(signal: c_int) -> bool {
    let main = MAIN.load(Ordering::SeqCst);
    let bit = 1u64 << (signal - 1);
    runners().any(|runner| {
        let within = || runner.thread.load(Ordering::SeqCst) == main;
        if !within() {
            return false;
        }
        runner.handed.fetch_or(bit, Ordering::SeqCst);
        if within() {
            runner.end_run_early();
            return true;
        }
        // Its end has seen the bit, or does not any more.
        runner.handed.fetch_and(!bit, Ordering::SeqCst) & bit == 0
    })
}
