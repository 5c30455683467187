// SPDX-License-Identifier: Apache-2.0
//! The machines whose guests have memory of the client's, to ask without a lock whether some is concerned.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

/// As many machines are asked; those beyond are not told of memory that goes.
const MOST: usize = 256;

/// A function of a machine and its argument (`Machine.has_region_function`), zeros for none.
struct Guest {
    function: AtomicUsize,
    argument: AtomicUsize,
    /// How many threads are calling it.
    callers: AtomicUsize,
}

static GUESTS: [Guest; MOST] = [const {
    Guest { function: AtomicUsize::new(0), argument: AtomicUsize::new(0), callers: AtomicUsize::new(0) }
}; MOST];

/// How many of them there have been at once.
static USED: AtomicUsize = AtomicUsize::new(0);

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
    GUESTS.iter().for_each(|guest| guest.callers.store(0, Ordering::SeqCst));
}

pub extern "C-unwind" fn concerns(address: usize, size: usize) -> bool {
    GUESTS[..USED.load(Ordering::SeqCst)].iter().any(|guest| guest.has(address, size))
}

/// Adds a machine by its function and argument, or takes it away.
#[pyfunction]
pub fn client_guest(has_region: (usize, usize), add: bool) -> PyResult<()> {
    let (function, argument) = has_region;
    if !add {
        let given = |guest: &&Guest| guest.argument.load(Ordering::SeqCst) == argument;
        if let Some(guest) = GUESTS.iter().find(given) {
            guest.function.store(0, Ordering::SeqCst);
            while guest.callers.load(Ordering::SeqCst) != 0 {
                std::thread::yield_now();
            }
            guest.argument.store(0, Ordering::SeqCst);
        }
        return Ok(());
    }
    let free = |guest: &Guest| {
        guest.argument.compare_exchange(0, argument, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    };
    let Some(place) = GUESTS.iter().position(free) else {
        return Err(PyOSError::new_err((
            libc::ENOMEM,
            format!("Cannot allocate memory: {MOST} VMs are all"),
        )));
    };
    USED.fetch_max(place + 1, Ordering::SeqCst);
    GUESTS[place].function.store(function, Ordering::SeqCst);
    Ok(())
}
