// SPDX-License-Identifier: Apache-2.0
//! `Machine` and `Page`.

use std::ffi::c_int;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use pyo3::exceptions::{PyBufferError, PyMemoryError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use softcpu::mem::{Machine, RegionError};

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
    };
    PyValueError::new_err(format!("region {hva:#x}+{size:#x} {what}"))
}

impl PyMachine {
    /// The page-table entry at `address`.
    fn entry(&self, address: usize) -> PyResult<&AtomicU64> {
        self.entries(address, 1).map(|e| &e[0])
    }

    fn entries(&self, address: usize, count: usize) -> PyResult<&[AtomicU64]> {
        let bytes = count.saturating_mul(8);
        if address % 8 != 0 || !self.inner.regions().contains(address, bytes) {
            return Err(PyValueError::new_err(format!(
                "page-table entry {address:#x} (count {count}): expected an 8-byte aligned address of registered memory"
            )));
        }
        // SAFETY: registered memory is mapped; AtomicU64 has the layout of u64 and allows concurrent writers.
        Ok(unsafe { std::slice::from_raw_parts(address as *const AtomicU64, count) })
    }

    fn range(&self, hva: usize, size: usize) -> PyResult<()> {
        if self.inner.regions().contains(hva, size) {
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
        unsafe { self.inner.add_region(hva, size) }.map_err(|e| region_error(e, hva, size))
    }

    fn remove_region(&self, py: Python<'_>, hva: usize) -> PyResult<()> {
        py.detach(|| self.inner.remove_region(hva)).map_err(|e| region_error(e, hva, 0))
    }

    #[pyo3(signature = (count = 1))]
    fn alloc_page(&self, count: usize) -> PyResult<Page> {
        Page::new(self.inner.clone(), count)
    }

    fn notify_write(&self, hva: usize, size: usize) {
        self.inner.notify_write(hva, size);
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
        Ok(match e.compare_exchange(expected, value, Ordering::SeqCst, Ordering::SeqCst) {
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
            unsafe { std::ptr::copy_nonoverlapping(hva as *const u8, out.as_mut_ptr(), size) };
            Ok(())
        })
    }

    fn write(&self, hva: usize, data: &[u8]) -> PyResult<()> {
        self.range(hva, data.len())?;
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), hva as *mut u8, data.len()) };
        self.inner.notify_write(hva, data.len());
        Ok(())
    }
}

/// Zeroed pages of host memory that are registered with a machine.
#[pyclass(frozen, module = "softkvm._softcpu")]
pub struct Page {
    machine: Arc<Machine>,
    address: AtomicU64,
    size: usize,
    exports: AtomicUsize,
}

impl Page {
    fn new(machine: Arc<Machine>, count: usize) -> PyResult<Page> {
        let size = count
            .checked_mul(4096)
            .filter(|s| *s > 0 && *s < 1 << 40)
            .ok_or_else(|| PyValueError::new_err(format!("count {count}: expected 1 or more pages")))?;
        // SAFETY: a new private anonymous mapping.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(PyMemoryError::new_err(format!("cannot map {size} bytes")));
        }
        let hva = p as usize;
        // SAFETY: mapped until `free` has removed the region.
        if let Err(e) = unsafe { machine.add_region(hva, size) } {
            // SAFETY: just mapped, unused.
            unsafe { libc::munmap(p, size) };
            return Err(region_error(e, hva, size));
        }
        Ok(Page { machine, address: AtomicU64::new(hva as u64), size, exports: AtomicUsize::new(0) })
    }

    fn release(&self) {
        let hva = self.address.swap(0, Ordering::SeqCst) as usize;
        if hva != 0 && self.machine.remove_region(hva).is_ok() {
            // SAFETY: mapped by `new`, and no processor reaches it any more.
            unsafe { libc::munmap(hva as *mut libc::c_void, self.size) };
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.release();
    }
}

#[pymethods]
impl Page {
    #[getter]
    fn address(&self) -> u64 {
        self.address.load(Ordering::SeqCst)
    }

    #[getter]
    fn size(&self) -> usize {
        self.size
    }

    fn __len__(&self) -> usize {
        self.size
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let p = this.address.load(Ordering::SeqCst);
        if p == 0 {
            return Err(PyBufferError::new_err("the page was freed"));
        }
        // SAFETY: the view keeps the object alive, and the object keeps the memory mapped.
        unsafe { fill(view, slf.as_ptr(), p as *mut u8, this.size, flags) }?;
        this.exports.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.exports.fetch_sub(1, Ordering::SeqCst);
    }

    /// Gives the memory back; BufferError while memory views of it exist.
    fn free(&self, py: Python<'_>) -> PyResult<()> {
        if self.exports.load(Ordering::SeqCst) != 0 {
            return Err(PyBufferError::new_err("the page has memory views; release them first"));
        }
        py.detach(|| self.release());
        Ok(())
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
