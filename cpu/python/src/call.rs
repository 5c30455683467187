// SPDX-License-Identifier: Apache-2.0
//! Calls of Python functions, on threads that the interpreter may end.
//!
//! Up to 3.13 a thread that wants the interpreter's lock while the interpreter finalizes is ended by pthread_exit
//! (`take_gil` in Python/ceval_gil.c), which unwinds its stack. Frames of ours cannot be unwound so: the process would be
//! aborted, "FATAL: exception not rethrown". The thread stays where it is then, as Python 3.14 has it, and ends with the
//! process. PyO3 has the same for where a thread takes the lock in Rust; this is for where it does in Python.

use core::hint::black_box;

use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

type Call =
    unsafe extern "C" fn(*mut ffi::PyObject, *mut ffi::PyObject, *mut ffi::PyObject) -> *mut ffi::PyObject;
type Unwinding = unsafe extern "C-unwind" fn(
    *mut ffi::PyObject,
    *mut ffi::PyObject,
    *mut ffi::PyObject,
) -> *mut ffi::PyObject;

/// Where an unwinding thread stays.
struct Stay;

impl Drop for Stay {
    #[cold]
    fn drop(&mut self) {
        loop {
            // SAFETY: waits, for what comes to no thread that blocks all signals or has a handler for them.
            unsafe { libc::pause() };
        }
    }
}

/// `function(*args, **named)`. All calls of Python functions that may run Python code are made by this.
pub fn call<'py>(
    function: &Bound<'py, PyAny>,
    args: &Bound<'py, PyTuple>,
    named: Option<&Bound<'py, PyDict>>,
) -> PyResult<Bound<'py, PyAny>> {
    let named = named.map_or(core::ptr::null_mut(), |named| named.as_ptr());
    // The compiler may not know which function it is: PyO3 says of it that it does not unwind.
    let object_call: Call = black_box(ffi::PyObject_Call);
    // SAFETY: they differ in that only.
    let object_call = unsafe { core::mem::transmute::<Call, Unwinding>(object_call) };
    let stay = Stay;
    // SAFETY: valid objects, with the interpreter's lock held.
    let result = unsafe { object_call(function.as_ptr(), args.as_ptr(), named) };
    core::mem::forget(stay);
    // SAFETY: a new reference, or NULL with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(function.py(), result) }
}
