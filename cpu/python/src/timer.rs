// SPDX-License-Identifier: Apache-2.0
//! One thread that kicks processors when their timers expire, without taking part in Python.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::Duration;

use softcpu::clock::clock_ns;
use softcpu::mem::Shared;

use crate::signals;

/// When, and for whom: the address of the processor's shared part.
type Key = (u64, usize);

#[derive(Default)]
struct Service {
    armed: Mutex<BTreeMap<Key, Weak<Shared>>>,
    changed: Condvar,
}

static SERVICE: AtomicPtr<Service> = AtomicPtr::new(core::ptr::null_mut());

fn service() -> &'static Service {
    // SAFETY: a service is never freed.
    if let Some(service) = unsafe { SERVICE.load(Ordering::Acquire).as_ref() } {
        return service;
    }
    let new = Box::into_raw(Box::<Service>::default());
    match SERVICE.compare_exchange(core::ptr::null_mut(), new, Ordering::SeqCst, Ordering::SeqCst) {
        Ok(_) => {
            // SAFETY: as above.
            let service: &'static Service = unsafe { &*new };
            // Without the thread timers would never fire; a process that cannot start one is beyond help.
            signals::spawn_quiet("softcpu-timer", move || run(service)).expect("timer thread");
            service
        }
        Err(other) => {
            // SAFETY: nobody else has seen `new`; `other` is a service.
            drop(unsafe { Box::from_raw(new) });
            unsafe { &*other }
        }
    }
}

/// A forked child has no timer thread: the next timer starts one, with a list of its own. The lock of the old one may
/// have been held by a thread that isn't there.
pub fn after_fork() {
    SERVICE.store(core::ptr::null_mut(), Ordering::SeqCst);
}

/// Lets timed waits of the calling thread end when they should: Linux adds up to 50 us of slack unless told otherwise.
pub fn be_punctual() {
    #[cfg(target_os = "linux")]
    {
        thread_local!(static TOLD: std::cell::Cell<bool> = const { std::cell::Cell::new(false) });
        if !TOLD.replace(true) {
            // SAFETY: PR_SET_TIMERSLACK takes a number, and sets the calling thread's slack in ns.
            unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong) };
        }
    }
}

fn run(s: &'static Service) {
    be_punctual();
    let mut armed = s.armed.lock().unwrap_or_else(|e| e.into_inner());
    loop {
        let now = clock_ns();
        while let Some(entry) = armed.first_entry() {
            if entry.key().0 > now {
                break;
            }
            if let Some(shared) = entry.remove().upgrade() {
                shared.kick();
            }
        }
        armed = match armed.first_key_value() {
            None => s.changed.wait(armed).unwrap_or_else(|e| e.into_inner()),
            Some((key, _)) => {
                let left = Duration::from_nanos(key.0.saturating_sub(now));
                s.changed.wait_timeout(armed, left).unwrap_or_else(|e| e.into_inner()).0
            }
        };
    }
}

/// Kicks `shared` once at `deadline` (0: never); replaces `previous`, the deadline armed before.
pub fn arm(shared: &Arc<Shared>, previous: u64, deadline: u64) {
    if previous == 0 && deadline == 0 {
        return;
    }
    let s = service();
    let id = Arc::as_ptr(shared) as usize;
    let mut armed = s.armed.lock().unwrap_or_else(|e| e.into_inner());
    if previous != 0 {
        armed.remove(&(previous, id));
    }
    if deadline != 0 {
        armed.insert((deadline, id), Arc::downgrade(shared));
        if armed.first_key_value().is_some_and(|(k, _)| *k == (deadline, id)) {
            s.changed.notify_one();
        }
    }
}
