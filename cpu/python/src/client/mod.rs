// SPDX-License-Identifier: Apache-2.0
//! KVM in the process of a client that knows of none of this: its descriptors, its threads and its memory.
//!
//! The client's side calls the functions of [`softkvm_client::Core`], from any thread, with the client's signal mask and
//! the client's handlers. A request is done like a system call: no handler runs in its middle, it is no cancellation
//! point, and the interpreter's lock is held only where Python runs.

pub mod files;
mod guests;
mod memory;
mod threads;

use std::ffi::{c_int, c_long, c_uint, c_ulong, c_void};
use std::sync::OnceLock;

use pyo3::exceptions::{PyMemoryError, PyOSError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use softkvm_client::{Core, KIND_NONE, NOT_OUR_SIGNAL, NOT_OURS};

use crate::request::own;
use crate::signals;
use threads::uninterrupted;

/// The functions in Python that the client's side needs.
struct World {
    open_system: Py<PyAny>,
    unmapping: Py<PyAny>,
    /// None where there is nothing to be done.
    at_exit: Option<Py<PyAny>>,
}

static WORLD: OnceLock<World> = OnceLock::new();

static CORE: Core = Core {
    open,
    ioctl,
    kind,
    collect: files::collect,
    in_request,
    refresh,
    mapped,
    concerns: guests::concerns,
    unmapping,
    sigaction,
    handler_changed,
    cancelled: threads::cancelled,
    put_off,
    block_in_run,
    forking: threads::forking,
    at_exit,
    start: files::start,
    client_is_python: threads::client_is_python,
};

const KVM_RUN: c_uint = 0xAE80;

/// Says what was no OSError: a line, and in development mode where it came from before.
fn report(py: Python<'_>, error: PyErr) {
    let value = error.value(py);
    let kind = value.get_type().name().map_or_else(|_| String::new(), |name| name.to_string());
    let text = value.to_string();
    let text = text.lines().next().unwrap_or_default();
    let line = match kind.as_str() {
        "PluginError" => format!("softkvm: {text}"),
        _ => format!("softkvm: internal error: {kind}: {text}"),
    };
    if std::env::var_os("PYTHONDEVMODE").is_some_and(|mode| !mode.is_empty()) {
        error.print(py);
    }
    eprintln!("{line}");
}

/// The errno of what Python has raised; whatever is no OSError is a fault of ours, and said to be one.
fn errno_of(py: Python<'_>, error: PyErr) -> c_int {
    if error.is_instance_of::<PyOSError>(py)
        && let Ok(Some(number)) = error.value(py).getattr("errno").and_then(|e| e.extract::<Option<c_int>>())
    {
        return number;
    }
    if error.is_instance_of::<PyMemoryError>(py) {
        return libc::ENOMEM;
    }
    report(py, error);
    libc::EIO
}

/// A request's result; ENODEV behind the interpreter's end.
fn request(function: impl FnOnce(Python<'_>) -> c_long) -> c_long {
    threads::request(function).unwrap_or(-c_long::from(libc::ENODEV))
}

fn result_of<'py>(py: Python<'py>, result: PyResult<Bound<'py, PyAny>>) -> c_long {
    match result.and_then(|value| if value.is_none() { Ok(0) } else { value.extract::<c_long>() }) {
        Ok(value) => value,
        Err(error) => -c_long::from(errno_of(py, error)),
    }
}

/// Flags of open() that its descriptors have.
const KEPT: c_int =
    libc::O_ACCMODE | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_APPEND | libc::O_SYNC | libc::O_NOATIME;

/// The error that open() of a character device has with these flags: it is no directory, is there, and has no direct
/// access.
fn refused(flags: c_int) -> Option<c_int> {
    const NEW: c_int = libc::O_CREAT | libc::O_EXCL;
    if flags & NEW == NEW {
        Some(libc::EEXIST)
    } else if flags & libc::O_DIRECTORY != 0 {
        Some(libc::ENOTDIR)
    } else if flags & libc::O_DIRECT != 0 {
        Some(libc::EINVAL)
    } else {
        None
    }
}

/// Calls a function of Python's for a request.
fn call<A>(function: &Py<PyAny>, args: A) -> c_long
where
    A: for<'py> IntoPyObject<'py, Target = PyTuple, Output = Bound<'py, PyTuple>, Error: Into<PyErr>>,
{
    request(|py| {
        result_of(
            py,
            args.into_pyobject(py)
                .map_err(Into::into)
                .and_then(|args| crate::call::call(function.bind(py), &args, None)),
        )
    })
}

extern "C-unwind" fn open(flags: c_int) -> c_int {
    let Some(world) = WORLD.get() else { return -libc::ENOENT };
    if let Some(error) = refused(flags) {
        return -error;
    }
    uninterrupted(|| call(&world.open_system, (flags & KEPT,))) as c_int
}

extern "C-unwind" fn kind(fd: c_int) -> c_int {
    uninterrupted(|| files::find(fd).map_or(KIND_NONE, |file| file.kind))
}

extern "C-unwind" fn ioctl(fd: c_int, number: c_uint, argument: c_ulong) -> c_long {
    uninterrupted(|| {
        let Some(file) = files::find(fd) else { return NOT_OURS };
        match &file.run {
            Some(_) if number == KVM_RUN && argument != 0 => -c_long::from(libc::EINVAL),
            Some(run) if number == KVM_RUN => call(run, ()),
            _ => call(&file.ioctl, (number, argument)),
        }
    })
}

extern "C-unwind" fn in_request() -> bool {
    own().held()
}

extern "C-unwind" fn refresh(fd: c_int) -> c_int {
    uninterrupted(|| {
        let Some(file) = files::find(fd) else { return 0 };
        let Some(refresh) = &file.refresh else { return -libc::EINVAL };
        call(refresh, ()) as c_int
    })
}

extern "C-unwind" fn mapped(
    fd: c_int,
    address: usize,
    size: usize,
    offset: usize,
    protection: c_int,
    shared: bool,
) -> c_int {
    uninterrupted(|| {
        let Some(file) = files::find(fd) else { return 0 };
        let Some(mapped) = &file.mapped else { return -libc::ENODEV };
        call(mapped, (address, size, offset, protection, shared)) as c_int
    })
}

extern "C-unwind" fn unmapping(address: usize, size: usize) {
    // If it is Python that unmaps it has locks that nobody knows: a guest that touches what is gone then ends with EFAULT,
    // as ever.
    if let Some(world) = WORLD.get()
        && !threads::may_hold_lock()
    {
        uninterrupted(|| call(&world.unmapping, (address, size)));
    }
}

extern "C-unwind" fn sigaction(
    signal: c_int,
    new: *const libc::sigaction,
    old: *mut libc::sigaction,
) -> c_int {
    // SAFETY: both are null or the client's structures.
    match signals::client_action(signal, unsafe { new.as_ref() }) {
        None => NOT_OUR_SIGNAL,
        Some(Err(error)) => -error,
        Some(Ok(before)) => {
            if !old.is_null() {
                // SAFETY: as above.
                unsafe { *old = before };
            }
            0
        }
    }
}

extern "C-unwind" fn handler_changed(signal: c_int, before: usize) -> usize {
    let before = signals::client_handler(signal, before);
    signals::client_action_changed(signal);
    before
}

extern "C-unwind" fn put_off(signal: c_int, info: *mut c_void, context: *mut c_void) -> bool {
    signals::put_off(signal, info.cast(), context.cast())
}

extern "C-unwind" fn block_in_run(mask: u64) {
    signals::block_in_run(mask);
}

extern "C-unwind" fn at_exit() {
    if let Some(World { at_exit: Some(at_exit), .. }) = WORLD.get()
        && threads::is_own_process()
    {
        uninterrupted(|| call(at_exit, ()));
    }
}

/// The address of the functions for the client's side, which call these.
#[pyfunction]
fn client_core(open_system: Py<PyAny>, unmapping: Py<PyAny>, at_exit: Option<Py<PyAny>>) -> usize {
    if WORLD.set(World { open_system, unmapping, at_exit }).is_ok() {
        threads::note_process();
    }
    &raw const CORE as usize
}

pub fn add_to(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(client_core, m)?)?;
    m.add_function(wrap_pyfunction!(files::client_file, m)?)?;
    m.add_function(wrap_pyfunction!(guests::client_guest, m)?)?;
    m.add_function(wrap_pyfunction!(files::own_descriptor, m)?)?;
    m.add_function(wrap_pyfunction!(files::close_own_descriptor, m)?)?;
    m.add_function(wrap_pyfunction!(files::client_cpuid_sites, m)?)?;
    m.add_function(wrap_pyfunction!(memory::read_memory, m)?)?;
    m.add_function(wrap_pyfunction!(memory::write_memory, m)?)
}
