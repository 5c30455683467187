// SPDX-License-Identifier: Apache-2.0
//! `Run`: KVM_RUN's frame around a function, with all that it needs at hand.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::call::call;
use crate::processor::PyCpu;
use crate::request;

/// A function that runs a processor, and the object it is a method of.
///
/// A call goes into the interpreter's loop straight from here: no bound method is made for it, and no tuple unless the
/// function has something to be told.
#[pyclass(frozen, name = "Run", module = "softkvm._softcpu")]
pub struct PyRun {
    cpu: Py<PyCpu>,
    function: Py<PyAny>,
    owner: Py<PyAny>,
    /// The arguments when there is nothing to tell.
    plain: Py<PyTuple>,
    masked: AtomicBool,
    mask: AtomicU64,
}

#[pymethods]
impl PyRun {
    #[new]
    fn new(cpu: Py<PyCpu>, function: Py<PyAny>, owner: Py<PyAny>, py: Python<'_>) -> PyResult<PyRun> {
        let plain = (owner.bind(py), 0).into_pyobject(py)?.unbind();
        Ok(PyRun { cpu, function, owner, plain, masked: AtomicBool::new(false), mask: AtomicU64::new(0) })
    }

    #[getter]
    fn mask(&self) -> Option<u64> {
        self.masked.load(Ordering::Relaxed).then(|| self.mask.load(Ordering::Relaxed))
    }

    #[setter]
    fn set_mask(&self, mask: Option<u64>) {
        self.mask.store(mask.unwrap_or(0), Ordering::Relaxed);
        self.masked.store(mask.is_some(), Ordering::Relaxed);
    }

    fn run(&self, py: Python<'_>) -> PyResult<()> {
        let cpu = self.cpu.get();
        let run = || {
            let result = match cpu.enter_run() {
                0 => call(self.function.bind(py), self.plain.bind(py), None),
                told => (self.owner.bind(py), told)
                    .into_pyobject(py)
                    .and_then(|told| call(self.function.bind(py), &told, None)),
            };
            cpu.leave_run();
            result
        };
        request::run(cpu.runner(), self.mask(), run, py).map(drop)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.cpu)?;
        visit.call(&self.function)?;
        visit.call(&self.owner)?;
        visit.call(&self.plain)
    }
}
