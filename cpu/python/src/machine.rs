// SPDX-License-Identifier: Apache-2.0
//! `Machine` and `Page`.

use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pyo3::exceptions::{PyBufferError, PyMemoryError, PyOSError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use softcpu::mem::remote::AccessError;
use softcpu::mem::{Machine, PAGE_SIZE, RegionError};

/// The physical machine: memory regions and processors.
#[pyclass(frozen, name = "Machine", module = "softkvm._softcpu")]
pub struct PyMachine {
    pub inner: Arc<Machine>,
}

/// [`Machine::has_region`] for C.
///
/// # Safety
/// `machine` is what `Machine.has_region_function` gave for a machine that is still there.
unsafe extern "C" fn has_region(machine: *const c_void, hva: usize, size: usize) -> c_int {
    // SAFETY: given.
    c_int::from(unsafe { &*machine.cast::<Machine>() }.has_region(hva, size))
}

fn region_error(e: RegionError, hva: usize, size: usize) -> PyErr {
    let what = match e {
        RegionError::Unaligned => "must be page aligned, not empty and below 2**52",
        RegionError::Overlap => "overlaps a registered region",
        RegionError::Missing => "is not the start of a registered region",
        RegionError::NoMemory => {
            return PyMemoryError::new_err(format!(
                "region {hva:#x}+{size:#x}: the host has no memory for it"
            ));
        }
    };
    PyValueError::new_err(format!("region {hva:#x}+{size:#x} {what}"))
}

/// The machine, if this process has made it; EIO in a child of the one that has.
pub fn own(machine: &Arc<Machine>) -> PyResult<&Arc<Machine>> {
    if machine.inherited() {
        let what = "Input/output error: it belongs to the process that this one was forked from";
        return Err(PyOSError::new_err((libc::EIO, what)));
    }
    Ok(machine)
}

fn access_error(e: AccessError, address: usize, size: usize) -> PyErr {
    match e {
        AccessError::Unregistered => PyValueError::new_err(format!(
            "{address:#x}+{size:#x} is not inside a registered region, or not aligned"
        )),
        AccessError::Lost(lost) => {
            let message = format!("registered memory at {:#x} is not there, or not for that", lost.address);
            PyOSError::new_err((libc::EFAULT, message))
        }
    }
}

impl PyMachine {
    fn words<R>(&self, address: usize, count: usize, f: impl FnOnce(&[AtomicU64]) -> R) -> PyResult<R> {
        // SAFETY: the functions below do arithmetic on the words, into memory that is there already.
        let done = unsafe { own(&self.inner)?.words(address, count, f) };
        done.map_err(|e| access_error(e, address, count.saturating_mul(8)))
    }

    fn word<R>(&self, address: usize, f: impl FnOnce(&AtomicU64) -> R) -> PyResult<R> {
        self.words(address, 1, |words| f(&words[0]))
    }
}

#[pymethods]
impl PyMachine {
    #[new]
    fn new() -> PyMachine {
        PyMachine { inner: Machine::new() }
    }

    fn add_region(&self, hva: usize, size: usize) -> PyResult<()> {
        // SAFETY: the caller (KVM's memslots) keeps the memory mapped, as the method's documentation demands.
        unsafe { own(&self.inner)?.add_region(hva, size) }.map_err(|e| region_error(e, hva, size))
    }

    fn remove_region(&self, py: Python<'_>, hva: usize) -> PyResult<()> {
        let machine = own(&self.inner)?;
        py.detach(|| machine.remove_region(hva)).map_err(|e| region_error(e, hva, 0))
    }

    fn has_region(&self, hva: usize, size: usize) -> bool {
        self.inner.has_region(hva, size)
    }

    #[getter]
    fn has_region_function(&self) -> (usize, usize) {
        (has_region as *const () as usize, Arc::as_ptr(&self.inner) as usize)
    }

    fn fill_holes(&self, hva: usize) -> PyResult<()> {
        own(&self.inner)?.fill_holes(hva);
        Ok(())
    }

    #[pyo3(signature = (count = 1))]
    fn alloc_page(&self, count: usize) -> PyResult<Page> {
        Page::new(own(&self.inner)?.clone(), count)
    }

    fn discard(&self, py: Python<'_>, hva: usize, size: usize, shared: bool) -> PyResult<()> {
        let machine = own(&self.inner)?;
        py.detach(|| machine.discard(hva, size, shared))
            .map_err(|e| PyOSError::new_err((e.raw_os_error(), e.to_string())))
    }

    fn notify_write(&self, hva: usize, size: usize) -> PyResult<()> {
        own(&self.inner)?.notify_write(hva, size);
        Ok(())
    }

    fn pte_load(&self, address: usize) -> PyResult<u64> {
        self.word(address, |e| e.load(Ordering::SeqCst))
    }

    fn pte_store(&self, address: usize, value: u64) -> PyResult<()> {
        self.word(address, |e| e.store(value, Ordering::SeqCst))
    }

    fn pte_or(&self, address: usize, mask: u64) -> PyResult<u64> {
        self.word(address, |e| e.fetch_or(mask, Ordering::SeqCst))
    }

    fn pte_exchange(&self, address: usize, value: u64) -> PyResult<u64> {
        self.word(address, |e| e.swap(value, Ordering::SeqCst))
    }

    fn pte_compare_exchange(&self, address: usize, expected: u64, value: u64) -> PyResult<u64> {
        self.word(address, |e| {
            match e.compare_exchange(expected, value, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(v) | Err(v) => v,
            }
        })
    }

    fn pte_fill(&self, address: usize, count: usize, first: u64, step: u64) -> PyResult<usize> {
        self.words(address, count, |entries| {
            let mut value = first;
            let mut filled = 0;
            for entry in entries {
                if entry.load(Ordering::Relaxed) & PRESENT == 0 {
                    entry.store(value, Ordering::SeqCst);
                    filled += 1;
                }
                value += step;
            }
            filled
        })
    }

    #[pyo3(signature = (address, count, mask, having = 0))]
    fn pte_clear_bits(&self, address: usize, count: usize, mask: u64, having: u64) -> PyResult<usize> {
        let is_meant = |e: &&AtomicU64| e.load(Ordering::Relaxed) & having == having;
        self.words(address, count, |entries| {
            entries.iter().filter(is_meant).filter(|e| take_bits(e, mask)).count()
        })
    }

    fn pte_test_and_clear<'py>(
        &self,
        py: Python<'py>,
        address: usize,
        count: usize,
        mask: u64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        PyBytes::new_with(py, count.div_ceil(8), |bitmap| {
            self.words(address, count, |entries| {
                for (i, _) in entries.iter().enumerate().filter(|(_, e)| take_bits(e, mask)) {
                    bitmap[i / 8] |= 1 << (i % 8);
                }
            })
        })
    }

    fn read<'py>(&self, py: Python<'py>, hva: usize, size: usize) -> PyResult<Bound<'py, PyBytes>> {
        let machine = own(&self.inner)?;
        PyBytes::new_with(py, size, |out| machine.read(hva, out).map_err(|e| access_error(e, hva, size)))
    }

    fn populate(&self, py: Python<'_>, hva: usize) -> PyResult<()> {
        let machine = own(&self.inner)?;
        py.detach(|| machine.populate(hva)).map_err(|e| access_error(e, hva, 1))
    }

    fn write(&self, hva: usize, data: &[u8]) -> PyResult<()> {
        own(&self.inner)?.write(hva, data).map_err(|e| access_error(e, hva, data.len()))
    }
}

/// Clears bits of an entry; whether any was set.
fn take_bits(entry: &AtomicU64, mask: u64) -> bool {
    entry.load(Ordering::Relaxed) & mask != 0 && entry.fetch_and(!mask, Ordering::SeqCst) & mask != 0
}

/// Zeroed pages of the machine's own.
#[pyclass(frozen, module = "softkvm._softcpu")]
pub struct Page {
    machine: Arc<Machine>,
    address: usize,
    count: usize,
    /// How many buffers of it there are; [`FREED`] once it has been given back. Both in one word: whoever takes a buffer
    /// and whoever gives the page back find out about each other.
    exports: AtomicUsize,
}

/// P of an entry of page tables.
const PRESENT: u64 = 1;
const FREED: usize = 1 << (usize::BITS - 1);

impl Page {
    fn new(machine: Arc<Machine>, count: usize) -> PyResult<Page> {
        if count == 0 {
            return Err(PyValueError::new_err(format!("count {count}: expected 1 or more pages")));
        }
        let address = machine
            .alloc_pages(count)
            .map_err(|_| PyMemoryError::new_err(format!("the host has no memory for {count} pages")))?;
        Ok(Page { machine, address, count, exports: AtomicUsize::new(0) })
    }

    /// Gives the pages back unless that has been done, or there are buffers; the state found.
    fn release(&self) -> usize {
        match self.exports.compare_exchange(0, FREED, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(state) => {
                self.machine.free_pages(self.address, self.count);
                state
            }
            Err(state) => state,
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // A buffer keeps its object alive: there is none.
        self.release();
    }
}

#[pymethods]
impl Page {
    #[getter]
    fn address(&self) -> usize {
        if self.exports.load(Ordering::SeqCst) == FREED { 0 } else { self.address }
    }

    #[getter]
    fn size(&self) -> usize {
        self.count * PAGE_SIZE
    }

    fn __len__(&self) -> usize {
        self.size()
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let taken =
            this.exports.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| (n != FREED).then_some(n + 1));
        if taken.is_err() {
            return Err(PyBufferError::new_err("the page was freed"));
        }
        // SAFETY: the view keeps the object alive, and its count the memory, until `__releasebuffer__`.
        let filled = unsafe { fill(view, slf.as_ptr(), this.address as *mut u8, this.size(), flags) };
        if filled.is_err() {
            this.exports.fetch_sub(1, Ordering::SeqCst);
        }
        filled
    }

    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.exports.fetch_sub(1, Ordering::SeqCst);
    }

    /// Gives the memory back; BufferError while memory views of it exist.
    fn free(&self, py: Python<'_>) -> PyResult<()> {
        match py.detach(|| self.release()) {
            0 | FREED => Ok(()),
            _ => Err(PyBufferError::new_err("the page has memory views; release them first")),
        }
    }
}

/// Fills in a writable byte buffer.
///
/// # Safety
/// `p..p+size` must stay valid as long as `owner` lives.
pub unsafe fn fill(
    view: *mut ffi::Py_buffer,
    owner: *mut ffi::PyObject,
    p: *mut u8,
    size: usize,
    flags: c_int,
) -> PyResult<()> {
    // SAFETY: given; PyBuffer_FillInfo takes its own reference to `owner`.
    let rc = unsafe { ffi::PyBuffer_FillInfo(view, owner, p.cast(), size as ffi::Py_ssize_t, 0, flags) };
    if rc == 0 {
        Ok(())
    } else {
        Err(PyErr::take(unsafe { Python::assume_attached() })
            .unwrap_or_else(|| PyBufferError::new_err("no buffer")))
    }
}
