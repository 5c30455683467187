// SPDX-License-Identifier: Apache-2.0
//! Descriptors that the client has of the KVM's files, and how long those live.
//!
//! Such a descriptor is one of a memfd: `mmap()`, `dup()`, `poll()`, passing it over a socket and the like need no help.
//! It is known by its inode. The client's open file description holds a lock of its own kind (`F_OFD_SETLK`) as long as
//! it is there, which is as long as any descriptor, message under way or mapping refers to it, in any process. So a
//! second description of the file, ours, tells whether the client still has it open.

use std::ffi::c_int;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use softcpu::mem::lost::actions::use_sigaction;
use softkvm_client::{Client, MARK_CLIENTS, MARK_OURS};

use super::{result_of, threads};
use crate::call::call;
use crate::{request, signals};

/// A file that the client has open.
pub struct File {
    identity: (u64, u64),
    /// What it is to the client: `KIND_*`.
    pub kind: c_int,
    /// Our description of it.
    ours: OwnedFd,
    pub ioctl: Py<PyAny>,
    pub run: Option<Py<PyAny>>,
    pub refresh: Option<Py<PyAny>>,
    pub mapped: Option<Py<PyAny>>,
    release: Py<PyAny>,
}

impl Drop for File {
    fn drop(&mut self) {
        // The number may be the client's next.
        mark(self.ours.as_raw_fd(), 0);
    }
}

/// Where our descriptors begin, if the process may have so many: out of the way of what a client closes by the range.
const HIGH: c_int = 700;

/// How many descriptors are remembered.
const REMEMBERED: usize = 256;

pub struct Files {
    all: Vec<Arc<File>>,
    /// Whose files the descriptors below [`REMEMBERED`] were when they were last asked for: fstat() costs a tenth of a
    /// request. Forgotten whenever one of the KVM's is closed or made.
    by_descriptor: [Option<Arc<File>>; REMEMBERED],
    /// How often they have been forgotten.
    forgotten: u64,
    /// Files that the client has no more, until no request has one: their last reference goes with the interpreter's lock.
    /// Without it PyO3 takes a lock of its own, which a child that is forked just then would find held for ever.
    retired: Vec<Arc<File>>,
}

static FILES: RwLock<Files> = RwLock::new(Files {
    all: Vec::new(),
    by_descriptor: [const { None }; REMEMBERED],
    forgotten: 0,
    retired: Vec::new(),
});

fn read_files() -> RwLockReadGuard<'static, Files> {
    FILES.read().unwrap_or_else(|e| e.into_inner())
}

/// The files, to be changed.
fn write_files() -> RwLockWriteGuard<'static, Files> {
    FILES.write().unwrap_or_else(|e| e.into_inner())
}

/// The locks of this file, held.
pub type Held = (MutexGuard<'static, ()>, RwLockWriteGuard<'static, Files>);

/// Takes the locks, for a child that is about to be forked to find them as they should be. None of the threads that have
/// one waits for the interpreter's.
pub fn hold() -> Held {
    (COLLECTING.lock().unwrap_or_else(|e| e.into_inner()), write_files())
}

impl Files {
    fn forget(&mut self) {
        self.by_descriptor.fill(None);
        self.forgotten += 1;
    }
}
/// Whether the client's side tells at once when a descriptor is closed: only then is what it was worth remembering.
static TOLD: AtomicBool = AtomicBool::new(false);
static MARK: AtomicUsize = AtomicUsize::new(0);
static POSTPONED: AtomicBool = AtomicBool::new(false);
static COLLECTING: Mutex<()> = Mutex::new(());

static CPUID_SITES: AtomicUsize = AtomicUsize::new(0);

pub extern "C-unwind" fn start(client: &Client) {
    use_sigaction(client.sigaction);
    signals::leave_handlers(client.handlers);
    MARK.store(client.mark as usize, Ordering::SeqCst);
    TOLD.store(client.tells_closing, Ordering::SeqCst);
    CPUID_SITES.store(client.cpuid_sites, Ordering::SeqCst);
}

/// In how many places of the client CPUID is answered.
#[pyfunction]
pub fn client_cpuid_sites() -> usize {
    CPUID_SITES.load(Ordering::SeqCst)
}

fn identity(fd: c_int) -> Option<(u64, u64)> {
    // SAFETY: fills the structure in.
    unsafe {
        let mut stat: libc::stat = zeroed();
        (libc::fstat(fd, &mut stat) == 0).then_some((stat.st_dev, stat.st_ino))
    }
}

/// The file of a descriptor.
pub fn find(fd: c_int) -> Option<Arc<File>> {
    let index = usize::try_from(fd).ok()?;
    let forgotten = {
        let files = read_files();
        if let Some(Some(file)) = files.by_descriptor.get(index) {
            return Some(file.clone());
        }
        files.forgotten
    };
    let identity = identity(fd)?;
    let file = read_files().all.iter().find(|file| file.identity == identity).cloned()?;
    if index < REMEMBERED && TOLD.load(Ordering::Relaxed) {
        let mut files = write_files();
        if files.forgotten == forgotten {
            files.by_descriptor[index] = Some(file.clone());
        }
    }
    Some(file)
}

fn lock(operation: c_int, fd: c_int, kind: c_int) -> Option<libc::flock> {
    // SAFETY: a request of the whole file, which is filled in.
    unsafe {
        let mut lock: libc::flock = zeroed();
        lock.l_type = kind as libc::c_short;
        (libc::fcntl(fd, operation, &mut lock) == 0).then_some(lock)
    }
}

/// Whether the client's description is still there.
fn is_open(file: &File) -> bool {
    lock(libc::F_OFD_GETLK, file.ours.as_raw_fd(), libc::F_WRLCK)
        .is_some_and(|lock| lock.l_type != libc::F_UNLCK as libc::c_short)
}

fn os_error() -> PyErr {
    let error = std::io::Error::last_os_error();
    PyOSError::new_err((error.raw_os_error(), error.to_string()))
}

/// Does what [`collect`] has put off.
pub fn collect_postponed() {
    if POSTPONED.load(Ordering::Relaxed) && POSTPONED.swap(false, Ordering::SeqCst) {
        collect();
    }
}

fn mark(fd: c_int, kind: u8) {
    let mark = MARK.load(Ordering::SeqCst);
    if mark != 0 {
        // SAFETY: what `start` got.
        unsafe { core::mem::transmute::<usize, extern "C-unwind" fn(c_int, u8)>(mark)(fd, kind) };
    }
}

/// Makes another descriptor, which is ours.
fn high_copy(fd: c_int) -> PyResult<c_int> {
    let copy = [HIGH, 3].into_iter().map(|from| {
        // SAFETY: asks for a descriptor.
        unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, from) }
    });
    let copy = copy.into_iter().find(|copy| *copy >= 0).ok_or_else(os_error)?;
    mark(copy, MARK_OURS);
    Ok(copy)
}

/// Moves a descriptor of the KVM's out of the way of a client, whose descriptors have the lowest numbers; returns the new
/// one. A client does not close it, whatever range it names.
#[pyfunction]
pub fn own_descriptor(fd: c_int) -> PyResult<c_int> {
    // SAFETY: the caller's, who has no use for it afterwards.
    let given = unsafe { OwnedFd::from_raw_fd(fd) };
    high_copy(given.as_raw_fd())
}

/// Closes a descriptor of the KVM's, at any time: it may be the interpreter that does, when it ends.
#[pyfunction]
pub fn close_own_descriptor(fd: c_int) -> PyResult<()> {
    mark(fd, 0);
    // SAFETY: closes it.
    if unsafe { libc::close(fd) } == 0 { Ok(()) } else { Err(os_error()) }
}

/// Makes the client's descriptor of a memfd, by way of `/proc`'s directory `proc`; requests on it are `ioctl(request, argument)` and, if it has one, `run()`
/// of `object`, which is told by `release()` that nobody has it open any more.
#[pyfunction]
pub fn client_file(object: &Bound<'_, PyAny>, fd: c_int, flags: c_int, proc: c_int) -> PyResult<c_int> {
    let optional = |name: &str| object.getattr_opt(name).map(|found| found.map(Bound::unbind));
    let path = std::ffi::CString::new(format!("self/fd/{fd}"))?;
    // SAFETY: system calls; the descriptors are ours until they are handed over.
    let (ours, theirs) = unsafe {
        let ours = OwnedFd::from_raw_fd(high_copy(fd)?);
        let theirs = libc::openat(proc, path.as_ptr(), flags);
        if theirs < 0 {
            return Err(os_error());
        }
        (ours, theirs)
    };
    let identity = identity(theirs).ok_or_else(os_error)?;
    let access = if flags & libc::O_ACCMODE == libc::O_RDONLY { libc::F_RDLCK } else { libc::F_WRLCK };
    if lock(libc::F_OFD_SETLK, theirs, access).is_none() {
        return Err(os_error());
    }
    let attribute = |name: &str| object.getattr(name).map(Bound::unbind);
    let file = File {
        identity,
        kind: object.getattr("nature")?.extract()?,
        ours,
        ioctl: attribute("ioctl")?,
        run: optional("run")?,
        refresh: optional("refresh")?,
        mapped: optional("mapped")?,
        release: attribute("release")?,
    };
    let mut files = write_files();
    files.all.push(Arc::new(file));
    files.forget();
    drop(files);
    mark(theirs, MARK_CLIENTS);
    Ok(theirs)
}

/// Gives back the files that the client has no more; behind the request that this thread is in, if it is in one: then it
/// is Python that has closed something, and who knows what it holds.
pub extern "C-unwind" fn collect() {
    if request::own().held() {
        write_files().forget();
        POSTPONED.store(true, Ordering::SeqCst);
        return;
    }
    threads::uninterrupted(|| {
        write_files().forget();
        let gone = take_gone();
        let has_retired = !read_files().retired.is_empty();
        if has_retired {
            threads::request(|py| {
                for file in gone {
                    result_of(py, call(file.release.bind(py), &PyTuple::empty(py), None));
                }
                drop(take_unused());
            });
        }
    });
}

/// Takes the files that the client has no more.
fn take_gone() -> Vec<Arc<File>> {
    let _one = COLLECTING.lock().unwrap_or_else(|e| e.into_inner());
    let files = read_files().all.clone();
    let gone: Vec<_> = files.into_iter().filter(|file| !is_open(file)).collect();
    if !gone.is_empty() {
        let mut files = write_files();
        files.all.retain(|file| !gone.iter().any(|g| Arc::ptr_eq(file, g)));
        files.forget(); // another thread may just have found one of them
        files.retired.extend_from_slice(&gone);
    }
    gone
}

/// Takes the retired files that no request has; none finds one any more.
fn take_unused() -> Vec<Arc<File>> {
    let mut files = write_files();
    let (unused, used) =
        std::mem::take(&mut files.retired).into_iter().partition(|file| Arc::strong_count(file) == 1);
    files.retired = used;
    unused
}
