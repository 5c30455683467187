// SPDX-License-Identifier: Apache-2.0
//! Looking for handlers that are new, to stand before them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use libc::c_int;
use softcpu::mem::lost;
use softcpu::mem::lost::actions::action_of;

use super::handlers::{PREVIOUS, install, is_ours, own_level};
use super::python::{MAIN, PYTHON};
use super::runner::FOREIGN;
use super::sets::{END, can_be_caught};

/// When all handlers were looked at, and whether somebody does it now.
pub(super) static LAST_WATCH: AtomicU64 = AtomicU64::new(0);
pub(super) static LOOKING: AtomicBool = AtomicBool::new(false);

/// CLOCK_MONOTONIC, a few milliseconds late: a cheap way to ask.
pub(super) fn now_about_ns() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a valid clock and a valid pointer.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Puts ours before all handlers that are new.
pub(super) fn watch() {
    if FOREIGN.load(Ordering::SeqCst) || LOOKING.swap(true, Ordering::SeqCst) {
        return;
    }
    LAST_WATCH.store(now_about_ns(), Ordering::SeqCst);
    (1..END as c_int).for_each(watch_signal);
    lost::watch();
    LOOKING.store(false, Ordering::SeqCst);
}

/// Puts ours before a signal's handler, if it has one.
pub fn watch_signal(signal: c_int) {
    if !can_be_caught(signal) || FOREIGN.load(Ordering::SeqCst) {
        return;
    }
    if let Some(action) = action_of(signal).filter(|a| a.sa_sigaction > libc::SIG_IGN && !is_ours(a)) {
        install(signal, action);
    }
}

/// [`watch_signal`] for one whose handler Python has just installed; its handlers run on the thread `main`.
pub fn watch_python_signal(signal: c_int, main: usize) {
    let Some(action) = action_of(signal) else { return };
    let handler = match own_level(&action) {
        Some(level) => PREVIOUS[level][signal as usize].handler.load(Ordering::SeqCst),
        None => action.sa_sigaction,
    };
    if handler > libc::SIG_IGN {
        PYTHON.store(handler, Ordering::SeqCst);
        MAIN.store(main, Ordering::SeqCst);
    }
    watch_signal(signal);
}
