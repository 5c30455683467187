// SPDX-License-Identifier: Apache-2.0
//! Handlers of signals: the KVM, which puts them off while their thread is in a request, has to know of each.

use core::ffi::c_int;
use core::sync::atomic::{AtomicBool, Ordering};

use libc::sighandler_t;
use softkvm_client::NOT_OUR_SIGNAL;
use softkvm_client::python::core;

use crate::cpuid;
use crate::real;
use crate::real::set_errno;

/// The C library's sigaction().
pub unsafe extern "C" fn real_sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    real!(sigaction(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> c_int)
}

/// sigaction() behind the handlers that are there for the client's sake; None: it is for the C library's.
fn behind(signal: c_int, new: *const libc::sigaction, old: *mut libc::sigaction) -> Option<c_int> {
    if signal == libc::SIGILL {
        return cpuid::client_action(new, old);
    }
    let result = (core()?.sigaction)(signal, new, old);
    (result != NOT_OUR_SIGNAL).then_some(result)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    match behind(signal, new, old) {
        // SAFETY: the caller's own call.
        None => unsafe { real_sigaction(signal, new, old) },
        Some(error @ ..0) => {
            set_errno(-error);
            -1
        }
        Some(done) => done,
    }
}

fn install_old(signal: c_int, handler: sighandler_t) -> Option<sighandler_t> {
    if signal != libc::SIGILL {
        return None;
    }
    // SAFETY: zeros are a sigaction with an empty mask.
    let mut action: libc::sigaction = unsafe { core::mem::zeroed() };
    let mut old = action;
    action.sa_sigaction = handler;
    cpuid::client_action(&action, &mut old).map(|_| old.sa_sigaction)
}

/// The older functions, which call the C library's own sigaction().
macro_rules! signals {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C-unwind" fn $name(signal: c_int, handler: sighandler_t) -> sighandler_t {
            if let Some(before) = install_old(signal, handler) {
                return before;
            }
            let before = real!($name(signal: c_int, handler: sighandler_t) -> sighandler_t);
            match core() {
                Some(core) if before != libc::SIG_ERR => (core.handler_changed)(signal, before),
                _ => before,
            }
        }
    )*};
}

signals! { signal bsd_signal ssignal sysv_signal __sysv_signal sigset }

/// It calls the C library's own sigaction(), too, and what it changes is a flag of the client's handler.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn siginterrupt(signal: c_int, interrupts: c_int) -> c_int {
    let result = real!(siginterrupt(signal: c_int, interrupts: c_int) -> c_int);
    // SAFETY: all zeros are a sigaction; those of the client, as it calls it.
    unsafe {
        let mut action: libc::sigaction = core::mem::zeroed();
        if result == 0 && sigaction(signal, core::ptr::null(), &mut action) == 0 {
            action.sa_flags =
                action.sa_flags & !libc::SA_RESTART | if interrupts == 0 { libc::SA_RESTART } else { 0 };
            sigaction(signal, &action, core::ptr::null_mut());
        }
    }
    result
}

// ---- cancellation ----------------------------------------------------------------------------------------------------

/// Whether any thread has made its cancellation asynchronous.
static ASYNCHRONOUS: AtomicBool = AtomicBool::new(false);
const PTHREAD_CANCEL_ASYNCHRONOUS: c_int = 1;

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn pthread_setcanceltype(kind: c_int, old: *mut c_int) -> c_int {
    if kind == PTHREAD_CANCEL_ASYNCHRONOUS {
        ASYNCHRONOUS.store(true, Ordering::SeqCst);
    }
    real!(pthread_setcanceltype(kind: c_int, old: *mut c_int) -> c_int)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn pthread_cancel(thread: libc::pthread_t) -> c_int {
    let result = real!(pthread_cancel(thread: libc::pthread_t) -> c_int);
    if result == 0
        && ASYNCHRONOUS.load(Ordering::SeqCst)
        && let Some(core) = core()
    {
        (core.cancelled)(thread as usize);
    }
    result
}

// ---- the end ---------------------------------------------------------------------------------------------------------

/// The process ends by `exit()`, or by returning from `main()`.
pub extern "C" fn at_exit() {
    if let Some(core) = core() {
        (core.at_exit)();
    }
}

/// It ends at once.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn _exit(status: c_int) -> ! {
    at_exit();
    real!(_exit(status: c_int) -> !)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn _Exit(status: c_int) -> ! {
    at_exit();
    real!(_Exit(status: c_int) -> !)
}

#[used]
#[unsafe(link_section = ".fini_array")]
static AT_EXIT: extern "C" fn() = at_exit;
