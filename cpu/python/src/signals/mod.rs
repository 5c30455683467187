// SPDX-License-Identifier: Apache-2.0
//! Signals to the thread that runs a processor: they end the run, and are handled behind it.
//!
//! The kernel's KVM_RUN is a system call: a signal makes it return, and its handler runs then, never in the middle.
//! Here a run is code of the process, which handlers interrupt anywhere. So handlers are called through ours, which
//! puts a signal off while its thread is in a run, kicks the processor, and lets the run's end raise the signal again
//! with all that came with it. On a thread that is in no run the handler is called as if ours were not there.
//!
//! The kernel does every other request like that, too. So a thread that is in one holds a [`Runner`]: the vCPU's, which
//! is its mutex at the same time, or one of the thread's own.
//!
//! Python's handlers are two: the interpreter's in C marks the signal, on whatever thread the kernel has chosen, and its
//! main thread calls the one in Python soon after, in the middle of anything. So one that another thread has caught is
//! handed to the request that the main thread is in, whose end marks it ([`hand_to_main`]).
//!
//! Which handlers a process has, the kernel tells nobody. Python's are reported as they are installed
//! ([`watch_signal`]); for those of other languages [`watch`] looks now and then.
//!
//! Everything that a handler may touch is atomic and never freed; the thread is recognized by its `pthread_self`.

mod client;
mod handlers;
mod python;
mod request;
mod runner;
mod sets;
mod watch;

use std::sync::atomic::Ordering;

pub use self::client::{client_action, client_action_changed, client_handler};
pub use self::handlers::put_off;
use self::python::{MAIN, MARKING};
pub use self::request::block_in_run;
pub use self::runner::{Runner, end_run_of, interrupt, leave_handlers};
use self::runner::{current_thread, runners};
pub use self::sets::spawn_quiet;
use self::watch::LOOKING;
pub use self::watch::watch_python_signal;

/// A forked child has one thread, which is in no request of its own.
pub fn after_fork() {
    LOOKING.store(false, Ordering::SeqCst);
    MARKING.store(0, Ordering::SeqCst);
    MAIN.store(current_thread(), Ordering::SeqCst);
    for runner in runners() {
        runner.thread.store(0, Ordering::SeqCst);
        runner.owner.store(0, Ordering::SeqCst);
        runner.waiters.store(0, Ordering::SeqCst);
        runner.heir.store(0, Ordering::SeqCst);
        runner.put_off.store(0, Ordering::SeqCst);
        runner.handed.store(0, Ordering::SeqCst);
    }
}
