// SPDX-License-Identifier: Apache-2.0
//! `Cpu`.

use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use softcpu::x86::state::{Cpu, Shared};

use crate::machine::PyMachine;
use crate::timer;

/// One logical processor.
#[pyclass(frozen, name = "Cpu", module = "softkvm._softcpu")]
pub struct PyCpu {
    inner: UnsafeCell<Box<Cpu>>,
    registers: *mut u8,
    busy: AtomicBool,
    shared: Arc<Shared>,
    deadline: AtomicU64,
}

// SAFETY: `inner` is only reached through `exclusive`, which hands it to one thread at a time; `registers` points into
// the boxed Cpu and is only turned into a Python buffer.
unsafe impl Sync for PyCpu {}
unsafe impl Send for PyCpu {}

/// Releases `busy` however the use ends.
struct Busy<'a>(&'a AtomicBool);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl PyCpu {
    fn exclusive<R>(&self, f: impl FnOnce(&mut Cpu) -> R) -> PyResult<R> {
        if self.busy.swap(true, Ordering::Acquire) {
            return Err(PyRuntimeError::new_err("the processor is running in another thread"));
        }
        let _busy = Busy(&self.busy);
        // SAFETY: `busy` was false, so nobody else has a reference.
        Ok(f(unsafe { &mut *self.inner.get() }))
    }
}

#[pymethods]
impl PyCpu {
    #[new]
    fn new(machine: &PyMachine, index: u32) -> PyCpu {
        let mut cpu = Cpu::new(machine.inner.clone(), index);
        let registers = (&raw mut cpu.rb).cast::<u8>();
        let shared = cpu.shared.clone();
        PyCpu {
            inner: UnsafeCell::new(cpu),
            registers,
            busy: AtomicBool::new(false),
            shared,
            deadline: AtomicU64::new(0),
        }
    }

    #[getter]
    fn registers(slf: Bound<'_, Self>) -> PyResult<Bound<'_, PyAny>> {
        slf.py().import("builtins")?.getattr("memoryview")?.call1((slf,))
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let p = slf.get().registers;
        // SAFETY: the register block is the first 4 KiB of the boxed Cpu, which lives as long as the object.
        unsafe { crate::machine::fill(view, slf.as_ptr(), p, 4096, flags) }
    }

    fn vmrun(&self, py: Python<'_>, vmcb: usize) -> PyResult<u64> {
        let result = py.detach(|| self.exclusive(|cpu| cpu.vmrun(vmcb)))?;
        result.map_err(|_| {
            PyValueError::new_err(format!(
                "vmcb {vmcb:#x}: expected a 4096-byte aligned page of registered memory"
            ))
        })
    }

    fn kick(&self) {
        self.shared.kick();
    }

    fn clear_kick(&self) -> bool {
        self.shared.clear_kick()
    }

    #[pyo3(signature = (timeout_ns = -1))]
    fn wait(&self, py: Python<'_>, timeout_ns: i64) -> bool {
        let timeout = (timeout_ns >= 0).then(|| Duration::from_nanos(timeout_ns as u64));
        py.detach(|| self.shared.wait(timeout))
    }

    fn set_timer(&self, deadline_ns: u64) {
        let previous = self.deadline.swap(deadline_ns, Ordering::SeqCst);
        timer::arm(&self.shared, previous, deadline_ns);
    }

    fn flush_tlb(&self) -> PyResult<()> {
        self.exclusive(|cpu| cpu.tlb.flush_all())
    }

    #[getter]
    fn instructions(&self) -> u64 {
        // SAFETY: a racy read of a counter while the processor runs gives some recent value.
        unsafe {
            let cpu: *const Cpu = &raw const **self.inner.get();
            (&raw const (*cpu).instructions).read_volatile()
        }
    }

    #[getter]
    fn next_rip(&self) -> PyResult<bool> {
        self.exclusive(|cpu| cpu.next_rip_enabled)
    }

    #[setter]
    fn set_next_rip(&self, on: bool) -> PyResult<()> {
        self.exclusive(|cpu| cpu.next_rip_enabled = on)
    }

    /// Counters of the processor's insides.
    fn stats(&self) -> PyResult<BTreeMap<&'static str, u64>> {
        self.exclusive(|cpu| {
            BTreeMap::from([
                ("instructions", cpu.instructions),
                ("decoded_blocks", cpu.blocks.decoded_blocks),
                ("decoded_instructions", cpu.blocks.decoded_instructions),
                ("block_checks", cpu.blocks.checks),
                ("block_flushes", cpu.blocks.flushes),
                ("block_bytes", cpu.blocks.bytes() as u64),
                ("code_writes", cpu.blocks.invalidations),
                ("tlb_fills", cpu.tlb.fills),
                ("tlb_flushes", cpu.tlb.flushes),
            ])
        })
    }
}
