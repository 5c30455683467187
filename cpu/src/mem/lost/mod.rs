// SPDX-License-Identifier: Apache-2.0
//! Memory that is not there any more.
//!
//! Registered memory is its owner's, who can take it away at any time: truncate the file behind it, unmap it, protect
//! it. Then the host ends an access with SIGBUS or SIGSEGV. [`guarded`] makes that a result: a handler of both signals
//! finds that its thread is inside of a guard, which expects the address, and has the guard return. Any other signal
//! goes to the handler that was there before, or does what it does without one.
//!
//! Memory may also be long in coming: a thread sleeps in its access until somebody provides the page (a userfaultfd's).
//! Who may not wait for that has it leave a [`guarded_rousable`] ([`rouse`]).
//!
//! What runs guarded is left in the middle when that happens. So it holds no locks while it touches such memory, has
//! nothing to drop, and changes what it answers for behind the access.

pub mod actions;
mod guards;
mod handler;
mod host;
mod instruction;
mod named;
mod sleepers;

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering;

use super::forks::forks;
use guards::{Guard, MINE};
use host::{Run, call_guarded};

pub use guards::Lost;
pub use handler::{client_action, client_action_changed, client_handler, watch};
pub use named::{load_for, load128_for, store_for, store128_for};
pub use sleepers::leave_awaited;

/// Calls `f`. If it touches memory that is not there, at an address of which `covers` says yes, then `f` ends there, and
/// so does all that it has called. Costs some ten instructions.
///
/// # Safety
/// Nothing that `f` has on the stack while it touches memory needs to be dropped. `covers` may be called by a signal
/// handler during any such access: it takes no locks, allocates nothing, and what it looks at is whole then.
pub unsafe fn guarded<R>(covers: &dyn Fn(usize) -> bool, f: impl FnOnce() -> R) -> Result<R, Lost> {
    // SAFETY: given.
    unsafe { guard(covers, false, f) }
}

/// [`guarded`] for what can be done once more from there on: it may also end at memory that is not there yet, if
/// somebody asks for that ([`rouse`], [`leave_awaited`]).
///
/// # Safety
/// As [`guarded`].
pub unsafe fn guarded_rousable<R>(covers: &dyn Fn(usize) -> bool, f: impl FnOnce() -> R) -> Result<R, Lost> {
    // SAFETY: given.
    unsafe { guard(covers, true, f) }
}

/// Has a thread of this process leave its [`guarded_rousable`] if it sleeps there. Nothing happens to one that doesn't, or
/// that has ended. Async-signal-safe, but for `errno`.
pub fn rouse(thread: std::ffi::c_int) {
    // Another handler than ours would not know what to do with the signal.
    if handler::is_in_front(sleepers::SIGNAL) {
        sleepers::call(thread);
    }
}

#[inline]
unsafe fn guard<R>(covers: &dyn Fn(usize) -> bool, rousable: bool, f: impl FnOnce() -> R) -> Result<R, Lost> {
    handler::install();
    let Ok(guards) = MINE.try_with(|mine| mine.0) else {
        return Ok(f()); // the thread is about to end
    };
    let outer = guards.innermost.load(Ordering::Relaxed);
    let mut guard = Guard {
        stack: 0,
        lost: Lost { address: 0, of: 0, awaited: false },
        covers: (&raw const covers).cast(),
        rousable,
        outer,
        forks: forks(),
    };
    // SAFETY: the guard is taken away again before it ends.
    guards.innermost.store((&raw mut guard).cast(), Ordering::Release);
    let mut call = Call { f: Some(f), result: None };
    // SAFETY: `run` gets the call that it is made for; leaving it half-way is what the caller has agreed to.
    let done = unsafe { call_guarded((&raw mut guard).cast(), run_of(&call), (&raw mut call).cast()) };
    guards.innermost.store(outer, Ordering::Release);
    match call.result {
        _ if done == 0 => Err(guard.lost),
        Some(Ok(result)) => Ok(result),
        Some(Err(panic)) => resume_unwind(panic),
        None => unreachable!("a call that has returned has a result"),
    }
}

struct Call<F, R> {
    f: Option<F>,
    result: Option<std::thread::Result<R>>,
}

/// What calls the function of such a call.
fn run_of<F: FnOnce() -> R, R>(_: &Call<F, R>) -> Run {
    unsafe extern "C" fn run<F: FnOnce() -> R, R>(call: *mut c_void) {
        // SAFETY: `guarded` passes its call, to this function of the same types.
        let call = unsafe { &mut *call.cast::<Call<F, R>>() };
        if let Some(f) = call.f.take() {
            // No unwinding through the assembly.
            call.result = Some(catch_unwind(AssertUnwindSafe(f)));
        }
    }
    run::<F, R>
}

#[cfg(all(test, target_arch = "x86_64", target_os = "linux", not(miri)))]
mod tests;
