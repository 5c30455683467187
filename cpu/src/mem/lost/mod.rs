// SPDX-License-Identifier: Apache-2.0
//! Memory that is not there any more.
//!
//! Registered memory is its owner's, who can take it away at any time: truncate the file behind it, unmap it, protect
//! it. Then the host ends an access with SIGBUS or SIGSEGV. [`guarded`] makes that a result: a handler of both signals
//! finds that its thread is inside of a guard, which expects the address, and has the guard return. Any other signal
//! goes to the handler that was there before, or does what it does without one.
//!
//! What runs guarded is left in the middle when that happens. So it holds no locks while it touches such memory, has
//! nothing to drop, and changes what it answers for behind the access.

pub mod actions;
mod handler;
mod host;
mod named;

use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::forks::forks;
use host::{Run, call_guarded};

pub use handler::{client_action, client_action_changed, client_handler, watch};
pub use named::{load_for, load128_for, store_for, store128_for};

/// An access found no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Lost {
    /// Where.
    pub address: usize,
    /// What the access was for, if it named that ([`load_for`]), else 0.
    pub of: usize,
}

/// Calls `f`. If it touches memory that is not there, at an address of which `covers` says yes, then `f` ends there, and
/// so does all that it has called. Costs some ten instructions.
///
/// # Safety
/// Nothing that `f` has on the stack while it touches memory needs to be dropped. `covers` may be called by a signal
/// handler during any such access: it takes no locks, allocates nothing, and what it looks at is whole then.
pub unsafe fn guarded<R>(covers: &dyn Fn(usize) -> bool, f: impl FnOnce() -> R) -> Result<R, Lost> {
    handler::install();
    let Ok(guards) = MINE.try_with(|mine| mine.0) else {
        return Ok(f()); // the thread is about to end
    };
    let outer = guards.innermost.load(Ordering::Relaxed);
    let mut guard = Guard {
        stack: 0,
        lost: Lost { address: 0, of: 0 },
        covers: (&raw const covers).cast(),
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

/// One [`guarded`] under way, on the stack of its thread.
#[repr(C)]
struct Guard {
    /// Where the stack was, with the registers to put back on it: see the assembly.
    stack: usize,
    /// What has ended it.
    lost: Lost,
    /// Points to the `&dyn Fn(usize) -> bool`.
    covers: *const c_void,
    /// The one around it.
    outer: *mut Guard,
    /// [`forks`] when it began: of the parent's guards a child has only those of the thread that forked.
    forks: u64,
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

// ---- the guards of each thread -------------------------------------------------------------------------------------

/// The guards of one thread. Never freed, as signal handlers look at all of them; used again for other threads.
struct Guards {
    /// pthread_self(), 0 when free.
    thread: AtomicUsize,
    innermost: AtomicPtr<Guard>,
    next: *const Guards,
}

// SAFETY: `next` never changes and leads to another one that lives for ever; the rest is atomic.
unsafe impl Sync for Guards {}

static ALL: AtomicPtr<Guards> = AtomicPtr::new(null_mut());

fn all() -> impl Iterator<Item = &'static Guards> {
    // SAFETY: null or a `Guards` that lives for ever.
    let at = |p: *const Guards| unsafe { p.as_ref() };
    std::iter::successors(at(ALL.load(Ordering::Acquire)), move |g| at(g.next))
}

fn this_thread() -> usize {
    // SAFETY: always succeeds; async-signal-safe in all C libraries (it reads a register).
    unsafe { libc::pthread_self() as usize }
}

struct Mine(&'static Guards);

thread_local!(static MINE: Mine = Mine(Guards::take()));

impl Guards {
    /// Those of the calling thread from now on.
    fn take() -> &'static Guards {
        let me = this_thread();
        let free =
            |g: &&Guards| g.thread.compare_exchange(0, me, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        if let Some(guards) = all().find(free) {
            return guards;
        }
        let guards = Box::into_raw(Box::new(Guards {
            thread: AtomicUsize::new(me),
            innermost: AtomicPtr::new(null_mut()),
            next: null(),
        }));
        let mut first = ALL.load(Ordering::Acquire);
        loop {
            // SAFETY: nobody else knows it yet.
            unsafe { (*guards).next = first };
            match ALL.compare_exchange_weak(first, guards, Ordering::AcqRel, Ordering::Acquire) {
                // SAFETY: leaked, so it lives for ever.
                Ok(_) => return unsafe { &*guards },
                Err(now) => first = now,
            }
        }
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        self.0.thread.store(0, Ordering::Release);
    }
}

/// The innermost guard of this thread that expects the address to be lost, or null. Async-signal-safe.
fn expecting(address: usize) -> *mut Guard {
    let me = this_thread();
    for guards in all().filter(|g| g.thread.load(Ordering::Relaxed) == me) {
        let mut guard = guards.innermost.load(Ordering::Acquire);
        // SAFETY: guards of this thread, in this process: they are on its stack, below what runs now.
        while let Some(g) = unsafe { guard.as_ref() } {
            if g.forks != forks() {
                break;
            }
            // SAFETY: points to the reference that `guarded` has, which allows it to be called now.
            if unsafe { (*g.covers.cast::<&dyn Fn(usize) -> bool>())(address) } {
                return guard;
            }
            guard = g.outer;
        }
    }
    null_mut()
}

#[cfg(all(test, target_arch = "x86_64", target_os = "linux", not(miri)))]
mod tests;
