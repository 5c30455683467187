// SPDX-License-Identifier: Apache-2.0
//! Sets of signals, and which of them can wait.

use std::io;
use std::mem::MaybeUninit;

use libc::{c_int, sigset_t};
use softkvm_client::sanitizers::Unseen;

/// One more than the last signal.
pub(super) const END: usize = 65;

/// Signals that an instruction raises: they cannot wait.
pub(super) fn is_synchronous(signal: c_int) -> bool {
    use libc::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP};
    matches!(signal, SIGABRT | SIGBUS | SIGFPE | SIGILL | SIGSEGV | SIGSYS | SIGTRAP)
}

/// Signals whose handlers are ours to call: not those of the C library (32 and 33) either.
pub(super) fn can_be_caught(signal: c_int) -> bool {
    let in_range = (1..END as c_int).contains(&signal);
    let reserved = (32..libc::SIGRTMIN()).contains(&signal);
    in_range && !is_synchronous(signal) && !reserved && !matches!(signal, libc::SIGKILL | libc::SIGSTOP)
}

pub(super) fn members(bits: u64) -> impl Iterator<Item = c_int> {
    (1..END as c_int).filter(move |s| bits >> (s - 1) & 1 != 0)
}

pub(super) fn members_of(kind: fn(c_int) -> bool) -> u64 {
    (1..END as c_int).filter(|&s| kind(s)).fold(0, |bits, s| bits | 1 << (s - 1))
}

pub(super) fn set_of(bits: u64) -> sigset_t {
    // SAFETY: sigemptyset fills it in; the C library refuses its own signals.
    unsafe {
        let mut set = MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        let mut set = set.assume_init();
        for signal in members(bits) {
            libc::sigaddset(&mut set, signal);
        }
        set
    }
}

pub(super) fn bits_of(set: &sigset_t) -> u64 {
    // SAFETY: asks.
    let holds = |s: c_int| unsafe { libc::sigismember(set, s) == 1 };
    (1..END as c_int).filter(|&s| holds(s)).fold(0, |bits, s| bits | 1 << (s - 1))
}

pub(super) fn set_mask(how: c_int, set: &sigset_t) {
    // SAFETY: a valid set; only a wrong `how` fails.
    unsafe { libc::pthread_sigmask(how, set, core::ptr::null_mut()) };
}

/// Starts a thread that takes no signal, and that no sanitizer looks at: both are for the client's threads.
pub fn spawn_quiet(name: &str, main: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let mut before = set_of(0);
    // SAFETY: valid sets; the new thread inherits the mask.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set_of(!members_of(is_synchronous)), &mut before) };
    let main = || {
        let _unseen = Unseen::new();
        main();
    };
    let spawned = std::thread::Builder::new().name(name.into()).spawn(main);
    set_mask(libc::SIG_SETMASK, &before);
    spawned.map(drop)
}
