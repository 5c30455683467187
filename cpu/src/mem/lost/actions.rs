// SPDX-License-Identifier: Apache-2.0
//! What signals do: the C library's sigaction(), even where something in the process stands before it.

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::ptr::{from_ref, null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};

/// sigaction().
pub type SigAction = unsafe extern "C" fn(c_int, *const libc::sigaction, *mut libc::sigaction) -> c_int;

static FUNCTION: AtomicUsize = AtomicUsize::new(0);

/// Has [`set_action`] and [`action_of`] call this one. What is found by its name may be for those who are not to see our
/// handlers.
pub fn use_sigaction(function: SigAction) {
    FUNCTION.store(function as usize, Ordering::SeqCst);
}

fn call(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> bool {
    let function: SigAction = match FUNCTION.load(Ordering::SeqCst) {
        0 => libc::sigaction,
        // SAFETY: what `use_sigaction` got.
        known => unsafe { std::mem::transmute::<usize, SigAction>(known) },
    };
    // SAFETY: both are null or a structure of the caller's.
    unsafe { function(signal, new, old) == 0 }
}

/// What a signal does; None if there is no such signal. Async-signal-safe.
pub fn action_of(signal: c_int) -> Option<libc::sigaction> {
    let mut action = MaybeUninit::uninit();
    // SAFETY: filled in on success.
    call(signal, null(), action.as_mut_ptr()).then(|| unsafe { action.assume_init() })
}

/// Changes what a signal does; returns what it did before, None if it cannot be changed. Async-signal-safe.
///
/// # Safety
/// The handler, if it is one, is a function as the flags say.
pub unsafe fn set_action(signal: c_int, action: &libc::sigaction) -> Option<libc::sigaction> {
    let mut before = MaybeUninit::uninit();
    // SAFETY: filled in on success.
    call(signal, from_ref(action), before.as_mut_ptr()).then(|| unsafe { before.assume_init() })
}

/// Has a signal do what it does by default. Async-signal-safe.
pub fn set_default(signal: c_int) {
    // SAFETY: zeros are SIG_DFL with an empty mask.
    let action: libc::sigaction = unsafe { std::mem::zeroed() };
    call(signal, &raw const action, null_mut());
}

/// Calls a handler as it wants to be called.
///
/// # Safety
/// `action` has a handler, which its flags describe; the others are what the kernel has passed.
pub unsafe fn call_handler(
    action: &libc::sigaction,
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut std::ffi::c_void,
) {
    // SAFETY: given.
    unsafe {
        if action.sa_flags & libc::SA_SIGINFO != 0 {
            type Handler = extern "C-unwind" fn(c_int, *mut libc::siginfo_t, *mut std::ffi::c_void);
            std::mem::transmute::<usize, Handler>(action.sa_sigaction)(signal, info, context);
        } else {
            std::mem::transmute::<usize, extern "C-unwind" fn(c_int)>(action.sa_sigaction)(signal);
        }
    }
}
