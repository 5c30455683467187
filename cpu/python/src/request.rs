// SPDX-License-Identifier: Apache-2.0
//! Requests of the KVM API: one thread at a time is in those to a vCPU, and no handler of a signal runs in the middle.
//!
//! Both as it is with the kernel's, which are system calls that a signal's handler waits for, and take `vcpu->mutex`.

use std::sync::OnceLock;

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use softkvm_client::sanitizers::{self, Unseen};

use crate::call::call;
use crate::signals::Runner;

/// A thread's runner for what is no vCPU's; it goes to another thread behind this one's end.
struct Own(&'static Runner);

impl Drop for Own {
    fn drop(&mut self) {
        self.0.release();
    }
}

thread_local!(static OWN: Own = Own(Runner::new(None)));

/// The runner of threads that are about to end, and have their own no more.
static LAST: OnceLock<&'static Runner> = OnceLock::new();

/// The calling thread's own runner.
pub fn own() -> &'static Runner {
    OWN.try_with(|own| own.0).unwrap_or_else(|_| LAST.get_or_init(|| Runner::new(None)))
}

/// Takes a runner that another thread has; handlers of signals run meanwhile, and what Python's raise ends the wait.
#[cold]
fn lock(py: Python<'_>, runner: &Runner) -> PyResult<()> {
    while !py.detach(|| runner.lock()) {
        py.check_signals()?;
    }
    Ok(())
}

/// Does a request. Python's handlers whose signals came before run before, and the others behind it.
pub fn within<'py>(
    runner: &Runner,
    function: impl FnOnce() -> PyResult<Bound<'py, PyAny>>,
    py: Python<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    if runner.held() {
        return function();
    }
    if !runner.try_lock() {
        lock(py, runner)?;
    }
    runner.begin();
    let result = py.check_signals().and_then(|()| function());
    end(runner, result, py)
}

/// [`within`] for a run of the processor.
pub fn run<'py>(
    runner: &Runner,
    mask: Option<u64>,
    function: impl FnOnce() -> PyResult<Bound<'py, PyAny>>,
    py: Python<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    if !runner.try_lock() {
        if runner.held() {
            let message = "Device or resource busy: the thread is in a request to the vCPU";
            return Err(PyOSError::new_err((libc::EBUSY, message)));
        }
        lock(py, runner)?;
    }
    runner.begin();
    runner.begin_run(mask);
    if own().waiting() {
        // It has come to the request that this run is in, just before.
        runner.signalled();
    }
    let result = py.check_signals().and_then(|()| function());
    end(runner, result, py)
}

/// Ends a request; what a handler raises that has waited for it is raised in the place of its result.
fn end<'py>(
    runner: &Runner,
    result: PyResult<Bound<'py, PyAny>>,
    py: Python<'py>,
) -> PyResult<Bound<'py, PyAny>> {
    if runner.end()
        && let Err(raised) = py.check_signals()
    {
        if let Err(error) = result {
            raised.value(py).setattr("__context__", error.into_value(py))?;
        }
        return Err(raised);
    }
    result
}

/// Calls a function of a thread that is none of the client's: its sanitizers leave it out.
#[pyfunction]
#[pyo3(signature = (function, *args))]
pub fn unseen<'py>(function: &Bound<'py, PyAny>, args: &Bound<'py, PyTuple>) -> PyResult<Bound<'py, PyAny>> {
    let _unseen = Unseen::new();
    call(function, args, None)
}

/// Whether the client has a sanitizer that looks at all of its process's threads.
#[pyfunction]
pub fn sanitized() -> bool {
    sanitizers::watches()
}

/// Calls a function that no handler of a signal interrupts.
#[pyfunction]
#[pyo3(signature = (function, *args, **named))]
pub fn uninterrupted<'py>(
    function: &Bound<'py, PyAny>,
    args: &Bound<'py, PyTuple>,
    named: Option<&Bound<'py, PyDict>>,
) -> PyResult<Bound<'py, PyAny>> {
    within(own(), || call(function, args, named), function.py())
}
