// SPDX-License-Identifier: Apache-2.0
//! `Cpu`.

use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
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
use softcpu::x86::vmrun::BadVmcb;

use crate::call::call;
use crate::cputime::{Account, GUEST, HOST, OFF};
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
    /// Processors to kick at the next entry.
    held: Mutex<Vec<Arc<Shared>>>,
    account: Account,
    /// What there is to do around an entry.
    at_entry: AtomicU32,
    /// What a run looks at when it begins.
    watched: OnceLock<PyBuffer<u64>>,
}

/// What the function of a run is told.
pub const RUN_INTERRUPTED: u32 = 1;
pub const RUN_WATCHED: u32 = 2;
pub const RUN_MOVED: u32 = 4;

/// Bits of [`PyCpu::at_entry`]: processors are to be kicked; the processor's time is accounted.
const HOLDING: u32 = 1;
const ACCOUNTED: u32 = 2;

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

    /// The lock of those who are in a run, or another request.
    pub fn runner(&self) -> &'static Runner {
        self.runner
    }

    /// Begins a run; what its function is told.
    pub fn enter_run(&self) -> u32 {
        let mut told = if self.runner.interrupted() { RUN_INTERRUPTED } else { 0 };
        if self.watches() {
            told |= RUN_WATCHED;
        }
        if self.accounted() && self.account.enter_run() {
            told |= RUN_MOVED;
        }
        told
    }

    /// Ends what a run has begun.
    pub fn leave_run(&self) {
        self.send_held();
        if self.accounted() {
            self.account.leave_run();
        }
    }

    fn accounted(&self) -> bool {
        self.at_entry.load(Ordering::Relaxed) & ACCOUNTED != 0
    }

    /// Enters the guest where there is something to do around that; also whether the time is accounted.
    #[cold]
    fn enter_attended(&self, vmcb: usize) -> (PyResult<Result<u64, BadVmcb>>, bool) {
        self.send_held();
        let accounted = self.accounted();
        if accounted {
            self.account.switch(GUEST);
        }
        let result = self.exclusive(|cpu| cpu.vmrun_gprs(vmcb));
        if accounted {
            self.account.switch(OFF); // until it has the interpreter
        }
        (result, accounted)
    }

    /// Sends the kicks that were held back.
    fn send_held(&self) {
        if self.at_entry.load(Ordering::Relaxed) & HOLDING != 0 {
            self.at_entry.fetch_and(!HOLDING, Ordering::SeqCst);
            for shared in self.held.lock().unwrap_or_else(|e| e.into_inner()).drain(..) {
                shared.kick();
            }
        }
    }

    /// Blocks until a kick, at most until the physical clock reads `end`. The processor's timer is this thread's
    /// meanwhile: one wake-up, not the timer thread's and then this one's.
    fn sleep(&self, end: Option<u64>) -> bool {
        let deadline = self.deadline.load(Ordering::SeqCst);
        if deadline == 0 || self.shared.woken() {
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
                if self.shared.woken() {
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
            account: Account::default(),
            at_entry: AtomicU32::new(0),
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
        let (result, accounted) = py.detach(|| {
            if self.at_entry.load(Ordering::Relaxed) == 0 {
                return (self.exclusive(|cpu| cpu.vmrun_gprs(vmcb)), false);
            }
            self.enter_attended(vmcb)
        });
        if accounted {
            self.account.switch(HOST);
        }
        result?.map_err(|_| {
            PyValueError::new_err(format!(
                "vmcb {vmcb:#x}: expected a 4096-byte aligned page of registered memory"
            ))
        })
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
        request::within(self.runner, || call(function, args, named), function.py())
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
        self.shared.clear_doorbell();
        self.shared.clear_kick()
    }

    fn ring(&self) {
        self.shared.ring();
    }

    fn kick_at_entry(&self, other: &PyCpu) {
        self.held.lock().unwrap_or_else(|e| e.into_inner()).push(other.shared.clone());
        self.at_entry.fetch_or(HOLDING, Ordering::SeqCst);
    }

    #[pyo3(signature = (timeout_ns = -1))]
    fn wait(&self, py: Python<'_>, timeout_ns: i64) -> bool {
        let accounted = self.accounted() && self.runner.held();
        if accounted {
            self.account.switch(OFF);
        }
        let kicked = py.detach(|| {
            self.send_held();
            self.sleep((timeout_ns >= 0).then(|| clock_ns().saturating_add(timeout_ns as u64)))
        });
        if accounted {
            self.account.switch(HOST);
        }
        kicked
    }

    fn poll(&self, py: Python<'_>, timeout_ns: u64) -> bool {
        py.detach(|| {
            self.send_held();
            self.spin(timeout_ns)
        })
    }

    fn account(&self) -> PyResult<()> {
        if !self.runner.held() {
            return Err(PyRuntimeError::new_err("the thread does not run the processor"));
        }
        if !self.accounted() {
            self.account.begin();
            self.at_entry.fetch_or(ACCOUNTED, Ordering::SeqCst);
        }
        Ok(())
    }

    fn cpu_times(&self) -> (u64, u64) {
        self.account.times()
    }

    fn cpu_thread(&self) -> (i32, i64) {
        self.account.thread()
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

    #[getter]
    fn waitpkg(&self) -> PyResult<bool> {
        self.exclusive(|cpu| cpu.waitpkg)
    }

    #[setter]
    fn set_waitpkg(&self, on: bool) -> PyResult<()> {
        self.exclusive(|cpu| cpu.waitpkg = on)
    }

    #[getter]
    fn tsc_ratio(&self) -> PyResult<u64> {
        self.exclusive(|cpu| cpu.tsc_ratio)
    }

    #[setter]
    fn set_tsc_ratio(&self, ratio: u64) -> PyResult<()> {
        self.exclusive(|cpu| cpu.tsc_ratio = ratio)
    }

    /// Counters of the processor's insides.
    fn stats(&self) -> PyResult<BTreeMap<&'static str, u64>> {
        self.exclusive(|cpu| cpu.engine.statistics().into())
    }
}
