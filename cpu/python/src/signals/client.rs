// SPDX-License-Identifier: Apache-2.0
//! For a client that is not to know of ours.

use std::sync::atomic::Ordering;

use libc::c_int;
use softcpu::mem::lost;
use softcpu::mem::lost::actions::{action_of, set_action};

use super::handlers::{FRONT, OURS, PREVIOUS, is_ours, own_level, put_in_front};
use super::sets::can_be_caught;

/// sigaction() behind ours, which stays in front of any handler; None: it is for the C library's.
pub fn client_action(signal: c_int, new: Option<&libc::sigaction>) -> Option<Result<libc::sigaction, c_int>> {
    if !can_be_caught(signal) {
        return lost::client_action(signal, new).map(Ok);
    }
    let level = FRONT[signal as usize].load(Ordering::SeqCst);
    let before = PREVIOUS[level][signal as usize].action();
    let old = match new {
        None => action_of(signal),
        Some(action) if action.sa_sigaction > libc::SIG_IGN => {
            PREVIOUS[level][signal as usize].set(action);
            put_in_front(signal, level, action)
        }
        // SAFETY: no handler.
        Some(action) => unsafe { set_action(signal, action) },
    };
    let Some(mut old) = old else { return Some(Err(libc::EINVAL)) };
    if own_level(&old) == Some(level) {
        (old.sa_sigaction, old.sa_flags) = before;
    }
    Some(Ok(old))
}

/// Somebody has changed what a signal does, by a function that is none of [`client_action`]'s: ours goes in front.
pub fn client_action_changed(signal: c_int) {
    if !can_be_caught(signal) {
        return lost::client_action_changed(signal);
    }
    if let Some(action) = action_of(signal).filter(|a| a.sa_sigaction > libc::SIG_IGN && !is_ours(a)) {
        let level = FRONT[signal as usize].load(Ordering::SeqCst);
        PREVIOUS[level][signal as usize].set(&action);
        put_in_front(signal, level, &action);
    }
}

/// The handler that one of ours stands before; any other is itself.
pub fn client_handler(signal: c_int, handler: usize) -> usize {
    if !can_be_caught(signal) {
        return lost::client_handler(signal, handler);
    }
    let level = OURS.iter().position(|&ours| ours as usize == handler);
    level.map_or(handler, |level| PREVIOUS[level][signal as usize].action().0)
}
