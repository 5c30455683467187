// SPDX-License-Identifier: Apache-2.0
//! Python binding of softcpu: `softkvm._softcpu`. Types and documentation are in `_softcpu.pyi`.

mod call;
mod client;
mod cputime;
mod decode;
mod events;
mod flush;
mod machine;
mod processor;
mod request;
mod run;
mod signals;
mod timer;

use core::mem::offset_of;
use std::collections::BTreeMap;

use pyo3::prelude::*;
use softcpu::x86::state::RegisterBlock;

/// The physical clock in nanoseconds (CLOCK_MONOTONIC).
#[pyfunction]
fn clock_ns() -> u64 {
    softcpu::clock::clock_ns()
}

/// The physical time-stamp counter: one tick per nanosecond of `clock_ns`, unless it is the host's.
#[pyfunction]
fn rdtsc() -> u64 {
    softcpu::clock::tsc()
}

/// Its frequency.
#[pyfunction]
fn tsc_khz() -> u64 {
    softcpu::clock::tsc_khz()
}

/// `rdtsc` and `clock_ns` at one moment.
#[pyfunction]
fn clocks() -> (u64, u64) {
    let now = softcpu::clock::moment();
    (now.tsc, now.ns)
}

/// Makes the host's time-stamp counter the processor's, before there is a machine; its frequency in kHz.
#[pyfunction]
fn use_host_tsc(py: Python<'_>) -> u64 {
    py.detach(softcpu::clock::use_host_tsc)
}

/// Lets another thread have the host's processor; the interpreter's lock is released (os.sched_yield holds it up to
/// Python 3.12). How long the others took, in nanoseconds.
#[pyfunction]
fn sched_yield(py: Python<'_>) -> u64 {
    py.detach(|| {
        let before = softcpu::clock::clock_ns();
        std::thread::yield_now();
        softcpu::clock::clock_ns() - before
    })
}

/// Python has a handler for `signal`, which runs on its main thread.
#[pyfunction]
fn watch_signal(signal: i32, main_thread: usize) {
    signals::watch_python_signal(signal, main_thread);
}

/// (eax, ebx, ecx, edx) of the silicon's own CPUID leaf.
#[pyfunction]
fn cpuid(leaf: u32, subleaf: u32) -> (u32, u32, u32, u32) {
    let [a, b, c, d] = softcpu::x86::system::cpuid::cpuid(leaf, subleaf);
    (a, b, c, d)
}

/// The name of an EXITCODE.
#[pyfunction]
fn exit_name(code: u64) -> &'static str {
    softcpu::x86::system::exitcode::name(code)
}

/// Where a register's field of the register block begins, in bytes.
fn register_offsets() -> BTreeMap<&'static str, usize> {
    macro_rules! offsets {
        ($($field:ident)*) => { BTreeMap::from([$((stringify!($field), offset_of!(RegisterBlock, $field))),*]) };
    }
    offsets!(gpr dr xcr0 pkru mxcsr tsc_aux fcw fsw ftw fop fip fdp fcs fds umwait_control st ymm
        pmc_enable pmc_status pmc_select pmc_count)
}

/// In a child that has been forked there is one thread, and no other's work goes on.
extern "C" fn after_fork() {
    softcpu::mem::forked();
    signals::after_fork();
    timer::after_fork();
    cputime::after_fork();
}

#[pymodule]
fn _softcpu(m: &Bound<'_, PyModule>) -> PyResult<()> {
    // SAFETY: the handler does what is allowed in a forked child: stores to atomics.
    unsafe { libc::pthread_atfork(None, None, Some(after_fork)) };
    m.add_class::<machine::PyMachine>()?;
    m.add_class::<machine::Page>()?;
    m.add_class::<processor::PyCpu>()?;
    m.add_class::<run::PyRun>()?;
    m.add_class::<cputime::PyThreadTimer>()?;
    m.add_class::<events::PyEventPoller>()?;
    m.add_class::<decode::PyInstruction>()?;
    m.add("REGISTER_OFFSETS", register_offsets())?;
    m.add("RUN_INTERRUPTED", processor::RUN_INTERRUPTED)?;
    m.add("RUN_WATCHED", processor::RUN_WATCHED)?;
    m.add("FLUSH_MAX_RANGES", softcpu::mem::flush::MAX_RANGES)?;
    m.add_function(wrap_pyfunction!(flush::flush_physical, m)?)?;
    m.add_function(wrap_pyfunction!(flush::flush_linear, m)?)?;
    m.add("RUN_MOVED", processor::RUN_MOVED)?;
    m.add_function(wrap_pyfunction!(clock_ns, m)?)?;
    softcpu::clock::begin_measurement();
    m.add_function(wrap_pyfunction!(rdtsc, m)?)?;
    m.add_function(wrap_pyfunction!(tsc_khz, m)?)?;
    m.add_function(wrap_pyfunction!(clocks, m)?)?;
    m.add_function(wrap_pyfunction!(use_host_tsc, m)?)?;
    m.add_function(wrap_pyfunction!(sched_yield, m)?)?;
    m.add_function(wrap_pyfunction!(watch_signal, m)?)?;
    m.add_function(wrap_pyfunction!(cputime::cputime_adjust, m)?)?;
    m.add_function(wrap_pyfunction!(request::uninterrupted, m)?)?;
    m.add_function(wrap_pyfunction!(request::unseen, m)?)?;
    m.add_function(wrap_pyfunction!(request::sanitized, m)?)?;
    m.add_function(wrap_pyfunction!(cpuid, m)?)?;
    m.add_function(wrap_pyfunction!(exit_name, m)?)?;
    client::add_to(m)?;
    m.add_function(wrap_pyfunction!(decode::decode, m)?)?;
    Ok(())
}
