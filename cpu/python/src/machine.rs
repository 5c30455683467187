// SPDX-License-Identifier: Apache-2.0
//! `Machine` and `Page`.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pyo3::exceptions::{PyBufferError, PyMemoryError, PyOSError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use softcpu::mem::{Machine, PAGE_SIZE, RegionError, host_read, host_write};

/// The physical machine: memory regions and processors.
#[pyclass(frozen, name = "Machine", module = "softkvm._softcpu")]
pub struct PyMachine {
    pub inner: Arc<Machine>,
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

impl PyMachine {
    /// The page-table entry at `address`.
    fn entry(&self, address: usize) -> PyResult<&AtomicU64> {
        self.entries(address, 1).map(|e| &e[0])
    }

    fn entries(&self, address: usize, count: usize) -> PyResult<&[AtomicU64]> {
        let bytes = count.saturating_mul(8);
        if address % 8 != 0 || !own(&self.inner)?.regions().contains(address, bytes) {
            return Err(PyValueError::new_err(format!(
                "page-table entry {address:#x} (count {count}): expected an 8-byte aligned address of registered memory"
            )));
        }
        // SAFETY: registered memory is mapped; AtomicU64 has the layout of u64 and allows concurrent writers.
        Ok(unsafe { std::slice::from_raw_parts(address as *const AtomicU64, count) })
    }

    fn range(&self, hva: usize, size: usize) -> PyResult<()> {
        if own(&self.inner)?.regions().contains(hva, size) {
            Ok(())
        } else {
            Err(PyValueError::new_err(format!("{hva:#x}+{size:#x} is not inside a registered region")))
        }
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

    #[pyo3(signature = (count = 1))]
    fn alloc_page(&self, count: usize) -> PyResult<Page> {
        Page::new(own(&self.inner)?.clone(), count)
    }

    fn notify_write(&self, hva: usize, size: usize) -> PyResult<()> {
        own(&self.inner)?.notify_write(hva, size);
        Ok(())
    }

    fn pte_load(&self, address: usize) -> PyResult<u64> {
        Ok(self.entry(address)?.load(Ordering::SeqCst))
    }

    fn pte_store(&self, address: usize, value: u64) -> PyResult<()> {
        self.entry(address)?.store(value, Ordering::SeqCst);
        Ok(())
    }

    fn pte_exchange(&self, address: usize, value: u64) -> PyResult<u64> {
        Ok(self.entry(address)?.swap(value, Ordering::SeqCst))
    }

    fn pte_compare_exchange(&self, address: usize, expected: u64, value: u64) -> PyResult<u64> {
        let e = self.entry(address)?;
        let found = || e.compare_exchange(expected, value, Ordering::SeqCst, Ordering::SeqCst);
        Ok(match self.inner.with_host_access(found) {
            Ok(v) | Err(v) => v,
        })
    }

    fn pte_clear_bits(&self, address: usize, count: usize, mask: u64) -> PyResult<usize> {
        let entries = self.entries(address, count)?;
        Ok(entries
            .iter()
            .filter(|e| {
                e.load(Ordering::Relaxed) & mask != 0 && e.fetch_and(!mask, Ordering::SeqCst) & mask != 0
            })
            .count())
    }

    fn pte_test_and_clear<'py>(
        &self,
        py: Python<'py>,
        address: usize,
        count: usize,
        mask: u64,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let entries = self.entries(address, count)?;
        let mut bitmap = vec![0u8; count.div_ceil(8)];
        for (i, e) in entries.iter().enumerate() {
            if e.load(Ordering::Relaxed) & mask != 0 && e.fetch_and(!mask, Ordering::SeqCst) & mask != 0 {
                bitmap[i / 8] |= 1 << (i % 8);
            }
        }
        Ok(PyBytes::new(py, &bitmap))
    }

    fn read<'py>(&self, py: Python<'py>, hva: usize, size: usize) -> PyResult<Bound<'py, PyBytes>> {
        self.range(hva, size)?;
        PyBytes::new_with(py, size, |out| {
            // SAFETY: registered, so mapped; others may write at the same time, which copies some mix of bytes.
            unsafe { host_read(hva as *const u8, out) };
            Ok(())
        })
    }

    fn write(&self, hva: usize, data: &[u8]) -> PyResult<()> {
        self.range(hva, data.len())?;
        // SAFETY: as in `read`.
        self.inner.with_host_access(|| unsafe { host_write(data, hva as *mut u8) });
        self.inner.notify_write(hva, data.len());
        Ok(())
    }
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
