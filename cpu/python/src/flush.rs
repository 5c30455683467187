// SPDX-License-Identifier: Apache-2.0
//! Flushes of several processors' TLBs.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use softcpu::mem::Shared;
use softcpu::mem::flush::{Flushes, MAX_RANGES, Pages, ask};

use crate::processor::PyCpu;

/// How often the processors are looked at before the interpreter's lock is given away, which others may hold for long
/// then: each time it is some microseconds.
const LOOKS: u32 = 8;

/// A range of whole pages: the first one's number, and how many.
type Range = (u64, u64);

fn flush(py: Python<'_>, cpus: &[Bound<'_, PyCpu>], what: &Flushes) -> PyResult<usize> {
    let processors: Vec<Arc<Shared>> = cpus.iter().map(|cpu| cpu.get().shared()).collect::<PyResult<_>>()?;
    let mut asked = ask(&processors, what);
    let waited = asked.waited();
    if waited != 0 && !(0..LOOKS).any(|_| asked.done()) {
        py.detach(|| asked.wait());
    }
    Ok(waited)
}

fn pages(ranges: &[Range]) -> PyResult<Vec<Pages>> {
    if ranges.len() > MAX_RANGES {
        return Err(PyValueError::new_err(format!("{} ranges, expected at most {MAX_RANGES}", ranges.len())));
    }
    let range = |&(first, count): &Range| {
        first.checked_add(count).map(|end| first..end).ok_or_else(|| {
            PyValueError::new_err(format!("the range of {count:#x} pages from {first:#x} on has no end"))
        })
    };
    ranges.iter().map(range).collect()
}

/// Has processors forget what is known of guest-physical pages (None: everything); how many were waited for.
#[pyfunction]
#[pyo3(signature = (cpus, ranges, /))]
pub fn flush_physical(
    py: Python<'_>,
    cpus: Vec<Bound<'_, PyCpu>>,
    ranges: Option<Vec<Range>>,
) -> PyResult<usize> {
    let what = match ranges {
        Some(ranges) => Flushes::physical(&pages(&ranges)?),
        None => Flushes::everything(),
    };
    flush(py, &cpus, &what)
}

/// Has processors forget a guest's linear pages (None: all of them); how many were waited for.
#[pyfunction]
#[pyo3(signature = (cpus, asid, ranges, /))]
pub fn flush_linear(
    py: Python<'_>,
    cpus: Vec<Bound<'_, PyCpu>>,
    asid: u32,
    ranges: Option<Vec<Range>>,
) -> PyResult<usize> {
    let pages = ranges.map(|ranges| pages(&ranges)).transpose()?;
    flush(py, &cpus, &Flushes::linear(asid, pages.as_deref()))
}
