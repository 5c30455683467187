// SPDX-License-Identifier: Apache-2.0
//! Ours, which stand before all handlers and put signals off.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use libc::{c_int, c_void, siginfo_t, ucontext_t};
use softcpu::clock::clock_ns;
use softcpu::mem::lost;
use softcpu::mem::lost::actions::{action_of, call_handler, set_action, set_default};

use super::python::{is_for_main, mark_for_python};
use super::runner::{FOREIGN, current_thread, runners};
use super::sets::END;

/// A signal that comes again so long after it was put off is handled at once: the run does not end.
const PATIENCE_NS: u64 = 1_000_000_000;
/// How many handlers of one signal may have been installed over each other, each calling the one before.
const LEVELS: usize = 4;

pub(super) type Handler = extern "C-unwind" fn(c_int, *mut siginfo_t, *mut c_void);

/// A handler that ours stands before.
pub(super) struct Previous {
    known: AtomicBool,
    pub(super) handler: AtomicUsize,
    flags: AtomicI32,
}

impl Previous {
    pub(super) fn set(&self, action: &libc::sigaction) {
        self.handler.store(action.sa_sigaction, Ordering::SeqCst);
        self.flags.store(action.sa_flags, Ordering::SeqCst);
        self.known.store(true, Ordering::SeqCst);
    }

    /// The handler, and its flags.
    pub(super) fn action(&self) -> (usize, c_int) {
        (self.handler.load(Ordering::SeqCst), self.flags.load(Ordering::SeqCst))
    }
}

/// The level of ours that a signal has.
pub(super) static FRONT: [AtomicUsize; END] = [const { AtomicUsize::new(0) }; END];

pub(super) static PREVIOUS: [[Previous; END]; LEVELS] = [const {
    [const { Previous { known: AtomicBool::new(false), handler: AtomicUsize::new(0), flags: AtomicI32::new(0) } };
        END]
}; LEVELS];

/// Ours, one for each level: a handler that was installed over ours may call it, and means the one below.
pub(super) const OURS: [Handler; LEVELS] = [on_signal::<0>, on_signal::<1>, on_signal::<2>, on_signal::<3>];

extern "C-unwind" fn on_signal<const LEVEL: usize>(
    signal: c_int,
    info: *mut siginfo_t,
    context: *mut c_void,
) {
    // SAFETY: errno of this thread, which a handler has to leave alone.
    let errno = unsafe { libc::__errno_location() };
    let before = unsafe { *errno };
    if !put_off(signal, info, context.cast()) {
        call_previous(LEVEL, signal, info, context);
    }
    // SAFETY: as above.
    unsafe { *errno = before };
}

/// Puts a signal off if this thread is in a run; false: it is to be handled now.
pub fn put_off(signal: c_int, info: *const siginfo_t, context: *mut ucontext_t) -> bool {
    let me = current_thread();
    let bit = 1u64 << (signal - 1);
    let (mut done, mut runs) = (false, false);
    for runner in runners().filter(|r| r.thread.load(Ordering::SeqCst) == me) {
        runner.signalled();
        runs |= runner.running.load(Ordering::SeqCst);
        if core::mem::replace(&mut done, true) {
            continue; // a run inside of another
        }
        let before = runner.put_off.load(Ordering::SeqCst);
        if before & bit != 0 {
            let waits_since = runner.since.load(Ordering::SeqCst);
            if clock_ns().saturating_sub(waits_since) < PATIENCE_NS || FOREIGN.load(Ordering::SeqCst) {
                continue; // as if it were still pending
            }
            runner.put_off.fetch_and(!bit, Ordering::SeqCst);
            return false;
        }
        // SAFETY: this is the run's thread, and the entry is free; the kernel gave valid pointers.
        unsafe {
            (*runner.infos[signal as usize - 1].get()).write(*info);
            if signal >= libc::SIGRTMIN() {
                // Such signals queue up: the kernel keeps the next ones.
                libc::sigaddset(&raw mut (*context).uc_sigmask, signal);
            }
        }
        if before == 0 {
            runner.since.store(clock_ns(), Ordering::SeqCst);
        }
        runner.put_off.fetch_or(bit, Ordering::SeqCst);
    }
    if runs {
        // SAFETY: the context of a handler.
        unsafe { lost::leave_awaited(context.cast()) }; // or the run would not end before the memory is there
    }
    done
}

fn call_previous(level: usize, signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let previous = &PREVIOUS[level][signal as usize];
    let handler = previous.handler.load(Ordering::SeqCst);
    match handler {
        libc::SIG_IGN => {}
        libc::SIG_DFL => default_action(signal),
        _ if is_for_main(handler) => mark_for_python(signal),
        // SAFETY: a handler that somebody has installed for this signal, called as its flags say.
        _ => unsafe {
            let flags = previous.flags.load(Ordering::SeqCst);
            if flags & libc::SA_RESETHAND != 0 {
                set_default(signal);
            }
            let mut action: libc::sigaction = core::mem::zeroed();
            (action.sa_sigaction, action.sa_flags) = (handler, flags);
            call_handler(&action, signal, info, context);
        },
    }
}

/// What the kernel does with a signal that has no handler.
fn default_action(signal: c_int) {
    if matches!(signal, libc::SIGCHLD | libc::SIGURG | libc::SIGWINCH | libc::SIGCONT) {
        return;
    }
    set_default(signal);
    // SAFETY: the signal is blocked until our handler returns, and then ends or stops the process.
    unsafe { libc::raise(signal) };
}

/// Puts ours before whatever a signal does, unless it is ignored; whether it is there.
pub(super) fn catch(signal: c_int) -> bool {
    if FOREIGN.load(Ordering::SeqCst) {
        return true;
    }
    match action_of(signal) {
        Some(action) if action.sa_sigaction == libc::SIG_IGN => false,
        Some(action) => is_ours(&action) || install(signal, action),
        None => false,
    }
}

pub(super) fn is_ours(action: &libc::sigaction) -> bool {
    own_level(action).is_some()
}

/// The level of ours, if it is `action`'s handler.
pub(super) fn own_level(action: &libc::sigaction) -> Option<usize> {
    OURS.iter().position(|&ours| ours as usize == action.sa_sigaction)
}

/// Puts ours before `action`, which a signal has; false if it cannot be.
pub(super) fn install(signal: c_int, mut action: libc::sigaction) -> bool {
    loop {
        let Some(level) = level_of(signal, &action) else { return false };
        let Some(replaced) = put_in_front(signal, level, &action) else { return false };
        if replaced.sa_sigaction == action.sa_sigaction || is_ours(&replaced) {
            return true;
        }
        // Somebody has changed it since we looked: that is what ours has to stand before.
        action = replaced;
    }
}

/// Installs ours, otherwise as `action`; returns what was there, None if it cannot be.
pub(super) fn put_in_front(signal: c_int, level: usize, action: &libc::sigaction) -> Option<libc::sigaction> {
    FRONT[signal as usize].store(level, Ordering::SeqCst);
    let mut ours = *action;
    ours.sa_sigaction = OURS[level] as usize;
    // That it is for once, ours sees to: it may put the signal off.
    ours.sa_flags = ours.sa_flags & !libc::SA_RESETHAND | libc::SA_SIGINFO;
    // SAFETY: a handler as its flags say.
    unsafe { set_action(signal, &ours) }
}

/// The level at which ours calls `action`'s handler.
fn level_of(signal: c_int, action: &libc::sigaction) -> Option<usize> {
    (0..LEVELS).find(|&level| {
        let previous = &PREVIOUS[level][signal as usize];
        if !previous.known.load(Ordering::SeqCst) {
            previous.set(action);
        }
        let is_it = previous.handler.load(Ordering::SeqCst) == action.sa_sigaction;
        if is_it {
            previous.set(action);
        }
        is_it
    })
}
