// SPDX-License-Identifier: Apache-2.0
//! Takes the counters of eventfds as they come, without the interpreter's lock: the sooner, the less others see of them.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard};

use libc::c_int;
use pyo3::prelude::*;

use crate::client::files::{close_own_descriptor, own_descriptor};

/// How many come at once.
const BATCH: usize = 64;

/// The eventfds that a thread waits for, and what it has taken from them.
#[pyclass(frozen, name = "EventPoller", module = "softkvm._softcpu")]
pub struct PyEventPoller {
    epoll: AtomicI32,
    wake: c_int,
    /// What was taken from each, and nobody has asked for yet.
    taken: Mutex<HashMap<c_int, u64>>,
}

fn check(result: c_int) -> PyResult<c_int> {
    if result < 0 { Err(io::Error::last_os_error().into()) } else { Ok(result) }
}

/// Takes an eventfd's counter, 0 if it is that: somebody else may have been quicker. It doesn't wait.
fn take(fd: c_int) -> u64 {
    let mut count = 0u64;
    let vector = libc::iovec { iov_base: (&raw mut count).cast(), iov_len: 8 };
    // SAFETY: reads 8 bytes into `count`.
    if unsafe { libc::preadv2(fd, &vector, 1, -1, libc::RWF_NOWAIT) } == 8 {
        return count;
    }
    if io::Error::last_os_error().raw_os_error() != Some(libc::EOPNOTSUPP) {
        return 0;
    }
    // Kernels before 5.8.
    let mut readable = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: as above; one entry.
    unsafe {
        if libc::poll(&mut readable, 1, 0) != 1 || libc::read(fd, (&raw mut count).cast(), 8) != 8 {
            return 0;
        }
    }
    count
}

impl PyEventPoller {
    fn lock(&self) -> MutexGuard<'_, HashMap<c_int, u64>> {
        self.taken.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn control(&self, operation: c_int, fd: c_int) -> PyResult<()> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: fd as u64 };
        // SAFETY: a valid event.
        check(unsafe { libc::epoll_ctl(self.epoll.load(Ordering::SeqCst), operation, fd, &mut event) })?;
        Ok(())
    }

    fn poll(&self) -> io::Result<Vec<c_int>> {
        let mut events = [const { libc::epoll_event { events: 0, u64: 0 } }; BATCH];
        let epoll = self.epoll.load(Ordering::SeqCst);
        // SAFETY: room for as many events as are told.
        let count = unsafe { libc::epoll_wait(epoll, events.as_mut_ptr(), BATCH as c_int, -1) };
        if count < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(Vec::new()) } else { Err(error) };
        }
        let mut taken = self.lock();
        let ready = events[..count as usize].iter().map(|event| event.u64 as c_int);
        Ok(ready
            .filter(|fd| {
                // One that was removed since is others' to read, or another file by now.
                let sum = taken.get_mut(fd);
                sum.map(|sum| *sum = sum.saturating_add(take(*fd))).is_some()
            })
            .collect())
    }
}

#[pymethods]
impl PyEventPoller {
    #[new]
    fn new(wake: c_int) -> PyResult<PyEventPoller> {
        // SAFETY: makes a descriptor.
        let epoll = own_descriptor(check(unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) })?)?;
        let poller = PyEventPoller { epoll: AtomicI32::new(epoll), wake, taken: Mutex::default() };
        poller.control(libc::EPOLL_CTL_ADD, wake)?;
        Ok(poller)
    }

    fn add(&self, fd: c_int) -> PyResult<()> {
        let mut taken = self.lock();
        self.control(libc::EPOLL_CTL_ADD, fd)?;
        taken.insert(fd, 0);
        Ok(())
    }

    fn remove(&self, fd: c_int) -> PyResult<u64> {
        let mut taken = self.lock();
        let left = taken.remove(&fd).unwrap_or(0);
        self.control(libc::EPOLL_CTL_DEL, fd)?;
        Ok(left)
    }

    fn take(&self, fd: c_int) -> u64 {
        self.lock().get_mut(&fd).map_or(0, core::mem::take)
    }

    fn wait(&self, py: Python<'_>) -> PyResult<Vec<c_int>> {
        Ok(py.detach(|| self.poll())?)
    }

    #[getter]
    fn wake(&self) -> c_int {
        self.wake
    }

    fn close(&self) -> PyResult<()> {
        let epoll = self.epoll.swap(-1, Ordering::SeqCst);
        if epoll >= 0 { close_own_descriptor(epoll) } else { Ok(()) }
    }
}

impl Drop for PyEventPoller {
    fn drop(&mut self) {
        let _ = self.close();
    }
}
