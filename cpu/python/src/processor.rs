// SPDX-License-Identifier: Apache-2.0
//! `Cpu`.

use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use softcpu::clock::clock_ns;
use softcpu::engine::state::Engine;
use softcpu::mem::{Machine, Shared, Wake};
use softcpu::x86::state::Cpu;

use crate::machine::{PyMachine, own};
use crate::request;
use crate::signals::{self, Runner};
use crate::timer;

/// Looks at the kick between two looks at the clock, while polling.
const SPINS: u32 = 16;

/// One logical processor.
#[pyclass(frozen, name = "Cpu", module = "softkvm._softcpu")]
pub struct PyCpu {
    inner: UnsafeCell<Box<Cpu>>,
    registers: *mut u8,
    busy: AtomicBool,
    shared: Arc<Shared>,
    machine: Arc<Machine>,
    runner: &'static Runner,
    deadline: AtomicU64,
    /// Processors to kick at the next entry, and whether there are any.
    held: Mutex<Vec<Arc<Shared>>>,
    holding: AtomicBool,
    /// What [`PyCpu::run`] looks at when it begins.
    watched: OnceLock<PyBuffer<u64>>,
}

/// What the function of [`PyCpu::run`] is told.
pub const RUN_INTERRUPTED: u32 = 1;
pub const RUN_WATCHED: u32 = 2;

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

    /// What other threads touch of it; EIO in a child of the process that has made it.
    pub fn shared(&self) -> PyResult<Arc<Shared>> {
        own(&self.machine)?;
        Ok(self.shared.clone())
    }

    /// Whether a watched word isn't 0.
    fn watches(&self) -> bool {
        self.watched.get().is_some_and(|words| {
            let first = words.buf_ptr().cast::<AtomicU64>();
            // SAFETY: the buffer keeps its memory, whose items are aligned words; others may write them meanwhile.
            (0..words.item_count()).any(|n| unsafe { &*first.add(n) }.load(Ordering::Relaxed) != 0)
        })
    }

    /// Sends the kicks that were held back.
    fn send_held(&self) {
        if self.holding.swap(false, Ordering::SeqCst) {
            for shared in self.held.lock().unwrap_or_else(|e| e.into_inner()).drain(..) {
                shared.kick();
            }
        }
    }

    /// Blocks until a kick, at most until the physical clock reads `end`. The processor's timer is this thread's
    /// meanwhile: one wake-up, not the timer thread's and then this one's.
    fn sleep(&self, end: Option<u64>) -> bool {
        let deadline = self.deadline.load(Ordering::SeqCst);
        if deadline == 0 || self.shared.kicked() {
            return self.wait_until(end);
        }
        timer::arm(&self.shared, deadline, 0);
        timer::be_punctual();
        let kicked = self.wait_until(Some(end.map_or(deadline, |e| e.min(deadline))));
        if kicked || clock_ns() < deadline {
            // Unless another thread has set the timer: then its deadline is armed already.
            if self.deadline.load(Ordering::SeqCst) == deadline {
                timer::arm(&self.shared, 0, deadline);
            }
            return kicked;
        }
        self.shared.kick();
        true
    }

    /// Sleeps until a kick is pending or the physical clock reads `end`; whether one is.
    fn wait_until(&self, end: Option<u64>) -> bool {
        loop {
            match self.shared.wait(end) {
                Wake::Event => return true,
                Wake::Timeout => return false,
                Wake::Interrupted => self.runner.signalled(),
            }
        }
    }

    /// Spins until a kick is pending or the timer is due, at most `timeout` ns; whether one of the two is.
    fn spin(&self, timeout: u64) -> bool {
        let end = clock_ns().saturating_add(timeout);
        loop {
            for _ in 0..SPINS {
                if self.shared.kicked() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let now = clock_ns();
            let deadline = self.deadline.load(Ordering::SeqCst);
            if deadline != 0 && now >= deadline {
                return true;
            }
            if now >= end {
                return false;
            }
        }
    }
}

impl Drop for PyCpu {
    fn drop(&mut self) {
        self.runner.release();
    }
}

#[pymethods]
impl PyCpu {
    #[new]
    fn new(machine: &PyMachine, index: u32) -> PyResult<PyCpu> {
        // Here nobody forks: the thread has the interpreter's lock.
        softcpu::x86::decode::prepare();
        let machine = own(&machine.inner)?.clone();
        let mut cpu = Cpu::new(machine.clone(), index);
        let registers = (&raw mut cpu.rb).cast::<u8>();
        let shared = cpu.engine.shared().clone();
        let runner = Runner::new(Some(&shared));
        Ok(PyCpu {
            inner: UnsafeCell::new(cpu),
            registers,
            busy: AtomicBool::new(false),
            shared,
            machine,
            runner,
            deadline: AtomicU64::new(0),
            held: Mutex::default(),
            holding: AtomicBool::new(false),
            watched: OnceLock::new(),
        })
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
        own(&self.machine)?;
        let result = py.detach(|| {
            self.send_held();
            self.exclusive(|cpu| cpu.vmrun_gprs(vmcb))
        })?;
        result.map_err(|_| {
            PyValueError::new_err(format!(
                "vmcb {vmcb:#x}: expected a 4096-byte aligned page of registered memory"
            ))
        })
    }

    #[pyo3(signature = (function, mask = None, /))]
    fn run(&self, function: &Bound<'_, PyAny>, mask: Option<u64>) -> PyResult<()> {
        let run = |interrupted: bool| {
            let told =
                if interrupted { RUN_INTERRUPTED } else { 0 } | if self.watches() { RUN_WATCHED } else { 0 };
            let result = function.call1((told,));
            self.send_held();
            result
        };
        request::run(self.runner, mask, run, function.py()).map(drop)
    }

    fn watch(&self, words: PyBuffer<u64>) -> PyResult<()> {
        if !words.is_c_contiguous() {
            return Err(PyValueError::new_err("expected words in a row"));
        }
        self.watched.set(words).map_err(|_| PyValueError::new_err("there are watched words already"))
    }

    #[pyo3(signature = (function, *args, **named))]
    fn request<'py>(
        &self,
        function: &Bound<'py, PyAny>,
        args: &Bound<'py, PyTuple>,
        named: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        request::within(self.runner, || function.call(args, named), function.py())
    }

    #[getter]
    fn held(&self) -> bool {
        self.runner.held()
    }

    fn interrupt(&self) {
        self.runner.interrupt();
    }

    #[getter]
    fn interrupted(&self) -> bool {
        self.runner.interrupted()
    }

    fn take_interrupt(&self) -> bool {
        self.runner.take_interrupt()
    }

    #[getter]
    fn interrupt_function(&self) -> (usize, usize) {
        (signals::interrupt as *const () as usize, &raw const *self.runner as usize)
    }

    fn kick(&self) {
        self.shared.kick();
    }

    fn clear_kick(&self) -> bool {
        self.shared.clear_kick()
    }

    fn kick_at_entry(&self, other: &PyCpu) {
        self.held.lock().unwrap_or_else(|e| e.into_inner()).push(other.shared.clone());
        self.holding.store(true, Ordering::SeqCst);
    }

    #[pyo3(signature = (timeout_ns = -1))]
    fn wait(&self, py: Python<'_>, timeout_ns: i64) -> bool {
        py.detach(|| {
            self.send_held();
            self.sleep((timeout_ns >= 0).then(|| clock_ns().saturating_add(timeout_ns as u64)))
        })
    }

    fn poll(&self, py: Python<'_>, timeout_ns: u64) -> bool {
        py.detach(|| {
            self.send_held();
            self.spin(timeout_ns)
        })
    }

    fn set_timer(&self, deadline_ns: u64) {
        let previous = self.deadline.swap(deadline_ns, Ordering::SeqCst);
        timer::arm(&self.shared, previous, deadline_ns);
    }

    fn flush_tlb(&self) -> PyResult<()> {
        self.exclusive(|cpu| cpu.engine.flush_tlb())
    }

    #[getter]
    fn instructions(&self) -> u64 {
        // SAFETY: the processor lives as long as the object; only the counter is read, for which it may be running.
        unsafe {
            let cpu: *const Cpu = &raw const **self.inner.get();
            Engine::instructions_of(&raw const (*cpu).engine)
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
        self.exclusive(|cpu| cpu.engine.statistics().into())
    }
}
