// SPDX-License-Identifier: Apache-2.0
//! The client's memory, as the kernel has it (`copy_from_user`, `copy_to_user`): what is not there is EFAULT.

use std::mem::zeroed;

use pyo3::exceptions::{PyOSError, PyOverflowError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use softcpu::mem::lost::guarded;

/// Addresses from here on are nobody's memory.
const TASK_SIZE: usize = 1 << 47;

fn fault(address: usize, size: usize) -> PyErr {
    PyOSError::new_err((libc::EFAULT, format!("Bad address: {size} bytes at {address:#x}")))
}

/// Copies between the client's memory at `address` and memory of ours.
fn copy(address: usize, size: usize, from: *const u8, to: *mut u8) -> PyResult<()> {
    if size == 0 {
        return Ok(());
    }
    if address >= TASK_SIZE || size > TASK_SIZE - address {
        return Err(fault(address, size));
    }
    let covers = |at: usize| at.wrapping_sub(address) < size;
    // SAFETY: nothing to drop; one side is memory of ours, the other's faults are expected.
    unsafe { guarded(&covers, || core::ptr::copy(from, to, size)) }.map_err(|_| fault(address, size))
}

/// An address, nobody's memory if it is beyond all addresses: of a field behind a pointer that is near the last one.
pub struct Address(usize);

impl<'py> FromPyObject<'_, 'py> for Address {
    type Error = PyErr;

    fn extract(number: Borrowed<'_, 'py, PyAny>) -> PyResult<Address> {
        match number.extract::<usize>() {
            Err(error) if error.is_instance_of::<PyOverflowError>(number.py()) => Ok(Address(usize::MAX)),
            address => address.map(Address),
        }
    }
}

/// A copy of the client's memory.
#[pyfunction]
pub fn read_memory(py: Python<'_>, address: Address, size: usize) -> PyResult<Bound<'_, PyBytes>> {
    PyBytes::new_with(py, size, |bytes| copy(address.0, size, address.0 as *const u8, bytes.as_mut_ptr()))
}

/// The bytes of an object, whatever they are to it.
struct Bytes(ffi::Py_buffer);

impl Bytes {
    fn of(object: &Bound<'_, PyAny>) -> PyResult<Bytes> {
        // SAFETY: all zeros are a buffer to be filled in.
        let mut view = Bytes(unsafe { zeroed() });
        // SAFETY: the object is one; the view is given back when it is dropped.
        match unsafe { ffi::PyObject_GetBuffer(object.as_ptr(), &mut view.0, ffi::PyBUF_SIMPLE) } {
            0 => Ok(view),
            _ => Err(PyErr::fetch(object.py())),
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // SAFETY: of PyObject_GetBuffer, or zeros, which it leaves alone; the lock is held by who has called `of`.
        unsafe { ffi::PyBuffer_Release(&mut self.0) };
    }
}

/// Puts an object's bytes into the client's memory.
#[pyfunction]
pub fn write_memory(address: Address, data: &Bound<'_, PyAny>) -> PyResult<()> {
    let Bytes(view) = &Bytes::of(data)?;
    copy(address.0, view.len as usize, view.buf.cast(), address.0 as *mut u8)
}
