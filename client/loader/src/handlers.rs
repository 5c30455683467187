// SPDX-License-Identifier: Apache-2.0
//! Handlers of signals: the program's, behind ours.
//!
//! The kernel only knows ours. A signal that comes while its thread has a donor's thread pointer is left to the request
//! that it interrupts, whose end raises it again; on the program's own pointer and stack its handler is called.

use core::ffi::{c_int, c_void};
use core::mem::zeroed;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use libc::{siginfo_t, ucontext_t};
use softkvm_client::python;

use crate::calls;
use crate::donor;
use crate::raw::raw;

const END: usize = 65;
const SA_RESTORER: i32 = 0x0400_0000;

/// What the program has for a signal: the kernel's `struct sigaction`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Action {
    pub handler: usize,
    pub flags: u64,
    pub restorer: usize,
    pub mask: u64,
}

struct Kept {
    handler: AtomicUsize,
    flags: AtomicU64,
    restorer: AtomicUsize,
    mask: AtomicU64,
}

static PROGRAM: [Kept; END] = [const {
    Kept {
        handler: AtomicUsize::new(0),
        flags: AtomicU64::new(0),
        restorer: AtomicUsize::new(0),
        mask: AtomicU64::new(0),
    }
}; END];

/// Our own way back from a handler.
static RESTORER: AtomicUsize = AtomicUsize::new(0);

fn kept(signal: c_int) -> Action {
    let kept = &PROGRAM[signal as usize];
    Action {
        handler: kept.handler.load(Ordering::SeqCst),
        flags: kept.flags.load(Ordering::SeqCst),
        restorer: kept.restorer.load(Ordering::SeqCst),
        mask: kept.mask.load(Ordering::SeqCst),
    }
}

/// Signals whose handler stays ours: what comes by SIGSYS, and faults, some of which are guests'.
fn is_ours(signal: c_int) -> bool {
    matches!(signal, libc::SIGSYS | libc::SIGSEGV | libc::SIGBUS)
}

/// The bits of signals that must not be blocked.
pub const OPEN: u64 = 1 << (libc::SIGSYS - 1) | 1 << (libc::SIGSEGV - 1) | 1 << (libc::SIGBUS - 1);

/// Does rt_sigaction() of the program's.
pub fn sigaction(signal: c_int, new: *const Action, old: *mut Action, size: usize) -> isize {
    if size != 8 || !(1..END as c_int).contains(&signal) || matches!(signal, libc::SIGKILL | libc::SIGSTOP) {
        return -(libc::EINVAL as isize);
    }
    let before = kept(signal);
    if !new.is_null() {
        // SAFETY: the program's structure.
        let new = unsafe { *new };
        let given = is_ours(signal) || new.handler <= libc::SIG_IGN || {
            let action = Action {
                handler: on_signal as *const () as usize,
                flags: new.flags | libc::SA_SIGINFO as u64 | SA_RESTORER as u64,
                restorer: RESTORER.load(Ordering::SeqCst),
                mask: new.mask & !OPEN,
            };
            raw!(libc::SYS_rt_sigaction, signal, &raw const action, 0, 8) == 0
        };
        if !given {
            return -(libc::EINVAL as isize);
        }
        let kept = &PROGRAM[signal as usize];
        kept.handler.store(new.handler, Ordering::SeqCst);
        kept.flags.store(new.flags, Ordering::SeqCst);
        kept.restorer.store(new.restorer, Ordering::SeqCst);
        kept.mask.store(new.mask, Ordering::SeqCst);
        if !is_ours(signal) && new.handler <= libc::SIG_IGN {
            raw!(libc::SYS_rt_sigaction, signal, &raw const new, 0, 8);
        }
    }
    if !old.is_null() {
        // SAFETY: the program's structure.
        unsafe { *old = before };
    }
    0
}

/// Calls the program's handler, on its own thread pointer and stack.
fn call(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let action = kept(signal);
    match action.handler {
        libc::SIG_IGN => {}
        libc::SIG_DFL => {
            // It ends the process, or comes again and does so then.
            // SAFETY: all zeros are SIG_DFL.
            let default: Action = unsafe { zeroed() };
            raw!(libc::SYS_rt_sigaction, signal, &raw const default, 0, 8);
        }
        // SAFETY: what the program has installed; all three are passed to either kind of handler, as the kernel does.
        handler => unsafe {
            core::mem::transmute::<usize, extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(handler)(
                signal, info, context,
            );
        },
    }
}

extern "C" fn on_signal(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    if donor::own().is_some_and(|donor| donor.lent.load(Ordering::SeqCst)) && !donor::is_child() {
        if let Some(core) = python::core() {
            (core.put_off)(signal, info.cast(), context);
        }
        return;
    }
    call(signal, info, context);
}

/// A fault that is no guest's.
extern "C" fn on_fault(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    call(signal, info, context);
}

extern "C" fn on_system_call(_: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes both.
    unsafe { calls::handle(info, &mut *context.cast::<ucontext_t>()) };
}

/// Installs those that are always there.
pub fn install() {
    // SAFETY: zeros are a sigaction with an empty mask; filled in on success.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        action.sa_sigaction = on_fault as *const () as usize;
        libc::sigaction(libc::SIGSEGV, &action, core::ptr::null_mut());
        libc::sigaction(libc::SIGBUS, &action, core::ptr::null_mut());
        action.sa_sigaction = on_system_call as *const () as usize;
        libc::sigfillset(&mut action.sa_mask);
        for signal in [libc::SIGSYS, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP] {
            libc::sigdelset(&mut action.sa_mask, signal);
        }
        libc::sigaction(libc::SIGSYS, &action, core::ptr::null_mut());
        // What the C library has given the kernel as the way back.
        let mut installed: Action = zeroed();
        raw!(libc::SYS_rt_sigaction, libc::SIGSYS, 0, &raw mut installed, 8);
        RESTORER.store(installed.restorer, Ordering::SeqCst);
    }
}
