// SPDX-License-Identifier: Apache-2.0
//! The machines whose guests have memory of the client's, to ask without a lock whether some is concerned.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use pyo3::prelude::*;

/// A function of a machine and its argument (`Machine.has_region_function`), zeros for none. Never freed, as somebody may
/// be looking at it; another machine uses it again.
struct Guest {
    next: Option<&'static Guest>,
    function: AtomicUsize,
    argument: AtomicUsize,
    /// How many threads are calling it.
    callers: AtomicUsize,
}

/// As many as there have been at once.
static GUESTS: AtomicPtr<Guest> = AtomicPtr::new(core::ptr::null_mut());

fn guests() -> impl Iterator<Item = &'static Guest> {
    // SAFETY: guests are never freed.
    let first = unsafe { GUESTS.load(Ordering::Acquire).as_ref() };
    std::iter::successors(first, |guest| guest.next)
}

/// One that is free, or a new one, for the machine with this argument; without a function nobody calls it.
fn occupy(argument: usize) -> &'static Guest {
    let free = |guest: &&Guest| {
        guest.argument.compare_exchange(0, argument, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    };
    guests().find(free).unwrap_or_else(|| {
        let new = Box::leak(Box::new(Guest {
            next: None,
            function: AtomicUsize::new(0),
            argument: AtomicUsize::new(argument),
            callers: AtomicUsize::new(0),
        }));
        let mut first = GUESTS.load(Ordering::Acquire);
        loop {
            // SAFETY: guests are never freed.
            new.next = unsafe { first.as_ref() };
            match GUESTS.compare_exchange(first, new, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return &*new,
                Err(now) => first = now,
            }
        }
    })
}

impl Guest {
    fn has(&self, address: usize, size: usize) -> bool {
        if self.function.load(Ordering::Relaxed) == 0 {
            return false;
        }
        self.callers.fetch_add(1, Ordering::SeqCst);
        let function = self.function.load(Ordering::SeqCst);
        let found = function != 0 && {
            let argument = self.argument.load(Ordering::SeqCst) as *const c_void;
            type Function = extern "C" fn(*const c_void, usize, usize) -> c_int;
            // SAFETY: of this type; its machine is there until nobody calls it.
            unsafe { core::mem::transmute::<usize, Function>(function)(argument, address, size) != 0 }
        };
        self.callers.fetch_sub(1, Ordering::SeqCst);
        found
    }
}

/// In a child nobody is calling.
pub fn after_fork() {
    guests().for_each(|guest| guest.callers.store(0, Ordering::SeqCst));
}

pub extern "C-unwind" fn concerns(address: usize, size: usize) -> bool {
    guests().any(|guest| guest.has(address, size))
}

/// Adds a machine by its function and argument, or takes it away.
#[pyfunction]
pub fn client_guest(has_region: (usize, usize), add: bool) {
    let (function, argument) = has_region;
    if add {
        occupy(argument).function.store(function, Ordering::SeqCst);
    } else if let Some(guest) = guests().find(|guest| guest.argument.load(Ordering::SeqCst) == argument) {
        guest.function.store(0, Ordering::SeqCst);
        while guest.callers.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
        guest.argument.store(0, Ordering::SeqCst);
    }
}
