// SPDX-License-Identifier: Apache-2.0
//! The handler of SIGBUS and SIGSEGV, and those that it stands before.
//!
//! It has to stay in front: a process may install one of its own at any time, for faults of its own. Where that goes
//! through the client's side it is put behind ours at once ([`client_action`]), and who asks sees it alone. What was
//! installed otherwise, [`watch`] finds. Such a handler may call the one that was there before it, which is ours, and
//! means the one below: so there are several of ours, one for each level.

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use super::actions::{action_of, call_handler, set_action, set_default};
use super::guards::{Lost, expecting};
use super::host::{self, go_on_leaving};
use super::sleepers::{self, leave_awaited};

const SIGNALS: [c_int; 2] = [libc::SIGBUS, libc::SIGSEGV];

/// How many handlers of one signal may have been installed over each other, each calling the one before.
const LEVELS: usize = 4;

/// Hosts of which the assembly is there; on others memory that is lost ends the process, as without a guard.
const POSSIBLE: bool = cfg!(all(target_arch = "x86_64", target_os = "linux", not(miri)));

/// What ours stands before, for each signal and level, and the level that is in front.
struct Levels {
    before: [AtomicPtr<Known>; LEVELS],
    front: AtomicUsize,
}

static ALL: [Levels; SIGNALS.len()] =
    [const { Levels { before: [const { AtomicPtr::new(null_mut()) }; LEVELS], front: AtomicUsize::new(0) } };
        SIGNALS.len()];

fn levels(signal: c_int) -> Option<&'static Levels> {
    SIGNALS.iter().position(|s| *s == signal).map(|n| &ALL[n])
}

impl Levels {
    fn before(&self, level: usize) -> Option<&'static Known> {
        // SAFETY: null, or an action that is never freed.
        unsafe { self.before[level].load(Ordering::Acquire).as_ref() }
    }

    /// Has ours stand before an action at the level that is in front.
    fn replace(&self, action: &libc::sigaction) {
        let front = &self.before[self.front.load(Ordering::SeqCst)];
        front.store(keep(action), Ordering::Release);
    }

    /// The level at which ours calls an action's handler.
    fn level_of(&self, action: &libc::sigaction) -> usize {
        let handler = |level| self.before(level).map(|known: &Known| known.action.sa_sigaction);
        (0..LEVELS)
            .find(|&level| handler(level).is_none_or(|known| known == action.sa_sigaction))
            .unwrap_or_else(|| (self.front.load(Ordering::SeqCst) + 1) % LEVELS)
    }
}

// ---- actions, kept for handlers to look at -----------------------------------------------------------------------

/// An action that there has been. Never freed, as a handler may be about to look at it; an equal one is the same.
struct Known {
    action: libc::sigaction,
    next: *mut Known,
}

static KNOWN: AtomicPtr<Known> = AtomicPtr::new(null_mut());

// SAFETY: zeros are SIG_DFL with an empty mask.
static DEFAULT: libc::sigaction = unsafe { std::mem::zeroed() };

fn is_same(a: &libc::sigaction, b: &libc::sigaction) -> bool {
    // SAFETY: asks.
    let has = |set, signal| unsafe { libc::sigismember(set, signal) == 1 };
    (a.sa_sigaction, a.sa_flags) == (b.sa_sigaction, b.sa_flags)
        && (1..65).all(|signal| has(&raw const a.sa_mask, signal) == has(&raw const b.sa_mask, signal))
}

fn keep(action: &libc::sigaction) -> *mut Known {
    let mut first = KNOWN.load(Ordering::Acquire);
    let mut at = first;
    // SAFETY: null, or what is never freed.
    while let Some(known) = unsafe { at.as_ref() } {
        if is_same(&known.action, action) {
            return at;
        }
        at = known.next;
    }
    let new = Box::into_raw(Box::new(Known { action: *action, next: null_mut() }));
    loop {
        // SAFETY: nobody else knows it yet.
        unsafe { (*new).next = first };
        match KNOWN.compare_exchange_weak(first, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return new,
            Err(now) => first = now,
        }
    }
}

// ---- in front ----------------------------------------------------------------------------------------------------

type Handler = extern "C-unwind" fn(c_int, *mut libc::siginfo_t, *mut c_void);

const OURS: [Handler; LEVELS] = [on_fault::<0>, on_fault::<1>, on_fault::<2>, on_fault::<3>];

fn own_level(handler: usize) -> Option<usize> {
    OURS.iter().position(|&ours| ours as usize == handler)
}

/// Whether ours is the handler of a signal. Async-signal-safe.
pub(super) fn is_in_front(signal: c_int) -> bool {
    action_of(signal).is_some_and(|action| own_level(action.sa_sigaction).is_some())
}

fn put_in_front(signal: c_int, level: usize) {
    // SAFETY: zeros are a sigaction with an empty mask; the handler is as its flags say.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = OURS[level] as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        set_action(signal, &action);
    }
}

/// Puts ours in front, if it isn't.
pub fn watch() {
    if !POSSIBLE {
        return;
    }
    for (signal, levels) in SIGNALS.into_iter().zip(&ALL) {
        if levels.before(0).is_none() {
            keep(&DEFAULT); // what a handler may look for
        }
        let Some(action) = action_of(signal).filter(|a| own_level(a.sa_sigaction).is_none()) else {
            continue;
        };
        let level = levels.level_of(&action);
        levels.front.store(level, Ordering::SeqCst);
        levels.replace(&action);
        put_in_front(signal, level);
    }
}

/// Puts ours in front for the first time. Threads that come at once all do: nobody waits for one that a child, forked
/// meanwhile, does not have.
pub fn install() {
    static DONE: AtomicBool = AtomicBool::new(false);
    if !DONE.load(Ordering::SeqCst) {
        super::instruction::prepare();
        watch();
        DONE.store(true, Ordering::SeqCst);
    }
}

// ---- for those who are not to know of ours -----------------------------------------------------------------------

/// sigaction() behind ours; None: the signal is none of these.
pub fn client_action(signal: c_int, new: Option<&libc::sigaction>) -> Option<libc::sigaction> {
    if !POSSIBLE {
        return None;
    }
    let levels = levels(signal)?;
    watch();
    let old = levels.before(levels.front.load(Ordering::SeqCst))?.action;
    if let Some(action) = new {
        levels.replace(action);
    }
    Some(old)
}

/// Somebody has installed a handler in the place of ours, by a function that is none of [`client_action`]'s: puts it
/// behind ours.
pub fn client_action_changed(signal: c_int) {
    let Some(levels) = levels(signal).filter(|_| POSSIBLE) else { return };
    if let Some(action) = action_of(signal).filter(|a| own_level(a.sa_sigaction).is_none()) {
        levels.replace(&action);
        put_in_front(signal, levels.front.load(Ordering::SeqCst));
    }
}

/// The handler that one of ours stands before; any other is itself.
pub fn client_handler(signal: c_int, handler: usize) -> usize {
    let known = own_level(handler).and_then(|level| levels(signal)?.before(level));
    known.map_or(handler, |known| known.action.sa_sigaction)
}

// ---- faults ------------------------------------------------------------------------------------------------------

/// Handles both signals: see the top.
extern "C-unwind" fn on_fault<const LEVEL: usize>(
    signal: c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    // SAFETY: the kernel passes both. A code above 0 is its own: then there is an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if sleepers::is_call(info) {
        // SAFETY: the kernel's context.
        unsafe { leave_awaited(context) };
        return;
    }
    let guard = if code > 0 { expecting(address) } else { null_mut() };
    if guard.is_null() {
        return hand_on(LEVEL, signal, code, info, context);
    }
    // SAFETY: a guard of this thread; the context is what the thread goes on with.
    unsafe {
        (*guard).lost = Lost { address, of: host::named(context), awaited: false };
        go_on_leaving(context, guard.cast());
    }
}

/// Does what would have been done without this handler.
fn hand_on(level: usize, signal: c_int, code: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let Some(levels) = levels(signal) else { return };
    // A fault comes again when this returns; a signal that was sent does not.
    let sent = code <= 0;
    match levels.before(level).map(|known| &known.action) {
        Some(action) if !matches!(action.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) => {
            // SAFETY: the handler that was there, called as it wants to be, with the signals blocked that it wants.
            unsafe {
                if action.sa_flags & libc::SA_RESETHAND != 0 {
                    levels.before[level].store(keep(&DEFAULT), Ordering::Release);
                }
                let mut mask = std::mem::zeroed();
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const action.sa_mask, &raw mut mask);
                if action.sa_flags & libc::SA_NODEFER != 0
                    && libc::sigismember(&raw const action.sa_mask, signal) != 1
                {
                    let mut this = std::mem::zeroed();
                    libc::sigemptyset(&raw mut this);
                    libc::sigaddset(&raw mut this, signal);
                    libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const this, null_mut());
                }
                call_handler(action, signal, info, context);
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, null_mut());
            }
        }
        Some(action) if sent && action.sa_sigaction == libc::SIG_IGN => {}
        // The default action, of which nobody comes back; it is pending until this handler returns.
        _ => {
            set_default(signal);
            if sent {
                // SAFETY: a signal.
                unsafe { libc::raise(signal) };
            }
        }
    }
}
