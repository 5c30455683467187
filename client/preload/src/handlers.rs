// SPDX-License-Identifier: Apache-2.0
//! Handlers of signals: the KVM, which puts them off while their thread is in a request, has to know of each.

use core::ffi::c_int;

use softkvm_client::python::core;

use crate::real;

fn changed(signal: c_int, installed: bool) {
    if installed && let Some(core) = core() {
        (core.handler_changed)(signal);
    }
}

/// The C library's sigaction().
pub fn real_sigaction(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int {
    real!(sigaction(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    let result =
        real!(sigaction(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int);
    changed(signal, result == 0 && !new.is_null());
    result
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn signal(signal: c_int, handler: libc::sighandler_t) -> libc::sighandler_t {
    if signal == libc::SIGILL {
        // SAFETY: zeros are a sigaction with an empty mask.
        let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
        let mut old = action;
        action.sa_sigaction = handler;
        if crate::cpuid::client_action(&action, &mut old).is_some() {
            return old.sa_sigaction;
        }
    }
    let before = real!(signal(signal: c_int, handler: libc::sighandler_t) -> libc::sighandler_t);
    changed(signal, before != libc::SIG_ERR);
    before
}

/// The process ends by `exit()`, or by returning from `main()`.
extern "C" fn at_exit() {
    if let Some(core) = core() {
        (core.at_exit)();
    }
}

#[used]
#[unsafe(link_section = ".fini_array")]
static AT_EXIT: extern "C" fn() = at_exit;
